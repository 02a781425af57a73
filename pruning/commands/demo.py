"""`python -m pruning demo`: make one HTML file in which a network says what is drawn."""

from __future__ import annotations

import argparse
from pathlib import Path

from pruning import flags
from pruning.demo import demo_checkpoint as execute

SUMMARY = "make one HTML file in which a network says what is drawn"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="weights of the dense network, to show beside it"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: the checkpoint's name with the ending .html"
    )
    parser.add_argument(
        "--classes", nargs="+", metavar="NAME", help="of the classes, in their order (default: numbers)"
    )
    flags.checkpoint_flags(parser)


__all__ = ["SUMMARY", "add_flags", "execute"]
