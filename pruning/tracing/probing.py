"""Groups whose widths the model's own code knows: written in it, or kept in attributes.

Sizes of a view or a split may have been computed from those of its input, which shows when the
model runs with a channel less. Where it fails then, an attribute of the module that ran may hold
the size, and the model runs when that follows. Where none does, the size is written in the code.
Layers with code of their own (standardized weights, say) may run with a channel less and compute
something else; that shows when their groups lose a channel and the outputs are compared.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from pruning.graph.groups import Group, Size, Trace
from pruning.graph.plan import Plan
from pruning.surgery.apply import apply, cut
from pruning.surgery.sizes import holding
from pruning.surgery.verify import difference
from pruning.tracing.labels import NONE, Flow
from pruning.utils.meta import Shapes, on_meta, to_meta
from pruning.utils.modules import call, copied
from pruning.utils.tree import Inputs, tensors

#: A size as it was met: the module whose code ran, the number, and how many of its positions
#: each channel is, by group.
Kept = tuple[str, int, dict[str, torch.Tensor]]

_CURE = (
    "Compute the sizes of views and splits from those of their inputs, or keep them in attributes of the "
    "module that uses them, to let it be pruned"
)

#: Ways to tell which attributes a group's width is kept in that are tried out.
TRIALS = 16

#: A way that has failed in so many modules of a type, and worked in none, is tried in no further one.
HOPELESS = 2


class Rigid:
    """What the code of a model says about its channel groups.

    Args:
        found: by a pass over the model. groups: that may be pruned otherwise. labels: of their
            channels, by group.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        found: Flow,
        groups: dict[str, Group],
        labels: Mapping[str, np.ndarray],
    ):
        self.model, self.found, self.groups, self.labels = model, found, groups, labels
        self.runs = _Runs(model, inputs, found, groups, labels)

    def tied(self) -> tuple[dict[str, str], tuple[Size, ...]]:
        """Groups that cannot lose a channel, with the reason, and sizes that follow the others."""
        found, groups, labels = self.found, self.groups, self.labels
        sized = np.unique(found.ties.root(np.concatenate([np.arange(0), *found.rigid])))
        sized = sized[sized != NONE]
        suspect = [name for name in groups if np.isin(labels[name], sized).any()]
        at_fault = _at_fault(self.runs.failure, suspect)
        if at_fault or not np.isin(sized, np.concatenate([np.arange(0), *labels.values()])).all():
            # Sizes of what stays whole may be computed from those of any other tensor.
            at_fault |= _at_fault(self.runs.failure, [name for name in groups if name not in suspect])
        reasons = {
            name: f"the model's code is tied to its width: with a channel less, {error}. {_CURE}"
            for name, error in at_fault.items()
        }
        misplaced = self._misplaced([name for name in groups if name not in at_fault])
        reasons |= {name: f"{why}. {_CURE}" for name, why in misplaced.items()}
        followed = _followed(self.model, self.runs, _kept(found, labels, reasons))
        reasons = {name: reason for name, reason in reasons.items() if name not in followed}
        return reasons, _merged(followed.values())

    def _misplaced(self, names: list[str]) -> dict[str, str]:
        """Groups of which the model takes other channels, by their positions, when some are gone."""
        why: dict[str, str] = {}
        for numbers, reason in self.found.placed:
            roots = self.found.ties.root(numbers)
            for name in names:
                if name not in why and np.isin(self.labels[name], roots).any():
                    why[name] = reason

        def changed_outputs(some: list[str]) -> str:
            """An end that is computed from the input's width may be right by chance, but not twice."""
            return self.runs.difference(some, (), 1 / 3) or self.runs.difference(some, (), 2 / 3)

        changed = _at_fault(changed_outputs, list(why))
        return {name: why[name] for name in changed}

    def mixed(self, names: Iterable[str], sizes: tuple[Size, ...]) -> dict[str, str]:
        """Of these groups those whose channels a layer's own code mixes, with the reason.

        Only where there are layers with code of their own are outputs compared, which takes two passes.
        """
        own = {name: code for name in names if (code := _own_code(self.model, self.groups[name]))}
        changed = _at_fault(lambda some: self.runs.difference(some, sizes), list(own))
        return {
            name: f"{own[name]} has code of its own, and with a channel less the model does not compute what "
            f"it should ({error}). Put a layer of torch in its place, with the weights that it computes "
            "with, to let it be pruned"
            for name, error in changed.items()
        }


def _at_fault(test: Callable[[list[str]], str], names: list[str]) -> dict[str, str]:
    """Of these groups those with which the model fails a test, found by halves, each with the error."""
    error = test(names) if names else ""
    if not error or len(names) == 1:
        return {names[0]: error} if error else {}
    half = len(names) // 2
    return _at_fault(test, names[:half]) | _at_fault(test, names[half:])


def _own_code(model: nn.Module, group: Group) -> str:
    """The first layer of a group, those that read it before others, whose type is not torch's own."""
    for member in (*group.side("in"), *group.side("out")):
        kind = type(model.get_submodule(member.layer))
        codes = (getattr(kind, name, kind) for name in ("forward", "_conv_forward"))
        if any(getattr(code, "__module__", "").partition(".")[0] != "torch" for code in codes):
            return f"{member.layer} ({kind.__name__})"
    return ""


