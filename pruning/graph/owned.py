"""Widths as functions of the widths of groups: sums of terms, each a group's width or a product of several.

The number of kept positions of a layer is a linear function of the widths of the groups that own them,
except where a position has owners in two groups, as in attention: with h of its heads and d positions of each
head, a layer has h·d positions.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pruning.graph.groups import Positions, Trace
from pruning.graph.rule import Side

#: By group, positions and the channels that own them.
_Owners = list[tuple[int, np.ndarray]]


class Terms:
    """The terms of which the widths of a traced model are sums.

    Attributes:
        products: groups, by their numbers, whose widths a term multiplies; they follow the single groups.
        full: the terms at full width, (terms,).
        sides: by layer and side, the factor of each term in its width, (terms,).
        counted: by product of activations, the factors of its rows and of its columns, relative to the number
            of all positions, and the parts that do not depend on any group.
    """

    def __init__(self, trace: Trace):
        self.channels = np.array([group.channels for group in trace.groups.values()], dtype=np.float64)
        self._number = {name: i for i, name in enumerate(trace.groups)}
        self.products: list[tuple[int, ...]] = []
        sides = {key: self._factors(owners) for key, owners in _owners_of_sides(trace).items()}
        counted = [(self._share(use.rows), self._share(use.columns)) for use in trace.products]
        self.full = self.at(self.channels)
        self.sides = {key: self._vector(factors) for key, factors in sides.items()}
        self.counted = [tuple((self._vector(factors), fixed) for factors, fixed in both) for both in counted]

    def at(self, widths: np.ndarray) -> np.ndarray:
        """Return the terms at given widths, (groups,) or (groups, plans)."""
        if not self.products:
            return widths
        return np.concatenate([widths, [np.prod(widths[list(term)], axis=0) for term in self.products]])

    def lost(self, matrix: np.ndarray, widths: np.ndarray, channels: np.ndarray | float) -> np.ndarray:
        """Return what rows, (rows, terms), lose if each group alone loses channels, (rows, groups)."""
        groups = len(widths)
        lost = matrix[:, :groups] * channels
        if self.products:
            each = np.broadcast_to(channels, widths.shape)
            change = np.zeros((len(self.products), groups))
            for row, term in zip(change, self.products, strict=True):
                for group in term:
                    others = [other for other in term if other != group]
                    row[group] = np.prod(widths[others]) * each[group]
            lost = lost + matrix[:, groups:] @ change
        return lost

    def _vector(self, factors: Mapping[tuple[int, ...], float]) -> np.ndarray:
        vector = np.zeros(len(self.full))
        for term, factor in factors.items():
            single = len(term) == 1
            vector[term[0] if single else len(self.channels) + self.products.index(term)] = factor
        return vector

    def _share(self, positions: Positions) -> tuple[dict[tuple[int, ...], float], float]:
        """Return the factors of the terms in the share of positions that is kept, and the constant part."""
        owners = [(self._number[g], index.numpy()) for g, (index, _) in positions.owners.items()]
        if not owners:
            return {}, 1.0
        factors = {term: factor / positions.size for term, factor in self._factors(owners).items()}
        owned = len(np.unique(np.concatenate([index for _, index in owners])))
        return factors, 1 - owned / positions.size

    def _factors(self, owners: _Owners) -> dict[tuple[int, ...], float]:
        """Return the factor of each term in the number of positions with these owners."""
        factors: dict[tuple[int, ...], float] = {}
        index = np.concatenate([positions for _, positions in owners])
        if len(owners) == 1 or len(np.unique(index)) == len(index):
            for group, positions in owners:
                factors[group,] = factors.get((group,), 0.0) + len(positions) / self.channels[group]
            return factors
        owned = np.zeros((int(index.max()) + 1, len(self.channels)), dtype=bool)
        for group, positions in owners:
            owned[positions, group] = True
        kinds, counts = np.unique(owned[owned.any(1)], axis=0, return_counts=True)
        for kind, count in zip(kinds, counts.tolist(), strict=True):
            term = tuple(np.flatnonzero(kind).tolist())
            if len(term) > 1 and term not in self.products:
                self.products.append(term)
            factors[term] = factors.get(term, 0.0) + count / float(np.prod(self.channels[list(term)]))
        return factors


def _owners_of_sides(trace: Trace) -> dict[tuple[str, Side], _Owners]:
    """Return, by layer and side, the groups that own its positions, by number, with these positions."""
    found: dict[tuple[str, Side], _Owners] = {}
    for i, group in enumerate(trace.groups.values()):
        for member in group.members:
            found.setdefault((member.layer, member.side), []).append((i, member.index.numpy()))
    return found
