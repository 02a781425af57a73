"""Run copies of a model without some channels, to see whether its code works with fewer of them."""

from __future__ import annotations

import contextlib
import copy
import functools
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from pruning.graph.groups import Group, Rescale, Trace, WidthAttribute
from pruning.graph.plan import Plan
from pruning.surgery.apply import apply, cut_channels
from pruning.surgery.verify import (
    compare_with_masked,
    masked_outputs,
    rounding_error,
    with_random_weights,
)
from pruning.tracing.attribute_reads import attribute_reads
from pruning.tracing.grouping import is_along_axis
from pruning.tracing.record import Flow
from pruning.tracing.scales import rescaling_choices
from pruning.tracing.size_attributes import merged
from pruning.tracing.ties import is_among
from pruning.utils.compare import outputs_of
from pruning.utils.entries import Entry
from pruning.utils.fast_path import without_fast_path
from pruning.utils.meta import Shapes, to_meta
from pruning.utils.modules import call, copied
from pruning.utils.outputs import Outputs, counted
from pruning.utils.sharing import sharing
from pruning.utils.tree import Inputs, map_tensors, tensors

#: Larger differences are those of wrong channels: relative to the largest output, and to the rounding error.
_MOST_ROUNDING, _TIMES_ROUNDING = 0.1, 100

#: Most plans for which the outputs of masked models are kept.
MOST_KEPT = 4


