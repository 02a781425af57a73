"""Find groups whose width is a constant in the model's code, by running narrowed copies of the model.

The code may compute the sizes of a view or a split from its input, or hold them as constants: with
constants, a narrowed copy fails. If an attribute of the module that ran holds the size, the copy runs
once the attribute is updated. Otherwise the size is a constant in the code, and the group is not pruned.
A layer with code of its own (standardized weights, for example) may run in a narrowed copy and compute
something else: a comparison of the outputs detects that.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pruning.graph.groups import Group, WidthAttribute
from pruning.surgery.width_attributes import attributes_with
from pruning.tracing.bisection import Structure, faulty_groups, structure_of
from pruning.tracing.labels import Flow
from pruning.tracing.narrowed_runs import NarrowedRuns, merged
from pruning.tracing.ties import NONE
from pruning.utils.entries import Entry
from pruning.utils.outputs import Outputs
from pruning.utils.tree import Inputs


@dataclass(frozen=True)
class CountedSize:
    """A size that an operation was given, and the channels that it counts.

    Attributes:
        module: name of the module whose code ran. value: the size.
        owned: by group, how many positions each channel contributes to it, (channels,).
    """

    module: str
    value: int
    owned: dict[str, torch.Tensor]


CURE = (
    "Compute the sizes of views and splits from those of their inputs, or keep them in attributes of the "
    "module that uses them, to let it be pruned"
)

#: Largest number of attribute sets to try for one group.
MOST_CANDIDATES = 16

#: A set of attributes that failed in this many modules of a type, and worked in none, is tried no more.
MOST_FAILURES = 2


class WidthProbe:
    """Find groups that the code of the model, or of one of its layers, does not allow to be narrowed.

    Args:
        model, inputs: as given to `trace`; not changed.
        found: the record of the traced forward pass.
        groups: groups that nothing else excludes from pruning.
        labels: by group, the labels of its channels.
        outputs: which outputs count.
        also: other calls of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        found: Flow,
        groups: dict[str, Group],
        labels: Mapping[str, np.ndarray],
        outputs: Outputs = None,
        also: tuple[Entry, ...] = (),
    ):
        self.model, self.found, self.groups, self.labels = model, found, groups, labels
        self.runs = NarrowedRuns(model, inputs, found, groups, labels, outputs, also)
        self.structures = {name: structure_of(model, found, group) for name, group in groups.items()}

    def code_bound(self) -> tuple[dict[str, str], tuple[WidthAttribute, ...]]:
        """Return the groups that cannot be narrowed, with the reason, and the attributes to update."""
        found, groups, labels = self.found, self.groups, self.labels
        sized = np.unique(found.ties.find(np.concatenate([np.arange(0), *found.sized])))
        sized = sized[sized != NONE]
        # Other calls of the model may exchange modules, and are then not followed.
        suspect = [name for name in groups if self.runs.also or np.isin(labels[name], sized).any()]
        at_fault = faulty_groups(self.runs.error, suspect, self.structures)
        if at_fault or not np.isin(sized, np.concatenate([np.arange(0), *labels.values()])).all():
            # The sizes of tensors that are not pruned may be computed from those of any group.
            others = [name for name in groups if name not in suspect]
            at_fault |= faulty_groups(self.runs.error, others, self.structures)
        reasons = {
            name: f"the model's code is tied to its width: with fewer channels, {error}. {CURE}"
            for name, error in at_fault.items()
        }
        misplaced = self._misplaced([name for name in groups if name not in at_fault])
        reasons |= {name: f"{why}. {CURE}" for name, why in misplaced.items()}
        attributes = following(self.model, self.runs, _counted_sizes(found, labels, reasons), self.structures)
        reasons = {name: reason for name, reason in reasons.items() if name not in attributes}
        return reasons, merged(attributes.values())

    def _misplaced(self, names: list[str]) -> dict[str, str]:
        """Return the groups of which a slice or split would select other channels after pruning."""
        why: dict[str, str] = {}
        for labels, reason in self.found.by_position:
            roots = self.found.ties.find(labels)
            for name in names:
                if name not in why and np.isin(self.labels[name], roots).any():
                    why[name] = reason

        def mismatch_at_two_widths(some: list[str]) -> str:
            """Compare at two widths: a wrong bound of a slice may be right by chance at one of them."""
            return self.runs.mismatch(some, (), 1 / 3) or self.runs.mismatch(some, (), 2 / 3)

        changed = faulty_groups(mismatch_at_two_widths, list(why), self.structures)
        return {name: why[name] for name in changed}

    def mixing(self, names: Iterable[str], sizes: tuple[WidthAttribute, ...]) -> dict[str, str]:
        """Return the groups whose channels a layer's own code mixes, with the reason.

        Only if there are layers with code of their own, outputs are compared, in two forward passes.
        """
        own = {name: code for name in names if (code := _own_code(self.model, self.groups[name]))}
        changed = faulty_groups(lambda some: self.runs.mismatch(some, sizes), list(own), self.structures)
        return {
            name: f"{own[name]} has code of its own, and with fewer channels the model does not compute what "
            f"the masked one does ({error}). Replace it by a layer of torch, with the weights that it "
            "computes with, to let it be pruned"
            for name, error in changed.items()
        }


