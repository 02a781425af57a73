"""What a terminal user types: commands, their flags, and the files that hold flags."""

from pruning.cli.argument_types import device, folder, new_file, next_run, number, seed, whole_number
from pruning.cli.arguments import parse_flags
from pruning.cli.config_file import read_recipe, tomllib, write_recipe
from pruning.cli.main import run
from pruning.cli.parsers import HelpFormatter, Several

__all__ = [
    "HelpFormatter",
    "Several",
    "device",
    "folder",
    "new_file",
    "next_run",
    "number",
    "parse_flags",
    "read_recipe",
    "run",
    "seed",
    "tomllib",
    "whole_number",
    "write_recipe",
]