class NarrowedRuns:
    """Run narrowed copies of a model."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        found: Flow,
        groups: dict[str, Group],
        labels: dict[str, np.ndarray],
        outputs: Outputs,
        also: tuple[Entry, ...],
    ):
        self.model, self.inputs, self.found, self.groups = model, inputs, found, groups
        self.labels, self.outputs, self.also = labels, outputs, also
        #: By group, for each channel the number of the slice that it belongs to.
        self.pieces: dict[str, np.ndarray] = {}
        #: By group that a product sums over, the ways to keep the product's scale, and the one it needs.
        self.choices: dict[str, list[tuple[Rescale, ...]]] = {}
        self.scales: dict[str, tuple[Rescale, ...]] = {}
        self._mark(labels)
        #: Shapes of the outputs of the whole model.
        self.expected = found.outputs
        #: Whether the copies also run in training mode.
        self.training = False
        #: Attributes that follow the widths in all runs.
        self.sizes: tuple[WidthAttribute, ...] = ()
        #: Outputs of masked models, by model, groups and the channels that are kept; with these groups.
        self.masked: dict[tuple[object, ...], tuple[tuple[Group, ...], list[Tensor] | Exception]] = {}
        #: Groups of which a narrowed copy computed what the masked model does.
        self.compared: set[str] = set()
        #: By model, what rounding does to its outputs.
        self.rounding: dict[int, float] = {}
        self.on_meta = found.probe is not None
        #: What copies are made of: on the meta device the copy that was traced, as a model may store tensors
        #: of a pass on its own device.
        self.original = found.probe if found.probe is not None else model
        self.example = map_tensors(to_meta, inputs) if self.on_meta else inputs

    def add(self, group: Group, labels: np.ndarray) -> None:
        """Add a group of the model, with the labels of its channels."""
        self.groups[group.name], self.labels[group.name] = group, labels
        self.compared.discard(group.name)
        self._mark({group.name: labels})

    def _mark(self, labels: Mapping[str, np.ndarray]) -> None:
        """Note for groups which slices their channels belong to, and how scales may be kept."""
        places = [self.found.channels(taken) for taken, _ in self.found.by_position]
        for name, own in labels.items() if places else ():
            self.pieces[name] = _same_marks([is_among(own, place) for place in places])
        if self.found.left:
            groups = {name: self.groups[name] for name in labels}
            self.choices.update(rescaling_choices(self.model, self.found, groups, self.labels))

    def probe(self, own: bool = False) -> nn.Module:
        """Return a copy of the model, on the meta device if it runs there.

        Args:
            own: whether code of a user may change it in place; otherwise it shares what it can.
        """
        return copied(self.original) if own or not self.on_meta else sharing(self.original, buffers=True)

    def with_training(self) -> NarrowedRuns:
        """Return such runs that also run the copies in training mode."""
        runs = copy.copy(self)
        runs.training = True
        return runs

    def with_sizes(self, sizes: tuple[WidthAttribute, ...]) -> NarrowedRuns:
        """Return such runs in which attributes follow the widths."""
        runs = copy.copy(self)
        runs.sizes = sizes
        return runs

    def with_entry(self, entry: Entry) -> NarrowedRuns:
        """Return such runs that also call the copies in another way; raise what it raises.

        The entry's own inputs are the example inputs.
        """
        runs = copy.copy(self)
        runs.also, runs.masked = (*self.also, entry), {}
        with torch.no_grad(), self.shapes():
            got = tensors(entry.run(self.probe(own=True).eval(), runs.convert))
        runs.expected = [*self.expected, *(t.shape for t in got)]
        return runs

    @property
    def convert(self) -> Callable[[Tensor], Tensor] | None:
        """What changes the tensors of the inputs of other calls."""
        return to_meta if self.on_meta else None

    @contextlib.contextmanager
    def shapes(self) -> Iterator[None]:
        """Let copies run in the block: on the meta device, also with tensors of other devices."""
        with without_fast_path(), Shapes() if self.on_meta else contextlib.nullcontext():
            yield

    def run(self, probe: nn.Module) -> list[Tensor]:
        """Run a copy of the model in all ways, and return its outputs in eval mode."""
        with torch.no_grad(), self.shapes():
            got = counted(call(probe.eval(), self.example), self.outputs)
            for entry in self.also:
                got = got + tensors(entry.on_copy(probe, self.convert))
            if self.training:
                call(probe.train(), self.example)
        return got

    def reads(self) -> dict[str, set[str]] | None:
        """Return the attributes that each module's code reads; None if the model does not run like that."""
        probe = self.probe().eval()
        try:
            with torch.no_grad(), self.shapes(), attribute_reads(probe) as reads:
                call(probe, self.example)
        except Exception:  # of code that depends on the types of modules, whatever it raises
            return None
        return reads

    def training_error(self, names: Iterable[str]) -> str:
        """Return the error of the narrowed model in training mode; empty if it runs."""
        probe = self.probe()
        try:
            cut_channels(probe, *self._narrower(names, ()))
            with torch.no_grad(), self.shapes():
                call(probe.train(), self.example)
        except Exception as error:  # whatever the narrowed copy raises
            return described(error)
        return ""

    def error(self, names: Iterable[str], sizes: tuple[WidthAttribute, ...] = ()) -> str:
        """Return the error of the model without the last channels of these groups; empty if it runs."""
        probe = self.probe()
        try:
            cut_channels(probe, *self._narrower(names, sizes))
            got = [tensor.shape for tensor in self.run(probe)]
        except Exception as error:  # whatever the narrowed copy raises
            return described(error)
        return "" if got == self.expected else f"its outputs change from {self.expected} to {got}"

    def mismatch(self, names: Iterable[str], sizes: tuple[WidthAttribute, ...], share: float = 0.0) -> str:
        """Return how the outputs of the narrowed copy differ from the masked model's; empty if they agree.

        Args:
            share: least share of the channels to remove from each slice.
        """
        some = list(names)
        summed = [name for name in some if self.choices.get(name) and name not in self.scales]
        # A difference that a scale explains needs no decision in double precision.
        for in_double in (False, True) if summed else (True,):
            problem, least = self._mismatch(some, sizes, share, in_double)
            for i in range(max((len(self.choices[name]) for name in summed), default=0) if problem else 0):
                for name in summed:
                    self.scales[name] = self.choices[name][min(i, len(self.choices[name]) - 1)]
                of_choice, difference = self._mismatch(some, sizes, share, in_double)
                if not of_choice:
                    problem = ""
                    break
                least = min(least, difference)
                for name in summed:
                    del self.scales[name]
            if not problem or not self._may_be_rounding(self._compared(some), least):
                break
        if not problem:
            self.compared.update(some)
        return problem

    def _compared(self, names: Iterable[str]) -> nn.Module:
        """Return the model, or a copy with random weights, to compare without some channels of these groups.

        With the given weights, outputs may depend neither on a scale nor on how values are divided: a head of
        zeros, or weights so small that all tokens get the same attention.
        """
        attention = any(n in self.choices or is_along_axis(self.found, self.labels[n]) for n in names)
        return self._randomized if attention else self.model

    def _mismatch(
        self, names: list[str], sizes: tuple[WidthAttribute, ...], share: float, in_double: bool
    ) -> tuple[str, float]:
        """Return how a narrowed copy differs from the masked model, and by how much of its largest output.

        The masked model does not depend on attributes and factors, so its outputs are kept for a plan.

        Args:
            in_double: whether to decide in double precision where rounding may be why.
        """
        traced, plan = self._narrower(names, sizes, share)
        model = self._compared(names)
        groups = tuple(self.groups[name] for name in plan.keep)
        key = id(model), tuple(map(id, groups)), tuple(plan.keep.values())
        if key not in self.masked:
            if len(self.masked) == MOST_KEPT:
                del self.masked[next(iter(self.masked))]
            self.masked[key] = groups, masked_outputs(model, traced, plan, self.inputs)
        small = apply(model, traced, plan, shared=True)
        differs = functools.partial(
            compare_with_masked, model, small, traced, plan, self.inputs, expected=self.masked[key][1]
        )
        problem, difference = differs(in_double=False)
        if problem and in_double and self._may_be_rounding(model, difference):
            return differs()
        return problem, difference

    def _may_be_rounding(self, model: nn.Module, difference: float) -> bool:
        """Whether rounding may be why outputs differ by so much."""
        if difference >= _MOST_ROUNDING:
            return False
        return not difference >= _TIMES_ROUNDING * self._rounding_of(model)

    def _rounding_of(self, model: nn.Module) -> float:
        """Return what rounding does to the outputs of a model, see `rounding_error`."""
        if id(model) not in self.rounding:
            self.rounding[id(model)] = rounding_error(model, self.inputs, self.outputs)
        return self.rounding[id(model)]

    @functools.cached_property
    def _randomized(self) -> nn.Module:
        """A copy of the model with random weights; the model itself if random weights give no numbers."""
        randomized = with_random_weights(self.model, self.inputs)
        outputs = outputs_of(randomized, self.inputs, self.outputs)
        wrong = isinstance(outputs, Exception) or any(x.isnan().any() for x in outputs)
        return self.model if wrong else randomized

    def is_exact(self, sizes: Mapping[str, tuple[WidthAttribute, ...]]) -> bool:
        """Whether the outputs are right when these groups are narrowed and their attributes updated.

        An attribute may equal a width by chance, or hold another quantity, such as a factor.
        """
        together = merged(sizes.values())
        return not (self.error(sizes, together) or self.mismatch(sizes, together, 1 / 3))

    def _narrower(
        self, names: Iterable[str], sizes: tuple[WidthAttribute, ...], share: float = 0.0
    ) -> tuple[Trace, Plan]:
        """Return a trace and a plan that remove the last channels of each slice of each group.

        Every second group loses one channel more: groups whose widths the code compares would otherwise
        fit together by chance.
        """
        keep = {}
        for i, name in enumerate(names):
            channels, multiple = np.arange(self.groups[name].channels), self.groups[name].multiple
            pieces = self.pieces.get(name, np.zeros_like(channels))
            each = [channels[pieces == piece] for piece in np.unique(pieces)]
            last = [
                piece[-multiple * (max(1, int(share * len(piece) / multiple)) + i % 2) :] for piece in each
            ]
            kept = np.setdiff1d(channels, np.concatenate(last)).tolist()
            kept = kept[: len(kept) - (len(kept) - len(channels)) % multiple]  # pieces may be small
            keep[name] = tuple(kept) or tuple(range(multiple))
        sizes = merged((self.sizes, sizes)) if self.sizes else sizes
        rescales = tuple(rescale for name in keep for rescale in self.scales.get(name, ()))
        traced = Trace(
            self.groups, {}, {}, {}, sizes=sizes, outputs=self.outputs, also=self.also, rescales=rescales
        )
        return traced, Plan(keep)


def _same_marks(marks: list[np.ndarray]) -> np.ndarray:
    """Return a number for each channel; two channels have the same number if all their marks agree."""
    return np.unique(np.stack(marks), axis=1, return_inverse=True)[1].reshape(-1)


def described(error: Exception) -> str:
    """Describe an error in one line; without a message, by the line of code that raised it.

    >>> described(ValueError("no such size"))
    'ValueError: no such size'
    """
    kind, said = type(error).__name__, str(error).strip()
    if said:
        return f"{kind}: {said.splitlines()[0]}"
    frames = traceback.extract_tb(error.__traceback__)
    return f"{kind} at `{frames[-1].line}`" if frames and frames[-1].line else kind
