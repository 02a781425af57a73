"""Tables of positions: parameters and buffers of which code selects rows before it adds them."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from pruning import Budget, prune, trace
from pruning.tracing.passes import flow
from pruning.utils.modules import call

LONGEST, CHANNELS = 20, 12

#: What code adds to x, (N, length, channels), of a table (1, LONGEST, channels).
FORMS = {
    "slice": lambda table, x: table[:, : x.shape[1]],
    "slice of a row": lambda table, x: table[0, : x.shape[1]],
    "from an offset": lambda table, x: table[:, 1 : x.shape[1] + 1],
    "the last rows": lambda table, x: table[:, -x.shape[1] :],
    "every second": lambda table, x: table[:, ::2][:, : x.shape[1]],
    "positions": lambda table, x: table[:, torch.arange(x.shape[1])],
    "positions of a row": lambda table, x: table[0][torch.arange(x.shape[1])],
    "index_select": lambda table, x: table.index_select(1, torch.arange(x.shape[1])),
    "one row": lambda table, x: table[:, 3].unsqueeze(1),
    "rows of two uses": lambda table, x: table[:, :1] + table[:, 2 : x.shape[1] + 2],
}


class Positioned(nn.Module):
    """A linear layer, a table of positions, and a layer that reads their sum."""

    def __init__(self, form: str, learned: bool):
        super().__init__()
        self.form, self.first, self.last = form, nn.Linear(5, CHANNELS), nn.Linear(CHANNELS, 3)
        table = torch.randn(1, LONGEST, CHANNELS)
        if learned:
            self.table = nn.Parameter(table)
        else:
            self.register_buffer("table", table)

    def forward(self, x):
        x = self.first(x)
        return self.last(torch.relu(x + FORMS[self.form](self.table, x)))


@pytest.mark.parametrize("length", [7, 10])
@pytest.mark.parametrize("learned", [True, False], ids=["parameter", "buffer"])
@pytest.mark.parametrize("form", FORMS)
def test_the_channels_of_a_table_are_narrowed_in_all_rows(form, learned, length):
    torch.manual_seed(0)
    net, x = Positioned(form, learned), torch.randn(2, length, 5)
    step = prune(net, x, Budget(channels="50%"), score="l2")
    assert step.plan.widths == {"first": CHANNELS // 2} and not step.left_out
    assert step.model.table.shape == (1, LONGEST, CHANNELS // 2)
    dense, kept = copy.deepcopy(net), step.plan.keep["first"]
    dropped = [c for c in range(CHANNELS) if c not in kept]
    with torch.no_grad():
        for tensor in (dense.first.weight, dense.first.bias):
            tensor[dropped] = 0
        dense.table[..., dropped] = 0
        for other in (length, 3, 9):
            inputs = torch.randn(2, other, 5)
            torch.testing.assert_close(step.model(inputs), dense(inputs), rtol=1e-4, atol=1e-5)


def test_a_table_of_which_code_selects_channels_by_position_is_not_narrowed():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
            self.table = nn.Parameter(torch.randn(1, LONGEST, CHANNELS))

        def forward(self, x):
            x = self.first(x)
            return self.last(torch.relu(x + self.table[:, : x.shape[1], :8]))

    found = trace(Part(), torch.randn(2, 7, 5))
    assert not found.groups and "first" in found.skipped


class Tutorial(nn.Module):
    """The transformer of PyTorch's tutorial: embedding, sines of the positions, `nn.TransformerEncoder`."""

    def __init__(self, batch_first: bool):
        super().__init__()
        self.embed, self.batch_first = nn.Embedding(30, 16), batch_first
        angles = torch.arange(50)[:, None] * torch.exp(torch.arange(0, 16, 2) * (-math.log(1e4) / 16))
        sines = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
        self.register_buffer("sines", sines[None] if batch_first else sines[:, None])
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.decode = nn.Linear(16, 30)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + (self.sines[:, : x.size(1)] if self.batch_first else self.sines[: x.size(0)])
        return self.decode(self.encoder(x))


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_residual_width_of_the_tutorials_transformer_is_narrowed(batch_first):
    torch.manual_seed(0)
    net, tokens = Tutorial(batch_first), torch.randint(0, 30, (7, 10))
    found = trace(net, tokens)
    assert {"embed/heads", "embed/width"} <= found.groups.keys()
    step = prune(net, tokens, Budget(params="30%"), score="l2")
    assert not step.left_out and step.model.sines.shape[-1] < 16
    assert step.model(tokens[:5, :9]).shape == (5, 9, 30)


