"""Replace layers that compute their weight from parameters by layers of torch that hold this weight.

Such a layer standardizes its filters (Qiao et al., arXiv 1903.10520), binarizes them, rounds them to a grid,
divides them by a norm, or adds an update of low rank. Where the computation looks at all inputs of a filter,
a part of them has another result, so the layer that reads channels cannot lose any. A plain layer can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from pruning.errors import PruningError
from pruning.graph.computed import refresh_computed
from pruning.surgery.linear_form import FUNCTIONS
from pruning.utils.compare import compare, outputs_of
from pruning.utils.modules import buffers_unchanged, call, copied, eval_mode, hooked
from pruning.utils.tree import Inputs, fresh, noise_like, tensors_among

#: By function, the type of layer that calls it.
_TYPES: Mapping[Callable[..., object], type[nn.Module]] = {
    F.linear: nn.Linear,
    F.conv1d: nn.Conv1d,
    F.conv2d: nn.Conv2d,
    F.conv3d: nn.Conv3d,
    F.conv_transpose1d: nn.ConvTranspose1d,
    F.conv_transpose2d: nn.ConvTranspose2d,
    F.conv_transpose3d: nn.ConvTranspose3d,
}


@buffers_unchanged
def with_plain_weights(model: nn.Module, inputs: Inputs) -> nn.Module:
    """Return a copy of a model whose layers hold the weights that they compute in eval mode.

    A module is replaced by `nn.Linear`, a convolution or a transposed one if all that it returns is one
    product of its input with a weight that it computes, and if this weight is the same for other inputs. A
    weight that is computed from the input (a mixture of experts, a modulation) stays as it is. The outputs in
    eval mode are those of the given model. Training goes on with plain weights: standardized filters do not
    stay standardized.

    Use it before `trace` or `prune`. To load a checkpoint of the result, let the factory do the same:
    `load(path, lambda: with_plain_weights(make(), inputs))`.

    Args:
        model: it is not changed.
        inputs: example inputs.

    Raises `PruningError` for a model that does not run on the inputs.

    >>> class Standardized(nn.Linear):
    ...     def forward(self, x):
    ...         weight = self.weight - self.weight.mean(1, keepdim=True)
    ...         return F.linear(x, weight / weight.norm(dim=1, keepdim=True), self.bias)
    >>> net, x = nn.Sequential(Standardized(3, 8), nn.ReLU(), Standardized(8, 2)), torch.ones(2, 3)
    >>> plain = with_plain_weights(net, x)
    >>> plain[2], torch.equal(plain(x), net(x))
    (Linear(in_features=8, out_features=2, bias=True), True)
    >>> from pruning import trace
    >>> trace(net, x).widths, trace(plain, x).widths
    ({}, {'0': 8})
    """
    plain = copied(model)
    refresh_computed(plain)
    passes = [_computed(plain, given) for given in (inputs, *noise_like(inputs))]
    replaced: dict[nn.Module, nn.Module] = {}
    for module, use in passes[0].items():
        if all(_same(use, other[module]) for other in passes[1:] if module in other):
            replaced[module] = _layer(module, use)
    for parent in list(plain.modules()):
        for name, child in parent._modules.items():
            if child in replaced:
                parent._modules[name] = replaced[child]
    plain = replaced.get(plain, plain)
    problem = compare(outputs_of(model, inputs), outputs_of(plain, inputs))[0]
    if problem:
        raise PruningError(
            f"with the weights that its layers computed, {type(model).__name__} returns something else "
            f"({problem}); give a model that computes the same in each call"
        )
    return plain


@dataclass
class _Use:
    """The products of one module with one weight.

    Attributes:
        func: the function of torch. given: its arguments by name.
    """

    func: Callable[..., object]
    given: Mapping[str, object]


@dataclass
class _Call:
    """A call of a module: its first tensor, and the products that its code computed."""

    x: Tensor | None
    products: list[tuple[_Use, Tensor]] = field(default_factory=list)


class _Recorder(TorchFunctionMode):
    """Record the products that modules compute."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[_Call] = []

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func in FUNCTIONS and self.running and isinstance(output, Tensor):
            given = {**dict(zip(FUNCTIONS[func], args, strict=False)), **kwargs}
            for running in self.running:  # also the modules around it, which are then no single product
                running.products.append((_Use(func, given), output))
        return output


def _computed(model: nn.Module, inputs: Inputs) -> dict[nn.Module, _Use]:
    """Return the modules that are no more than a product with a weight that they compute."""
    recorder, handles = _Recorder(), list[RemovableHandle]()
    found: dict[nn.Module, _Use] = {}
    others: set[nn.Module] = set()

    def enter(_: nn.Module, args: object, kwargs: object) -> None:
        recorder.running.append(_Call(next(iter(tensors_among((args, kwargs))), None)))

    def leave(module: nn.Module, args: object, kwargs: object, output: object) -> None:
        ran = recorder.running.pop()
        use, result = ran.products[0] if len(ran.products) == 1 else (None, None)
        plain = use is not None and result is output and use.given["input"] is ran.x
        if (
            use is None
            or not plain
            or len(tensors_among((args, kwargs))) != 1
            or not _same(use, found.get(module))
        ):
            others.add(module)
        else:
            found[module] = use

    for module in _candidates(model):
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))
    with hooked(handles), torch.no_grad(), eval_mode(model), recorder:
        call(model, fresh(inputs))
    held = {id(p) for p in model.parameters()}
    return {
        module: use
        for module, use in found.items()
        if module not in others and id(use.given["weight"]) not in held
    }


def _candidates(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that hold parameters and no hooks of their own behind their code."""
    for module in model.modules():
        plain = not isinstance(module, torch.jit.ScriptModule) and not module._forward_hooks
        if plain and next(module.parameters(), None) is not None:
            yield module


def _same(use: _Use, other: _Use | None) -> bool:
    """Whether two products are with the same weight in the same way."""
    if other is None:
        return True
    if use.func is not other.func or use.given.keys() != other.given.keys():
        return False
    pairs = ((value, other.given[name]) for name, value in use.given.items() if name != "input")
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or bool(a == b)
        for a, b in pairs
    )


def _layer(module: nn.Module, use: _Use) -> nn.Module:
    """Return the layer of torch that computes what a module does."""
    weight, bias = use.given["weight"], use.given.get("bias")
    assert isinstance(weight, Tensor)
    out, into = weight.shape[:2]
    kind, groups = _TYPES[use.func], use.given.get("groups", 1)
    assert isinstance(groups, int)
    options = {name: v for name, v in use.given.items() if name not in ("input", "weight", "bias")}
    if kind is not nn.Linear:
        transposed = issubclass(kind, nn.modules.conv._ConvTransposeNd)
        out, into = (into * groups, out) if transposed else (out, into * groups)
        options["kernel_size"] = tuple(weight.shape[2:])
    with torch.device("meta"):
        layer = kind(into, out, bias=bias is not None, **options)
    trains = any(p.requires_grad for p in module.parameters())
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=trains)
    if isinstance(bias, Tensor):
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=trains)
    return layer.train(module.training)
