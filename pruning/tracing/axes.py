"""Channels that lie along several dimensions of one tensor, such as the heads of attention and their widths.

A view that divides the channels of a layer into heads gives each channel two places: a head and a position
within the head. Code that works on the view demands that every head has the same positions, so a channel is
removed if its head or its position is removed. So each channel of such a grid is defined by a set of labels,
one along each dimension (an axis). Labels without a definition are those of which groups are made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pruning.tracing.ties import NONE, Ties, is_among, spread, unique, unique_columns, varying

#: Definitions are followed to this depth; deeper ones refer to themselves.
_DEEPEST = 12

#: A label stands for fewer others than this; one that stands for more refers to itself.
_MOST_PARTS = 64


@dataclass(frozen=True)
class Definition:
    """Labels that stand for others: a label is removed if one of those in its column is.

    Attributes:
        labels: the defined labels, (labels,). parts: what they stand for, (axes, labels).
        grid: for channels that a view divides, their labels in the shape of the view; otherwise None.
    """

    labels: np.ndarray
    parts: np.ndarray
    grid: np.ndarray | None = None


@dataclass(frozen=True)
class ProductUse:
    """A product of activations, which has `macs` MACs in the pass.

    Attributes:
        macs: multiply-adds of the product. rows: labels of the positions in the batch and the rows.
        columns: labels of the positions that are summed over and in the columns; None without channels.
    """

    macs: float
    rows: np.ndarray | None
    columns: np.ndarray | None


class Axes:
    """Definitions of labels by labels along single dimensions.

    Args:
        ties: which labels belong to the same channel.
    """

    def __init__(self, ties: Ties):
        self.ties = ties
        self.definitions: list[Definition] = []
        #: Vectors of labels along one dimension of a grid.
        self.vectors_made: list[np.ndarray] = []
        #: Labels that products of activations sum over, multiply batch by batch, or pass on.
        self.roles: dict[str, list[np.ndarray]] = {"heads": [], "qk": [], "v": []}
        #: Labels along which code selects by position, so that none of them is removed.
        self.constant: list[np.ndarray] = []
        #: Labels that must not be removed, because the grid has positions without a channel.
        self.fixed: list[np.ndarray] = []
        self._definition = np.full(0, -1)
        self._column = np.full(0, -1)
        self._known: dict[tuple[object, ...], dict[int, Tensor]] = {}
        self._composed: dict[tuple[object, ...], Tensor] = {}
        self._refined: set[bytes] = set()

    # --- during the pass -----------------------------------------------------------------

    def vectors(self, labels: Tensor) -> dict[int, Tensor]:
        """Return the labels of a grid along each of its dimensions; define those without a definition."""
        key = tuple(labels.shape), labels.numpy().tobytes(), len(self.constant)
        if key not in self._known:
            self._known[key] = self._along_dimensions(labels)
        return self._known[key]

    def is_defined(self, labels: Tensor) -> bool:
        """Whether all labels have definitions, as those of a grid that a view has made."""
        flat = labels.numpy().ravel()
        return bool((self._definition_of(flat[flat != NONE]) >= 0).all())

    def single(self, labels: Tensor) -> Tensor:
        """Return what all labels of a tensor stand for: the single position that it holds of a dimension."""
        sets = self.parts(labels.numpy().ravel())
        same = sets[0][(sets == sets[0]).all(0)]
        return torch.from_numpy(same[same != NONE])

    def compose(self, vectors: Mapping[int, Tensor], rank: int) -> Tensor | None:
        """Return the labels of a tensor that has these labels along its dimensions."""
        if len(vectors) < 2:
            return next((spread(vector, rank, dim) for dim, vector in vectors.items()), None)
        ordered = [(dim, vectors[dim]) for dim in sorted(vectors)]
        key = rank, *((dim, vector.numpy().tobytes()) for dim, vector in ordered)
        if key not in self._composed:
            grids = torch.broadcast_tensors(*(spread(vector, rank, dim) for dim, vector in ordered))
            made = self.combine([grid.reshape(-1) for grid in grids])
            self._composed[key] = made.reshape(grids[0].shape)
        return self._composed[key]

    def combine(self, vectors: list[Tensor]) -> Tensor:
        """Return a vector of labels, each removed if one of those at its place is."""
        if len(vectors) == 1:
            return vectors[0]
        distinct, place = unique_columns(np.stack([vector.numpy() for vector in vectors]))
        made = self.ties.new(distinct.shape[1])
        self._define(Definition(made, distinct))
        labels = np.where((distinct == NONE).all(0), NONE, made)
        return torch.from_numpy(labels[place])

    def _along_dimensions(self, labels: Tensor) -> dict[int, Tensor]:
        dims = varying(labels)
        sizes = [labels.shape[d] for d in dims]
        sets = self.parts(labels.numpy().ravel())
        if not dims:
            return {}
        found: dict[int, list[Tensor]] = {}
        for column in sets.T.reshape(-1, *sizes):
            along = [i for i in range(len(dims)) if (column != column.take([0], axis=i)).any()]
            if len(along) > 1:
                others = tuple(slice(None) if i in along else 0 for i in range(len(dims)))
                vectors = self._divide(column[others])
            elif not along:
                continue  # a single position along another dimension, see `single`
            else:
                vectors = [column[tuple(slice(None) if i == along[0] else 0 for i in range(len(dims)))]]
            for i, vector in zip(along, vectors, strict=True):
                if (vector != NONE).any():
                    found.setdefault(dims[i], []).append(torch.from_numpy(np.ascontiguousarray(vector)))
        return {dim: self.combine(several) for dim, several in found.items()}

    def _divide(self, grid: np.ndarray) -> list[np.ndarray]:
        """Define the labels of a grid by new labels along its dimensions, and return these."""
        vectors = [self.ties.new(size) for size in grid.shape]
        self.vectors_made += vectors
        flat = grid.ravel()
        parts = np.stack([x.ravel() for x in np.broadcast_arrays(*np.ix_(*vectors))])
        distinct, first, place = np.unique(flat, return_index=True, return_inverse=True)
        held = distinct != NONE
        self._define(Definition(distinct[held], parts[:, first[held]], grid))
        # A label at several places is removed from all of them.
        same = first[place.reshape(-1)]
        for row in parts:
            differ = (row != row[same]) & (flat != NONE)
            self.ties.union(row[differ], row[same][differ])
        self.fixed.append(parts[:, flat == NONE].ravel())
        return vectors

    def _define(self, definition: Definition) -> None:
        if self.ties.size > len(self._definition):
            more = np.full(max(self.ties.size, 2 * len(self._definition)) - len(self._definition), -1)
            self._definition = np.concatenate([self._definition, more])
            self._column = np.concatenate([self._column, more])
        self._definition[definition.labels] = len(self.definitions)
        self._column[definition.labels] = np.arange(len(definition.labels))
        self.definitions.append(definition)

    def _definition_of(self, labels: np.ndarray) -> np.ndarray:
        """Return the number of each label's definition; -1 where it has none."""
        known = (labels != NONE) & (labels < len(self._definition))
        return np.where(known, self._definition[np.where(known, labels, 0)], -1) if known.any() else known - 1

    def parts(self, labels: np.ndarray, final: bool = False) -> np.ndarray:
        """Return the labels without a definition that each label stands for, (labels, most), padded.

        Args:
            final: after `settle`: the smallest label tied to each.
        """
        own, place = unique(labels)  # a view of heads repeats them for each example and window
        sets = (self.ties.find(own) if final else own)[:, None]
        for _ in range(_DEEPEST):
            flat = sets.ravel()
            number = self._definition_of(flat)
            if (number < 0).all() or sets.shape[1] > _MOST_PARTS:
                break
            wide = max(len(self.definitions[n].parts) for n in np.unique(number) if n >= 0)
            deeper = np.full((len(flat), wide), NONE)
            deeper[:, 0] = np.where(number < 0, flat, NONE)
            for n in np.unique(number[number >= 0]).tolist():
                at, parts = number == n, self.definitions[n].parts
                deeper[at, : len(parts)] = parts[:, self._column[flat[at]]].T
            sets = deeper.reshape(len(own), -1)
            sets = sets[:, (sets != NONE).any(0)] if (sets != NONE).any() else sets[:, :1]
            sets = self.ties.find(sets) if final else sets
        constant = np.concatenate([np.arange(0), *self.constant])
        if len(constant):
            sets = np.where(is_among(sets, self.ties.find(constant) if final else constant), NONE, sets)
        return sets[place]

    def closure(self, labels: np.ndarray) -> np.ndarray:
        """Return labels and all labels that they stand for."""
        found = new = np.unique(labels)
        for _ in range(_DEEPEST):
            number = self._definition_of(new)
            deeper = [
                self.definitions[n].parts[:, self._column[new[number == n]]].ravel()
                for n in np.unique(number[number >= 0]).tolist()
            ]
            if not deeper:
                break
            new = np.unique(np.concatenate(deeper))
            found = np.union1d(found, new)
        return found

    # --- after the pass ------------------------------------------------------------------

    def settle(self) -> list[np.ndarray]:
        """Complete the definitions after the pass; return labels that must not be removed.

        Grids along whose dimensions no product works keep all positions of their smaller dimensions, as
        if these sizes were constants in the code.
        """
        self.fixed += self._collapse_unused()
        self.renew()
        labels = np.flatnonzero(self._definition >= 0)
        parts = self.parts(labels, final=True)
        circular = parts[self._definition_of(parts.ravel()).reshape(parts.shape) >= 0]
        return [*self.fixed, circular]

    def _collapse_unused(self) -> list[np.ndarray]:
        """Tie the labels of unused grids across all dimensions but the largest; return the other labels."""
        used = np.concatenate([np.arange(0), *(v for several in self.roles.values() for v in several)])
        used = np.unique(self.ties.find(np.concatenate([used, self.parts(used).ravel()])))
        waiting = dict(enumerate(self.definitions))
        while True:
            reached = [
                n
                for n, d in waiting.items()
                if is_among(
                    self.ties.find(d.labels if d.grid is None else np.append(d.parts, d.labels)), used
                ).any()
            ]
            if not reached:
                break
            made = [waiting.pop(n) for n in reached]
            more = np.concatenate([np.append(d.parts, d.labels) for d in made])
            used = np.union1d(used, self.ties.find(more))
        fixed = []
        for definition in waiting.values():
            grid = definition.grid
            if grid is None:
                continue
            largest = max(range(grid.ndim), key=lambda d: (grid.shape[d], d))
            rows = np.moveaxis(grid, largest, -1).reshape(-1, grid.shape[largest])
            for row in rows[1:]:
                held = (row != NONE) & (rows[0] != NONE)
                self.ties.union(rows[0][held], row[held])
            self._definition[definition.labels] = -1
            self.ties.union(definition.labels, definition.parts[largest])
            fixed += [parts for d, parts in enumerate(definition.parts) if d != largest]
        return fixed

    def _unite(self) -> bool:
        """Tie the parts of labels that are tied, once; return whether anything changed."""
        labels = np.flatnonzero(self._definition >= 0)
        roots = self.ties.find(labels)
        order = np.argsort(roots, kind="stable")
        labels, roots = labels[order], roots[order]
        first = np.searchsorted(roots, roots)
        others = np.flatnonzero(first != np.arange(len(roots)))
        left, right = labels[others], labels[first[others]]
        kinds = np.stack([self._definition[left], self._definition[right]])
        changed = False
        for pair in np.unique(kinds, axis=1).T:
            at = (kinds == pair[:, None]).all(0)
            a, b = (
                self.ties.find(self.definitions[n].parts[:, self._column[side[at]]])
                for n, side in zip(pair.tolist(), (left, right), strict=True)
            )
            changed |= self._tie_parts(a, b)
        return changed

    def _tie_parts(self, left: np.ndarray, right: np.ndarray) -> bool:
        """Tie two forms of the same labels, (axes, labels) each; return whether they differed."""
        if np.array_equal(np.sort(left, 0), np.sort(right, 0)):
            return False
        pairs, free = [], list(range(len(right)))
        lone = []
        for i, row in enumerate(left):
            candidates = sorted(free, key=lambda j: j != i)
            j = next((j for j in candidates if _match(row, right[j])), None)
            if j is None:
                lone.append(i)
            else:
                pairs.append((row, right[j]))
                free.remove(j)
        changed = False
        if len(lone) == len(free):
            pairs += [(left[i], right[j]) for i, j in zip(lone, free, strict=True)]
        elif len(lone) == 1 and free:
            changed = self._refine(left[lone[0]], right[free])
        elif len(free) == 1 and lone:
            changed = self._refine(right[free[0]], left[lone])
        elif lone or free:
            self.fixed.append(np.concatenate([left[lone].ravel(), right[free].ravel()]))  # the others agree
        for a, b in pairs:
            differ = (a != b) & (a != NONE) & (b != NONE)
            self.ties.union(a[differ], b[differ])
            changed |= bool(differ.any())
        return changed

    def _refine(self, labels: np.ndarray, parts: np.ndarray) -> bool:
        """Define labels by those of a finer division; return whether that is new."""
        distinct, first = np.unique(np.concatenate([labels[None], parts]), axis=1, return_index=True)
        key = distinct.tobytes()
        if key in self._refined:
            return False
        self._refined.add(key)
        finer = self.combine([torch.from_numpy(row[first]) for row in parts]).numpy()
        held = (labels[first] != NONE) & (finer != NONE)
        self.ties.union(labels[first][held], finer[held])
        return True

    def renew(self) -> None:
        """Unite the definitions of labels that are tied; let the smallest one have the definition."""
        while self._unite():
            pass
        labels = np.flatnonzero(self._definition >= 0)
        roots = self.ties.find(labels)
        if len(roots) and roots.max() >= len(self._definition):
            self._define(Definition(np.arange(0), np.zeros((1, 0), dtype=np.int64)))
        self._definition[roots], self._column[roots] = self._definition[labels], self._column[labels]

    def role_of(self, labels: np.ndarray) -> str:
        """Return what products do along channels, given by the smallest labels tied to them."""
        held = {role for role, several in self.roles.items() if several and self._are_in(labels, several)}
        if "heads" in held:
            return "heads"
        return "width" if {"qk", "v"} <= held else next(iter(held), "")

    def _are_in(self, labels: np.ndarray, vectors: Iterable[np.ndarray]) -> bool:
        return bool(is_among(labels, self.parts(np.concatenate(list(vectors)), final=True)).any())


def _match(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether each label of one vector is always paired with the same label of the other, and vice versa."""
    pairs = unique_columns(np.stack([left, right]))[0].shape[1]
    return pairs == len(np.unique(left)) == len(np.unique(right))
