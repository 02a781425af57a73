"""Cache what a model computes before some layers, for many evaluations that change only these layers.

In eval mode a forward pass is a sequence of calls of torch's functions. Those before the first call that
uses one of the layers are the same in every evaluation, so they return what they returned the first time.
Of their results only those that later calls read are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from pruning.utils.modules import call, eval_mode, hooked, submodule
from pruning.utils.tree import Inputs, fresh, tensors, tensors_among

_Function = Callable[..., object]


class PrefixCache:
    """Skip what a model computes before some of its layers, in evaluations in which only these change.

    The first batch tests whether the model then still computes the same; if not, nothing is skipped.

    Args:
        model: the whole model; it is not changed.
        layers: names of the layers that will change, as in `Member.layer`.
        batches: the inputs of all evaluations; they must stay in memory as long as the cache.

    Attributes:
        unchanged: modules that run only before these layers; their outputs and statistics do not change.

    >>> net, x = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).eval(), torch.ones(4, 2)
    >>> cache = PrefixCache(net, {"2"}, [x])
    >>> with torch.no_grad(), cache.replayed(0):  # runs one function of torch instead of three
    ...     outputs = net(x)
    >>> torch.equal(outputs, net(x))
    True
    """

    def __init__(self, model: nn.Module, layers: set[str], batches: Sequence[Inputs]):
        self.numbers = {id(tensors(batch)[0]): number for number, batch in enumerate(batches)}
        self.prefixes: list[_Prefix] = []
        with torch.no_grad(), eval_mode(model):
            survey, inputs = _Survey(model, layers), fresh(batches[0])
            with hooked(list(survey.hooks())), survey:
                expected = tensors(call(model, inputs))
            survey.end(expected)
            self.unchanged = survey.before - survey.after
            if survey.cut and not survey.is_shared(model):
                self.prefixes = [_prefix(model, batches[0], survey)]
                if not self._agrees(model, batches[0], expected):
                    self.prefixes = []
            if self.prefixes:
                self.prefixes += [_prefix(model, batch, survey) for batch in batches[1:]]

    def _agrees(self, model: nn.Module, batch: Inputs, expected: Sequence[Tensor]) -> bool:
        """Whether the model computes the expected outputs from a cached prefix."""
        inputs = fresh(batch)
        try:
            with self.replayed(0):
                found = tensors(call(model, inputs))
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            return False
        return len(found) == len(expected) and all(map(torch.equal, found, expected))

    @contextmanager
    def replayed(self, number: int) -> Iterator[None]:
        """Use the cache in one forward pass on the batch of this number, and call nothing else of torch."""
        if not self.prefixes:
            yield
            return
        with _Replay() as replay:
            replay.begin(self.prefixes[number])
            yield

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Use the cache in a model of the same code, which is called only with the known batches."""
        if not self.prefixes:
            yield
            return
        replay = _Replay()

        def begin(_: nn.Module, args: object, kwargs: object) -> None:
            number = self.numbers.get(id(tensors((args, kwargs))[0]))
            if number is None:
                raise AssertionError("a prefix cache supports only the batches that it was created with")
            replay.begin(self.prefixes[number])

        handles = [
            model.register_forward_pre_hook(begin, with_kwargs=True),
            model.register_forward_hook(lambda *_: replay.begin(None), always_call=True),
        ]
        with hooked(handles), replay:
            yield


