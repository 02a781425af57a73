"""What the user asks for: limits on the params and MACs of the result."""

from __future__ import annotations

from dataclasses import dataclass

from pruning.cost import Cost
from pruning.errors import PruningError

_SUFFIXES = {"k": 1e3, "m": 1e6, "g": 1e9}


@dataclass(frozen=True)
class Budget:
    """Limits on a network; None does not limit.

    A whole number is a count; text may be a count with k, M or G behind it, or a percentage
    of the dense network's cost, BatchNorm folded.

    >>> Budget(params="25%", macs="50k").resolve(Cost(params=8000, macs=90000, macs_with_bias=0))
    Budget(params=2000, macs=50000)

    Raises `PruningError` for a limit that is not one, is not positive, or is over 100 %.
    """

    params: int | str | None = None
    macs: int | str | None = None

    def __post_init__(self) -> None:
        if self.params is None and self.macs is None:
            raise PruningError("a budget needs a limit on params, on MACs, or on both")
        for what in ("params", "macs"):
            limit = getattr(self, what)
            if limit is not None:
                _parse(what, limit, dense=1)

    def resolve(self, dense: Cost) -> Budget:
        """The same limits as counts, given what the dense network costs."""
        return Budget(
            None if self.params is None else _parse("params", self.params, dense.params),
            None if self.macs is None else _parse("macs", self.macs, dense.macs),
        )

    def limits(self) -> dict[str, int]:
        """The limits in force, as counts; of a resolved budget."""
        limits = {"params": self.params, "macs": self.macs}
        return {what: limit for what, limit in limits.items() if isinstance(limit, int)}

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
        names = {"params": "params", "macs": "MACs"}
        given = [(getattr(self, what), name) for what, name in names.items()]
        return ", ".join(
            f"≤ {limit:,} {name}" if isinstance(limit, int) else f"≤ {limit} {name}"
            for limit, name in given
            if limit is not None
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
