"""TOML files that hold flags."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pruning.errors import PruningError
from pruning.utils.files import replace_file

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_recipe(path: Path, parser: argparse.ArgumentParser, given: Sequence[str] = ()) -> list[str]:
    """The flags that a TOML file holds: `max-params = 2000` is --max-params 2000.

    `true` and `false` stand for a flag and its --no- form, an array for a flag with several
    values. Flags that are among the words `given` on the command line are left out.

    Raises `PruningError` for a file that cannot be read, a name that is no flag of the parser
    (it says which is near), or a value of another kind.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PruningError(f"{path} cannot be read as a recipe: {error}") from error
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
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise PruningError(
                f"{path}: there is no setting {name!r}{f'; did you mean {near[0]!r}?' if near else ''}"
            )
        if value is True or (value is False and f"no-{name}" in known):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list) and all(isinstance(each, str | int | float) for each in value):
            flags += [f"--{name}", *map(str, value)]
        elif isinstance(value, str | int | float) and not isinstance(value, bool):
            flags.append(f"--{name}={value}")
        elif value is not False:
            raise PruningError(f"{path}: {name} is a {type(value).__name__}, a plain value was expected")
    return flags


def write_recipe(path: Path, args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Write the TOML file from which `read_recipe` gives these flags again, but for `path` flags."""
    lines = ["# The flags of this run: give this file as --config to repeat it."]
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        long = next((o[2:] for o in action.option_strings if o.startswith("--")), "")
        if not long or value is None or value == [] or action.dest in ("help", "config", "output", "resume"):
            continue
        lines.append(f"{long} = {_toml(value)}")
    replace_file(path, ("\n".join(lines) + "\n").encode())


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(_toml(each) for each in value) + "]"
    if isinstance(value, int | float):
        return repr(value)
    return json.dumps(str(value), ensure_ascii=False)
