"""Find the batch of nested inputs: how many examples one call computes, and where the inputs hold them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.utils.compare import compare, outputs_of
from pruning.utils.meta import on_meta, to_meta
from pruning.utils.modules import call, copied
from pruning.utils.paths import Path, lists_with_paths, map_with_paths, tensors_with_paths
from pruning.utils.tree import Inputs, fresh, map_tensors, tensors
from pruning.utils.work import Pass, Work

T = TypeVar("T")

#: Share of the work that has to grow with the examples: the rest does not depend on the batch.
LEAST_SHARE = 0.5


@dataclass(frozen=True)
class Batch:
    """The batch of nested inputs.

    Attributes:
        size: number of examples that one call computes; costs are those of a call divided by it.
        dims: for each tensor that holds one entry per example, the dimension along which they lie.
        lists: sequences that hold one entry per example, such as the images of a detection model.

    >>> batch = Batch(2, {(0,): 0, (1,): 1})
    >>> [tuple(x.shape) for x in batch.first((torch.zeros(2, 7), torch.zeros(3, 2), torch.zeros(5)), 1)]
    [(1, 7), (3, 1), (5,)]
    """

    size: int = 1
    dims: Mapping[Path, int] = field(default_factory=dict)
    lists: frozenset[Path] = frozenset()

    def of(self, inputs: object) -> Batch:
        """Return the batch of other inputs: along the same dimensions, or else by their form.

        >>> Batch(2, {(): 1}).of(torch.zeros(7, 5, 3)).size
        5
        """
        for path, tensor in tensors_with_paths(inputs):
            if path in self.dims and self.dims[path] < tensor.ndim:
                return replace(self, size=tensor.shape[self.dims[path]])
        return usual_batch(inputs)

    def first(self, inputs: T, count: int) -> T:
        """Return the first `count` examples of inputs; all of them if there are fewer."""
        return self._selected(inputs, lambda size: torch.arange(min(count, size)))

    def at(self, inputs: T, places: Tensor) -> T:
        """Return the examples at some places, (count,)."""
        return self._selected(inputs, lambda _: places)

    def rest(self, inputs: T, count: int) -> T:
        """Return the examples of inputs behind the first `count`."""
        return self._selected(inputs, lambda size: torch.arange(min(count, size), size))

    def resized(self, inputs: T, count: int) -> T:
        """Return inputs of `count` examples: the first ones, repeated where there are fewer."""
        return self._selected(inputs, lambda size: torch.arange(count) % size)

    def _selected(self, inputs: T, chosen: Callable[[int], Tensor]) -> T:
        def select(path: Path, value: object) -> object:
            if isinstance(value, Tensor) and path in self.dims:
                dim = self.dims[path]
                return value.index_select(dim, chosen(value.shape[dim]).to(value.device))
            if path in self.lists and isinstance(value, list | tuple):
                return type(value)(value[i] for i in chosen(len(value)).tolist())
            return value

        return map_with_paths(select, inputs)

    def perturbed(self, inputs: T) -> T:
        """Return inputs in which the first half of the examples differs."""
        some, generator = self.size // 2, torch.Generator().manual_seed(0)
        held = dict(tensors_with_paths(inputs))
        floats = {path for path in self.dims if path in held and held[path].is_floating_point()}

        def perturb(path: Path, value: object) -> object:
            if not isinstance(value, Tensor) or path not in (floats or self.dims):
                return value
            dim = self.dims[path]
            changed = value.detach().clone()
            part = changed.narrow(dim, 0, some)
            if floats:
                part.copy_(torch.randn(part.shape, generator=generator).to(part) * 2)
            else:  # valid values, such as tokens: those of other examples
                part.copy_(value.narrow(dim, self.size - some, some))
            return changed

        return map_with_paths(perturb, inputs)


def find_batch(
    model: nn.Module, inputs: Inputs, size: int | None = None, traced: Pass | None = None
) -> Batch:
    """Find the batch of example inputs: the dimension, or the list, along which examples are independent.

    A candidate is a list of tensors, or a dimension of the tensors, the first one first. With one example
    more along it, the model must run, most of its work must grow in proportion, and so must a dimension
    of its outputs. In eval mode, the outputs of an example must not depend on the others; this is
    compared unless every convolution of the model shows it, by having its batch there. Work is counted on
    the meta device if the model runs there.

    Args:
        model: it is not changed.
        inputs: example inputs.
        size: the number of examples, where the caller states it.
        traced: what a forward pass in eval mode did, where the caller has run one.

    Returns:
        The batch; size 1 without dimensions if there is none, as in a network on one graph.

    Raises:
        PruningError: if `size` is no whole number from 1.

    >>> recurrent = nn.LSTM(3, 4)  # its input is (time, batch, features)
    >>> find_batch(recurrent, torch.zeros(7, 2, 3))
    Batch(size=2, dims={(): 1}, lists=frozenset())
    """
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise PruningError(
            f"batch_size {size!r}: expected a whole number from 1, the examples in the example inputs"
        )
    search = _Search(model, inputs, size, traced)
    if traced is not None and (found := next(filter(search.is_shown, search.candidates()), None)):
        return found
    found = next(filter(search.accepts, search.candidates()), None) if search.base else None
    if found is not None:
        return found
    if search.base is None and size is None:  # it does not run: whoever runs it reports the error
        return usual_batch(inputs)
    return Batch(size or 1)


def usual_batch(inputs: object) -> Batch:
    """Return the batch of inputs by their form alone, without a model.

    It is a list of tensors among the arguments (images of different sizes), else the first dimension of
    the first tensor that has several dimensions, or one.

    >>> usual_batch((torch.zeros(1), torch.zeros(4, 3))).size
    4
    """
    for path, value in lists_with_paths(inputs):
        if path and all(isinstance(each, Tensor) and 0 < each.ndim < 4 for each in value):
            return Batch(len(value), lists=frozenset([path]))
    shapes = {path: tensor.shape for path, tensor in tensors_with_paths(inputs) if tensor.ndim}
    if not shapes:
        return Batch()
    size = max(shapes.values(), key=lambda shape: len(shape) > 1)[0]
    return Batch(size, {path: 0 for path, shape in shapes.items() if shape[0] == size})


class _Search:
    """Try candidates for the batch of inputs."""

    def __init__(self, model: nn.Module, inputs: Inputs, size: int | None, traced: Pass | None):
        self.model, self.inputs, self.stated, self.traced = model, inputs, size, traced
        self.probe: nn.Module | None = None
        self.example = inputs

    @functools.cached_property
    def base(self) -> Pass | None:
        """What a pass on the inputs does, on the meta device if the model runs there; None if it fails."""
        for make, example in ((on_meta, map_tensors(to_meta, self.inputs)), (copied, self.inputs)):
            with contextlib.suppress(Exception):  # of any kind: the model reads values, or does not run
                self.probe, self.example = make(self.model), example
                return self._run(example)
        return None

    def _run(self, inputs: Inputs) -> Pass:
        assert self.probe is not None
        with torch.no_grad(), torch.random.fork_rng(devices=[]), Work(self.probe) as work:
            output = call(self.probe.eval(), fresh(inputs))
        work.done.shapes = [t.shape for t in tensors(output)]
        return work.done

    def candidates(self) -> Iterator[Batch]:
        """Yield the candidates: lists, first dimensions, other dimensions; those of most elements first."""
        shapes = {path: tuple(t.shape) for path, t in tensors_with_paths(self.inputs)}
        deepest = max((len(shape) for shape in shapes.values()), default=0)
        lists = {path: len(value) for path, value in lists_with_paths(self.inputs) if path}
        for length in sorted({*lists.values()} & self._sizes({*lists.values()})):
            yield Batch(length, lists=frozenset(path for path, n in lists.items() if n == length))
        for dim in range(deepest):
            yield from self._along(shapes, dim)

    def _sizes(self, sizes: set[int]) -> set[int]:
        return sizes if self.stated is None else sizes & {self.stated}

    def _along(self, shapes: Mapping[Path, tuple[int, ...]], dim: int) -> Iterator[Batch]:
        """Yield the candidates along one dimension, by size: with the tensors that may share the batch."""
        elements: dict[int, int] = {}
        for shape in shapes.values():
            if len(shape) > dim:
                elements[shape[dim]] = max(elements.get(shape[dim], 0), torch.Size(shape).numel())
        for size in sorted(self._sizes({*elements} - {0}), key=lambda n: -elements[n]):
            own = {path: dim for path, s in shapes.items() if len(s) > dim and s[dim] == size}
            # Others may hold the batch elsewhere: the states of a recurrent layer, lengths, a mask.
            elsewhere = {
                path: other
                for path, s in shapes.items()
                if path not in own
                for other in [0 if dim else 1]
                if len(s) > 2 * other and s[other] == size
            }
            matrices = {path: dim for path in own if len(shapes[path]) > 1}
            tried: list[dict[Path, int]] = []
            for dims in (own | elsewhere if dim else own, own | elsewhere, own, matrices):
                if dims and dims not in tried:
                    tried.append(dims)
                    yield Batch(size, dims)

    def accepts(self, batch: Batch) -> bool:
        """Whether a candidate is the batch."""
        base = self.base
        assert base is not None
        if self.is_shown(batch):
            return True
        shown = _agrees(base, batch)
        try:
            grown = self._run(batch.resized(self.example, batch.size + 1))
        except Exception:  # of any kind: it is no batch, or the code fixes its size
            fixed = 0 in batch.dims.values() and batch.size > 1
            rows = [s[:1] == (batch.size,) for s in base.shapes]
            if not fixed or not any(rows):
                return False
            return shown or self._is_independent(batch, [[0] if row else [] for row in rows])
        if base.flops and not self._is_proportional(batch.size, grown.flops / base.flops):
            return False
        if batch.lists:
            return True
        if len(grown.shapes) != len(base.shapes):
            return False
        dims = [_grown(one, other) for one, other in zip(base.shapes, grown.shapes, strict=True)]
        if not any(dims):  # a loss over the batch has no dimension
            return not any(base.shapes)
        return self.stated is not None or shown or self._is_independent(batch, dims)

    def is_shown(self, batch: Batch) -> bool:
        """Whether one pass shows that a candidate is the batch."""
        done = self.traced or self.base
        agrees = done is not None and 0 in batch.dims.values() and _agrees(done, batch)
        return agrees and self._is_alone(batch)

    def _is_alone(self, batch: Batch) -> bool:
        """Whether no other tensor could share or be confused with the batch."""
        first = [t.shape[0] for _, t in tensors_with_paths(self.inputs) if t.ndim]
        return first.count(batch.size) == 1

    def _is_proportional(self, size: int, ratio: float) -> bool:
        """Whether the work grows with the examples; more than in proportion is that of attention."""
        return LEAST_SHARE <= (ratio - 1) * size <= 1.1

    def _is_independent(self, batch: Batch, dims: list[list[int]]) -> bool:
        """Whether the outputs of the second half of the examples stay if the first half changes.

        Args:
            dims: by output, the dimensions along which the examples lie.
        """
        inputs = self.inputs
        if batch.size == 1:
            inputs, batch = batch.resized(inputs, 2), Batch(2, batch.dims)
        model = copied(self.model)
        before, after = (outputs_of(model, given) for given in (inputs, batch.perturbed(inputs)))
        if isinstance(before, Exception) or isinstance(after, Exception) or len(before) != len(dims):
            return True  # cannot be compared
        first = batch.size // 2
        kept: list[list[Tensor]] = [[], []]
        for outputs, some in zip((before, after), kept, strict=True):
            for output, along in zip(outputs, dims, strict=True):
                for dim in along:
                    output = output.narrow(dim, first, output.shape[dim] - first)
                some += [output] if along else []
        return not compare(*kept)[0]


def _agrees(done: Pass, batch: Batch) -> bool:
    """Whether all convolutions, BatchNorms and outputs have the size of a batch first."""
    return done.batches == {batch.size} and all(s[:1] in ((), (batch.size,)) for s in done.shapes)


def _grown(before: torch.Size, after: torch.Size) -> list[int]:
    """Return the dimensions along which a tensor grew."""
    return [i for i, (a, b) in enumerate(zip(before, after, strict=False)) if b > a]
