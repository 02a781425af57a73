"""Remove whole layers: find the layers that can be removed, and build the model without one.

Four kinds can be removed. A hidden layer whose channels a single layer reads: that layer is refitted by
least squares on calibration data to replace both (exact if the layers between them are linear). A residual
block whose input can replace its output. A block of a transformer, which is deleted from its list
(`pruning.surgery.block_removal`). And a residual branch, such as the attention of a block alone, which
is replaced by zeros (`pruning.surgery.branch_removal`). Training afterwards recovers accuracy.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias, TypeGuard

import torch
from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.graph.groups import Group, Trace
from pruning.graph.layers import WEIGHTED, layer_width
from pruning.surgery.apply import replace_module
from pruning.surgery.block_removal import Block, dense_name, removable_blocks
from pruning.surgery.branch_removal import Branch, removable_branches
from pruning.surgery.linear_form import weight_uses
from pruning.utils.calls import Call, calls_of
from pruning.utils.meta import Shapes, without_storage
from pruning.utils.modules import call, call_until, copied, eval_mode, on_input, submodule
from pruning.utils.tree import Inputs, fresh, tensors, tensors_among
from pruning.utils.wrappers import unwrapped

#: Ridge penalty: added to the diagonal of the normal equations, relative to its mean. It keeps the weights
#: of inputs that hardly vary in the calibration data small.
RIDGE = 1e-5

#: Layers that can be refitted.
_Fittable: TypeAlias = nn.Linear | nn.Conv2d


@dataclass(frozen=True)
class Removable:
    """A layer that can be removed.

    Attributes:
        name: name of the hidden layer, the block or the branch, in the model with all blocks.
        bypassed: names of the modules that `nn.Identity` replaces.
        joined: name of the layer that is refitted; empty for a block.
        block: of a block that is deleted from its list, its place.
        branch: of a residual branch, what takes its place.
    """

    name: str
    bypassed: tuple[str, ...]
    joined: str = ""
    block: Block | None = field(default=None, repr=False)
    branch: Branch | None = field(default=None, repr=False)


def removable(model: nn.Module, traced: Trace, inputs: Inputs) -> dict[str, Removable]:
    """Return the layers that can be removed from a model, by name, in the order of the forward pass.

    Args:
        model: the traced model; it is not changed.
        traced: the trace of this model. Layers that it ignores, and blocks that contain such layers, are
            not returned.
        inputs: example inputs, in the form that `trace` takes.

    >>> from pruning import trace
    >>> model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    >>> removable(model, trace(model, torch.zeros(1, 4)), torch.zeros(1, 4))
    {'0': Removable(name='0', bypassed=('0',), joined='2')}
    """
    model = unwrapped(model)
    seen, modules = calls_of(model, inputs), dict(model.named_modules(remove_duplicate=False))
    probe, example = without_storage(model, lambda copied, x: call(copied, x), inputs)
    found: dict[str, Removable] = {}
    for name, uses in seen.items():
        if len(uses) != 1 or not name:
            continue
        candidate = None
        if name in traced.groups:
            candidate = _hidden(modules, traced.groups[name], seen)
        elif _passes_input_on(modules[name], uses[0]):
            kept = any(f"{layer}.".startswith(f"{name}.") for layer in traced.ignored)
            candidate = None if kept else Removable(name, (name,))
        if candidate is not None and _runs(probe, candidate, example, seen):
            found[name] = candidate
    listed = removable_blocks(model, inputs, seen, traced.outputs, traced.ignored, identities=found)
    found.update({name: Removable(name, (), block=block) for name, block in listed.items()})
    branches = removable_branches(model, inputs, seen, traced.outputs, traced.ignored)
    wholes = [c.block.present if c.block else name for name, c in found.items() if not c.joined]
    for name, branch in branches.items():
        around = [modules[whole] for whole in wholes if f"{name}.".startswith(f"{whole}.")]
        if not any(_is_all_of(modules[name], whole) for whole in around):
            full = dense_name(model, name)
            found[full] = Removable(full, (), branch=branch)
    # Of nested blocks return the innermost (a stage of blocks may also return its input).
    blocks = [name for name, candidate in found.items() if not (candidate.joined or candidate.branch)]
    return {
        name: candidate
        for name, candidate in found.items()
        if candidate.joined
        or candidate.block
        or candidate.branch
        or not any(other.startswith(f"{name}.") for other in blocks)
    }


def without_layer(
    model: nn.Module, traced: Trace, layer: Removable, batches: Iterable[Inputs] = ()
) -> nn.Module:
    """Return a copy of a model without a layer.

    Args:
        model: the traced model; it is not changed.
        traced: the trace of this model.
        layer: one of the layers that `removable` returns.
        batches: calibration inputs, to refit the joined layer.

    Raises `PruningError` when a layer must be refitted and `batches` is empty.

    >>> from pruning import trace
    >>> model, inputs = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(50, 4)
    >>> traced = trace(model, inputs)
    >>> without_layer(model, traced, removable(model, traced, inputs)["0"], [inputs])
    Sequential(
      (0): Identity()
      (1): ReLU()
      (2): Linear(in_features=4, out_features=3, bias=True)
    )
    """
    model = unwrapped(model)
    place = layer.block or layer.branch
    smaller = _bypassed(model, layer) if place is None else place.removed_from(model)
    if layer.joined:
        _refit(model, smaller, layer, list(batches), traced.foldable.get(layer.joined))
    smaller.zero_grad(set_to_none=True)
    return smaller


def _is_all_of(branch: nn.Module, block: nn.Module) -> bool:
    """Whether a branch holds all matrices of a block, so that removing one of the two removes both."""
    return {id(p) for p in block.parameters() if p.ndim > 1} <= {id(p) for p in branch.parameters()}


def _hidden(
    modules: Mapping[str, nn.Module], group: Group, seen: Mapping[str, list[Call]]
) -> Removable | None:
    """Return the layer that makes a group's channels if exactly one layer reads all of them, else None."""
    makers = [m.layer for m in group.side("out")]
    weighted = [m for m in makers if isinstance(modules.get(m), WEIGHTED)]
    consumers = group.side("in")
    if len(weighted) != 1 or len(consumers) != 1 or group.side("self"):
        return None
    layer, consumer = modules[weighted[0]], modules.get(consumers[0].layer)
    if len(consumers[0].index) != group.channels or len(seen.get(consumers[0].layer, ())) != 1:
        return None
    if not _is_fittable(layer) or not _is_fittable(consumer):
        return None
    if isinstance(consumer, nn.Conv2d) and consumer.padding_mode != "zeros":
        return None
    if layer_width(consumer, "in") != group.channels:
        return None
    use = seen[weighted[0]][0]
    if isinstance(layer, nn.Conv2d):
        [output] = tensors_among((use.output,))
        if use.inputs()[0].shape[2:] != output.shape[2:]:
            return None
    return Removable(weighted[0], tuple(makers), consumers[0].layer)


