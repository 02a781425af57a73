"""Options of a plan: how channels are compared, and the limits on the width of each group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, TypeVar

from pruning.errors import PruningError

if TYPE_CHECKING:  # the flags of the command line are read without torch
    from pruning.graph.groups import ByGroup

#: How channels of different groups are compared.
RANKINGS = ("global", "group")

#: Largest share of a group's channels that a step without training drops by default.
MOST = 0.9

#: Names of the scores by which channels are ranked; `scores.BY_NAME` defines them.
SCORES = ("taylor", "bn_scale", "l1", "l2", "random", "sensitivity", "fisher", "reconstruction")

#: The scores that need calibration batches.
NEED_DATA = ("taylor", "sensitivity", "fisher", "reconstruction")

Value = TypeVar("Value")


@dataclass(frozen=True)
class PlanOptions:
    """How `plan_within` compares channels, and the limits on the width of each group.

    `floor`, `most` and `widths` may be set per group, as a mapping from a group's name or a pattern
    (`layer4.*`) to a value. The last pattern that matches a group applies; groups that no pattern
    matches have the default.

    Attributes:
        ranking: `global` compares the scores of all groups; `group` keeps the same share of
            channels in every group, the largest share that meets the budget.
        per_cost: divide the score of a channel by the cost that its removal frees, as a share of
            the excess over each limit that is not met yet; False compares the scores directly.
        floor: least number of channels that a group keeps; by default `multiple`, or all channels of a
            group that has fewer.
        most: largest share of a group's channels that one plan drops, 0 to 1.
        multiple: widths are multiples of this number of channels, or the full width, or a given floor.
        widths: exact widths of some groups: a count, which goes before `multiple`, `floor` and `most`, or a
            percentage of the group's channels, which is rounded to `multiple`.
        alike: names or patterns, or several of them joined by commas; the groups that match one of them get
            one width, so that a configuration can state it. Groups of different numbers of channels keep one
            share of them.

    Raises:
        PruningError: if the ranking is unknown, a floor or multiple is not an integer from 1, or a
            share is outside 0 to 1.

    >>> PlanOptions(floor={"layer4.*": 8}, multiple=4).per_cost
    True
    """

    ranking: str = "global"
    per_cost: bool = True
    floor: int | ByGroup[int] | None = None
    most: float | ByGroup[float] = 1.0
    multiple: int = 1
    widths: ByGroup[int | str] | None = None
    alike: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.ranking not in RANKINGS:
            raise PruningError(f"ranking {self.ranking!r}: expected one of {', '.join(RANKINGS)}")
        if not isinstance(self.multiple, int) or self.multiple < 1:
            raise PruningError(f"multiple {self.multiple!r}: expected a whole number from 1")
        if isinstance(self.alike, str) or not all(isinstance(pattern, str) for pattern in self.alike):
            raise PruningError(f"alike={self.alike!r}: expected a list of names or patterns of groups")
        for where, floor in _by_pattern(self.floor) if self.floor is not None else ():
            if not isinstance(floor, int) or floor < 1:
                raise PruningError(f"floor {floor!r}{where}: expected a whole number of channels, at least 1")
        for where, share in _by_pattern(self.most):
            if not 0 <= share <= 1:
                raise PruningError(f"largest share dropped {share}{where}: expected a number from 0 to 1")


def per_group(setting: Value | ByGroup[Value], groups: Sequence[str]) -> dict[str, Value]:
    """Resolve a setting to one value per group; groups that no pattern matches are omitted.

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
        matched = [g for g in groups if isinstance(pattern, str) and fnmatchcase(g, pattern)]
        if not matched:
            raise PruningError(
                f"{pattern!r} matches no group of this model; its groups: {', '.join(groups) or 'none'}"
            )
        found.update(dict.fromkeys(matched, value))
    return found


def _by_pattern(setting: Value | ByGroup[Value]) -> list[tuple[str, Value]]:
    """Return the values of a setting, each with the end of a message that names its groups."""
    if isinstance(setting, Mapping):
        return [(f" of group {pattern!r}", value) for pattern, value in setting.items()]
    return [("", setting)]
