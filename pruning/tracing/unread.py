"""Attributes that equal a width and are not read in the traced passes: other code may read them.

In training mode, with another value of a flag (`self.export`) or in another method (`forward_split`,
`sample`) a module may read the attribute. These calls are tried: where narrowed copies of the model fail, and
are right once the attribute is updated, the attribute follows the width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from pruning.graph.groups import HeldWidth, WidthAttribute
from pruning.tracing.attribute_reads import attributes_read
from pruning.tracing.bisection import faulty_groups
from pruning.tracing.held_widths import held_widths, names_read
from pruning.tracing.narrowed_runs import NarrowedRuns
from pruning.tracing.other_calls import other_calls, reparameterization
from pruning.tracing.probing import CURE, WidthProbe
from pruning.tracing.size_attributes import CountedSize, following, merged
from pruning.utils.entries import Entry
from pruning.utils.modules import submodule


@dataclass(frozen=True)
class Unread:
    """What other code than that of the traced passes does with widths.

    Attributes:
        reasons: groups with which the model fails in training mode, with the reason.
        sizes: attributes that follow the widths, those of the traced passes included.
        stale: attributes that equal a width and that no call read.
    """

    reasons: dict[str, str]
    sizes: tuple[WidthAttribute, ...]
    stale: tuple[HeldWidth, ...]


def find_unread(probe: WidthProbe, names: list[str], sizes: tuple[WidthAttribute, ...]) -> Unread:
    """Try code that the traced passes did not run.

    Args:
        probe: of the traced model.
        names: the groups that can be narrowed.
        sizes: attributes that follow the widths so far.
    """
    model = probe.model
    held = held_widths(model, {name: probe.groups[name] for name in names})
    runs, reasons = probe.runs.with_sizes(sizes), dict[str, str]()
    trains = any(_reads_mode(type(module)) for module in model.modules())
    if trains and names:
        reasons, sizes = _in_training(probe, names, sizes, held)
        names = [name for name in names if name not in reasons]
        runs = probe.runs.with_training().with_sizes(sizes)
    known = {(size.module, size.attribute) for size in sizes}
    held = [each for each in held if each.place not in known and each.groups & {*names}]
    if held:
        read = attributes_read(runs.probe(), [each.place for each in held], runs.run)
        held = [each for each in held if each.place not in read]
    sizes, held = _tried(probe, sizes, held)
    first = {each.place: each for each in reversed(held)}
    return Unread(reasons, sizes, tuple(reversed(first.values())))


def _reads_mode(kind: type[nn.Module]) -> bool:
    """Whether code outside torch depends on training mode."""
    return not kind.__module__.startswith("torch.nn.") and "training" in names_read(kind)


def _in_training(
    probe: WidthProbe, names: list[str], sizes: tuple[WidthAttribute, ...], held: list[HeldWidth]
) -> tuple[dict[str, str], tuple[WidthAttribute, ...]]:
    """Return the groups with which the model fails in training mode alone, and the attributes to update."""
    runs = probe.runs.with_training().with_sizes(sizes)
    if not runs.training_error(names) or runs.training_error(()):
        return {}, sizes
    at_fault = faulty_groups(runs.training_error, names, probe.structures)
    found = following(probe.model, runs, _by_group(held, at_fault), probe.structures)
    reasons = {
        name: f"in training mode, the model's code is tied to its width: with fewer channels, {error}. {CURE}"
        for name, error in at_fault.items()
        if name not in found
    }
    return reasons, merged((sizes, *found.values()))


def _by_group(held: Iterable[HeldWidth], names: Iterable[str]) -> dict[str, list[CountedSize]]:
    """Return for each group the sizes that its attributes may hold."""
    sizes: dict[str, dict[tuple[str, int], CountedSize]] = {name: {} for name in names}
    for each in held:
        for name in each.groups & sizes.keys():
            size = CountedSize(each.attribute.module, each.attribute.counted)
            sizes[name].setdefault((size.module, size.counted.size), size)
    return {name: list(found.values()) for name, found in sizes.items()}


def _tried(
    probe: WidthProbe, sizes: tuple[WidthAttribute, ...], held: list[HeldWidth]
) -> tuple[tuple[WidthAttribute, ...], list[HeldWidth]]:
    """Let attributes follow that another call proves to be widths; return these and the others."""
    if (entry := reparameterization(probe.model, probe.runs.inputs)) is not None and held:
        runs = probe.runs.with_sizes(sizes)
        read = _reads_of(runs, [each.place for each in held], entry)
        found = _proven(probe, runs, [each for each in held if each.place in read], entry)
        followed = {(size.module, size.attribute) for size in found}
        sizes, held = merged((sizes, found)), [each for each in held if each.place not in followed]
    by_kind: dict[tuple[type[nn.Module], str], list[HeldWidth]] = {}
    for each in held:
        module, attribute = each.place
        by_kind.setdefault((type(submodule(probe.model, module)), attribute), []).append(each)
    left: list[HeldWidth] = []
    reads: _ReadsOfCalls = {}
    for kind, several in by_kind.items():
        runs = probe.runs.with_sizes(sizes)
        modules = list(dict.fromkeys(each.attribute.module for each in several))
        calls = other_calls(probe.model, modules, kind[1], runs.inputs)
        found = ()
        for entry in calls:
            key = kind[0], tuple(modules), entry.name
            if key not in reads:
                of_kind = [
                    each.place for other, some in by_kind.items() if other[0] is kind[0] for each in some
                ]
                reads[key] = _reads_of(runs, of_kind, entry)
            found = _proven(probe, runs, [each for each in several if each.place in reads[key]], entry)
            if found:
                break
        sizes = merged((sizes, found))
        followed = {(size.module, size.attribute) for size in found}
        left += [each for each in several if each.place not in followed]
    return sizes, left


#: By type and names of modules and the name of another call, the attributes that the call reads.
_ReadsOfCalls = dict[tuple[type[nn.Module], tuple[str, ...], str], set[tuple[str, str]]]


def _reads_of(runs: NarrowedRuns, places: list[tuple[str, str]], entry: Entry) -> set[tuple[str, str]]:
    """Return which attributes, given by module and name, another call of the model reads."""
    with runs.shapes():
        return attributes_read(
            runs.probe(own=True).eval(), places, lambda probe: entry.run(probe, runs.convert)
        )


def _proven(
    probe: WidthProbe, runs: NarrowedRuns, held: list[HeldWidth], entry: Entry
) -> tuple[WidthAttribute, ...]:
    """Return the attributes without which narrowed copies are wrong in a call, and with which right."""
    names = list(dict.fromkeys(name for each in held for name in each.groups))
    if not names:
        return ()
    try:
        runs = runs.with_entry(entry)
    except Exception:  # the model need not run in this way
        return ()
    if not (runs.error(names) or runs.mismatch(names, (), 1 / 3)):
        return ()
    whole = {name: merged([(each.attribute,) for each in held if name in each.groups]) for name in names}
    if runs.is_exact(whole):
        return merged(whole.values())
    found = following(probe.model, runs, _by_group(held, names), probe.structures)
    return merged(found.values())
