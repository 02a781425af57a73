"""The command line: which command it names, and how it ends."""

from __future__ import annotations

import argparse
import difflib
import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from pruning.cli.arguments import add_flags
from pruning.cli.command_table import COMMANDS
from pruning.cli.config_file import read_recipe
from pruning.cli.parsers import HelpFormatter, Parser
from pruning.errors import PruningError, UserError
from pruning.utils.interrupts import INTERRUPTED, noting_interrupts

#: Exit code of bad usage or input.
BAD_INPUT = 2


def run(main: Callable[[], None], interrupted: str | Callable[[], str] = "interrupted") -> None:
    """Call `main`; end with one line and exit code 2 when the input is at fault.

    Any other error keeps its traceback. `interrupted`, or what it returns, is printed after Ctrl-C.
    """
    with noting_interrupts() as interrupts:
        try:
            _run(main)
        except BaseException as error:
            # A library that is interrupted while it loads may raise another error.
            if not isinstance(error, KeyboardInterrupt) and not interrupts:
                raise
            line = interrupted if isinstance(interrupted, str) else interrupted()
            print(f"\n{line}", file=sys.stderr)
            sys.exit(INTERRUPTED)


def _run(main: Callable[[], None]) -> None:
    """Call `main`; turn an error of the input into one line and an exit code."""
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


def parse(
    argv: Sequence[str] | None = None,
) -> tuple[argparse.Namespace, Callable[[argparse.Namespace], None]]:
    """Parse a command line, whose flags take precedence over those of its --config file.

    Returns:
        The flags, with the command's parser as `parser`, and the function that executes the command.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser, commands = _parsers(argv)
    if not argv:
        parser.print_help()
        sys.exit()
    first = Parser(add_help=False)
    first.add_argument("--config", type=Path)
    rest = first.parse_known_args(argv)[1]
    first.add_argument("--resume", action="store_true")
    first.add_argument("--output", type=Path)
    given, _ = first.parse_known_args(argv)
    at = next((i for i, word in enumerate(rest) if word in commands), None)
    if at is None and rest and not rest[0].startswith("-"):
        near = difflib.get_close_matches(rest[0], commands, 1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(commands)}"
        parser.error(f"there is no command {rest[0]!r}: {hint}")
    if given.config is None and given.resume and given.output is not None:
        before = given.output / "config.toml"  # of the run that goes on
        if not (given.output / "config.json").exists():
            raise PruningError(
                f"{given.output} holds no run to resume (config.json is missing): start a new run without "
                "--resume, or give the folder of a run"
            )
        given.config = before if before.exists() else None
    if given.config is not None and at is not None:
        recipe = read_recipe(given.config, commands[rest[at]], rest)
        rest = [*rest[: at + 1], *recipe, *rest[at + 1 :]]
    args, unknown = parser.parse_known_args(rest)
    args.parser = commands[args.command]
    if unknown:
        args.parser.refuse(unknown, _commands_with(unknown))

    def execute(args: argparse.Namespace) -> None:
        import_module(f"pruning.cli.commands.{args.command}").execute(args)

    return args, execute


def _parsers(argv: Sequence[str]) -> tuple[Parser, dict[str, Parser]]:
    """The parser of the command line, and those of the commands; only those that it names have flags."""
    listed = [f"\n  {name}: {command.summary}\n    {_example(name)}" for name, command in COMMANDS.items()]
    parser = Parser(
        prog="python -m pruning",
        description="\n".join(["Structured pruning of PyTorch models.", "", "commands:", *listed]),
        epilog="python -m pruning COMMAND --help lists the flags of a command.",
        formatter_class=HelpFormatter,
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", help="one of the commands above"
    )
    made = {}
    for name, command in COMMANDS.items():
        made[name] = commands.add_parser(
            name,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            epilog=f"example: {_example(name)}",
            formatter_class=HelpFormatter,
        )
        if name in argv:
            add_flags(made[name], *command.flags)
    return parser, made


def _commands_with(words: Sequence[str]) -> list[str]:
    """Return the commands that have the first flag among words."""
    flag = next((word.partition("=")[0] for word in words if word.startswith("--")), "")
    parsers = {name: Parser() for name in COMMANDS if flag}
    for name, parser in parsers.items():
        add_flags(parser, *COMMANDS[name].flags)
    return [name for name, parser in parsers.items() if flag in parser._option_string_actions]


def _example(name: str) -> str:
    """A command line of the command."""
    return f"python -m pruning {name} {COMMANDS[name].example}"
