"""Layer knowledge, in one table: which tensors of a layer hold which of its channels."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pruning.errors import PruningError
from pruning.graph.deformable import DeformableConv

#: A side of a layer, or `self` for a tensor that a model uses without a layer of the table around it.
Side = Literal["out", "in", "self"]

#: How channels pass through a layer; see `Rule`.
Kind = Literal["weighted", "embedding", "channelwise", "norm", "recurrent"]


@dataclass(frozen=True)
class Rule:
    """Where a type of layer keeps its channels, and how they pass through it.

    Args:
        out: names of the tensors that hold output channels, each with the dimension they lie along.
            The channels of a norm or an activation, which are both, count as output channels.
        into: names of the tensors that hold input channels, in the same way.
        out_count, in_count: attributes with the number of channels; of a tuple the last entry counts.
            Empty where the layer keeps no such number: the width is then that of its tensors.
        parts: attribute with the number of equal parts that the channels are divided into.
        kind: `"weighted"`, every output channel is a sum over input channels (a convolution);
            `"embedding"`, output channels are looked up by index; `"channelwise"`, each channel is
            treated alone (BatchNorm, PReLU); `"norm"`, channels are scaled by statistics over several
            of them (LayerNorm); `"recurrent"`, input channels are read, the hidden size is kept.
        bias: the tensor that is added to the weighted sum, if the layer adds one and neither scales the
            sum nor pads its input with zeros; `apply` adds the constants of removed channels to it.
        dim: the dimension of the input and the output along which channels lie, from the end. The default
            is -1 for an embedding and for a weight of two dimensions, -3 for one of four (a convolution of
            images); for channelwise layers and norms it is dimension 1.
    """

    out: Mapping[str, int]
    into: Mapping[str, int] = field(default_factory=dict)
    out_count: str = ""
    in_count: str = ""
    parts: str = ""
    kind: Kind = "weighted"
    bias: str = ""
    dim: int | None = None

    @property
    def weight(self) -> str:
        """The tensor between input and output channels, or else the first that holds output channels."""
        return next((name for name in self.out if name in self.into), next(iter(self.out), ""))

    def count(self, side: Side) -> str:
        """The attribute with the number of channels of one side; empty where there is none."""
        return self.out_count if side == "out" else self.in_count

    def width(self, layer: nn.Module, side: Side) -> int:
        """The number of channels of one side of a layer."""
        if name := self.count(side):
            count = getattr(layer, name)
            return count[-1] if isinstance(count, tuple) else count
        held = self.out if side == "out" else self.into
        shapes = ((getattr(layer, name, None), dim) for name, dim in held.items())
        return next((tensor.shape[dim] for tensor, dim in shapes if isinstance(tensor, Tensor)), 0)


_ROWS = {"weight": 0, "bias": 0}

_CONV = Rule(_ROWS, {"weight": 1}, "out_channels", "in_channels", "groups", bias="bias")

_TRANSPOSED = Rule(
    {"weight": 1, "bias": 0}, {"weight": 0}, "out_channels", "in_channels", "groups", bias="bias"
)

_LINEAR = Rule(_ROWS, {"weight": 1}, "out_features", "in_features", bias="bias")

_STATISTICS = {**_ROWS, "running_mean": 0, "running_var": 0}

#: torch's own convolutions and linear layers, and torchvision's deformable ones.
WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, DeformableConv)

#: torch's recurrent layers, which read channels and keep their hidden size.
RECURRENT = (nn.RNNBase, nn.RNNCellBase)

_RNN = Rule({}, {"weight_ih_l0": 1, "weight_ih_l0_reverse": 1}, "hidden_size", "input_size", kind="recurrent")

#: The first row whose type matches is taken. `register_layer` adds rows for a user's own layers.
TABLE: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], Rule], ...] = (
    (nn.modules.conv._ConvTransposeNd, _TRANSPOSED),
    ((nn.modules.conv._ConvNd, DeformableConv), _CONV),
    (nn.Linear, _LINEAR),
    (nn.modules.batchnorm._NormBase, Rule(_STATISTICS, {}, "num_features", kind="channelwise")),
    (nn.GroupNorm, Rule(_ROWS, {}, "num_channels", parts="num_groups", kind="norm")),
    (nn.LayerNorm, Rule({"weight": -1, "bias": -1}, {}, "normalized_shape", kind="norm")),
    (nn.RMSNorm, Rule({"weight": -1}, {}, "normalized_shape", kind="norm")),
    (nn.PReLU, Rule({"weight": 0}, {}, "num_parameters", kind="channelwise")),
    ((nn.Embedding, nn.EmbeddingBag), Rule({"weight": 1}, {}, "embedding_dim", kind="embedding")),
    (nn.RNNBase, _RNN),
    (nn.RNNCellBase, Rule({}, {"weight_ih": 1}, "hidden_size", "input_size", kind="recurrent")),
)

#: Rows that users added, by the id of their handle.
_REGISTERED: OrderedDict[int, tuple[type[nn.Module], Rule]] = OrderedDict()


def register_layer(kind: type[nn.Module], rule: Rule, *, replace: bool = False) -> RemovableHandle:
    """Tell the toolkit where a type of layer keeps its channels, so that it can be pruned.

    The rule holds for the type and its subclasses wherever a layer of torch is known: in `trace`,
    `apply`, scores, costs and checkpoints. Tensors that it does not name stay as they are. `trace`
    compares the model's outputs with a channel less, and skips groups for which the rule is wrong. Each
    weight counts one MAC per output position; layers of the other kinds count none, as norms do.
    Checkpoints load without the registration, and without the toolkit.

    Args:
        kind: the type of the layer.
        rule: which tensors and attributes hold its channels.
        replace: whether a rule that there is for this very type may be replaced.

    Returns a handle: its method `remove`, or the end of a `with` block, takes the rule back.
    Raises `PruningError` for what is no module type or no rule, for a rule that names too few tensors or is
    of kind `"recurrent"`, and for a type that has a rule. `trace` raises it for a rule that names a tensor
    or attribute which the layer does not have.

    >>> import torch
    >>> class Scaled(nn.Module):
    ...     def __init__(self, into, out):
    ...         super().__init__()
    ...         self.kernel, self.scale = nn.Parameter(torch.randn(out, into)), nn.Parameter(torch.ones(out))
    ...     def forward(self, x):
    ...         return nn.functional.linear(x, self.kernel) * self.scale
    >>> from pruning import Budget, prune
    >>> model = nn.Sequential(Scaled(6, 8), nn.ReLU(), Scaled(8, 3))
    >>> with register_layer(Scaled, Rule(out={"kernel": 0, "scale": 0}, into={"kernel": 1})):
    ...     small = prune(model, torch.randn(2, 6), Budget(channels=4), score="l2").model
    >>> small[0].scale.shape, small[2].kernel.shape
    (torch.Size([4]), torch.Size([3, 4]))
    """
    _require_valid(kind, rule)
    known = any(of is kind for of, _ in _REGISTERED.values())
    if not replace and (known or (kind.__module__.startswith("torch.nn.") and _table_rule(kind) is not None)):
        raise PruningError(f"{kind.__name__} has a rule already; pass replace=True to replace it")
    handle = RemovableHandle(_REGISTERED)
    _REGISTERED[handle.id] = kind, rule
    return handle


def _require_valid(kind: type[nn.Module], rule: Rule) -> None:
    """Raise `PruningError` for a type or rule that cannot be registered."""
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise PruningError(f"{kind!r} is no type of layers; give a subclass of nn.Module")
    if not isinstance(rule, Rule):
        raise PruningError(f"the rule for {kind.__name__} is a {type(rule).__name__}; give a Rule")
    wrong = f"the rule for {kind.__name__} has"
    if rule.kind == "recurrent":
        raise PruningError(
            f"{wrong} kind='recurrent', which is for torch's own layers; put its input weights into a layer "
            "of their own, with kind='weighted'"
        )
    if rule.kind not in ("weighted", "embedding", "channelwise", "norm"):
        raise PruningError(
            f"{wrong} kind={rule.kind!r}; expected 'weighted', 'embedding', 'channelwise' or 'norm'"
        )
    if not rule.out:
        raise PruningError(f"{wrong} out={{}}; name the tensors that hold its output channels")
    if rule.kind == "weighted" and not rule.out.keys() & rule.into.keys():
        raise PruningError(
            f"{wrong} out={dict(rule.out)} and into={dict(rule.into)}; name the weight of a weighted layer "
            "in both"
        )
    if rule.kind != "weighted" and rule.into:
        raise PruningError(f"{wrong} kind={rule.kind!r} and into={dict(rule.into)}; leave out into")
    if rule.dim is not None and rule.dim >= 0:
        raise PruningError(f"{wrong} dim={rule.dim}; count it from the end, as -1")


def require_rules(model: nn.Module) -> None:
    """Raise `PruningError` where a registered rule does not describe a layer of the model."""
    for name, layer in model.named_modules() if _REGISTERED else ():
        rule = _registered_rule(type(layer))
        if rule is not None:
            problem = next(_problems(layer, rule), None)
            if problem is not None:
                raise PruningError(f"the rule for {type(layer).__name__} (layer {name!r}) {problem}")


def _problems(layer: nn.Module, rule: Rule) -> Iterator[str]:
    own = [name for name, _ in _tensors(layer)]
    for child, module in layer.named_children():
        if any(_tensors(module, recurse=True)):
            yield (
                f"is for a layer that holds another, {child!r} ({type(module).__name__}); register what the "
                "inner layers need instead"
            )
    for name in (*rule.out, *rule.into, *filter(None, [rule.bias])):
        if not hasattr(layer, name):
            yield f"names the tensor {name!r}; the layer has {', '.join(own) or 'none'}"
    for name in filter(None, (rule.out_count, rule.in_count, rule.parts)):
        if not hasattr(layer, name):
            yield f"names the attribute {name!r}, which the layer does not have"
        elif isinstance(getattr(type(layer), name, None), property):
            yield f"names {name!r}, a property, which pruning cannot set; leave it out"
        elif not isinstance(getattr(layer, name), int | tuple):
            yield f"names {name!r}, a {type(getattr(layer, name)).__name__}; expected a number of channels"
    sides: tuple[tuple[Side, Mapping[str, int]], ...] = (("out", rule.out), ("in", rule.into))
    for side, held in sides:
        for name, dim in held.items():
            tensor = getattr(layer, name)
            if tensor is None:
                continue
            if not isinstance(tensor, Tensor) or not -tensor.ndim <= dim < tensor.ndim:
                yield f"names dimension {dim} of {name!r}, which is {_described(tensor)}"
            elif tensor.shape[dim] not in (width := rule.width(layer, side), width // parts(layer)):
                yield f"says that {name!r} has {width} channels along dimension {dim}: {_described(tensor)}"


def _tensors(layer: nn.Module, recurse: bool = False) -> list[tuple[str, Tensor]]:
    return [*layer.named_parameters(recurse=recurse), *layer.named_buffers(recurse=recurse)]


def _described(value: object) -> str:
    return (
        f"a tensor of shape {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else f"a {type(value).__name__}"
    )


def rule_for(layer: nn.Module) -> Rule | None:
    """The rule for a layer, registered or of `TABLE`; None where there is none."""
    return _registered_rule(type(layer)) or _table_rule(type(layer))


def _registered_rule(kind: type) -> Rule | None:
    rules = dict(_REGISTERED.values())
    return next((rules[base] for base in kind.__mro__ if base in rules), None) if rules else None


def _table_rule(kind: type) -> Rule | None:
    return next((rule for types, rule in TABLE if issubclass(kind, types)), None)


def rule_of(layer: nn.Module) -> Rule:
    """The rule for a layer that is known to have one."""
    rule = rule_for(layer)
    assert rule is not None, f"{type(layer).__name__} has no row in pruning.graph.layers.TABLE"
    return rule


def is_registered(layer: nn.Module) -> bool:
    """Whether a layer has a rule that a user registered."""
    return _registered_rule(type(layer)) is not None


def is_weighted(layer: nn.Module) -> bool:
    """Whether a layer has a weight between input channels and output channels."""
    rule = rule_for(layer)
    return rule is not None and rule.kind == "weighted"


def makes_channels(layer: nn.Module) -> bool:
    """Whether the output channels of a layer are its own: not those that it reads, as a norm's are."""
    rule = rule_for(layer)
    return rule is not None and rule.kind in ("weighted", "embedding")


