"""Settings: dataclass fields that carry their help text, unit and bounds.

`require_valid` validates a field that is annotated with `Setting`, and the command line derives a
flag and a key of configuration files from it:

>>> @dataclass(frozen=True)
... class Sampling:
...     count: Annotated[int, Setting("number of samples", metavar="N", least=1)] = 8
...
...     def __post_init__(self) -> None:
...         require_valid(self)
>>> Sampling().count
8
>>> Sampling(0)
Traceback (most recent call last):
...
pruning.errors.PruningError: Sampling.count 0: expected a whole number from 1
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from pruning.errors import PruningError


@dataclass(frozen=True)
class Setting:
    """Describe a field of a dataclass: `epochs: Annotated[int, Setting("training epochs", least=0)]`.

    Attributes:
        help: meaning of the setting, with its unit.
        name: name of the flag; by default that of the field.
        metavar: placeholder for the value in the help text, such as N or FOLDER.
        least, most: inclusive bounds. above, below: exclusive bounds.
        choices: the only texts allowed.
        none: text that means None on the command line.
        parse: function that converts text to the value, in place of the field's type.
        group: title under which the help text lists the flag; by default that of the dataclass.
        stages: `each`: every stage has its own flag, prefixed with the stage's name; `all`: one flag
            applies to all stages; `last`: one flag, for the last stage only.
        flag: whether the command line has a flag for it.
        positional: whether it is a positional argument.
        last_only: values of a flag of all stages that only the last stage takes; the others keep the
            default of this field, and of the fields whose setting `follows` it.
        later: `setting`: earlier versions did not have it; `flag`: they had no flag for it. Files of runs
            hold it only where it is not the default.
    """

    help: str
    name: str = ""
    metavar: str | None = None
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    none: str | None = None
    parse: Callable[[str], object] | None = None
    group: str = ""
    stages: Literal["each", "all", "last"] = "all"
    flag: bool = True
    positional: bool = False
    last_only: tuple[str, ...] = ()
    follows: str = ""
    later: Literal["", "flag", "setting"] = ""

    def allows(self, value: object, kind: type) -> bool:
        """Return whether a value of this type is within the bounds and among the choices."""
        if self.choices and value not in self.choices:
            return False
        if kind not in (int, float):
            return True
        if not isinstance(value, numbers.Integral if kind is int else numbers.Real):
            return False
        if kind is float and not math.isfinite(value):
            return False
        return not (
            (self.least is not None and value < self.least)
            or (self.most is not None and not value <= self.most)
            or (self.above is not None and value <= self.above)
            or (self.below is not None and not value < self.below)
        )

    def expected(self, kind: type) -> str:
        """Describe the allowed values, for an error message."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        bounds = {"from": self.least, "above": self.above, "to": self.most, "below": self.below}
        given = [f"{word} {_plain(bound)}" for word, bound in bounds.items() if bound is not None]
        limits = (" " if self.least is not None and self.most is not None else " and ").join(given)
        return f"a {'whole number' if kind is int else 'number'} {limits}".rstrip()


@dataclass(frozen=True)
class Stage:
    """Describe a field that holds the settings of one stage, as a dataclass of its own.

    Attributes:
        name: prefix of the stage's own flags: `--NAME-epochs`.
        when: prefix of their help texts: "WHEN: training epochs".
        group: title under which the help text lists them.
        last: whether this is the last stage, which has the flags of `stages="last"`.
        unset: fields whose flag has no default, each with the text that the help shows instead.
    """

    name: str = ""
    when: str = ""
    group: str = ""
    last: bool = False
    unset: Mapping[str, str] = field(default_factory=dict)

    def has(self, setting: Setting) -> bool:
        """Return whether this stage takes the value of a setting from a flag."""
        return setting.flag and (setting.stages != "last" or self.last)


class SettingField(NamedTuple):
    """A field of a dataclass: its type without None and list, its annotations and its default."""

    name: str
    kind: type
    optional: bool
    several: bool
    setting: Setting | None
    stage: Stage | None
    default: object


def fields_of(cls: type) -> Iterator[SettingField]:
    """Yield the fields of a dataclass that are annotated with `Setting` or `Stage`, in their order.

    The default is `dataclasses.MISSING` for a field without one.
    """
    hints = get_type_hints(cls, include_extras=True)
    for each in dataclasses.fields(cls):
        hint = hints[each.name]
        if get_origin(hint) is not Annotated:
            continue
        hint, *notes = get_args(hint)
        setting = next((note for note in notes if isinstance(note, Setting)), None)
        stage = next((note for note in notes if isinstance(note, Stage)), None)
        kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        optional = type(None) in kinds
        # int | str counts as text: that is what the command line and configuration files give.
        kind = str if str in kinds else next(kind for kind in kinds if kind is not type(None))
        several = get_origin(kind) in (tuple, list)
        if several:
            kind = get_args(kind)[0]
        default = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
        yield SettingField(each.name, kind, optional, several, setting, stage, default)


def stored(config: object) -> dict[str, Any]:
    """Return a dataclass as plain data, without later settings that have their default.

    A function is stored as its module and name.

    >>> @dataclass(frozen=True)
    ... class Sampling:
    ...     count: Annotated[int, Setting("number of samples")] = 8
    ...     seed: Annotated[int, Setting("seed", later="setting")] = 0
    >>> stored(Sampling()), stored(Sampling(seed=1))
    ({'count': 8}, {'count': 8, 'seed': 1})
    """
    found: dict[str, Any] = {}
    known = {each.name: each for each in fields_of(type(config))}
    for name in (each.name for each in dataclasses.fields(config)):  # type: ignore[arg-type]
        value, each = getattr(config, name), known.get(name)
        is_later = each is not None and each.setting is not None and each.setting.later == "setting"
        value = _plain_data(value)
        if each is None or not is_later or (value or None) != (_plain_data(each.default) or None):
            found[name] = value
    return found


def _plain_data(value: object) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return stored(value)
    if isinstance(value, Mapping):
        return {str(key): _plain_data(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_data(held) for held in value]
    if callable(value):
        inner = getattr(value, "func", value)  # of a partial
        return f"{getattr(inner, '__module__', '')}:{getattr(inner, '__qualname__', type(inner).__name__)}"
    return value


def require_valid(config: object) -> None:
    """Check every field of a dataclass against its `Setting`.

    Raises:
        PruningError: if a value is out of bounds, not among the choices, or not a finite number.
    """
    for each in fields_of(type(config)):
        value = getattr(config, each.name)
        if each.setting is None or each.several or (each.optional and value is None):
            continue
        if not each.setting.allows(value, each.kind):
            near = difflib.get_close_matches(str(value), each.setting.choices, 1)
            raise PruningError(
                f"{type(config).__name__}.{each.name} {value!r}: expected {each.setting.expected(each.kind)}"
                f"{f'; did you mean {near[0]!r}?' if near else ''}"
            )


def _plain(bound: float) -> str:
    """Format a bound for people: 9223372036854775807 and 0.001, not 9.2e+18 and 1e-3."""
    return str(int(bound)) if bound == int(bound) else f"{bound:g}"
