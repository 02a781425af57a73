"""The toolkit as a command: `python -m pruning COMMAND`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from pruning.utils.interrupts import INTERRUPTED, noting_interrupts

#: By command, the file of its folder from which the same command goes on.
_GO_ON = {"frontier": "frontier.json", "sensitivity": "curves.json"}


class _Call:
    """One call of a command: what it was told is known once the command line is parsed."""

    args: argparse.Namespace | None = None

    def execute(self) -> None:
        if os.getcwd() not in sys.path:  # the user's models and data are imported from the current folder
            sys.path.insert(0, os.getcwd())
        from pruning.cli.main import parse

        args, command = parse()
        self.args = args
        from pruning.utils import distributed  # torch, which help and errors of usage need not wait for

        on = getattr(args, "device", "cpu")
        with distributed.process_group(on) as device, _silent(distributed.rank() > 0):
            args.device = device
            command(args)

    def advice(self) -> str:
        """Return what to print after Ctrl-C: how to go on, where there is a run that can."""
        run: Path | None = getattr(self.args, "output", None)
        if self.args is None or run is None:
            return "interrupted"
        file = _GO_ON.get(self.args.command)
        if file is not None and (run / file).exists():
            return f"interrupted; the same command goes on from {run}"
        if not hasattr(self.args, "resume"):
            return "interrupted"
        if not (run / "config.json").exists():
            return "interrupted"
        return f"interrupted; go on with: python -m pruning {self.args.command} --resume --output {run}"


@contextlib.contextmanager
def _silent(wanted: bool) -> Iterator[None]:
    """Print nothing in the block, if wanted: of several processes only the first prints."""
    if not wanted:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def main() -> None:
    """Execute the command line of this process."""
    _Call().execute()


def console() -> None:
    """Run a command; end with one line and an exit code when the user's input is at fault."""
    with noting_interrupts():
        try:
            from pruning.cli.main import run  # under way, Ctrl-C is heeded already
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr, flush=True)
            os._exit(INTERRUPTED)
    call = _Call()
    try:
        run(call.execute, interrupted=call.advice)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            # Python would end by the signal, not by the code, if Ctrl-C has interrupted generated code.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)
        raise


if __name__ == "__main__":
    console()
