"""What command lines share: argument types, and how they end."""

from __future__ import annotations

import argparse
import difflib
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pruning import sources
from pruning.checkpoint import replace_file
from pruning.errors import PruningError, UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: This toolkit.
OWN = Path(__file__).resolve().parent
#: Where runs go that are told no folder.
RUNS = Path("runs")
#: Exit codes: bad usage or input, and Ctrl-C.
BAD_INPUT, INTERRUPTED = 2, 130


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with the default of every flag that has one, and the description as it was written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Several(argparse.Action):
    """Values that stand in place of the default, and add up where the flag is given again."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: Any = None) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, list(values) if before is self.default else [*before, *values])


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


def run(main: Callable[[], None], interrupted: str = "interrupted") -> None:
    """Call `main`; end with one line and an exit code when the user's input was at fault.

    `interrupted` is said after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console that lacks γ or ≤ shows a ? for it
            stream.reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read what is printed has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError) as error:
        # In one line, whatever the user's code or a library put into its own message.
        print("error:", " ".join(line.strip() for line in str(error).splitlines()), file=sys.stderr)
        sys.exit(BAD_INPUT)
    except Exception as error:
        said = of_users_code(error)
        if said is None:  # then it is ours, and its traceback is wanted
            raise
        print("error:", said, file=sys.stderr)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        sys.exit(INTERRUPTED)


def of_users_code(error: Exception) -> str | None:
    """What went wrong, and where, in one line, if it went wrong in code that the user named.

    That is a network or data of a `module:factory`, in this process or in one that reads data.
    """
    kind, text = type(error).__name__, " ".join(str(error).split())
    if "DataLoader worker process" in text:  # which tells of its traceback in the message
        lines = str(error).strip().splitlines()
        at = [line.strip() for line in lines if line.strip().startswith("File ")]
        return f"{lines[-1].strip()} ({at[-1]})" if at else lines[-1].strip()
    folders = {Path(file).resolve().parent for file in sources.USERS}
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if folders & set(Path(frame.filename).resolve().parents) and OWN not in Path(frame.filename).parents
    ]
    if not frames:
        return None
    return f"{kind}: {text} ({frames[-1].filename}, line {frames[-1].lineno}, in {frames[-1].name})"


def next_run() -> Path:
    """The next free numbered folder of `RUNS`."""
    numbers = [int(path.name) for path in RUNS.glob("*") if path.name.isdigit()]
    return RUNS / str(max(numbers, default=0) + 1)


def new_file(text: str) -> Path:
    """An argument type: a file that is to be written, and is no folder."""
    if not text or Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder: expected the name of a file")
    return Path(text)


def folder(text: str) -> Path:
    """An argument type: a folder that is to be written to, there or not."""
    place = Path(text)
    there = next(path for path in (place, *place.absolute().parents) if path.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be a folder: {there} is a file")
    return place


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argument type: a whole number that is at least `least`, and at most `most` where there is one."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            bounds = f"from {least}" + (f" to {most}" if most is not None else "")
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number {bounds}")
        return value

    return parse


#: An argument type: what torch's generators can be seeded with.
seed = whole_number(0, 2**63 - 1)


def number(least: float, most: float = float("inf")) -> Callable[[str], float]:
    """An argument type: a number between two bounds, both allowed."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most or value == float("inf"):
            bounds = f"from {least:g}" + (f" to {most:g}" if most < float("inf") else "")
            raise argparse.ArgumentTypeError(f"{text!r}: expected a number {bounds}")
        return value

    return parse


def device(text: str) -> str:
    """An argument type: a device that torch can use here and that holds values."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error) else "it is not available"
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {reason}") from None
    if torch.device(text).type == "meta":
        raise argparse.ArgumentTypeError(f"{text!r} holds no values to prune: expected cpu or cuda")
    return text


def strength(text: str) -> float | None:
    """An argument type: λ, or `auto`, which is None."""
    return None if text == "auto" else number(0)(text)