def _is_fittable(layer: nn.Module | None) -> TypeGuard[_Fittable]:
    """Whether a layer can be refitted."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def _passes_input_on(module: nn.Module, use: Call) -> bool:
    """Whether a module returns its input when all its parameters are 0: a residual block."""
    if not any(True for _ in module.children()) or not list(module.parameters()):
        return False
    if len(use.args) != 1 or use.kwargs or not isinstance(use.args[0], Tensor):
        return False
    x, y = use.args[0], use.output
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype or not x.any():
        return False
    zeroed = copy.deepcopy(module).eval()
    with torch.no_grad():
        for parameter in zeroed.parameters():
            parameter.zero_()
        try:
            return torch.equal(zeroed(x), x)
        except (RuntimeError, ValueError):
            return False


def _input_of(model: nn.Module, name: str, inputs: Inputs) -> Tensor:
    """Return the input of a layer in a forward pass."""
    with torch.no_grad():
        return call_until(model, inputs, name, "in").detach()


def _bypassed(model: nn.Module, layer: Removable) -> nn.Module:
    """Return a copy with identities in place of the bypassed modules, and without in-place activations.

    An activation behind a bypassed module reads that module's input. Other modules may read this tensor
    as well, so the activation must not write to it.
    """
    smaller = copied(model)
    for name in layer.bypassed:
        replace_module(smaller, name, nn.Identity())
    for module in smaller.modules():
        if getattr(module, "inplace", False) is True:
            setattr(module, "inplace", False)  # noqa: B010 - nn.Module declares no such attribute
    return smaller


def _runs(model: nn.Module, layer: Removable, inputs: Inputs, seen: dict[str, list[Call]]) -> bool:
    """Whether the model without the layer runs and can be trained.

    One pass suffices: a hook gives the joined layer its new width when its input arrives.
    """
    probe = _bypassed(model, layer)
    if layer.joined:
        joined = _fittable(probe, layer.joined)
        before = seen[layer.joined][0].inputs()[0].shape
        on_input(joined, lambda x: _take_width(joined, x, before))
    try:
        with Shapes():
            shapes = [t.shape for t in _trainable_outputs(probe, inputs)]
    except (RuntimeError, ValueError, AttributeError, TypeError, IndexError):
        return False
    return bool(layer.joined) or shapes == [t.shape for t in tensors(seen[""][0].output)]


def _fittable(model: nn.Module, name: str) -> _Fittable:
    """Return the layer of this name, which must be one that can be refitted."""
    layer = submodule(model, name)
    assert _is_fittable(layer)
    return layer


def _take_width(joined: _Fittable, x: Tensor, before: torch.Size) -> None:
    """Replace a layer's weights by zeros for an input with another number of channels, in place."""
    linear = isinstance(joined, nn.Linear)
    if (x.shape[:-1] != before[:-1]) if linear else (x.shape[2:] != before[2:]):
        raise ValueError(f"{tuple(x.shape)} arrives in place of {tuple(before)}")
    width = x.shape[-1] if linear else x.shape[1]
    per_row = width * (1 if isinstance(joined, nn.Linear) else math.prod(joined.kernel_size))
    _replace_weights(joined, joined.weight.new_zeros(len(joined.weight), per_row))


