"""Find groups whose width is a constant in the model's code, by running narrowed copies of the model.

The code may compute the sizes of a view or a split from its input, or hold them as constants: with
constants, a narrowed copy fails. If an attribute of the module that ran holds the size, the copy runs
once the attribute is updated. Otherwise the size is a constant in the code, and the group is not pruned.
A layer with code of its own (standardized weights, for example) may run in a narrowed copy and compute
something else: a comparison of the outputs detects that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
from torch import nn

from pruning.graph.groups import Group, Rescale, WidthAttribute
from pruning.graph.layers import is_registered
from pruning.tracing.bisection import faulty_groups, structure_of
from pruning.tracing.grouping import is_along_axis
from pruning.tracing.joining import tie_equal_sizes, tie_inputs, tie_views
from pruning.tracing.narrowed_runs import NarrowedRuns
from pruning.tracing.own_code import has_own_code, inexact_readers
from pruning.tracing.record import Flow
from pruning.tracing.size_attributes import counted_sizes, following, known_sizes, merged, with_heads
from pruning.tracing.ties import NONE, is_among
from pruning.utils.entries import Entry
from pruning.utils.modules import submodule
from pruning.utils.outputs import Outputs
from pruning.utils.tree import Inputs

CURE = (
    "Compute the sizes of views, splits and new tensors from those of their inputs, or keep them in "
    "attributes of the module that uses them, to let it be pruned"
)


#: Why a group is skipped if a view with a size of -1 takes heads for tokens.
_DIVIDED = "with fewer channels, the model's code divides them differently, and its outputs change"


def _tied(error: str) -> str:
    return f"the model's code is tied to its width: with fewer channels, {error}. {CURE}"


#: Groups by name, and the labels of their channels.
Groups = tuple[dict[str, Group], dict[str, np.ndarray]]


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
        labels: dict[str, np.ndarray],
        outputs: Outputs = None,
        also: tuple[Entry, ...] = (),
    ):
        self.model, self.found, self.groups, self.labels = model, found, groups, labels
        self.runs = NarrowedRuns(model, inputs, found, groups, labels, outputs, also)
        self.runs.sizes = self.known_sizes()
        #: By module, the attributes that its code reads, if only those are to be tried.
        self.reads: dict[str, set[str]] | None = None
        self.structures = {name: structure_of(model, found, group) for name, group in groups.items()}

    def rescales(self, names: Iterable[str]) -> tuple[Rescale, ...]:
        """Return the factors that keep the scales of products, of some groups."""
        return tuple(rescale for name in names for rescale in self.runs.scales.get(name, ()))

    def known_sizes(self) -> tuple[WidthAttribute, ...]:
        """Return the attributes of torch's own layers that hold widths of the groups."""
        return known_sizes(self.found, {name: self.labels[name] for name in self.groups})

    def code_bound(self) -> tuple[dict[str, str], tuple[WidthAttribute, ...]]:
        """Return the groups that cannot be narrowed, with the reason, and the attributes to update."""
        found, groups, labels = self.found, self.groups, self.labels
        if found.axes is not None:  # the more sizes there are, the more attributes equal one by chance
            self.reads = self.runs.reads()
        sized = np.unique(found.channels(np.concatenate([np.arange(0), *found.sized])))
        sized = sized[sized != NONE]
        # Other calls of the model may exchange modules, and are then not followed.
        suspect = [name for name in groups if self.runs.also or is_among(labels[name], sized).any()]
        assumed: set[str] = set()
        at_fault = faulty_groups(self.runs.error, suspect, self.structures, assumed)
        if at_fault or not is_among(sized, np.concatenate([np.arange(0), *labels.values()])).all():
            # The sizes of tensors that are not pruned may be computed from those of any group.
            others = [name for name in groups if name not in suspect]
            at_fault |= faulty_groups(self.runs.error, others, self.structures, assumed)
        reasons = {name: _tied(error) for name, error in at_fault.items()}
        misplaced = self._misplaced([name for name in groups if name not in at_fault], assumed)
        reasons |= {name: f"{why}. {CURE}" for name, why in misplaced.items()}
        attributes = self._following(reasons, [name for name in groups if name not in reasons])
        reasons = {name: reason for name, reason in reasons.items() if name not in attributes}
        if unsure := [name for name in reasons if name in assumed]:  # test those that no attribute cures
            at_fault = faulty_groups(self.runs.error, unsure, self.structures)
            misplaced = self._misplaced([name for name in unsure if name not in at_fault])
            reasons = {name: reason for name, reason in reasons.items() if name not in assumed}
            reasons |= {name: _tied(error) for name, error in at_fault.items()}
            reasons |= {name: f"{why}. {CURE}" for name, why in misplaced.items()}
            reasons = {name: reasons[name] for name in groups if name in reasons}
        return reasons, merged(attributes.values())

    def _following(
        self, names: Iterable[str], others: Iterable[str] = ()
    ) -> dict[str, tuple[WidthAttribute, ...]]:
        """Return those of the groups that can be narrowed if attributes are updated, with these.

        Args:
            others: groups that can be narrowed, to compare in the same run where that is possible.
        """
        sizes = counted_sizes(self.found, self.labels, names)
        chosen = following(self.model, self.runs, sizes, self.structures, self.reads, others)
        if self.reads is None or not chosen:
            return chosen
        compared = [name for name in others if name in self.runs.compared]
        return with_heads(self.model, self.runs, chosen, sizes, compared)

    def joined(self, reasons: dict[str, str], regroup: Callable[[], Groups]) -> tuple[WidthAttribute, ...]:
        """Join groups that cannot be narrowed alone, and return the attributes of those that can together.

        Joined groups take the place of their parts, also in `reasons`.

        Args:
            reasons: groups that cannot be narrowed alone, with the reason.
            regroup: returns the groups, and the labels of their channels, after more labels are tied.
        """
        found, attributes = self.found, list[tuple[WidthAttribute, ...]]()
        if reasons and self.reads is None:
            self.reads = self.runs.reads()
        for tie in (partial(tie_equal_sizes, reads=self.reads or {}), tie_inputs, tie_views):
            if not reasons or (tie in (tie_inputs, tie_views) and found.axes is None):
                break
            before, bound = copy.deepcopy((found.ties, found.axes)), len(reasons)
            if tie(self.model, found, self.labels, reasons):
                attributes += self._narrowed_together(reasons, *regroup())
            if len(reasons) == bound:  # sizes may be equal by chance
                found.ties, found.axes = before
        self.labels.update({name: found.ties.find(own) for name, own in self.labels.items()})
        return merged(attributes)

    def _narrowed_together(
        self, reasons: dict[str, str], groups: dict[str, Group], labels: dict[str, np.ndarray]
    ) -> Iterable[tuple[WidthAttribute, ...]]:
        """Let new groups take the place of those that cannot be narrowed alone, where that helps."""
        bound = {name: self.found.channels(self.labels[name]) for name in reasons}
        parts = {
            name: several
            for name, own in labels.items()
            if (several := [part for part in reasons if is_among(bound[part], own).any()])
        }
        for name in parts:
            self.runs.add(groups[name], labels[name])
            self.structures[name] = structure_of(self.model, self.found, groups[name])
        self.runs.sizes = self.known_sizes()
        at_fault = faulty_groups(self.runs.error, list(parts), self.structures)
        at_fault |= self._misplaced([name for name in parts if name not in at_fault])
        attributes = self._following(at_fault)
        for name, several in parts.items():
            if name in attributes or name not in at_fault:
                for part in several:
                    reasons.pop(part, None)
                    if part not in parts:
                        self.groups.pop(part, None)
            elif name not in reasons:
                del self.groups[name]
        return attributes.values()

    def _misplaced(self, names: list[str], assumed: set[str] | None = None) -> dict[str, str]:
        """Return the groups of which a view, slice or split would select other channels after pruning.

        Args:
            assumed: as `faulty_groups` takes it.
        """
        why = {
            name: _DIVIDED
            for name in names
            if self.groups[name].is_summed or is_along_axis(self.found, self.labels[name])
        }
        for labels, reason in self.found.by_position:
            roots = self.found.channels(labels)
            for name in names:
                if name not in why and is_among(self.labels[name], roots).any():
                    why[name] = reason

        def mismatch_at_two_widths(some: list[str]) -> str:
            """Compare at two widths: a wrong bound of a slice may be right by chance at one of them."""
            return self.runs.mismatch(some, (), 1 / 3) or self.runs.mismatch(some, (), 2 / 3)

        changed = faulty_groups(mismatch_at_two_widths, list(why), self.structures, assumed)
        return {name: why[name] for name in changed}

    def mixing(self, names: Iterable[str], sizes: tuple[WidthAttribute, ...]) -> dict[str, str]:
        """Return the groups whose channels a layer's own code mixes, with the reason.

        Only if there are layers with code of their own, outputs are compared, in two forward passes. Groups
        that were compared before are not compared again.
        """
        own = {name: code for name in names if (code := _own_code(self.model, self.groups[name]))}
        changed = inexact_readers(self.model, self.runs.inputs, {name: self.groups[name] for name in own})
        left = [name for name in own if name not in changed and name not in self.runs.compared]
        changed |= faulty_groups(lambda some: self.runs.mismatch(some, sizes), left, self.structures)
        return {
            name: f"{own[name]} has code of its own, and with fewer channels the model does not compute what "
            f"the masked one does ({error}). {_own_code_cure(self.model, self.groups[name])}"
            for name, error in changed.items()
        }


def _own_code_cure(model: nn.Module, group: Group) -> str:
    """Say what to do about a group whose layers have code outside torch that mixes channels."""
    layers = [submodule(model, member.layer) for side in ("in", "out") for member in group.side(side)]
    if kinds := sorted({type(layer).__name__ for layer in layers if is_registered(layer)}):
        return (
            f"Check that the rule registered for {' and '.join(kinds)} names every tensor that holds "
            "channels, with their dimension, and let other modules mix channels, to let it be pruned"
        )
    return (
        "If it computes its weight from parameters, call pruning.surgery.with_plain_weights to let it be "
        "pruned"
    )


def _own_code(model: nn.Module, group: Group) -> str:
    """Describe the first layer of a group, readers before makers, with code outside torch; else ""."""
    if group.reductions:
        where = group.reductions[0].module
        return f"{where} ({type(submodule(model, where)).__name__})".lstrip()
    for member in (*group.side("in"), *group.side("out")):
        layer = submodule(model, member.layer)
        if has_own_code(layer):
            return f"{member.layer} ({type(layer).__name__})"
    return ""
