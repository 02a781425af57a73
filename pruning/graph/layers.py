"""The table of layers: which tensors of a layer hold its output and input channels."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from pruning.errors import PruningError
from pruning.graph.deformable import DeformableConv
from pruning.graph.inferred import inferred_rule
from pruning.graph.recurrent import is_projected, is_recurrent
from pruning.graph.rule import Rule, Side
from pruning.utils.modules import eval_mode

_ROWS = {"weight": 0, "bias": 0}

_CONV = Rule(_ROWS, {"weight": 1}, "out_channels", "in_channels", "groups", bias="bias")

_TRANSPOSED = Rule(
    {"weight": 1, "bias": 0}, {"weight": 0}, "out_channels", "in_channels", "groups", bias="bias"
)

_LINEAR = Rule(_ROWS, {"weight": 1}, "out_features", "in_features", bias="bias")

#: The rules of torch's own layers that multiply by a weight.
_PRODUCTS = (_CONV, _TRANSPOSED, _LINEAR)

_STATISTICS = {**_ROWS, "running_mean": 0, "running_var": 0}

#: torch's own convolutions and linear layers, and torchvision's deformable ones.
WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, DeformableConv)

_RNN = Rule({}, {"weight_ih_l0": 1, "weight_ih_l0_reverse": 1}, "hidden_size", "input_size", kind="recurrent")
_PROJECTED = replace(_RNN, out_count="proj_size")

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

#: By type, the rule that `TABLE` gives it.
_IN_TABLE: WeakKeyDictionary[type, Rule | None] = WeakKeyDictionary()


def register_layer(kind: type[nn.Module], rule: Rule, *, replace: bool = False) -> RemovableHandle:
    """Register a rule that says where a type of layer keeps its channels, so that it can be pruned.

    The rule applies to the type and its subclasses in `trace`, `apply`, scores, costs and checkpoints.
    Tensors that it does not name are not changed. `trace` compares the outputs of narrowed copies of the
    model, and skips groups for which the rule is wrong. In a layer of kind `"weighted"` each weight counts
    one MAC per output position; layers of the other kinds count none. Checkpoints load without the
    registration, and without the toolkit.

    Args:
        kind: the type of the layer.
        rule: the tensors and attributes that hold its channels.
        replace: whether to replace a rule that this type already has.

    Returns a handle: its method `remove`, or the end of a `with` block, removes the rule.
    Raises `PruningError` if `kind` is not a module type or `rule` not a `Rule`, for a rule that names too few
    tensors or is of kind `"recurrent"`, and for a type that already has a rule. `trace` raises it for a rule
    that names a tensor or attribute which the layer does not have.

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
        raise PruningError(f"{kind!r} is not a type of layer; give a subclass of nn.Module")
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
            "in both, or set kind='channelwise' if it treats each channel alone"
        )
    if rule.kind != "weighted" and rule.into:
        raise PruningError(f"{wrong} kind={rule.kind!r} and into={dict(rule.into)}; leave out into")
    if rule.dim is not None and rule.dim >= 0:
        raise PruningError(f"{wrong} dim={rule.dim}; count it from the end, as -1")
    if rule.spans:
        raise PruningError(f"{wrong} spans={rule.spans}, which `trace` finds by itself; leave them out")


def require_rules(model: nn.Module) -> None:
    """Raise `PruningError` if a registered rule does not fit a layer of the model."""
    for name, layer in model.named_modules() if _REGISTERED else ():
        rule = _registered_rule(type(layer))
        if rule is not None:
            problem = next(_problems(layer, rule), None)
            if problem is not None:
                raise PruningError(f"the rule for {type(layer).__name__} (layer {name!r}) {problem}")


