"""Networks with attention of several kinds, for the tests of heads and of widths of heads."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, DEPTH = 12, 4, 6


class Attention(nn.Module):
    """Attention whose queries, keys and values are three layers; `kind` chooses the code of the products."""

    def __init__(self, kind: str, kv_heads: int = HEADS):
        super().__init__()
        self.kind, self.num_heads, self.head_dim, self.kv_heads = kind, HEADS, DEPTH, kv_heads
        self.repeats, self.scale = HEADS // kv_heads, DEPTH**-0.5
        self.q, self.out = nn.Linear(WIDTH, HEADS * DEPTH), nn.Linear(HEADS * DEPTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, kv_heads * DEPTH), nn.Linear(WIDTH, kv_heads * DEPTH)
        if kind == "rotary":
            self.register_buffer("frequency", 100.0 ** -torch.linspace(0, 1, DEPTH // 2))
        if kind == "bias":
            self.table = nn.Parameter(torch.randn(9, HEADS))
        if kind == "norm":
            self.q_norm, self.k_norm = nn.LayerNorm(DEPTH), nn.LayerNorm(DEPTH)

    def rotate(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[-2]).to(x)[:, None] * self.frequency
        angles, half = torch.cat([angles, angles], -1), x.shape[-1] // 2
        return x * angles.cos() + torch.cat([-x[..., half:], x[..., :half]], -1) * angles.sin()

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = *x.shape[:2], -1, self.head_dim
        return tuple(layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attend(*self.heads(x)).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.kind == "sdpa":
            return F.scaled_dot_product_attention(q, k, v)
        if self.kind == "gqa_sdpa":
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        if self.kind == "gqa":
            k, v = (x.repeat_interleave(self.repeats, dim=1) for x in (k, v))
        if self.kind == "gqa_expanded":
            k, v = (x[:, :, None].expand(-1, -1, self.repeats, -1, -1).flatten(1, 2) for x in (k, v))
        if self.kind == "rotary":
            q, k = self.rotate(q), self.rotate(k)
        if self.kind == "norm":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.kind == "einsum":
            scores = torch.einsum("bhnd,bhmd->bhnm", q, k) * self.scale
            return torch.einsum("bhnm,bhmd->bhnd", scores.softmax(-1), v)
        if self.kind == "shape":
            return ((q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        scores = (q @ k.transpose(-2, -1)) * self.scale
        if self.kind == "bias":
            place = torch.arange(scores.shape[-1])
            scores = scores + self.table[place[:, None] - place + 4].permute(2, 0, 1)
        if self.kind == "causal":
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, -1e9)
        return scores.softmax(-1) @ v


class Fused(Attention):
    """Attention with one layer for queries, keys and values."""

    def __init__(self, kind: str):
        super().__init__(kind)
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * DEPTH)
        del self.q, self.k, self.v

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.kind == "chunked":
            shape = *x.shape[:2], self.num_heads, self.head_dim
            return tuple(part.reshape(shape).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        shape = *x.shape[:2], 3, self.num_heads, self.head_dim
        return self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)


class Mean(nn.Module):
    """The mean over tokens, (batch, channels)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


KINDS = ("softmax", "sdpa", "einsum", "shape", "causal", "bias", "norm", "rotary")
GROUPED = ("gqa", "gqa_expanded", "gqa_sdpa")
FUSED = ("fused", "chunked")


def network(kind: str) -> tuple[nn.Module, Tensor]:
    """Return a network with attention, and inputs (batch, tokens, channels)."""
    torch.manual_seed(0)
    kv_heads = HEADS // 2 if kind in GROUPED else HEADS
    attention = Fused(kind) if kind in FUSED else Attention(kind, kv_heads)
    net = nn.Sequential(nn.Linear(5, WIDTH), nn.LayerNorm(WIDTH), attention, nn.Tanh(), nn.Linear(WIDTH, 3))
    return net.eval(), torch.randn(2, 5, 5)
