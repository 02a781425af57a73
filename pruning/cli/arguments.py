"""Flags made of settings: every `Setting` of a dataclass becomes a flag, its default and its help text.

`add_flags` adds the flags of dataclasses to a parser, and `read_flags` makes a dataclass of what was parsed.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from pruning.cli.argument_types import within
from pruning.cli.parsers import HelpFormatter, Parser, Several
from pruning.utils.settings import Setting, Stage, fields_of

#: Groups of flags by the name that settings give them, in the order of the help text.
GROUPS = {
    "budget": "budget: a count (2000, 50k) or a percentage of the dense network (25%)",
    "latency": "budget of latency, measured on this machine",
    "stage 1": "stage 1: train with a penalty on the scales of channels",
    "stage 2": "stage 2: remove channels, and train after each pruning step",
    "stage 3": "stage 3: fine-tune the pruned network",
    "training": "training, in every stage",
    "data": "data",
    "model": "model",
    "run": "run",
}

#: Titles of groups in the help of a command without stages.
_WITHOUT_STAGES = {"stage 2": "channels that are removed", "training": "training"}

Settings = TypeVar("Settings")

#: Of settings that belong to no stage.
_NO_STAGE = Stage(last=True)


# --- flags of dataclasses ---------------------------------------------------------------


@dataclass(frozen=True)
class FlagsOf:
    """Name the settings of a dataclass for which a command has flags.

    Attributes:
        cls: a dataclass whose fields are annotated with `Setting`; its class variable GROUP, if it has
            one, is the group of settings that name none.
        defaults: values of fields that take the place of the dataclass's defaults.
        only: the fields that have flags; by default all.
        without: fields that have none.
    """

    cls: type
    defaults: Mapping[str, object] = field(default_factory=dict)
    only: Collection[str] = ()
    without: Collection[str] = ()


class Flag(NamedTuple):
    """A flag of the command line, which is also a key of a configuration file."""

    name: str
    kind: type
    several: bool
    setting: Setting
    group: str
    help: str
    default: object

    def add_to(self, parser: argparse._ActionsContainer) -> None:
        """Add the flag to a parser or to a group of its flags."""
        setting = self.setting
        if self.kind is bool:
            parser.add_argument(
                f"--{self.name}",
                action=argparse.BooleanOptionalAction,
                default=self.default,
                help=self.help,
            )
            return
        if setting.positional:
            parser.add_argument(self.name, type=self.value, metavar=setting.metavar, help=self.help)
            return
        missing = self.default is dataclasses.MISSING
        parser.add_argument(
            f"--{self.name}",
            action=Several if self.several else "store",
            nargs="+" if self.several else None,
            type=self.value,
            choices=setting.choices or None,
            metavar=setting.metavar,
            required=missing,
            default=None if missing else self.default,
            help=self.help,
        )

    def value(self, text: str) -> object:
        """Convert the text of the command line to the value of the setting."""
        setting = self.setting
        if setting.none is not None and text == setting.none:
            return None
        if setting.parse is not None:
            return setting.parse(text)
        if self.kind is int:
            return within(int, setting, text)
        if self.kind is float:
            return within(float, setting, text)
        return self.kind(text)


def add_flags(parser: argparse.ArgumentParser, *sources: FlagsOf | type) -> None:
    """Add the flags of dataclasses to a parser, in the groups that their settings name."""
    flags: dict[str, Flag] = {}
    for source in sources:
        wanted = source if isinstance(source, FlagsOf) else FlagsOf(source)
        for flag in _flags(wanted):
            flags.setdefault(flag.name, flag)  # one flag may hold for several stages
    titles = dict(GROUPS)
    if not any(flag.group == "stage 1" for flag in flags.values()):
        titles |= _WITHOUT_STAGES
    for group in ("", *titles):
        members = [flag for flag in flags.values() if flag.group == group]
        place = parser.add_argument_group(titles[group]) if group and members else parser
        for flag in members:
            flag.add_to(place)


def read_flags(
    cls: type[Settings], args: argparse.Namespace, stage: Stage = _NO_STAGE, **given: object
) -> Settings:
    """Make a dataclass of parsed flags.

    Args:
        cls: a dataclass whose settings were added by `add_flags`.
        args: what was parsed.
        stage: the stage whose settings these are.
        given: values of fields that are not taken from flags.
    """
    values = dict(given)
    left_out: set[str] = set()
    for each in fields_of(cls):
        if each.name in given:
            continue
        if each.stage is not None:
            values[each.name] = read_flags(each.kind, args, each.stage)
        elif each.setting is not None and stage.has(each.setting):
            value = getattr(args, _destination(_name(each.name, each.setting, stage)))
            if not stage.last and (value in each.setting.last_only or each.setting.follows in left_out):
                left_out.add(each.name)
                continue
            values[each.name] = value
    return cls(**values)


def later_flags(*sources: FlagsOf | type) -> dict[str, object]:
    """Return the flags that earlier versions did not have, by destination, with their defaults.

    The file of a run holds them only where they are not the default, so that earlier runs are resumed.
    """
    found = {}
    for source in sources:
        for flag in _flags(source if isinstance(source, FlagsOf) else FlagsOf(source)):
            if flag.setting.later:
                found[_destination(flag.name)] = flag.default
    return found


def _flags(source: FlagsOf, stage: Stage = _NO_STAGE) -> Iterator[Flag]:
    for each in fields_of(source.cls):
        if each.name in source.without or (source.only and each.name not in source.only):
            continue
        default = source.defaults.get(each.name, each.default)
        if each.stage is not None:
            held = vars(default) if dataclasses.is_dataclass(default) else {}
            inner = dataclasses.replace(each.stage, group=each.stage.group or stage.group)
            yield from _flags(FlagsOf(each.kind, held), inner)
        elif each.setting is not None and stage.has(each.setting):
            group = each.setting.group or stage.group or getattr(source.cls, "GROUP", "")
            if each.setting.positional:
                group = ""
            text = each.setting.help
            if each.name in stage.unset:
                default, text = None, f"{text} (default: {stage.unset[each.name]})"
            elif default is None and each.setting.none is not None:
                text = f"{text} (default: {each.setting.none})"
            if stage.when:
                text = f"{stage.when}: {text}"
            if isinstance(default, tuple | Mapping):
                default = list(default)
            name = _name(each.name, each.setting, stage)
            yield Flag(name, each.kind, each.several, each.setting, group, text.replace("%", "%%"), default)


def _name(name: str, setting: Setting, stage: Stage) -> str:
    """The name of a setting's flag, without the hyphens before it."""
    name = setting.name or name.replace("_", "-")
    return f"{stage.name}-{name}" if stage.name and setting.stages == "each" else name


def _destination(name: str) -> str:
    return name.replace("-", "_")


# --- parsers ----------------------------------------------------------------------------


def parse_flags(
    cls: type[Settings], description: str | None, argv: Sequence[str] | None = None
) -> tuple[Settings, Parser]:
    """Parse the command line of a script whose flags are those of one dataclass.

    Args:
        cls: a dataclass whose fields are annotated with `Setting`.
        description: the script's docstring.
        argv: words of the command line; by default those of the process.

    Returns:
        The settings, and the parser, for the errors that the script itself finds.
    """
    parser = Parser(description=description, formatter_class=HelpFormatter)
    add_flags(parser, cls)
    return read_flags(cls, parser.parsed(argv)), parser