def weight_of(layer: nn.Module) -> Tensor | None:
    """The tensor of a layer between its input and output channels, or the scales of a norm."""
    rule = rule_for(layer)
    weight = getattr(layer, rule.weight, None) if rule is not None and rule.weight else None
    return weight if isinstance(weight, Tensor) else None


def bias_of(layer: nn.Module) -> Tensor | None:
    """The tensor that a weighted layer adds to its sums."""
    rule = rule_for(layer)
    bias = getattr(layer, rule.bias, None) if rule is not None and rule.bias else None
    return bias if isinstance(bias, Tensor) else None


def layer_width(layer: nn.Module, side: Side) -> int:
    """The number of channels of one side of a layer that has a rule."""
    return rule_of(layer).width(layer, side)


def channels_stand_alone(layer: nn.Module) -> bool:
    """Whether a layer in parts has one channel in each, as a depthwise convolution does.

    Such a layer may lose any of its channels: it loses the part with the channel.
    """
    rule = rule_of(layer)
    if rule.kind != "weighted" and rule.parts:
        return getattr(layer, rule.parts) == rule.width(layer, "out")
    return is_depthwise(layer)


def channel_dim(layer: nn.Module) -> int:
    """The dimension of a weighted layer's input along which its channels lie, from the end."""
    dim, weight = rule_of(layer).dim, weight_of(layer)
    if dim is None and weight is not None and is_registered(layer):
        return 1 - weight.ndim
    return -1 - len(getattr(layer, "kernel_size", ())) if dim is None else dim


def is_depthwise(layer: nn.Module) -> bool:
    """Whether each input channel is convolved alone, into one output channel or several."""
    rule = rule_for(layer)
    if rule is not _CONV and rule is not _TRANSPOSED:
        return False
    assert isinstance(layer, nn.modules.conv._ConvNd | DeformableConv)
    if not 1 < layer.groups == layer.in_channels:
        return False
    # The weight of a transposed one that makes several holds them along two dimensions.
    return rule is _CONV or layer.out_channels == layer.groups


def holds_layers(layer: nn.Module) -> bool:
    """Whether a convolution or linear layer holds others: the norm behind it, as in detectron2."""
    return isinstance(layer, WEIGHTED) and any(map(rule_for, layer.children()))


def is_recurrent(layer: nn.Module) -> bool:
    """Whether a layer is one of torch's own recurrent ones, which can be taken as a whole."""
    return isinstance(layer, RECURRENT) and type(layer).__module__ == nn.RNNBase.__module__


def parts(layer: nn.Module) -> int:
    """Into how many equal parts a layer divides its channels; each must lose as many."""
    rule = rule_for(layer)
    if rule is None or not rule.parts or channels_stand_alone(layer):
        return 1
    return getattr(layer, rule.parts)
