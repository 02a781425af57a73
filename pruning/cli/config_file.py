"""TOML files that hold flags."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pruning.cli.parsers import meant
from pruning.errors import PruningError
from pruning.utils.files import replace_file
from pruning.utils.wording import alternatives

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_recipe(path: Path, parser: argparse.ArgumentParser, given: Sequence[str] = ()) -> list[str]:
    """Read the flags that a TOML file holds: `max-params = 2000` is --max-params 2000.

    `true` and `false` stand for a flag and its --no- form, an array for a flag with several
    values.

    Args:
        path: the file.
        parser: a parser with the flags that the file may hold.
        given: words of the command line; the flags among them are left out, as they take precedence.

    Returns:
        Words for the parser.

    Raises:
        PruningError: the file cannot be read, a name is no flag of the parser (the message says which
            is similar), or a value is of another kind.
    """
    content = _content(path)
    known = [
        option[2:] for action in parser._actions for option in action.option_strings if option[:2] == "--"
    ]
    words = {word.partition("=")[0] for word in given}
    flags = []
    for name, value in content.items():
        if {f"--{name}", f"--no-{name}"} & words:
            continue
        if name in ("config", "recipe"):
            raise PruningError(
                f"{path}: a recipe cannot name another one ({name} = {value!r}); give it its flags"
            )
        if isinstance(value, dict):
            how = _without_table(name, value)
            raise PruningError(f"{path}: [{name}] is a table, a plain value was expected: {how}")
        if name not in known:
            raise PruningError(f"{path}: there is no setting {name!r}{_hint(name, value, known)}")
        if isinstance(value, bool):
            if f"no-{name}" not in known:
                raise PruningError(
                    f"{path}: {name} is a bool ({str(value).lower()}), a number or a text was expected"
                )
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list) and all(isinstance(each, str | int | float) for each in value):
            flags += [f"--{name}", *map(str, value)]
        elif isinstance(value, str | int | float):
            flags.append(f"--{name}={value}")
        else:
            raise PruningError(f"{path}: {name} is a {type(value).__name__}, a plain value was expected")
    return flags


def _hint(name: str, value: object, known: Sequence[str]) -> str:
    """What a name that is no setting may stand for: a similar setting, or an argument of the network."""
    if near := meant(name, known):
        return f"; did you mean {alternatives([repr(each) for each in near])}?"
    if "model-arg" in known and name.isidentifier():
        return f"; if the network takes it, write model-arg = {_toml([f'{name}={value}'])}"
    return ""


def _content(path: Path) -> dict[str, Any]:
    """What a TOML file holds."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PruningError(
            f"{path} cannot be read as a recipe: there is no such file; check the path"
        ) from error
    except OSError as error:
        raise PruningError(f"{path} cannot be read as a recipe: {error.strerror}; give a file") from error
    except ValueError as error:
        raise PruningError(f"{path} cannot be read as a recipe, because it is not TOML: {error}") from error


def _without_table(name: str, table: dict[str, Any]) -> str:
    """How to write what a table holds."""
    if name in ("model-arg", "data-arg"):
        return f"write {name} = {_toml([f'{key}={value}' for key, value in table.items()])}"
    return "write its keys at the top of the file; they are flags of one command, without their hyphens"


def write_recipe(path: Path, args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Write the TOML file from which `read_recipe` reads these flags again.

    Flags that belong to one call (--output, --resume, --config) are left out.
    """
    lines = ["# The flags of this run: give this file as --config to repeat it."]
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        long = next((o[2:] for o in action.option_strings if o.startswith("--")), "")
        if not long or value is None or value == [] or action.dest in ("help", "config", "output", "resume"):
            continue
        lines.append(f"{long} = {_toml(value)}")
    replace_file(path, ("\n".join(lines) + "\n").encode())


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(_toml(each) for each in value) + "]"
    if isinstance(value, int | float):
        return repr(value)
    return json.dumps(str(value), ensure_ascii=False)
