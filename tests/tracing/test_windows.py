"""Attention in shifted windows: weights given to a function, tables of positions, masks, merged patches."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer
from torchvision.models.swin_transformer import (
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerBlockV2,
)

from pruning import Plan, trace
from pruning.surgery.apply import apply

pytestmark = pytest.mark.quick

HEADS, DEPTH, SIDE = 3, 4, 2
WIDTH, AREA = HEADS * DEPTH, SIDE * SIDE


def attend(
    x: Tensor, qkv: nn.Linear, out: nn.Linear, num_heads: int, bias: Tensor, mask: Tensor | None
) -> Tensor:
    """Attend in windows, (windows, tokens, channels), as torchvision's function does."""
    count, tokens, width = x.shape
    q, k, v = (
        F.linear(x, qkv.weight, qkv.bias)
        .reshape(count, tokens, 3, num_heads, width // num_heads)
        .permute(2, 0, 3, 1, 4)
    )
    scores = q * (width // num_heads) ** -0.5 @ k.transpose(-2, -1) + bias
    if mask is not None:
        scores = scores.view(count // len(mask), len(mask), num_heads, tokens, tokens) + mask[None, :, None]
        scores = scores.view(-1, num_heads, tokens, tokens)
    x = (scores.softmax(-1) @ v).transpose(1, 2).reshape(count, tokens, width)
    return F.linear(x, out.weight, out.bias)


class Windows(nn.Module):
    """Attention in windows of an image that is shifted; `fused` adds the mask to the bias of positions."""

    def __init__(self, fused: bool):
        super().__init__()
        self.fused, self.num_heads, self.head_dim = fused, HEADS, DEPTH
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.table = nn.Parameter(torch.randn(9, HEADS))
        self.register_buffer("index", torch.randint(0, 9, (AREA * AREA,)))
        self.register_buffer("mask", 9.0 * torch.randn(4, AREA, AREA).sign().clamp(max=0))

    def forward(self, x: Tensor) -> Tensor:
        batch, height, wide, width = x.shape
        rows, columns = height // SIDE, wide // SIDE
        x = x.roll((-1, -1), (1, 2)).view(batch, rows, SIDE, columns, SIDE, width)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(-1, AREA, width)
        bias = self.table[self.index].view(AREA, AREA, -1).permute(2, 0, 1)[None]
        x = (
            self.scores(x, bias)
            if self.fused
            else attend(x, self.qkv, self.out, self.num_heads, bias, self.mask)
        )
        x = x.view(batch, rows, columns, SIDE, SIDE, width).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(batch, height, wide, width).roll((1, 1), (1, 2))

    def scores(self, x: Tensor, bias: Tensor) -> Tensor:
        count = len(x)
        qkv = self.qkv(x).view(count, AREA, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        mask = self.mask.view(1, 4, 1, AREA, AREA).expand(count // 4, -1, self.num_heads, -1, -1)
        bias = bias + mask.reshape(-1, self.num_heads, AREA, AREA)
        return self.out(F.scaled_dot_product_attention(*qkv, attn_mask=bias).transpose(1, 2).flatten(2))


class Net(nn.Module):
    """Two residual blocks of windows, four neighbors merged into one token, and a layer that reads these."""

    def __init__(self, fused: bool):
        super().__init__()
        self.embed = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList([Windows(fused), Windows(fused)])
        self.merge, self.last = nn.Linear(4 * WIDTH, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        parts = [x[:, i::2, j::2] for j in range(2) for i in range(2)]
        return self.last(torch.relu(self.merge(torch.cat(parts, -1))).mean((1, 2)))


def test_heads_and_channels_of_weights_given_to_a_function_are_groups():
    """Where a head has the size of the input divided by the heads, the channels of the input go along."""
    torch.manual_seed(0)
    net, x = Net(fused=False), torch.randn(2, 4, 4, 5)
    found = trace(net, x)
    assert found.widths == {"embed/heads": HEADS, "embed/width": DEPTH, "merge": 6}
    heads, places = (0, 2), (0, 1, 3)
    small = apply(net, found, Plan({"embed/heads": heads, "embed/width": places}))
    kept = [h * DEPTH + d for h in heads for d in places]
    dropped = [c for c in range(WIDTH) if c not in kept]
    dense = copy.deepcopy(net)
    with torch.no_grad():
        for layer in (dense.embed, *(block.out for block in dense.blocks)):
            layer.weight[dropped], layer.bias[dropped] = 0, 0
        for block in dense.blocks:
            for part in range(3):
                rows = [part * WIDTH + c for c in dropped]
                block.qkv.weight[rows], block.qkv.bias[rows] = 0, 0
        for images in (x, torch.randn(1, 4, 4, 5)):
            torch.testing.assert_close(small(images), dense(images), rtol=1e-4, atol=1e-5)
    block = small.blocks[0]
    assert block.num_heads == 2 and block.table.shape == (9, 2) and block.qkv.bias.shape == (3 * 6,)


def test_a_mask_that_is_added_to_a_table_of_heads_holds_no_channels():
    torch.manual_seed(0)
    net, x = Net(fused=True), torch.randn(2, 4, 4, 5)
    found = trace(net, x)
    blocks = [f"blocks.{i}.qkv/{kind}" for i in range(2) for kind in ("heads", "width")]
    assert found.widths.keys() == {"embed", "merge", *blocks}
    small = apply(net, found, Plan({"blocks.1.qkv/heads": (1, 2), "blocks.1.qkv/width": (0, 1, 3)}))
    dense = copy.deepcopy(net)
    dropped = [c for c in range(WIDTH) if c < DEPTH or c % DEPTH == 2]
    with torch.no_grad():
        for part in range(3):
            rows = [part * WIDTH + c for c in dropped]
            dense.blocks[1].qkv.weight[rows], dense.blocks[1].qkv.bias[rows] = 0, 0
        for images in (x, torch.randn(3, 4, 4, 5)):
            torch.testing.assert_close(small(images), dense(images), rtol=1e-4, atol=1e-5)
    assert small.blocks[1].mask.shape == net.blocks[1].mask.shape and small.blocks[1].table.shape == (9, 2)


class Gated(nn.Module):
    """Tables that are added to each other, and a factor for each token, (tokens, 1)."""

    def __init__(self, gate: Tensor):
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.rows, self.channels = nn.Parameter(torch.randn(6, 1)), nn.Parameter(torch.randn(8))
        self.register_buffer("gate", gate)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x) * self.gate + (self.rows + self.channels)))


def test_a_factor_for_each_token_and_a_sum_of_tables_hold_channels_along_one_dimension():
    torch.manual_seed(0)
    net, x = Gated(torch.rand(6, 1)), torch.randn(2, 6, 5)
    found = trace(net, x)
    assert found.widths == {"first": 8}
    small = apply(net, found, Plan({"first": (0, 2, 3)}))
    dense = copy.deepcopy(net)
    with torch.no_grad():
        dense.last.weight[:, [1, 4, 5, 6, 7]] = 0
        torch.testing.assert_close(small(x), dense(x), rtol=1e-4, atol=1e-5)
    assert small.channels.shape == (3,) and small.rows.shape == (6, 1)


def test_a_layer_whose_bias_other_code_reads_and_that_also_runs_keeps_its_channels():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.last(torch.relu(self.first(x)) + self.first.bias)

    found = trace(Both(), torch.randn(2, 5))
    assert not found.groups and "first" in found.skipped


def swin(block: type[nn.Module], heads: int, ratio: int) -> nn.Module:
    sizes = {"window_size": [2, 2], "depths": [2], "num_classes": 3, "mlp_ratio": ratio}
    return SwinTransformer([4, 4], 4 * heads, num_heads=[heads], block=block, **sizes).eval()


@pytest.mark.parametrize("block", [SwinTransformerBlock, SwinTransformerBlockV2])
def test_swin_of_torchvision_is_narrowed_to_what_its_constructor_makes(block):
    torch.manual_seed(0)
    net, x = swin(block, 3, 2), torch.randn(2, 3, 16, 16)
    found = trace(net, x)
    assert found.widths["features.0.0/heads"] == 3
    small, like = apply(net, found, Plan({"features.0.0/heads": (0, 1)})), swin(block, 2, 3)
    like.load_state_dict(small.state_dict())
    with torch.no_grad():
        for images in (x, torch.randn(1, 3, 24, 24)):
            torch.testing.assert_close(small(images), like(images), rtol=1e-4, atol=1e-5)


def test_a_size_of_the_image_that_equals_the_width_does_not_hide_the_attribute_that_holds_it():
    sizes = {"num_layers": 3, "mlp_dim": 24, "num_classes": 3}
    net = VisionTransformer(16, 8, num_heads=4, hidden_dim=16, **sizes).eval()
    found = trace(net, torch.randn(2, 3, 16, 16))
    assert {"conv_proj/heads", "conv_proj/width"} <= found.groups.keys()
    small = apply(net, found, Plan({"conv_proj/heads": (0, 3), "conv_proj/width": (1, 2, 3)}))
    like = VisionTransformer(16, 8, num_heads=2, hidden_dim=6, **sizes).eval()
    like.load_state_dict(small.state_dict())
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(small(x), like(x), rtol=1e-4, atol=1e-5)
