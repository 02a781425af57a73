"""Compute `nn.MultiheadAttention` by plain products, so that its channels can be followed and masked."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import TypedDict, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class Attended(TypedDict):
    """The arguments of `F.multi_head_attention_forward` that change what it computes."""

    query: Tensor
    key: Tensor
    value: Tensor
    num_heads: int
    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None
    add_zero_attn: bool
    dropout_p: float
    out_proj_weight: Tensor
    out_proj_bias: Tensor | None
    training: bool
    key_padding_mask: Tensor | None
    need_weights: bool
    attn_mask: Tensor | None
    use_separate_proj_weight: bool
    q_proj_weight: Tensor | None
    k_proj_weight: Tensor | None
    v_proj_weight: Tensor | None
    static_k: Tensor | None
    static_v: Tensor | None
    average_attn_weights: bool
    is_causal: bool


_SIGNATURE = inspect.signature(functional.multi_head_attention_forward)


def attended(args: Sequence[object], kwargs: dict[str, object]) -> Attended:
    """Return the arguments of a call of `F.multi_head_attention_forward` by name."""
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    return cast(Attended, bound.arguments)


class MultiheadByProducts(TorchFunctionMode):
    """Let `F.multi_head_attention_forward` project each input by its own rows of the weight.

    Torch's code divides the output of one projection, and repeats masks for each head. The sizes of these
    tensors hide which channels belong together. The results are the same, up to rounding.
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if func is functional.multi_head_attention_forward:
            given = attended(args, kwargs or {})
            if given["static_k"] is None and given["static_v"] is None:
                return multihead(given)
        return func(*args, **(kwargs or {}))


def multihead(given: Attended) -> tuple[Tensor, Tensor | None]:
    """Compute what `F.multi_head_attention_forward` does for inputs (positions, batch, channels).

    Attention is that of Vaswani et al., 2017 (arXiv:1706.03762).

    Args:
        given: its arguments; `static_k` and `static_v` are not supported.

    >>> layer, x = torch.nn.MultiheadAttention(8, 2), torch.randn(5, 3, 8)
    >>> with MultiheadByProducts():
    ...     by_products = layer(x, x, x)[0]
    >>> torch.allclose(by_products, layer(x, x, x)[0], atol=1e-6)
    True
    """
    inputs, mask, padding = (given["query"], given["key"], given["value"]), given["attn_mask"], None
    single = inputs[0].ndim == 2
    if single:
        inputs = (inputs[0].unsqueeze(1), inputs[1].unsqueeze(1), inputs[2].unsqueeze(1))
    heads, batch, length = given["num_heads"], inputs[0].shape[1], inputs[0].shape[0]
    if given["key_padding_mask"] is not None:
        padding = _added(given["key_padding_mask"].reshape(batch, 1, 1, -1), inputs[0])
    q, k, v = _projected(given, inputs)
    keys = k.shape[0]
    if given["bias_k"] is not None and given["bias_v"] is not None:
        k = torch.cat([k, given["bias_k"].expand(1, batch, -1)])
        v = torch.cat([v, given["bias_v"].expand(1, batch, -1)])
    q, k, v = (x.reshape(len(x), batch, heads, x.shape[-1] // heads).permute(1, 2, 0, 3) for x in (q, k, v))
    if given["add_zero_attn"]:
        k = torch.cat([k, torch.zeros_like(k[:, :, :1])], dim=2)
        v = torch.cat([v, torch.zeros_like(v[:, :, :1])], dim=2)
    scores = torch.matmul(q * math.sqrt(1 / q.shape[-1]), k.transpose(-2, -1))
    added = k.shape[2] - keys
    if given["is_causal"] and padding is None and not given["need_weights"]:
        causal = torch.ones(length, k.shape[2], dtype=torch.bool, device=k.device).tril()
        scores = scores + torch.zeros_like(causal, dtype=k.dtype).masked_fill(~causal, -math.inf)
    elif mask is not None:
        mask = _padded(_added(mask, k), added)
        scores = scores + (
            mask.reshape(batch, heads, length, -1) if mask.ndim == 3 and len(mask) > 1 else mask
        )
    if padding is not None:
        scores = scores + _padded(padding, added)
    plain = given["need_weights"] or not hasattr(torch, "_safe_softmax")
    weights = scores.softmax(-1) if plain else torch._safe_softmax(scores, -1)
    if given["training"] and given["dropout_p"] > 0:
        weights = functional.dropout(weights, given["dropout_p"])
    mixed = torch.matmul(weights, v).permute(2, 0, 1, 3).reshape(length * batch, -1)
    output = functional.linear(mixed, given["out_proj_weight"], given["out_proj_bias"])
    output = output.view(length, batch, output.shape[-1])
    if not given["need_weights"]:
        return (output.squeeze(1) if single else output), None
    weights = weights.mean(1) if given["average_attn_weights"] else weights
    return (output.squeeze(1), weights.squeeze(0)) if single else (output, weights)


def _added(mask: Tensor, x: Tensor) -> Tensor:
    """Return what a mask adds to scores: -inf where a boolean one is true."""
    return (
        torch.zeros_like(mask, dtype=x.dtype).masked_fill(mask, -math.inf)
        if mask.dtype == torch.bool
        else mask
    )


def _projected(given: Attended, inputs: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Return q, k and v."""
    bias = given["in_proj_bias"]
    if given["use_separate_proj_weight"]:
        weights = [given["q_proj_weight"], given["k_proj_weight"], given["v_proj_weight"]]
    else:
        assert given["in_proj_weight"] is not None
        weights = [*given["in_proj_weight"].chunk(3)]
    biases = [None, None, None] if bias is None else bias.chunk(3)
    return [
        functional.linear(x, cast(Tensor, weight), own)
        for x, weight, own in zip(inputs, weights, biases, strict=True)
    ]


def _padded(mask: Tensor, added: int) -> Tensor:
    """Return a mask that masks none of some further positions."""
    return functional.pad(mask, (0, added)) if added else mask