def _trainable_outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Run a forward and a backward pass, and return the outputs.

    The backward pass raises RuntimeError if, for example, an operation overwrote a tensor that it needs.
    """
    with torch.enable_grad(), eval_mode(model):
        outputs = tensors(call(model, fresh(inputs)))
        total = torch.stack([t.float().sum() for t in outputs if t.requires_grad]).sum()
        total.backward()
    return outputs


def _refit(
    model: nn.Module, smaller: nn.Module, layer: Removable, batches: list[Inputs], norm: str | None
) -> None:
    """Refit the joined layer in place: map its new inputs to its previous outputs.

    Args:
        model: the model with the layer. smaller: the model without it, in which to refit.
        norm: name of the BatchNorm directly behind the joined layer, if there is one.
    """
    if not batches:
        raise PruningError(
            f"calibration data is needed to join {layer.name} and {layer.joined}, and there are no batches; "
            "give some"
        )
    joined, refitted = _fittable(model, layer.joined), _fittable(smaller, layer.joined)

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for inputs in batches:
            given = _input_of(model, layer.joined, inputs)
            [use] = weight_uses(joined, given, {joined.weight})
            for rows, wanted in use.form.rows(_input_of(smaller, layer.joined, inputs), use.output):
                yield rows[:, 0], wanted[:, 0]

    with torch.no_grad():
        weight, bias = _least_squares(pairs(), offset=joined.bias is not None or norm is not None)
        _replace_weights(refitted, weight.T.to(joined.weight))
        if bias is not None and joined.bias is not None:
            refitted.get_parameter("bias").copy_(bias.to(joined.weight))
        elif bias is not None and norm is not None:
            submodule(smaller, norm).get_buffer("running_mean").sub_(bias.to(joined.weight))


def _least_squares(pairs: Iterable[tuple[Tensor, Tensor]], offset: bool) -> tuple[Tensor, Tensor | None]:
    """Solve `wanted = given @ weight + bias` in the least-squares sense, with a small ridge on the weight.

    Args:
        pairs: `given` (rows, inputs) and `wanted` (rows, outputs), in float64, batch by batch.
        offset: whether there is a bias.

    Returns the weight (inputs, outputs) and the bias (outputs,).
    """
    gram, cross = torch.zeros(()), torch.zeros(())
    for given, wanted in pairs:
        if offset:
            given = torch.cat([given, given.new_ones(len(given), 1)], 1)
        gram, cross = gram.to(given) + given.T @ given, cross.to(given) + given.T @ wanted
    diagonal = gram.diagonal()
    ridge = torch.full_like(diagonal, RIDGE * diagonal.mean().item() + 1e-12)
    if offset:
        ridge[-1] = 0
    solved = torch.linalg.solve(gram + torch.diag(ridge), cross)
    return (solved[:-1], solved[-1]) if offset else (solved, None)


def _replace_weights(layer: _Fittable, weight: Tensor) -> None:
    """Set a layer's weight, (outputs, inputs × kernel), which may have another input width, in place."""
    if isinstance(layer, nn.Conv2d):
        layer.in_channels = weight.shape[1] // math.prod(layer.kernel_size)
        weight = weight.reshape(len(weight), layer.in_channels, *layer.kernel_size)
    else:
        layer.in_features = weight.shape[1]
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=layer.weight.requires_grad)
