"""nn.MultiheadAttention and nn.TransformerEncoder: compared with narrower ones that are made by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pruning import Budget, Plan, load, prune, save, trace
from pruning.planning import count
from pruning.planning.cost import CostModel
from pruning.surgery.apply import apply

pytestmark = pytest.mark.quick

WIDTH, HEADS, DEPTH, HIDDEN = 12, 4, 3, 20


class Encoder(nn.Module):
    """Encoder layers between two linear layers."""

    def __init__(
        self, width: int = WIDTH, heads: int = HEADS, norm_first: bool = False, batch_first: bool = True
    ):
        super().__init__()
        self.stem, self.head = nn.Linear(5, width), nn.Linear(width, 3)
        layer = nn.TransformerEncoderLayer(
            width, heads, HIDDEN, norm_first=norm_first, batch_first=batch_first, dropout=0.0
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x)))


class Attending(nn.Module):
    """Attention alone, with weights or without."""

    def __init__(self, weights: bool, bias: bool = True):
        super().__init__()
        self.stem, self.head, self.weights = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3), weights
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.attention(x, x, x, need_weights=self.weights)[0])


def narrowed(attention: nn.MultiheadAttention, heads: list[int], places: list[int]) -> nn.MultiheadAttention:
    """Return an attention layer with some heads and positions of another, and the scale of that one."""
    kept = torch.tensor([h * DEPTH + d for h in heads for d in places])
    made = nn.MultiheadAttention(
        len(kept), len(heads), batch_first=attention.batch_first, bias=attention.in_proj_bias is not None
    )
    thrice = torch.cat([kept, WIDTH + kept, 2 * WIDTH + kept])
    scale = torch.ones(len(thrice))
    scale[: len(kept)] = (len(places) / DEPTH) ** 0.5
    with torch.no_grad():
        made.in_proj_weight.copy_(attention.in_proj_weight[thrice][:, kept] * scale[:, None])
        made.out_proj.weight.copy_(attention.out_proj.weight[kept][:, kept])
        if attention.in_proj_bias is not None:
            made.in_proj_bias.copy_(attention.in_proj_bias[thrice] * scale)
            made.out_proj.bias.copy_(attention.out_proj.bias[kept])
    return made.eval()


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    nets = {
        "weights": lambda: Attending(weights=True),
        "plain": lambda: Attending(weights=False),
        "no bias": lambda: Attending(weights=False, bias=False),
        "post": Encoder,
        "pre": lambda: Encoder(norm_first=True),
        "time first": lambda: Encoder(batch_first=False),
    }
    net = nets[kind]()
    with torch.no_grad():  # torch starts these at 0
        for parameter in net.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) / 4)
    return net.eval()


KEPT = [([0, 1, 2, 3], [0, 2]), ([1, 3], [0, 1, 2]), ([0, 1, 3], [1, 2])]


@pytest.mark.parametrize("kind", ["weights", "plain", "no bias"])
@pytest.mark.parametrize(("heads", "places"), KEPT)
def test_multihead_attention_is_narrowed_in_heads_and_positions(kind, heads, places):
    net, x = make(kind), torch.randn(2, 6, 5)
    traced = trace(net, x)
    assert traced.widths == {"stem/heads": HEADS, "stem/width": DEPTH}
    small = apply(net, traced, Plan({"stem/heads": heads, "stem/width": places}))
    kept = [h * DEPTH + d for h in heads for d in places]
    stem = x @ net.stem.weight[kept].T + net.stem.bias[kept]
    mixed = narrowed(net.attention, heads, places)(stem, stem, stem)[0]
    by_hand = (stem + mixed) @ net.head.weight[:, kept].T + net.head.bias
    torch.testing.assert_close(small(x), by_hand, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # torch takes another path
        torch.testing.assert_close(small(x), by_hand, rtol=1e-4, atol=1e-5)
    assert small.attention.embed_dim == len(kept) and small.attention.num_heads == len(heads)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["post", "pre", "time first"])
@pytest.mark.parametrize(("heads", "places"), KEPT)
def test_encoders_are_narrowed_in_heads_positions_and_hidden_layers(kind, heads, places):
    net, x = make(kind), torch.randn(2, 6, 5)
    traced = trace(net, x)
    hidden = {"layers.layers.0.linear1": [0, 3, 7], "layers.layers.1.linear1": list(range(HIDDEN))}
    plan = Plan({"stem/heads": heads, "stem/width": places} | hidden)
    small = apply(net, traced, plan)
    kept = [h * DEPTH + d for h in heads for d in places]
    first = net.layers.layers[0]
    made = Encoder(len(kept), len(heads), first.norm_first, first.self_attn.batch_first).eval()
    with torch.no_grad():
        for dense, layer, own in zip(net.layers.layers, made.layers.layers, hidden.values(), strict=True):
            layer.self_attn = narrowed(dense.self_attn, heads, places)
            for name, rows, columns in (("linear1", own, kept), ("linear2", kept, own)):
                linear = nn.Linear(len(columns), len(rows))
                linear.weight.copy_(dense.get_submodule(name).weight[rows][:, columns])
                linear.bias.copy_(dense.get_submodule(name).bias[rows])
                setattr(layer, name, linear)
            for name in ("norm1", "norm2"):
                layer.get_submodule(name).weight.copy_(dense.get_submodule(name).weight[kept])
                layer.get_submodule(name).bias.copy_(dense.get_submodule(name).bias[kept])
        made.stem.weight.copy_(net.stem.weight[kept])
        made.stem.bias.copy_(net.stem.bias[kept])
        made.head.weight.copy_(net.head.weight[:, kept])
        made.head.bias.copy_(net.head.bias)
        wanted = made(x)
    torch.testing.assert_close(small(x), wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # by torch's kernel for whole layers
        torch.testing.assert_close(small(x), wanted, rtol=1e-4, atol=1e-5)
    expected, counted = CostModel(net, traced)(plan.widths), count(small, x)
    assert (expected.params, expected.macs) == (counted.params, counted.macs)


def test_a_narrowed_encoder_meets_its_budget_and_reloads(tmp_path):
    net, x = make("post"), torch.randn(2, 6, 5)
    step = prune(net, x, Budget(macs="40%"), score="l2")
    assert count(step.model, x).macs == step.after.macs <= 0.4 * step.before.macs
    save(tmp_path / "encoder.pt", step.model)
    assert torch.equal(load(tmp_path / "encoder.pt", Encoder)(x), step.model(x))