def _followed(model: nn.Module, runs: _Runs, kept: Mapping[str, list[Kept]]) -> dict[str, tuple[Size, ...]]:
    """Of the groups at fault those that can lose a channel when these sizes follow."""
    ways = {name: those for name, sizes in kept.items() if (those := list(_ways(model, sizes)))}
    likely = {name: those[0] for name, those in ways.items()}
    if not likely or runs.follow(likely):
        return likely
    alone: dict[str, tuple[Size, ...]] = {}
    failed: Counter[Any] = Counter()
    for name, those in ways.items():
        for way in those:
            kind = tuple((type(model.get_submodule(s.module)), s.attribute, s.entries) for s in way)
            if failed[kind] >= HOPELESS:
                continue
            if runs.follow({name: way}):
                alone[name], failed[kind] = way, -len(ways)
                break
            failed[kind] += 1
    return alone if alone and runs.follow(alone) else {}


class _Runs:
    """Runs of a model whose groups have a channel less."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        found: Flow,
        groups: dict[str, Group],
        labels: Mapping[str, np.ndarray],
    ):
        self.model, self.inputs, self.found, self.groups = model, inputs, found, groups
        places = [found.ties.root(numbers) for numbers, _ in found.placed]
        #: Channels of each group, by the pieces that the code takes of it.
        self.pieces = (
            {name: _alike([np.isin(own, place) for place in places]) for name, own in labels.items()}
            if places
            else {}
        )
        self.unused = found.probe
        self.quick = found.probe is not None
        self.example = pytree.tree_map(to_meta, inputs) if self.quick else inputs

    def failure(self, names: Iterable[str], sizes: tuple[Size, ...] = ()) -> str:
        """Why the model fails when these groups lose their last channels; empty if it does not."""
        probe, self.unused = self.unused or (on_meta if self.quick else copied)(self.model), None
        try:
            cut(probe, *self._less(names, sizes))
            with torch.no_grad(), Shapes() if self.quick else contextlib.nullcontext():
                got = [t.shape for t in tensors(call(probe.eval(), self.example))]
        except Exception as error:  # of a model that no longer fits together
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        outputs = self.found.outputs
        return "" if got == outputs else f"its outputs change from {outputs} to {got}"

    def follow(self, sizes: Mapping[str, tuple[Size, ...]]) -> bool:
        """Whether the model computes what it should when these groups lose a channel and sizes follow.

        An attribute may also be a factor, say, or have had its value by chance.
        """
        together = _merged(sizes.values())
        return not (self.failure(sizes, together) or self.difference(sizes, together, 1 / 3))

    def difference(self, names: Iterable[str], sizes: tuple[Size, ...], share: float = 0.0) -> str:
        """How the outputs differ from what they should be without these channels; empty where they do not."""
        traced, plan = self._less(names, sizes, share)
        return difference(self.model, apply(self.model, traced, plan), traced, plan, self.inputs)[0]

    def _less(self, names: Iterable[str], sizes: tuple[Size, ...], share: float = 0.0) -> tuple[Trace, Plan]:
        """Every second group loses two channels, lest what is tied by the code fit together by chance.

        From every piece that the code takes of a group at least this share goes.
        """
        keep = {}
        for i, name in enumerate(names):
            channels = np.arange(self.groups[name].channels)
            pieces = self.pieces.get(name, np.zeros_like(channels))
            parts = [channels[pieces == piece] for piece in np.unique(pieces)]
            last = [part[-max(1, int(share * len(part))) - i % 2 :] for part in parts]
            keep[name] = tuple(np.setdiff1d(channels, np.concatenate(last)).tolist()) or (0,)
        return Trace(self.groups, {}, {}, {}, sizes=sizes), Plan(keep)


def _alike(marks: list[np.ndarray]) -> np.ndarray:
    """Numbers of the channels, equal for those that have all marks in common."""
    return np.unique(np.stack(marks), axis=1, return_inverse=True)[1].reshape(-1)


def _kept(found: Flow, labels: Mapping[str, np.ndarray], names: Iterable[str]) -> dict[str, list[Kept]]:
    """For each of these groups the sizes that count its channels."""
    belongs: dict[int, tuple[str, int]] = {}
    for group, numbers in labels.items():
        belongs.update((number, (group, channel)) for channel, number in enumerate(numbers.tolist()))
    kept: dict[str, list[Kept]] = {name: [] for name in names}
    seen = set()
    for extent in found.extents:
        numbers = found.ties.root(extent.labels)
        key = extent.module, numbers.tobytes()
        if not kept or key in seen:
            continue
        seen.add(key)
        owned: dict[str, torch.Tensor] = {}
        for group, channel in filter(None, map(belongs.get, numbers.tolist())):
            owned.setdefault(group, torch.zeros(len(labels[group]), dtype=torch.long))[channel] += 1
        for group in kept.keys() & owned.keys():
            kept[group].append((extent.module, len(numbers), owned))
    return kept


def _ways(model: nn.Module, kept: list[Kept]) -> Iterator[tuple[Size, ...]]:
    """Sets of attributes that may be what a group's sizes are read from, likely ones first."""
    choices: list[list[tuple[Size, ...]]] = []
    for module, value, owned in kept:
        held = [
            Size(module, attribute, entries, owned)
            for attribute, entries in holding(model.get_submodule(module), value)
        ]
        if held:
            several = [tuple(held)] if len(held) > 1 else []
            choices.append([*((size,) for size in held), *several, ()])
    for chosen in itertools.islice(itertools.product(*choices), TRIALS):
        if any(chosen):
            yield _merged(chosen)


def _merged(ways: Iterable[tuple[Size, ...]]) -> tuple[Size, ...]:
    """The sizes of several sets, each attribute, or entry of one, once."""
    sizes: list[Size] = []
    taken: dict[tuple[str, str], set[int]] = {}
    for size in itertools.chain.from_iterable(ways):
        entries = taken.setdefault((size.module, size.attribute), set())
        wanted = set(size.entries) or {0}
        if not entries & wanted:
            entries |= wanted
            sizes.append(size)
    return tuple(sizes)
