"""Options of a plan: how channels are compared, and how narrow each group may get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

from pruning.errors import PruningError

#: How channels of different groups are compared.
RANKINGS = ("global", "group")

Value = TypeVar("Value")


@dataclass(frozen=True)
class PlanOptions:
    """How `plan_within` chooses channels, and what every plan must keep.

    `floor`, `most` and `widths` may be set per group: a mapping from a group's name or a pattern
    (`layer4.*`) to its value. The last pattern that matches a group counts; groups that no pattern
    matches have the default.

    Attributes:
        ranking: `global` compares the scores of all groups; `group` keeps the same share of
            every group, the largest share that meets the budget.
        per_cost: divide the score of a channel by what it frees under the limits that are not
            met yet, as a share of each excess; False compares the scores as they are.
        floor: least number of channels that a group keeps.
        most: largest share of a group's channels that one plan drops, 0 to 1.
        multiple: widths are multiples of this number of channels, or the full width, or the floor.
        widths: exact widths of some groups: a count, or a percentage of the group's channels.

    Raises:
        PruningError: for an unknown ranking, a floor or multiple that is not a whole number from 1,
            or a share outside 0 to 1.

    >>> PlanOptions(floor={"layer4.*": 8}, multiple=4).per_cost
    True
    """

    ranking: str = "global"
    per_cost: bool = True
    floor: int | Mapping[str, int] = 1
    most: float | Mapping[str, float] = 1.0
    multiple: int = 1
    widths: Mapping[str, int | str] | None = None

    def __post_init__(self) -> None:
        if self.ranking not in RANKINGS:
            raise PruningError(f"ranking {self.ranking!r}: one of {', '.join(RANKINGS)}")
        if not isinstance(self.multiple, int) or self.multiple < 1:
            raise PruningError(f"multiple {self.multiple!r}: widths are multiples of a whole number from 1")
        for where, floor in _by_pattern(self.floor):
            if not isinstance(floor, int) or floor < 1:
                raise PruningError(f"floor {floor!r}{where}: a whole number of channels, at least 1")
        for where, share in _by_pattern(self.most):
            if not 0 <= share <= 1:
                raise PruningError(f"largest share dropped {share}{where}: from 0 to 1")


def per_group(setting: Value | Mapping[str, Value], groups: Sequence[str]) -> dict[str, Value]:
    """Resolve a setting to one value per group; groups that no pattern matches are left out.

    Args:
        setting: one value for all groups, or a mapping from a name or pattern to its value.
        groups: names of all groups.

    Raises:
        PruningError: for a pattern that matches no group.

    >>> per_group({"conv*": 4, "conv2": 8}, ["conv1", "conv2", "fc"])
    {'conv1': 4, 'conv2': 8}
    """
    if not isinstance(setting, Mapping):
        return dict.fromkeys(groups, setting)
    found: dict[str, Value] = {}
    for pattern, value in setting.items():
        matched = [g for g in groups if fnmatchcase(g, pattern)]
        if not matched:
            raise PruningError(
                f"{pattern!r} is no group of this model; there are: {', '.join(groups) or 'none'}"
            )
        found.update(dict.fromkeys(matched, value))
    return found


def _by_pattern(setting: Value | Mapping[str, Value]) -> list[tuple[str, Value]]:
    """The values of a setting, each with the words that say which groups it is for."""
    if isinstance(setting, Mapping):
        return [(f" of group {pattern!r}", value) for pattern, value in setting.items()]
    return [("", setting)]