def _problems(layer: nn.Module, rule: Rule) -> Iterator[str]:
    """Yield the reasons why a rule does not fit a layer, as the end of a message."""
    own = [name for name, _ in _tensors(layer)]
    for child, module in layer.named_children():
        if any(_tensors(module, recurse=True)):
            yield (
                f"is for a layer that holds another, {child!r} ({type(module).__name__}); register rules for "
                "the inner layers instead"
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
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def rule_for(layer: nn.Module) -> Rule | None:
    """Return the rule for a layer, registered, of `TABLE` or inferred; None if there is none."""
    kind = type(layer)
    if isinstance(layer, nn.MultiheadAttention) and layer.in_proj_weight is None:
        return _registered_rule(kind)  # each of its weights is a layer
    rule = _registered_rule(kind) or _table_rule(kind) or inferred_rule(kind)
    if rule is _RNN and is_projected(layer):
        return _PROJECTED
    return _with_scales(layer, rule) if len(layer._parameters) > 2 and rule in _PRODUCTS else rule


def _with_scales(layer: nn.Module, rule: Rule) -> Rule:
    """Return the rule of a convolution or linear layer whose class adds one number for each filter.

    An example is the gain of standardized filters, (out, 1, 1, 1). Other parameters change nothing.
    """
    weight = layer._parameters.get(rule.weight)
    if weight is None:
        return rule
    dim = rule.out[rule.weight]
    shape = [size if d == dim else 1 for d, size in enumerate(weight.shape)]
    own = {name for name, p in layer._parameters.items() if p is not None and list(p.shape) == shape}
    own -= rule.out.keys()
    return replace(rule, out={**rule.out, **dict.fromkeys(sorted(own), dim)}) if own else rule


def _registered_rule(kind: type) -> Rule | None:
    if not _REGISTERED:
        return None
    rules = dict(_REGISTERED.values())
    return next((rules[base] for base in kind.__mro__ if base in rules), None) if rules else None


def _table_rule(kind: type) -> Rule | None:
    if kind not in _IN_TABLE:
        _IN_TABLE[kind] = next((rule for types, rule in TABLE if issubclass(kind, types)), None)
    return _IN_TABLE[kind]


def rule_of(layer: nn.Module) -> Rule:
    """Return the rule for a layer that is known to have one."""
    rule = rule_for(layer)
    assert rule is not None, f"{type(layer).__name__} has no row in pruning.graph.layers.TABLE"
    return rule


def is_registered(layer: nn.Module) -> bool:
    """Whether a layer has a rule that a user registered."""
    return _registered_rule(type(layer)) is not None


def has_more_parameters(layer: nn.Module) -> bool:
    """Whether the class of a convolution or linear layer adds parameters to its weight and bias."""
    rule = _table_rule(type(layer))
    return rule in _PRODUCTS and "weight" in layer._parameters and len(layer._parameters) > 2


def is_inferred(layer: nn.Module) -> bool:
    """Whether the rule for a layer was inferred from its code, which is followed operator by operator."""
    return inferred_rule(type(layer)) is not None and rule_for(layer) is inferred_rule(type(layer))


def is_read_by_parent(parent: nn.Module, layer: nn.Module) -> bool:
    """Whether a module multiplies by the weight of a layer that it holds, without running the layer.

    >>> attention = nn.MultiheadAttention(8, 2)
    >>> is_read_by_parent(attention, attention.out_proj)
    True
    """
    return isinstance(parent, nn.MultiheadAttention) and layer is parent.out_proj


def is_weighted(layer: nn.Module) -> bool:
    """Whether a layer has a weight with input and output channels."""
    rule = rule_for(layer)
    return rule is not None and rule.kind == "weighted"


def is_of_layer(module: nn.Module, attribute: str) -> bool:
    """Whether a parameter holds channels of a layer, so that narrowing the layer narrows it.

    >>> is_of_layer(nn.Linear(3, 4), "weight")
    True
    """
    rule = rule_for(module)
    return rule is not None and (attribute in rule.out or attribute in rule.into)


def makes_channels(layer: nn.Module) -> bool:
    """Whether a layer makes new channels: its output channels are not its input channels, as in a norm."""
    rule = rule_for(layer)
    return (rule is not None and rule.kind in ("weighted", "embedding")) or is_recurrent(layer)


def weight_of(layer: nn.Module) -> Tensor | None:
    """Return the weight of a layer with input and output channels, or the scales of a norm."""
    rule = rule_for(layer)
    if rule is None or not rule.weight:
        return None
    if layer.training and parametrize.is_parametrized(layer, rule.weight):
        with eval_mode(layer.get_submodule("parametrizations")):  # spectral norm iterates in training mode
            return getattr(layer, rule.weight)
    weight = getattr(layer, rule.weight, None)
    return weight if isinstance(weight, Tensor) else None


def bias_of(layer: nn.Module) -> Tensor | None:
    """Return the bias of a weighted layer; None if it has none."""
    rule = rule_for(layer)
    bias = getattr(layer, rule.bias, None) if rule is not None and rule.bias else None
    return bias if isinstance(bias, Tensor) else None


def layer_width(layer: nn.Module, side: Side) -> int:
    """Return the number of channels of one side of a layer that has a rule."""
    return rule_of(layer).width(layer, side)


def channels_stand_alone(layer: nn.Module) -> bool:
    """Whether each part of a layer has one channel, as in a depthwise convolution.

    Each channel of such a layer can be removed, together with its part.
    """
    rule = rule_of(layer)
    if rule.kind != "weighted" and rule.parts:
        return getattr(layer, rule.parts) == rule.width(layer, "out")
    return is_depthwise(layer)


def channel_dim(layer: nn.Module) -> int:
    """Return the dimension, counted from the end, along which a weighted layer's input channels lie."""
    dim, weight = rule_of(layer).dim, weight_of(layer)
    if dim is None and weight is not None and is_registered(layer):
        return 1 - weight.ndim
    return -1 - len(getattr(layer, "kernel_size", ())) if dim is None else dim


def is_depthwise(layer: nn.Module) -> bool:
    """Whether each input channel is convolved alone, into one output channel or several."""
    rule = None if is_registered(layer) else _table_rule(type(layer))
    if rule is not _CONV and rule is not _TRANSPOSED:
        return False
    assert isinstance(layer, nn.modules.conv._ConvNd | DeformableConv)
    if not 1 < layer.groups == layer.in_channels:
        return False
    # A transposed one with several outputs per input holds its output channels along two dimensions.
    return rule is _CONV or layer.out_channels == layer.groups


def holds_layers(layer: nn.Module) -> bool:
    """Whether a convolution or linear layer contains other layers, such as its norm in detectron2."""
    return isinstance(layer, WEIGHTED) and any(map(rule_for, layer.children()))


def parts(layer: nn.Module) -> int:
    """Return the number of equal parts of a layer's channels; each part must lose the same number.

    A layer whose channels stand alone counts as one part.
    """
    rule = rule_for(layer)
    if rule is None or not rule.parts or channels_stand_alone(layer):
        return 1
    return getattr(layer, rule.parts)
