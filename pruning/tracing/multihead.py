"""Follow `nn.MultiheadAttention`: its code demands as many queries, keys and values as it reads channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pruning.graph.inferred import infer_rule
from pruning.graph.rule import Rule
from pruning.tracing.labels import Labels
from pruning.tracing.record import KnownSize, SideUse
from pruning.utils.held_weight import held_weight

#: The weights of a layer whose keys or values have other widths than its queries.
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def begin_multihead(
    labels: Labels, name: str, layer: nn.MultiheadAttention, read: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Let the bias of the projections have their labels, before code reads parts of it.

    Args:
        name: of the layer. read: the query, the key and the value.
    """
    for x in read:
        labels.of_or_uniform(x, -1)
    bias, inferred = layer.in_proj_bias, labels.weights.inferred
    if bias is None:
        return
    if layer._qkv_same_embed_dim:
        rule = Rule({"in_proj_weight": 0, "in_proj_bias": 0}, {"in_proj_weight": 1}, kind="weighted")
        if infer_rule(type(layer), rule, inferred):
            labels.own[id(bias)] = labels.side(name, layer, "out", -1)
        return
    held = {weight: held_weight(layer, weight) for weight in _SEPARATE}
    rule = Rule({"weight": 0}, {"weight": 1}, kind="weighted")
    if all(infer_rule(type(each), rule, inferred) for each in held.values()):
        made = torch.cat([labels.side(f"{name}.{own}", each, "out", -1) for own, each in held.items()])
        labels.found.sides[f"{name}.in_proj_bias", "self"] = SideUse(made.numpy(), 0)
        labels.own[id(bias)] = made


def tie_multihead(
    labels: Labels, name: str, layer: nn.MultiheadAttention, read: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Tie the channels of the query to the positions of q, k and v, and note the attributes that count them.

    Call it after the layer has run.

    Args:
        name: of the layer. read: the query, the key and the value.
    """
    projections = [name] * 3 if layer._qkv_same_embed_dim else [f"{name}.{weight}" for weight in _SEPARATE]
    if any((each, "out") not in labels.found.sides for each in projections):
        return
    made = [labels.found.sides[each, "out"].labels for each in projections]
    if layer._qkv_same_embed_dim:
        made = [*made[0].reshape(3, -1)]
    q, k, v = (torch.from_numpy(each) for each in made)
    reason = f"{labels.where()} takes as many channels as its heads hold, and they have a fixed size"
    for other in (k, v):
        labels.tie(q, other, reason)
    inputs = [labels.found.sides[each, "in"].labels for each in projections]
    for i, x in enumerate(read):
        arriving = labels.of(x)
        row = None if arriving is None else labels.row(arriving, x.ndim - 1, reason)
        vector = labels.vectors(row).get(x.ndim - 1)
        if vector is None:  # the columns of one weight are shared
            labels.fix(arriving, reason)
            labels.fix(torch.from_numpy(inputs[i]), reason)
        if i == 0:
            labels.fix(q, reason) if vector is None else labels.tie(vector, q, reason)
    counted = {"embed_dim": made[0], "kdim": inputs[1], "vdim": inputs[2]}
    heads = labels.vectors(q.reshape(layer.num_heads, -1)) if labels.found.axes is not None else {}
    counted |= {
        attribute: heads[dim].numpy()
        for dim, attribute in enumerate(("num_heads", "head_dim"))
        if dim in heads
    }
    labels.found.known += [KnownSize(name, attribute, held) for attribute, held in counted.items()]
    for owner, module in labels.weights.modules.items():
        if isinstance(module, nn.Transformer) and name.startswith(f"{owner}." if owner else ""):
            for attribute, same in (("d_model", "embed_dim"), ("nhead", "num_heads")):
                if same in counted:
                    labels.found.known.append(KnownSize(owner, attribute, counted[same]))
