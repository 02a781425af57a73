"""Which slices of which layers must be removed together: channel groups, by tracing.

`torch_pruning.DependencyGraph` follows the computation and finds the coupled slices; this
module is the only one that knows it. What comes out is plain data, with the reason for
every layer that is left out.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pruning.errors import PruningError
from pruning.layers import Side, layer_width, parts, rule_for

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
#: A layer to leave as it is: a name or pattern (`features.*`), a type, or the module itself.
Ignored = str | type[nn.Module] | nn.Module


@dataclass(frozen=True)
class Member:
    """One side of one layer in a group.

    `index[i]`, a position along that side of the layer, belongs to channel `channel[i]` of
    the group: after a flatten, several positions belong to one channel.
    """

    layer: str
    side: Side
    index: Tensor
    channel: Tensor

    def positions(self, channels: Tensor) -> Tensor:
        """The positions along this side that the given channels of the group own, sorted."""
        return self.index[torch.isin(self.channel, channels)].sort().values


@dataclass(frozen=True)
class Group:
    """Slices of layers that are kept or removed together; channels count from 0."""

    name: str
    channels: int
    members: tuple[Member, ...]

    def side(self, side: Side) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.side == side)


@dataclass(frozen=True)
class LayerUse:
    """How often a forward pass of one example uses a weight of a layer.

    A layer costs `uses * weight.numel()` MACs, whatever its widths. `positions` counts the
    output positions, at each of which a bias is added. `bias` tells whether the layer has
    one, or gets one when the BatchNorm behind it is folded.
    """

    uses: float
    positions: float
    bias: bool = False


@dataclass(frozen=True)
class Trace:
    """What tracing found out about a model.

    Attributes:
        groups: the prunable groups, by the name of their first layer.
        skipped: layers whose outputs cannot be pruned, with the reason and the cure.
        foldable: BatchNorm layers that directly follow a layer: layer name to norm name.
        uses: for every convolution and linear layer, how often it is used.
        ignored: the layers that were asked to stay as they are, those inside them included.
    """

    groups: dict[str, Group]
    skipped: dict[str, str]
    foldable: dict[str, str]
    uses: dict[str, LayerUse] = field(repr=False)
    ignored: frozenset[str] = frozenset()

    @property
    def widths(self) -> dict[str, int]:
        return {name: group.channels for name, group in self.groups.items()}


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Run a model on example inputs: a tensor, a sequence of arguments, or keyword arguments."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def tensors(output: Any) -> list[Tensor]:
    """The tensors in a model's output, whatever holds them."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def trace(model: nn.Module, inputs: Inputs, ignored: Iterable[Ignored] = ()) -> Trace:
    """Find the channel groups of a model.

    Args:
        model: any module; it is not changed, nor is its mode.
        inputs: example inputs with a batch dimension, on the model's device.
        ignored: layers whose outputs are to stay as they are; a pattern, type or instance
            that matches no layer is an error.

    Raises `PruningError` when the model cannot be traced.
    """
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    keep = _match(model, ignored)
    probe = copy.deepcopy(model).eval().requires_grad_(True)
    names = {module: name for name, module in probe.named_modules()}
    inputs = pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, inputs)

    uses = _count_uses(probe, inputs)
    graph = _build(probe, inputs)
    shared = _shared_parameters(model)

    groups, skipped = {}, {}
    seen: set[str] = set()
    roots = [
        m for m in names if m in graph.module2node and isinstance(m, nn.modules.conv._ConvNd | nn.Linear)
    ]
    for root in roots:
        name = names[root]
        if name in seen:
            continue
        width = graph.get_out_channels(root)
        pruner = graph.get_pruner_of_module(root)
        found = graph.get_pruning_group(root, pruner.prune_out_channels, list(range(width)))
        members, reason = _members(graph, found, names)
        group = _group(name, width, members, probe)
        producers = [m.layer for m in group.side("out")]
        seen.update(producers)
        reason = reason or _obstacle(group, probe, keep, frozen, shared)
        if reason:
            skipped.update({p: reason for p in producers if p in uses})
        else:
            groups[name] = group

    foldable = _foldable(graph, names)
    uses = {
        name: replace(use, bias=probe.get_submodule(name).bias is not None or name in foldable)
        for name, use in uses.items()
    }
    return Trace(groups, skipped, foldable, uses, frozenset(keep))


