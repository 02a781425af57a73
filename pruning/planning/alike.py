"""Groups that keep one share of their channels: the search for widths treats each set as one group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np

from pruning.errors import PruningError
from pruning.planning.cost import Cost, CostModel

#: By group, its channels in ascending order of importance, and their scores in that order.
_Order = Mapping[str, tuple[np.ndarray, np.ndarray]]


class AlikeGroups:
    """The cost of a model whose groups keep the same share within each set, as `CostModel` computes it.

    Widths are a vector in the order of the sets, (sets,): those of the first group of each. Groups of equal
    numbers of channels so have one width; others, such as the residual width and the width of a head, keep
    their ratio.

    Args:
        cost_model: of the model.
        alike: patterns, or several of them joined by commas; the groups that one of them matches keep one
            share. Patterns that match the same group form one set.

    Attributes:
        groups: the first group of each set. full: the full widths of the sets, (sets,).

    Raises:
        PruningError: for a pattern that matches no group, and for groups whose numbers of channels have no
            common divisor.
    """

    def __init__(self, cost_model: CostModel, alike: Sequence[str]):
        self.cost_model = cost_model
        names = cost_model.groups
        self.of_group = np.arange(len(names))
        for pattern in alike:
            parts = [part.strip() for part in pattern.split(",")]
            matched = [i for i, name in enumerate(names) if any(fnmatchcase(name, part) for part in parts)]
            if not matched:
                raise PruningError(
                    f"alike={pattern!r} matches no group of this model; its groups: "
                    f"{', '.join(names) or 'none'}"
                )
            self.of_group[np.isin(self.of_group, self.of_group[matched])] = self.of_group[matched].min()
        firsts, self.of_group = np.unique(self.of_group, return_inverse=True)
        self.sets = [np.flatnonzero(self.of_group == i) for i in range(len(firsts))]
        self.groups, self.full = [names[i] for i in firsts], cost_model.full[firsts]
        #: For each group, the channels that it loses where all groups of its set lose the smallest share.
        self.units = np.ones(len(names))
        for several in self.sets:
            widths = cost_model.full[several]
            self.units[several] = widths / math.gcd(*widths.astype(int).tolist())
            if len(set(widths)) > 1 and (self.units[several] == widths).all():
                listed = ", ".join(f"{names[i]} {int(cost_model.full[i])}" for i in several)
                raise PruningError(
                    f"groups of different numbers of channels without a common divisor cannot be alike "
                    f"({listed}); give a pattern for each number"
                )
        self.share = self.units / self.units[firsts][self.of_group]

    def __call__(self, widths: np.ndarray) -> Cost:
        """Return the cost at the given widths of the sets."""
        return self.cost_model(self.expanded(widths))

    def expanded(self, widths: np.ndarray) -> np.ndarray:
        """Return the width of each group, (groups,)."""
        return np.round(widths[self.of_group] * self.share)

    def bounds(
        self, lowest: np.ndarray, highest: np.ndarray, multiples: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the least and the greatest width of each set, and of what it is a multiple.

        Args:
            lowest, highest, multiples: of the groups.

        Raises:
            PruningError: if no width suits all groups of a set.
        """
        units = [self.units[several] for several in self.sets]
        first = np.array([each[0] for each in units])
        steps = np.array([_step(multiples[s], each) for s, each in zip(self.sets, units, strict=True)])
        least, greatest = np.empty(len(first)), np.empty(len(first))
        for i, (several, each, step) in enumerate(zip(self.sets, units, steps, strict=True)):
            low = (lowest[several] / each).max()
            if (each > 1).any():
                low = min(np.ceil(low / step) * step, self.full[i] / each[0])
            least[i], greatest[i] = first[i] * low, first[i] * np.floor((highest[several] / each).min())
        for several, low, high in zip(self.sets, least, greatest, strict=True):
            if low > high:
                listed = ", ".join(self.cost_model.groups[i] for i in several)
                raise PruningError(
                    f"{listed} are to be alike, but their floors and widths exclude one another; give them "
                    "the same floor and width"
                )
        return least, greatest, first * steps

    def order(self, order: _Order) -> _Order:
        """Return for each set the sums of the scores of its groups' channels, the least of each first."""
        found = {}
        for name, several, full in zip(self.groups, self.sets, self.full, strict=True):
            sums = [
                _spread(order[self.cost_model.groups[i]][1], int(full))
                for i in several
                if self.cost_model.groups[i] in order
            ]
            if sums:
                found[name] = np.arange(int(full)), np.sum(sums, axis=0)
        return found

    def freed(self, widths: np.ndarray, channels: np.ndarray | float = 1.0) -> dict[str, np.ndarray]:
        """Return, by kind of cost, what is freed by narrowing each set alone by `channels`, (sets,)."""
        steps = np.broadcast_to(channels, widths.shape)
        alone = self.cost_model.freed(self.expanded(widths), steps[self.of_group] * self.share)
        freed = {what: np.array([each[s[0]] for s in self.sets]) for what, each in alone.items()}
        before = self(widths)
        for i, several in enumerate(self.sets):
            if len(several) > 1:
                narrower = widths.copy()
                narrower[i] -= steps[i]
                after = self(narrower)
                for what in freed:
                    freed[what][i] = getattr(before, what) - getattr(after, what)
        return freed


def _step(multiples: np.ndarray, units: np.ndarray) -> int:
    """Return the smallest number of units of which all widths are multiples of what they have to be.

    >>> _step(np.array([4.0, 1.0]), np.array([6.0, 1.0]))
    2
    """
    pairs = zip(multiples.astype(int).tolist(), units.astype(int).tolist(), strict=True)
    return math.lcm(*(multiple // math.gcd(multiple, unit) for multiple, unit in pairs))


def _spread(scores: np.ndarray, channels: int) -> np.ndarray:
    """Return scores with the same sums, of another number of channels that has them in the same shares.

    >>> _spread(np.array([1.0, 3.0, 5.0, 7.0]), 2).tolist()
    [4.0, 12.0]
    >>> _spread(np.array([1.0, 3.0]), 4).tolist()
    [0.5, 0.5, 1.5, 1.5]
    """
    total = np.concatenate([[0.0], np.cumsum(scores)])
    return np.diff(np.interp(np.linspace(0, len(scores), channels + 1), np.arange(len(total)), total))
