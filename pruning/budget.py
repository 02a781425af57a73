"""What the user asks for: limits on the params, MACs and channels of the result."""

from __future__ import annotations

from dataclasses import dataclass

from pruning.cost import Cost
from pruning.errors import PruningError

#: What a budget can limit, as a `Cost` names it, and as it is printed.
LABELS = {"params": "params", "macs": "MACs", "channels": "channels"}
_SUFFIXES = {"k": 1e3, "m": 1e6, "g": 1e9}


@dataclass(frozen=True)
class Budget:
    """Limits on a network; None does not limit.

    A whole number is a count; text may be a count with k, M or G behind it, or a percentage
    of the dense network's cost, BatchNorm folded. Channels are those of all prunable groups.

    >>> Budget(params="25%", macs="50k").resolve(Cost(params=8000, macs=90000, macs_with_bias=0))
    Budget(params=2000, macs=50000, channels=None)

    Raises `PruningError` for a limit that is not one, is not positive, or is over 100 %.
    """

    params: int | str | None = None
    macs: int | str | None = None
    channels: int | str | None = None

    def __post_init__(self) -> None:
        if not self._given():
            raise PruningError("a budget needs at least one limit: on params, on MACs, or on channels")
        for what, limit in self._given().items():
            _parse(what, limit, dense=1)

    def _given(self) -> dict[str, int | str]:
        limits = {what: getattr(self, what) for what in LABELS}
        return {what: limit for what, limit in limits.items() if limit is not None}

    def resolve(self, dense: Cost) -> Budget:
        """The same limits as counts, given what the dense network costs."""
        return Budget(
            **{what: _parse(what, limit, getattr(dense, what)) for what, limit in self._given().items()}
        )

    def limits(self) -> dict[str, int]:
        """The limits in force, as counts; of a resolved budget."""
        return {what: limit for what, limit in self._given().items() if isinstance(limit, int)}

    def excess(self, cost: Cost) -> dict[str, int]:
        """By how much a cost is over each limit that it breaks; empty when the budget is met."""
        over = {what: getattr(cost, what) - limit for what, limit in self.limits().items()}
        return {what: value for what, value in over.items() if value > 0}

    def share(self, start: Cost, step: int, steps: int) -> Budget:
        """The budget of one of several steps from `start` to here: equal ratios, the last exact.

        `step` counts from 1; the budget is resolved.
        """
        partial = {}
        for what, limit in self.limits().items():
            begin = max(getattr(start, what), limit)
            partial[what] = limit if step == steps else round(begin * (limit / begin) ** (step / steps))
        return Budget(**partial)

    def __str__(self) -> str:
        return ", ".join(
            f"≤ {limit:,} {LABELS[what]}" if isinstance(limit, int) else f"≤ {limit} {LABELS[what]}"
            for what, limit in self._given().items()
        )


def _parse(what: str, limit: int | str, dense: int) -> int:
    text = str(limit).strip().lower().replace(",", "").replace("_", "")
    try:
        if text.endswith("%"):
            share = float(text[:-1]) / 100
            if not 0 < share <= 1:
                raise PruningError(f"{what} budget {limit!r}: a percentage is above 0 and at most 100")
            return round(share * dense)
        factor = _SUFFIXES.get(text[-1:], 1)
        count = float(text[:-1] if text[-1:] in _SUFFIXES else text) * factor
        if count < 1 or count != round(count):
            raise PruningError(f"{what} budget {limit!r}: a count is a whole number from 1")
        return round(count)
    except (ValueError, OverflowError) as error:
        if isinstance(error, PruningError):
            raise
        raise PruningError(
            f"{what} budget {limit!r}: expected a count (2000, 50k) or a percentage of the dense net (25%)"
        ) from error
