"""The toolkit as a command: `python -m pruning COMMAND`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from pruning.cli.main import parse, run
from pruning.utils import distributed


def main() -> None:
    if os.getcwd() not in sys.path:  # the user's models and data are imported from the current folder
        sys.path.insert(0, os.getcwd())
    args, command = parse()
    with distributed.process_group(getattr(args, "device", "cpu")) as device, silent(distributed.rank() > 0):
        args.device = device
        command(args)


@contextlib.contextmanager
def silent(wanted: bool) -> Iterator[None]:
    """Print nothing in the block, if wanted: of several processes only the first prints."""
    if not wanted:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def console() -> None:
    """Run a command; end with one line and an exit code when the user's input is at fault."""
    run(main, interrupted="interrupted; slim and finetune go on with: --resume --output FOLDER")


if __name__ == "__main__":
    console()