class _Survey(TorchFunctionMode):
    """Find the first call of a function that uses one of some layers, and which earlier results are read.

    Attributes:
        cut: number of calls before it.
        live: results of these calls that are read later, by their number.
        before, after: names of the modules that finished before it, and of those that run later.
    """

    def __init__(self, model: nn.Module, layers: set[str]):
        super().__init__()
        self.model, self.layers = model, layers
        held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.own = {id(held[name]) for name in layers & held.keys()}
        for name in layers - held.keys():
            self.own |= {id(p) for p in submodule(model, name).parameters(recurse=False)}
        self.cut, self.reached = 0, False
        self.numbers, self.live = _Numbers(), set[int]()
        self.before, self.after = set[str](), set[str]()

    def hooks(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Register the hooks that note which modules run."""

        def begin(name: str) -> Callable[..., None]:
            def hook(*_: object) -> None:
                self.reached = self.reached or name in self.layers

            return hook

        def end(name: str) -> Callable[..., None]:
            def hook(*_: object) -> None:
                (self.after if self.reached else self.before).add(name)

            return hook

        for name, module in self.model.named_modules():
            if name and not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                yield module.register_forward_pre_hook(begin(name))
                yield module.register_forward_hook(end(name))

    def __torch_function__(
        self,
        func: _Function,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        given = tensors_among((*args, *(kwargs or {}).values()))
        self.reached = self.reached or any(id(tensor) in self.own for tensor in given)
        if self.reached:
            self.live |= self.numbers.known(given)
        result = func(*args, **(kwargs or {}))
        if not self.reached:
            self.cut += 1
            self.numbers.note(result)
        return result

    def end(self, outputs: Sequence[Tensor]) -> None:
        """Note the outputs of the model, which are read, too."""
        self.live |= self.numbers.known(outputs)
        self.cut *= self.reached

    def is_shared(self, model: nn.Module) -> bool:
        """Whether a module with statistics runs before the layers and later, too."""
        both = (submodule(model, name) for name in self.before & self.after)
        return any(getattr(module, "running_mean", None) is not None for module in both)


class _Numbers:
    """Number tensors in the order in which they first appear."""

    def __init__(self) -> None:
        self.count, self._of = 0, WeakTensorKeyDictionary()

    def note(self, result: object) -> list[tuple[int, Tensor]]:
        """Number the tensors in a result that are new; return all with their numbers."""
        found = []
        for tensor in tensors_among((result,)):
            if tensor not in self._of:
                self._of[tensor] = self.count
                self.count += 1
            found.append((self._of[tensor], tensor))
        return found

    def known(self, given: Sequence[Tensor]) -> set[int]:
        """Return the numbers of the tensors that have one."""
        return {self._of[tensor] for tensor in given if tensor in self._of}


@dataclass
class _Prefix:
    """The calls before the layers, for one batch.

    Attributes:
        results: of each call, with a number in the place of each tensor.
        live: the tensors that are read later. dead: the others, without values, by number.
    """

    results: list[object] = field(default_factory=list)
    live: dict[int, Tensor] = field(default_factory=dict)
    dead: dict[int, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[int, Tensor]:
        """Return the tensors by number; those that are read later are copies."""
        return {**self.dead, **{number: tensor.clone() for number, tensor in self.live.items()}}


class _Number(int):
    """The number of a tensor in a result."""


class _Finished(BaseException):
    """Ends the forward pass of `_Recorder`."""


class _Recorder(TorchFunctionMode):
    """Record the calls before a cut, then end the pass."""

    def __init__(self, survey: _Survey):
        super().__init__()
        self.cut, self.live = survey.cut, survey.live
        self.prefix, self.numbers = _Prefix(), _Numbers()
        self.held: dict[int, Tensor] = {}

    def __torch_function__(
        self,
        func: _Function,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if len(self.prefix.results) == self.cut:
            raise _Finished
        result = func(*args, **(kwargs or {}))
        noted = self.numbers.note(result)
        numbered = {id(tensor): _Number(number) for number, tensor in noted}
        self.prefix.results.append(_replaced(result, lambda tensor: numbered[id(tensor)]))
        for number, tensor in noted:
            if number in self.live:
                self.held[number] = tensor
            elif number not in self.prefix.dead:
                self.prefix.dead[number] = tensor.new_empty(()).expand(tensor.shape)
        return result

    def end(self) -> _Prefix:
        """Return what was recorded; values are those at the cut."""
        self.prefix.live = {number: tensor.detach().clone() for number, tensor in self.held.items()}
        return self.prefix


def _prefix(model: nn.Module, batch: Inputs, survey: _Survey) -> _Prefix:
    recorder, inputs = _Recorder(survey), fresh(batch)
    try:
        with recorder:
            call(model, inputs)
    except _Finished:
        pass
    return recorder.end()


class _Replay(TorchFunctionMode):
    """Return the recorded results of a prefix, then run the functions."""

    def __init__(self) -> None:
        super().__init__()
        self.next, self.results, self.tensors = 0, list[object](), dict[int, Tensor]()

    def begin(self, prefix: _Prefix | None) -> None:
        """Begin a forward pass; without a prefix all functions are run."""
        self.next, self.results = 0, []  # copying the tensors is a function of torch, too
        if prefix is not None:
            self.tensors = prefix.tensors()
            self.results = prefix.results

    def __torch_function__(
        self,
        func: _Function,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if self.next == len(self.results):
            return func(*args, **(kwargs or {}))
        result = self.results[self.next]
        self.next += 1
        if isinstance(result, _Number):
            return self.tensors[result]
        return pytree.tree_map(lambda x: self.tensors[x] if isinstance(x, _Number) else x, result)


def _replaced(result: object, function: Callable[[Tensor], object]) -> object:
    """Return a result with a function applied to each of its tensors."""
    if not tensors_among((result,)):
        return result
    return pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, result)
