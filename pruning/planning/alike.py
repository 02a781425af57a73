"""Groups that have one width: the search for widths treats each set of them as one group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np

from pruning.errors import PruningError
from pruning.planning.cost import Cost, CostModel

#: By group, its channels in ascending order of importance, and their scores in that order.
_Order = Mapping[str, tuple[np.ndarray, np.ndarray]]


class AlikeGroups:
    """The cost of a model whose groups have the same width within each set, as `CostModel` computes it.

    Widths are a vector in the order of the sets, (sets,).

    Args:
        cost_model: of the model.
        alike: patterns, or several of them joined by commas; the groups that one of them matches have one
            width. Patterns that match the same group form one set.

    Attributes:
        groups: the first group of each set. full: the full widths of the sets, (sets,).

    Raises:
        PruningError: for a pattern that matches no group, and for groups of different numbers of channels.
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
        for several in self.sets:
            widths = cost_model.full[several]
            if len(set(widths)) > 1:
                listed = ", ".join(f"{names[i]} {int(cost_model.full[i])}" for i in several)
                raise PruningError(
                    f"groups of different numbers of channels cannot be alike ({listed}); give a pattern for "
                    "each number"
                )

    def __call__(self, widths: np.ndarray) -> Cost:
        """Return the cost at the given widths of the sets."""
        return self.cost_model(self.expanded(widths))

    def expanded(self, widths: np.ndarray) -> np.ndarray:
        """Return the width of each group, (groups,)."""
        return widths[self.of_group]

    def bounds(self, lowest: np.ndarray, highest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the least and the greatest width of each set, from those of the groups.

        Raises:
            PruningError: if no width suits all groups of a set.
        """
        least = np.array([lowest[several].max() for several in self.sets])
        greatest = np.array([highest[several].min() for several in self.sets])
        for several, low, high in zip(self.sets, least, greatest, strict=True):
            if low > high:
                listed = ", ".join(self.cost_model.groups[i] for i in several)
                raise PruningError(
                    f"{listed} are to be alike, but their floors and widths exclude one another; give them "
                    "the same floor and width"
                )
        return least, greatest

    def order(self, order: _Order) -> _Order:
        """Return for each set the sums of the scores of its groups' channels, the least of each first."""
        found = {}
        for name, several in zip(self.groups, self.sets, strict=True):
            members = [
                order[self.cost_model.groups[i]] for i in several if self.cost_model.groups[i] in order
            ]
            if members:
                found[name] = members[0][0], np.sum([scores for _, scores in members], axis=0)
        return found

    def freed(self, widths: np.ndarray, channels: np.ndarray | float = 1.0) -> dict[str, np.ndarray]:
        """Return, by kind of cost, what is freed by narrowing each set alone by `channels`, (sets,)."""
        steps = np.broadcast_to(channels, widths.shape)
        alone = self.cost_model.freed(self.expanded(widths), self.expanded(steps))
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
