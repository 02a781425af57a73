"""A parser of command lines whose errors are one line, and the format of its help."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from pruning.utils.wording import alternatives


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and that takes no abbreviated flags."""

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        """Print the message in one line, and exit with code 2."""
        line = " ".join(message.split())
        self.exit(2, f"error: {line} (see {self.prog} --help)\n")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        """Name the nearest choice where a value is none."""
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            near = difflib.get_close_matches(str(value), [str(choice) for choice in action.choices or ()], 1)
            error.message += f"; did you mean {near[0]}?" if near else ""
            raise

    def parsed(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse the command line; an unknown flag is refused, with the name of one that is near."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            self.refuse(unknown)
        return args

    def refuse(self, unknown: Sequence[str], commands: Sequence[str] = ()) -> NoReturn:
        """Exit because of unknown words on the command line; `commands` are others that have the flag."""
        names = [option for action in self._actions for option in action.option_strings]
        words = [word.partition("=")[0] for word in unknown if word.startswith("--")]
        hint = ""
        if words and (near := meant(words[0], names)):
            hint = f"; did you mean {alternatives(near)}?"
        elif commands:
            hint = f"; {words[0]} is a flag of {' and '.join(commands)}"
        elif not words and "--weights" in names and Path(unknown[0]).suffix in (".pth", ".pt", ".ckpt"):
            hint = f"; give a checkpoint as --weights {unknown[0]}"
        self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")


def meant(name: str, known: Sequence[str]) -> list[str]:
    """Return the names that a wrong one may stand for: those that end with it, or else the nearest.

    >>> meant("--epochs", ["--points", "--recover-epochs", "--finetune-epochs"])
    ['--recover-epochs', '--finetune-epochs']
    >>> meant("--point", ["--points", "--epochs"]), meant("--epochs", ["--points"])
    (['--points'], [])
    """
    word = name.lstrip("-")
    if longer := [each for each in known if each.endswith(f"-{word}")]:
        return longer
    plain = {each.lstrip("-"): each for each in known}
    return [plain[near] for near in difflib.get_close_matches(word, plain, 1, 0.7)]


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with the default of every flag that has one, and the description as it was written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


class Several(argparse.Action):
    """Collect the values of a flag: they replace the default, and add up where the flag is repeated."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*(() if before is self.default else before), *(values or ())])