class Queries(nn.Module):
    """Learned queries that a layer reads as they are, and a transformer decoder, as in DETR."""

    def __init__(self, read: str):
        super().__init__()
        self.read, self.embed = read, nn.Linear(5, 16)
        self.queries = nn.Parameter(torch.randn(6, 16))
        self.rows, self.columns = (nn.Parameter(torch.randn(9, 8)) for _ in range(2))
        self.layer = {"linear": nn.Linear(16, 16), "norm": nn.LayerNorm(16), "attention": nn.Identity()}[read]
        layer = nn.TransformerDecoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
        self.decoder, self.last = nn.TransformerDecoder(layer, 1), nn.Linear(16, 3)

    def forward(self, x):
        height, width = x.shape[1:3]
        places = [self.columns[:width].expand(height, -1, -1),
                  self.rows[:height].unsqueeze(1).repeat(1, width, 1)]  # fmt: skip
        memory = self.embed(x).flatten(1, 2) + torch.cat(places, -1).flatten(0, 1)
        queries = self.layer(self.queries)[None].repeat(len(x), 1, 1)
        return self.last(self.decoder(queries, memory))


@pytest.mark.parametrize("read", ["linear", "norm", "attention"])
def test_learned_queries_are_narrowed(read):
    torch.manual_seed(0)
    net, x = Queries(read), torch.randn(2, 3, 4, 5)
    step = prune(net, x, Budget(params="40%"), score="l2")
    assert not step.left_out and step.difference < 1e-4
    assert step.model.embed.out_features < 16
    assert read == "linear" or step.model.queries.shape[1] < 16, "only layers and what they are added to are"
    assert step.model(torch.randn(3, 5, 2, 5)).shape == (3, 6, 3)


class Lookup(nn.Module):
    """Attention in windows, with a bias for pairs of positions that products with one-hot tables look up.

    Args:
        apart: whether the positions of a window lie apart in the image, as those of a grid.
    """

    def __init__(self, apart: bool, side: int = 3, channels: int = 12):
        super().__init__()
        self.apart, self.side, self.heads, self.width = apart, side, 3, 4
        self.norm, self.qkv = nn.LayerNorm(channels), nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.table = nn.Parameter(torch.randn(3, 2 * side - 1, 2 * side - 1))
        offsets = torch.arange(side)[None] - torch.arange(side)[:, None] + side - 1
        self.register_buffer("lookup", nn.functional.one_hot(offsets).float())

    def forward(self, x):  # (N, H, W, C)
        batch, high, wide, channels = x.shape
        s, order = self.side, (0, 2, 4, 1, 3, 5) if self.apart else (0, 1, 3, 2, 4, 5)
        cut = (s, high // s, s, wide // s) if self.apart else (high // s, s, wide // s, s)
        windows = self.norm(x).view(batch, *cut, channels).permute(order)
        qkv = self.qkv(windows.reshape(-1, s * s, channels)).view(-1, s * s, 3, self.heads, self.width)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        bias = torch.einsum("nhw,ixh->nixw", self.table, self.lookup)
        bias = torch.einsum("nixw,jyw->nijxy", bias, self.lookup).reshape(-1, s * s, s * s)
        read = ((q @ k.mT * 0.5 + bias).softmax(-1) @ v).transpose(1, 2)
        back = read.reshape(*windows.shape[:-1], -1).permute(*(order.index(d) for d in range(6)))
        return x + self.proj(back.reshape(batch, high, wide, -1))


def lookups(blocks: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 12), *(Lookup(i % 2 == 1) for i in range(blocks)), nn.Linear(12, 3))


def test_positions_of_a_bias_that_products_look_up_are_no_channels_of_the_activations():
    x = torch.randn(2, 6, 6, 5)
    labels = [flow(lookups(blocks), call, x).ties.size for blocks in (1, 2, 3, 4, 5)]
    more = [after - before for before, after in pairwise(labels)]
    assert len(set(more)) == 1, labels  # each block makes as many labels


def test_attention_with_a_bias_that_products_look_up_is_narrowed():
    net, x = lookups(2), torch.randn(2, 6, 6, 5)
    assert trace(net, x).widths == {"0": 12, "1.qkv/width": 4, "2.qkv/width": 4}
    step = prune(net, x, Budget(channels="60%"), score="l2")
    assert step.plan.widths["1.qkv/width"] < 4 and not step.left_out
    assert step.model[1].table.shape == net[1].table.shape
