"""The command line: which command it names, and how it ends."""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from pruning.cli import arguments, config_file, sources
from pruning.cli.commands import demo, doctor, export, finetune, prune, report, sensitivity, slim, test
from pruning.errors import UserError

#: This toolkit.
OWN = Path(__file__).resolve().parent.parent

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
#: Exit codes: bad usage or input, and Ctrl-C.
BAD_INPUT, INTERRUPTED = 2, 130


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


def parse(
    argv: Sequence[str] | None = None,
) -> tuple[argparse.Namespace, Callable[[argparse.Namespace], None]]:
    """The flags of a command line over those of its --config file, and what to do with them."""
    parser = argparse.ArgumentParser(
        prog="python -m pruning",
        description="Structured pruning: `python -m pruning COMMAND --help`.",
        formatter_class=arguments.HelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    made = {}
    for name, command in COMMANDS.items():
        made[name] = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=f"{command.SUMMARY[0].upper()}{command.SUMMARY[1:]}.",
            formatter_class=arguments.HelpFormatter,
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
        rest = [*rest[:at], *config_file.read_recipe(given.config, chosen, rest), *rest[at:]]
    args = parser.parse_args(rest)
    args.parser = made[args.command]
    return args, COMMANDS[args.command].execute
