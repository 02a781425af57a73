"""Find the attributes of modules that hold the sizes which their code gives to views and splits."""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from torch import nn

from pruning.graph.groups import Positions, WidthAttribute
from pruning.surgery.width_attributes import attributes_with
from pruning.tracing.bisection import Structure
from pruning.tracing.grouping import positions_by_group
from pruning.tracing.record import Flow
from pruning.utils.modules import submodule


class Runs(Protocol):
    """What runs narrowed copies of a model.

    Attributes:
        sizes: attributes that follow the widths in all runs.
    """

    sizes: tuple[WidthAttribute, ...]

    def is_exact(self, sizes: Mapping[str, tuple[WidthAttribute, ...]]) -> bool: ...


@dataclass(frozen=True)
class CountedSize:
    """A size that an operation was given, and the channels that it counts.

    Attributes:
        module: name of the module whose code ran. counted: the positions that the size counts.
    """

    module: str
    counted: Positions


#: By name of a module, the attributes that its code reads.
Reads = Mapping[str, set[str]]

#: Types of modules, names and entries of a set of attributes.
Kind = tuple[tuple[type, str, tuple[int, ...]], ...]

#: Largest number of attribute sets to try for one group.
MOST_CANDIDATES = 16

#: A set of attributes that failed in this many modules of a type, and worked in none, is tried no more.
MOST_FAILURES = 2


def following(
    model: nn.Module,
    runs: Runs,
    sizes: Mapping[str, list[CountedSize]],
    structures: Mapping[str, Structure],
    reads: Reads | None = None,
    others: Iterable[str] = (),
) -> dict[str, tuple[WidthAttribute, ...]]:
    """Return the groups that can be narrowed if attributes are updated, with these attributes.

    Args:
        sizes: by group, the sizes that count its channels. structures: by group, what it has in common with
            groups of similar blocks.
        reads: by module, the attributes that its code reads; others are not tried. By default, all are.
        others: groups that can be narrowed without attributes, to compare in the same run if it succeeds.
    """
    known = {(size.module, size.attribute) for size in runs.sizes}
    candidates = {
        name: several
        for name, counted in sizes.items()
        if (several := list(_candidates(model, name, counted, reads, known)))
    }
    likely = {name: several[0] for name, several in candidates.items()}

    @functools.cache
    def works(name: str, place: int) -> bool:
        return runs.is_exact({name: candidates[name][place]})

    together = likely | dict.fromkeys(others, ())
    if not likely or runs.is_exact(together) or (len(together) > len(likely) and runs.is_exact(likely)):
        return likely
    if reads is not None:
        for by_role in (True, False):
            alike = _alike(model, works, candidates, structures, by_role)
            if not alike or runs.is_exact(alike):
                return alike
    alone: dict[str, tuple[WidthAttribute, ...]] = {}
    failures: Counter[Kind] = Counter()
    hopeless: set[tuple[Structure, int]] = set()  # no set of attributes works for groups of this structure
    for name, several in candidates.items():
        like = structures[name], len(several)
        for i, chosen in enumerate(() if like in hopeless else several):
            kind = _kind(model, chosen)
            if failures[kind] >= MOST_FAILURES:
                continue
            if works(name, i):
                alone[name], failures[kind] = chosen, -len(candidates)
                break
            failures[kind] += 1
        else:
            hopeless.add(like)
    return alone if alone and runs.is_exact(alone) else {}


def _alike(
    model: nn.Module,
    works: Callable[[str, int], bool],
    candidates: Mapping[str, list[tuple[WidthAttribute, ...]]],
    structures: Mapping[str, Structure],
    by_role: bool,
) -> dict[str, tuple[WidthAttribute, ...]]:
    """Return attributes that work for the first group of each shape and role, for all groups like it.

    The role is the name without the layer, such as `heads` or `width`. Groups of one shape have different
    widths; those with the same choice of attributes get one answer. Whether the attributes work together is
    not tried.

    Args:
        works: function (group, place): whether a candidate of the group, by its place, works.
        by_role: whether to take, untried, attributes that work for a group of the same role and another
            shape, such as the heads of another stage.
    """
    places: dict[tuple[str, str, tuple[Kind, ...]], int | None] = {}
    known: dict[str, set[frozenset[tuple[type, str, tuple[int, ...]]]]] = {}
    chosen = {}
    for name, several in candidates.items():
        kinds = tuple(_kind(model, attributes) for attributes in several)
        read = [frozenset(kind) for kind in kinds]
        role = name.partition("/")[2]
        of_role = known.setdefault(role, set()) if by_role else set()
        like = role, structures[name].shape, kinds
        if like not in places:
            known_first = sorted(range(len(several)), key=lambda i: read[i] not in of_role)
            places[like] = next((i for i in known_first if read[i] in of_role or works(name, i)), None)
        place = places[like]
        if place is not None:
            chosen[name] = several[place]
            of_role.add(read[place])
    return chosen


def _kind(model: nn.Module, attributes: tuple[WidthAttribute, ...]) -> Kind:
    """Return the types of modules, names and entries of attributes."""
    return tuple((type(submodule(model, a.module)), a.attribute, a.entries) for a in attributes)


