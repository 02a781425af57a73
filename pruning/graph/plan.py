"""A plan: for each group, the channels it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypedDict

from pruning.errors import PruningError


class PlanData(TypedDict):
    """A plan as plain data."""

    keep: dict[str, list[int]]
    removed: list[str]


@dataclass(frozen=True)
class Plan:
    """The channels that each group keeps: immutable, and convertible to JSON.

    Args:
        keep: by group, the channels that it keeps, in any order; a group that is not named keeps all.
        removed: whole layers that were removed beforehand (`pruning.surgery.layer_removal`); the groups
            are those of the model without these layers.

    Raises `PruningError` for a group that would keep no channel, a negative one, or one twice.

    >>> plan = Plan(keep={"conv1": (0, 2, 5)})
    >>> plan.widths
    {'conv1': 3}
    >>> Plan.from_json(plan.to_json()) == plan
    True
    """

    keep: Mapping[str, tuple[int, ...]]
    removed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        keep = {}
        for group, channels in self.keep.items():
            chosen = tuple(sorted(int(c) for c in channels))
            if not chosen:
                raise PruningError(f"group {group!r} would keep no channel; keep at least one")
            if chosen[0] < 0 or len(set(chosen)) != len(chosen):
                raise PruningError(f"group {group!r} keeps {chosen}: expected channels from 0, each once")
            keep[group] = chosen
        object.__setattr__(self, "keep", MappingProxyType(keep))
        object.__setattr__(self, "removed", tuple(self.removed))

    @property
    def widths(self) -> dict[str, int]:
        """The number of channels that each group keeps."""
        return {group: len(channels) for group, channels in self.keep.items()}

    def to_json(self) -> PlanData:
        """Return the plan as plain data."""
        keep = {group: list(channels) for group, channels in self.keep.items()}
        return {"keep": keep, "removed": list(self.removed)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Build the plan from what `to_json` returned."""
        keep = {group: tuple(channels) for group, channels in data["keep"].items()}
        return cls(keep, tuple(data.get("removed", ())))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return False
        return dict(self.keep) == dict(other.keep) and self.removed == other.removed

    def __hash__(self) -> int:
        return hash((tuple(sorted(self.keep.items())), self.removed))

    def __repr__(self) -> str:
        removed = f", removed={self.removed!r}" if self.removed else ""
        return f"Plan(keep={dict(self.keep)!r}{removed})"