def _build(probe: nn.Module, inputs: Inputs) -> Any:
    def mark_outputs(output: Any) -> list[Tensor]:
        # An operation of its own behind every output makes the graph see it as an output
        # even where a layer gives it directly.
        return [t * 1 for t in tensors(output) if t.requires_grad]

    # Imported here, so that what it finds can be loaded where it is not installed.
    try:
        import torch_pruning
    except ImportError as error:
        raise PruningError(
            f"tracing needs the package torch-pruning: pip install torch-pruning ({error})"
        ) from error
    example = inputs if isinstance(inputs, Tensor | Mapping) else list(inputs)
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch_pruning: we name what it cannot prune
            return torch_pruning.DependencyGraph().build_dependency(
                probe,
                example,
                forward_fn=call,
                output_transform=mark_outputs,
                verbose=False,
            )
    except Exception as error:  # whatever a foreign model or the graph raises on it
        raise PruningError(
            f"{type(probe).__name__} cannot be traced: {type(error).__name__}: {error}. Check that it "
            "runs on the example inputs and is differentiable end to end"
        ) from error


def _count_uses(probe: nn.Module, inputs: Inputs) -> dict[str, LayerUse]:
    """How often one example uses every convolution and linear layer."""
    uses: dict[str, LayerUse] = {}
    example = tensors(inputs)
    batch = example[0].shape[0] if example and example[0].ndim else 1

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def record(layer: nn.Module, args: Any, output: Tensor) -> None:
            positions = output.numel() / layer_width(layer, "out") / batch
            used = positions
            if isinstance(layer, nn.modules.conv._ConvTransposeNd):
                used = args[0].numel() / layer.in_channels / batch
            before = uses.get(name, LayerUse(0.0, 0.0))
            uses[name] = LayerUse(before.uses + used, before.positions + positions)

        return record

    hooks = [
        module.register_forward_hook(hook(name))
        for name, module in probe.named_modules()
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear)
    ]
    try:
        with torch.no_grad():
            call(probe, inputs)
    except Exception as error:
        raise PruningError(
            f"{type(probe).__name__} does not run on the example inputs: {type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in hooks:
            handle.remove()
    return uses


def _members(graph: Any, found: Any, names: dict[nn.Module, str]) -> tuple[list[Member], str]:
    """The parametric layers in a group as the graph found it, or why it cannot be pruned."""
    members: dict[tuple[str, Side], Member] = {}
    reason = ""
    for item in found:
        module = item.dep.target.module
        if isinstance(module, nn.Parameter):
            parameter = graph._param_to_name[module]
            reason = (
                f"the parameter {parameter} is used directly, outside a layer that surgery knows; "
                "put it into a module of its own or list this layer as ignored"
            )
        elif type(module).__name__ == "_OutputOp":
            reason = reason or "its channels are the model's output, whose size is kept"
        elif module in names:
            if rule_for(module) is None:
                reason = (
                    f"{names[module]} is a {type(module).__name__}, which surgery does not know; "
                    "add a row to pruning.layers.TABLE or list this layer as ignored"
                )
                continue
            if isinstance(module, nn.PReLU) and module.num_parameters == 1:
                continue  # one slope for all channels
            consumes = graph.is_in_channel_pruning_fn(item.dep.handler)
            produces = graph.is_out_channel_pruning_fn(item.dep.handler)
            side: Side = "in" if consumes and not produces else "out"
            pairs = torch.tensor([list(item.idxs), list(item.root_idxs)])
            old = members.get((names[module], side))
            if old is not None:
                pairs = torch.cat([torch.stack([old.index, old.channel]), pairs], dim=1).unique(dim=1)
            members[names[module], side] = Member(names[module], side, *pairs)
    return list(members.values()), reason


def _group(name: str, width: int, members: list[Member], probe: nn.Module) -> Group:
    """Merge channels that must go together, and number what is left from 0.

    A position reached from two channels ties them. A layer that divides its channels into
    g equal parts (grouped convolution, GroupNorm) must lose as many from each: the channels
    in the same place of every part are tied, and one number stands for them all.
    """
    parent = list(range(width))

    def find(channel: int) -> int:
        while parent[channel] != channel:
            parent[channel] = parent[parent[channel]]
            channel = parent[channel]
        return channel

    for member in members:
        layer = probe.get_submodule(member.layer)
        place = member.index % (layer_width(layer, member.side) // parts(layer))
        first: dict[int, int] = {}
        for spot, channel in zip(place.tolist(), member.channel.tolist(), strict=True):
            other = first.setdefault(spot, channel)
            if find(other) != find(channel):
                parent[max(find(other), find(channel))] = min(find(other), find(channel))

    roots = torch.tensor([find(c) for c in range(width)])
    distinct, number = roots.unique(return_inverse=True)
    merged = []
    for member in members:
        pairs = torch.stack([member.index, number[member.channel]]).unique(dim=1)
        merged.append(Member(member.layer, member.side, *pairs))
    return Group(name, len(distinct), tuple(merged))


def _obstacle(
    group: Group, model: nn.Module, keep: dict[str, str], frozen: set[str], shared: dict[str, str]
) -> str:
    """Why a group is left as it is; empty when it can be pruned."""
    if not group.side("in"):
        return "no layer that surgery knows consumes its channels; they may be the model's output"
    for member in group.members:
        layer = model.get_submodule(member.layer)
        # The graph takes any convolution with one output per part for a depthwise one, and
        # none of the parts of such a layer could be given up.
        if 1 < parts(layer) == layer_width(layer, member.side):
            return (
                f"{member.layer} works on {parts(layer)} parts with one channel each, none of which "
                "can be given up; list it as ignored or give it fewer groups"
            )
    if group.channels < 2:
        return "its channels can only be removed all together, and a group is never emptied"
    for member in group.members:
        layer = model.get_submodule(member.layer)
        if member.side == "out" and member.layer in keep:
            return f"ignored, as asked by {keep[member.layer]}"
        for parameter, _ in layer.named_parameters(recurse=False):
            full = f"{member.layer}.{parameter}"
            if full in frozen:
                return f"{full} is frozen; set requires_grad=True to let it be pruned"
            if full in shared:
                return f"{full} is the same tensor as {shared[full]}; untie them to let it be pruned"
        if nn.utils.parametrize.is_parametrized(layer):
            return f"{member.layer} is parametrized; remove the parametrization to let it be pruned"
        produces = isinstance(layer, nn.modules.conv._ConvNd | nn.Linear) and member.side == "out"
        if produces and len(member.index) != layer_width(layer, "out"):
            return (
                f"only {len(member.index)} of the channels of {member.layer} are coupled to it, which "
                "tracing cannot take apart; list it as ignored or split that layer"
            )
    return ""


def _match(model: nn.Module, ignored: Iterable[Ignored]) -> dict[str, str]:
    """The names of the layers to ignore, each with what asked for it."""
    keep: dict[str, str] = {}
    for entry in ignored:
        described = entry if isinstance(entry, str) else getattr(entry, "__name__", type(entry).__name__)
        matched = [
            name
            for name, module in model.named_modules()
            if (isinstance(entry, str) and fnmatchcase(name, entry))
            or (isinstance(entry, type) and isinstance(module, entry))
            or module is entry
        ]
        if not matched:
            raise PruningError(
                f"ignored layer {described!r} matches no layer of {type(model).__name__}; give a name or "
                "pattern from named_modules(), a module type, or one of its modules"
            )
        for name in matched:
            inner = model.get_submodule(name).named_modules(prefix=name)
            keep.update({layer: repr(described) for layer, _ in inner})
    return keep


def _shared_parameters(model: nn.Module) -> dict[str, str]:
    """Parameters that two layers hold: each full name with the other's."""
    holders: dict[int, str] = {}
    shared: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = holders.setdefault(id(parameter), name)
        if other != name:
            shared.update({name: other, other: name})
    return shared


def _foldable(graph: Any, names: dict[nn.Module, str]) -> dict[str, str]:
    """BatchNorm layers that alone consume the output of the layer before them."""
    pairs = {}
    for module, node in graph.module2node.items():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear) and len(node.outputs) == 1:
            norm = node.outputs[0].module
            if (
                isinstance(norm, nn.modules.batchnorm._BatchNorm)
                and norm.running_mean is not None
                and math.prod(norm.running_mean.shape) == graph.get_out_channels(module)
            ):
                pairs[names[module]] = names[norm]
    return pairs
