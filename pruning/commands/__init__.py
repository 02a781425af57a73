"""The toolkit's commands: `python -m pruning COMMAND --help`.

Each is a module with a `SUMMARY`, its flags (`add_flags`) and what it does with them (`execute`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from pruning import cli
from pruning.commands import demo, doctor, export, finetune, prune, report, sensitivity, slim, test

COMMANDS = {
    "doctor": doctor,
    "prune": prune,
    "slim": slim,
    "finetune": finetune,
    "sensitivity": sensitivity,
    "test": test,
    "export": export,
    "demo": demo,
    "report": report,
}


def parse(
    argv: Sequence[str] | None = None,
) -> tuple[argparse.Namespace, Callable[[argparse.Namespace], None]]:
    """The flags of a command line over those of its --config file, and what to do with them."""
    parser = argparse.ArgumentParser(
        prog="python -m pruning",
        description="Structured pruning: `python -m pruning COMMAND --help`.",
        formatter_class=cli.HelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    made = {}
    for name, command in COMMANDS.items():
        made[name] = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=f"{command.SUMMARY[0].upper()}{command.SUMMARY[1:]}.",
            formatter_class=cli.HelpFormatter,
        )
        command.add_flags(made[name])
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config", type=Path)
    rest = first.parse_known_args(argv)[1]
    first.add_argument("--resume", action="store_true")
    first.add_argument("--output", type=Path)
    given, _ = first.parse_known_args(argv)
    chosen = next((made[word] for word in rest if word in made), None)
    if given.config is None and given.resume and given.output is not None:
        before = given.output / "config.toml"  # of the run that goes on
        given.config = before if before.exists() else None
    if given.config is not None and chosen is not None:
        at = next(i for i, word in enumerate(rest) if word in made) + 1
        rest = [*rest[:at], *cli.read_recipe(given.config, chosen, rest), *rest[at:]]
    args = parser.parse_args(rest)
    args.parser = made[args.command]
    return args, COMMANDS[args.command].execute
