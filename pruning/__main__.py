"""The toolkit as a command: `python -m pruning COMMAND`."""

from __future__ import annotations

import os
import sys

from pruning import cli


def main() -> None:
    if os.getcwd() not in sys.path:  # models and data of the user's are found from where they stand
        sys.path.insert(0, os.getcwd())
    from pruning.commands import parse

    args, command = parse()
    command(args)


if __name__ == "__main__":
    cli.run(main, interrupted="interrupted; slim and finetune go on with: --resume --output FOLDER")