def _own_code(model: nn.Module, group: Group) -> str:
    """Describe the first layer of a group, readers before makers, with code outside torch; else ""."""
    if group.reductions:
        where = group.reductions[0].module
        return f"{where} ({type(model.get_submodule(where)).__name__})".lstrip()
    for member in (*group.side("in"), *group.side("out")):
        kind = type(model.get_submodule(member.layer))
        codes = (getattr(kind, name, kind) for name in ("forward", "_conv_forward"))
        if any(getattr(code, "__module__", "").partition(".")[0] != "torch" for code in codes):
            return f"{member.layer} ({kind.__name__})"
    return ""


# --- attributes that hold a size ------------------------------------------------------------


def following(
    model: nn.Module,
    runs: NarrowedRuns,
    sizes: Mapping[str, list[CountedSize]],
    structures: Mapping[str, Structure],
) -> dict[str, tuple[WidthAttribute, ...]]:
    """Return the groups that can be narrowed if attributes are updated, with these attributes."""
    candidates = {
        name: several for name, counted in sizes.items() if (several := list(_candidates(model, counted)))
    }
    likely = {name: several[0] for name, several in candidates.items()}
    if not likely or runs.is_exact(likely):
        return likely
    alone: dict[str, tuple[WidthAttribute, ...]] = {}
    failures: Counter[tuple[tuple[type, str, tuple[int, ...]], ...]] = Counter()
    hopeless: set[tuple[Structure, int]] = set()  # no set of attributes works for groups of this structure
    for name, several in candidates.items():
        like = structures[name], len(several)
        for chosen in () if like in hopeless else several:
            kind = tuple((type(model.get_submodule(s.module)), s.attribute, s.entries) for s in chosen)
            if failures[kind] >= MOST_FAILURES:
                continue
            if runs.is_exact({name: chosen}):
                alone[name], failures[kind] = chosen, -len(candidates)
                break
            failures[kind] += 1
        else:
            hopeless.add(like)
    return alone if alone and runs.is_exact(alone) else {}


def _counted_sizes(
    found: Flow, labels: Mapping[str, np.ndarray], names: Iterable[str]
) -> dict[str, list[CountedSize]]:
    """Return for each of the groups the sizes that count its channels."""
    belongs: dict[int, tuple[str, int]] = {}
    for group, own in labels.items():
        belongs.update((label, (group, channel)) for channel, label in enumerate(own.tolist()))
    sizes: dict[str, list[CountedSize]] = {name: [] for name in names}
    seen = set()
    for extent in found.extents:
        counted = found.ties.find(extent.labels)
        key = extent.module, counted.tobytes()
        if not sizes or key in seen:
            continue
        seen.add(key)
        owned: dict[str, torch.Tensor] = {}
        for group, channel in filter(None, map(belongs.get, counted.tolist())):
            owned.setdefault(group, torch.zeros(len(labels[group]), dtype=torch.long))[channel] += 1
        for group in sizes.keys() & owned.keys():
            sizes[group].append(CountedSize(extent.module, len(counted), owned))
    return sizes


def _candidates(model: nn.Module, sizes: list[CountedSize]) -> Iterator[tuple[WidthAttribute, ...]]:
    """Yield sets of attributes that the code may read a group's sizes from, likely ones first."""
    choices: list[list[tuple[WidthAttribute, ...]]] = []
    for size in sizes:
        held = [
            WidthAttribute(size.module, attribute, entries, size.owned)
            for attribute, entries in attributes_with(model.get_submodule(size.module), size.value)
        ]
        if held:
            several = [tuple(held)] if len(held) > 1 else []
            choices.append([*((each,) for each in held), *several, ()])
    for chosen in itertools.islice(itertools.product(*choices), MOST_CANDIDATES):
        if any(chosen):
            yield merged(chosen)