def with_heads(
    model: nn.Module,
    runs: Runs,
    chosen: dict[str, tuple[WidthAttribute, ...]],
    sizes: Mapping[str, list[CountedSize]],
    others: Iterable[str] = (),
) -> dict[str, tuple[WidthAttribute, ...]]:
    """Let attributes named after heads follow too, though the pass did not need them; drop chance ones.

    Code that the example inputs do not reach, as that of a cache, may read `num_heads`. An attribute that
    the pass reads, but does not need, has the same value by chance.

    Args:
        others: groups that were compared together with those of `chosen`.
    """
    unsized: dict[str, tuple[WidthAttribute, ...]] = dict.fromkeys(others, ())
    kinds = {(type(submodule(model, a.module)), a.attribute) for several in chosen.values() for a in several}
    for kind in sorted(kinds, key=lambda kind: kind[1]):
        if _names_heads(kind[1]):
            continue
        fewer = {
            name: tuple(a for a in several if (type(submodule(model, a.module)), a.attribute) != kind)
            for name, several in chosen.items()
        }
        if all(fewer.values()) and runs.is_exact(fewer | unsized):
            chosen = fewer
    more = {
        name: merged([several, *(_held(model, s, None) for s in sizes[name])], partial(_fits_name, name))
        for name, several in chosen.items()
    }
    return more if runs.is_exact(more | unsized) else chosen


def _names_heads(attribute: str) -> bool:
    return "head" in attribute.lower()


def _fits_name(group: str, attribute: str) -> bool:
    """Whether an attribute is named after what a group holds: the heads, or the places within one.

    >>> [_fits_name(group, "num_heads") for group in ("q/heads", "q/width")]
    [True, False]
    """
    counts = re.search(r"heads$|^(n|num).*head$", attribute.lower()) is not None
    return _names_heads(attribute) and counts == group.endswith("/heads")


def counted_sizes(
    found: Flow, labels: Mapping[str, np.ndarray], names: Iterable[str]
) -> dict[str, list[CountedSize]]:
    """Return for each of the groups the sizes that count its channels."""
    sizes: dict[str, list[CountedSize]] = {name: [] for name in names}
    seen = set()
    for extent in found.extents:
        counted = found.channels(extent.labels)
        key = extent.module, counted.tobytes()
        if not sizes or key in seen:
            continue
        seen.add(key)
        positions = positions_by_group(counted, labels)
        for group in sizes.keys() & positions.owners.keys():
            sizes[group].append(CountedSize(extent.module, positions))
    return sizes


def known_sizes(found: Flow, labels: Mapping[str, np.ndarray]) -> tuple[WidthAttribute, ...]:
    """Return the attributes that are known to hold widths of groups.

    Args:
        labels: by group, the labels of its channels.
    """
    sizes: dict[tuple[str, str], WidthAttribute] = {}
    for known in found.known:
        positions = positions_by_group(found.channels(known.labels), labels)
        if positions.owners:
            size = WidthAttribute(known.module, known.attribute, (), positions)
            sizes.setdefault((known.module, known.attribute), size)
    return tuple(sizes.values())


def _held(model: nn.Module, size: CountedSize, reads: Reads | None) -> tuple[WidthAttribute, ...]:
    """Return the attributes of the module whose code ran that are equal to a size."""
    return tuple(
        WidthAttribute(size.module, attribute, entries, size.counted)
        for attribute, entries in attributes_with(submodule(model, size.module), size.counted.size)
        if reads is None or attribute in reads.get(size.module, ())
    )


def _candidates(
    model: nn.Module, name: str, sizes: list[CountedSize], reads: Reads | None, known: Set[tuple[str, str]]
) -> Iterator[tuple[WidthAttribute, ...]]:
    """Yield sets of attributes that the code may read a group's sizes from, likely ones first.

    Modules of one type, and of one place in blocks that are numbered, read a size from the same attribute, so
    that many blocks have as few sets as one.

    Args:
        name: of the group. known: attributes that are known to follow, by module and name.
    """
    alike: dict[tuple[Kind, str], list[tuple[WidthAttribute, ...]]] = {}
    for size in sizes:
        held = [a for a in _held(model, size, reads) if (a.module, a.attribute) not in known]
        if held:
            held.sort(key=lambda attribute: not _fits_name(name, attribute.attribute))
            place = re.sub(r"\d+", "", size.module)
            alike.setdefault((_kind(model, tuple(held)), place), []).append(tuple(held))
    choices: list[list[tuple[WidthAttribute, ...]]] = []
    for several in alike.values():
        single = [tuple(each) for each in zip(*several, strict=True)]
        both = [merged(several)] if len(single) > 1 else []
        choices.append([*single, *both, ()])
    for chosen in itertools.islice(itertools.product(*choices), MOST_CANDIDATES):
        if any(chosen):
            yield merged(chosen)


def merged(
    sets: Iterable[tuple[WidthAttribute, ...]], among: Callable[[str], bool] | None = None
) -> tuple[WidthAttribute, ...]:
    """Return the union of several sets of attributes; each attribute, or entry of a sequence, once.

    Args:
        among: which attributes of the sets after the first are taken, by name; by default, all.
    """
    union: list[WidthAttribute] = []
    taken: dict[tuple[str, str], set[int]] = {}
    for i, several in enumerate(sets):
        for size in several:
            if i and among is not None and not among(size.attribute):
                continue
            entries = taken.setdefault((size.module, size.attribute), set())
            wanted = set(size.entries) or {0}
            if not entries & wanted:
                entries |= wanted
                union.append(size)
    return tuple(union)
