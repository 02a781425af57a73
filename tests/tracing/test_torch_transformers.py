"""Attention, encoders and decoders of torch, narrowed: compared with smaller ones that are made by hand.

The smaller network is made by the constructors of torch; its parameters are slices of the dense ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pruning import Plan, load, save, trace
from pruning.planning import count
from pruning.planning.cost import CostModel
from pruning.surgery.apply import apply
from pruning.surgery.multihead import MultiheadByProducts

WIDTH, HEADS, DEPTH, HIDDEN, KEYS, VALUES = 12, 4, 3, 20, 10, 14


class Attending(nn.Module):
    """Attention to the same sequence, or to another one that linear layers make."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS, call: str = "", **options: object):
        super().__init__()
        self.call = call
        self.stem, self.head = nn.Linear(5, width), nn.Linear(width, 3)
        if "cross" in call:
            self.keys = nn.Linear(7, int(options.get("kdim", width)))
            self.values = nn.Linear(7, int(options.get("vdim", width)))
        self.attention = nn.MultiheadAttention(width, heads, **{"batch_first": True, **options})

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        if not self.attention.batch_first:
            x, memory = x.transpose(0, 1), memory.transpose(0, 1)
        q = self.stem(x)
        k, v = (self.keys(memory), self.values(memory)) if "cross" in self.call else (q, q)
        sequence = int(self.attention.batch_first)
        batch, length, keys = q.shape[1 - sequence], q.shape[sequence], k.shape[sequence]
        given = {}
        if "causal" in self.call:
            given["attn_mask"] = torch.ones(length, keys, dtype=torch.bool).triu(1)
        if "each" in self.call:
            given["attn_mask"] = torch.zeros(batch * self.attention.num_heads, length, keys)
        if "padded" in self.call:
            given["key_padding_mask"] = torch.arange(keys).expand(batch, keys) >= keys - 1
        made, weights = self.attention(q, k, v, need_weights="weights" in self.call, **given)
        y = self.head(q + made)
        y = y if sequence else y.transpose(0, 1)
        return y if weights is None else y * (1 + weights.sum(-1)[..., None])


class Transformed(nn.Module):
    """An encoder, a decoder or both, between linear layers."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS, call: str = "", **options: object):
        super().__init__()
        self.call = call
        options = {"dim_feedforward": HIDDEN, "batch_first": True, "dropout": 0.0, **options}
        self.stem, self.head = nn.Linear(5, width), nn.Linear(width, 3)
        self.memory = None if "encoder" in call else nn.Linear(7, width)
        self.encoder = self.decoder = self.both = None
        if "encoder" in call:
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(width, heads, **options), 2)
        elif "decoder" in call:
            layer = nn.TransformerDecoderLayer(width, heads, **options)
            self.decoder = nn.TransformerDecoder(layer, 2, norm=nn.LayerNorm(width))
        else:
            self.both = nn.Transformer(width, heads, 2, 2, **options)
        self.batch_first = bool(options["batch_first"])

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        padding = torch.arange(x.shape[1]).expand(x.shape[:2]) >= x.shape[1] - 2
        x, memory = self.stem(x), memory if self.memory is None else self.memory(memory)
        if not self.batch_first:
            x, memory = x.transpose(0, 1), memory.transpose(0, 1)
        if self.encoder is not None:
            masks = {"mask": causal, "is_causal": True} if "causal" in self.call else {}
            masks |= {"src_key_padding_mask": padding} if "padded" in self.call else {}
            y = self.encoder(x, **masks)
        elif self.decoder is not None:
            y = self.decoder(x, memory, tgt_mask=causal, tgt_is_causal=True)
        else:
            assert self.both is not None
            y = self.both(memory, x, tgt_mask=causal)
        y = y if self.batch_first else y.transpose(0, 1)
        return self.head(y[:, :-2] if "padded" in self.call else y)  # torch's kernels set padding to 0


NETS: dict[str, Callable[..., nn.Module]] = {
    f"attention: {call or 'plain'} {' '.join(options)}": lambda call=call, options=options, **size: Attending(
        call=call, **{**size, **options}
    )
    for call, options in (
        ("", {"batch_first": False}),
        ("causal weights", {}),
        ("padded", {}),
        ("padded causal", {"add_bias_kv": True, "add_zero_attn": True}),
        ("each", {"bias": False}),
        ("cross", {}),
        ("cross padded weights", {"batch_first": False}),
        ("cross", {"kdim": KEYS, "vdim": VALUES}),
        ("cross padded", {"kdim": KEYS, "vdim": VALUES, "add_bias_kv": True}),
        ("cross", {"kdim": KEYS, "vdim": VALUES, "bias": False}),
    )
} | {
    f"{call} {' '.join(f'{k}={v}' for k, v in options.items())}": (
        lambda call=call, options=options, **size: Transformed(call=call, **{**size, **options})
    )
    for call, options in (
        ("encoder", {"norm_first": True}),
        ("encoder padded", {}),
        ("encoder padded causal", {}),
        ("encoder padded", {"activation": "gelu", "batch_first": False}),
        ("decoder", {}),
        ("decoder", {"norm_first": True, "batch_first": False}),
        ("transformer", {}),
        ("transformer", {"norm_first": True, "bias": False}),
    )
}

KEPT = [([0, 1, 3], [1, 2]), ([0, 1, 2, 3], [0, 2]), ([1, 3], [0, 1, 2])]


def make(name: str, **size: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of encoders that do not use nested tensors
        return NETS[name](**size)


def dense(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = make(name)
    with torch.no_grad():  # torch starts these at 0
        for parameter in net.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) / 4)
    return net.eval()


def by_hand(name: str, net: nn.Module, heads: list[int], places: list[int]) -> nn.Module:
    """Return a smaller network of the same class, whose parameters are slices of those of another."""
    kept = torch.tensor([h * DEPTH + d for h in heads for d in places])
    thrice = torch.cat([kept, WIDTH + kept, 2 * WIDTH + kept])
    made = make(name, width=len(kept), heads=len(heads)).eval()
    scale = (len(places) / DEPTH) ** 0.5
    with torch.no_grad():
        for own, parameter in made.named_parameters():
            values = net.get_parameter(own)
            for dim, size in enumerate(values.shape):
                index = {WIDTH: kept, 3 * WIDTH: thrice}.get(size, torch.arange(size))
                values = values.index_select(dim, index)
            values = values.clone()
            if own.endswith(("in_proj_weight", "in_proj_bias", "q_proj_weight")):
                values[: len(kept)] *= scale
            parameter.copy_(values)
    return made


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 6, 5), torch.randn(2, 4, 7)


def narrowed(name: str, heads: list[int], places: list[int]) -> tuple[nn.Module, nn.Module, Plan]:
    net = dense(name)
    traced = trace(net, inputs())
    assert traced.widths.items() >= {"stem/heads": HEADS, "stem/width": DEPTH}.items()
    plan = Plan({"stem/heads": tuple(heads), "stem/width": tuple(places)})
    return net, apply(net, traced, plan), plan


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "heads", "places"),
    [(name, *KEPT[i % len(KEPT)]) for i, name in enumerate(NETS)] + [("encoder padded ", *KEPT[0])],
)
@pytest.mark.filterwarnings("ignore:.*nested tensors", "ignore:Support for mismatched")
def test_the_narrowed_network_computes_what_the_plain_class_does_with_its_parameters(
    name, heads, places, tmp_path
):
    net, small, _ = narrowed(name, heads, places)
    made = by_hand(name, net, heads, places)
    assert {n: p.shape for n, p in small.named_parameters()} == {
        n: p.shape for n, p in made.named_parameters()
    }
    save(tmp_path / "small.pth", small)
    again = load(tmp_path / "small.pth", lambda: make(name))
    for module in (made, small, again):
        for attention in (m for m in module.modules() if isinstance(m, nn.MultiheadAttention)):
            assert attention.embed_dim == attention.num_heads * attention.head_dim == len(heads) * len(places)
    with MultiheadByProducts():
        wanted = made(*inputs())
    for mode in (True, False):  # no layer drops out
        for grad in (True, False):  # without gradients, torch takes its kernels for whole layers
            with torch.set_grad_enabled(grad):
                outputs = [module.train(mode)(*inputs()) for module in (made, small, again)]
            for output in outputs:
                torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention: cross ", "decoder "])
def test_costs_of_cross_attention_are_those_that_are_counted(name):
    net, small, plan = narrowed(name, [0, 1, 3], [1, 2])
    traced = trace(net, inputs())
    expected = CostModel(net, traced)({**traced.widths, **plan.widths})
    counted = count(small, inputs())
    assert (expected.params, expected.macs) == (counted.params, counted.macs)


def test_channels_that_the_query_shares_with_the_input_of_the_model_stay():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            return self.head(self.attention(self.stem(x), memory, memory)[0])

    traced = trace(Net(), (torch.randn(2, 6, 5), torch.randn(2, 4, WIDTH)))
    assert not {name for name in traced.widths if name.startswith("stem")}
    assert "as many channels as its heads hold" in traced.skipped["stem"]


@pytest.mark.quick
@pytest.mark.parametrize("name", NETS)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_attention_by_products_is_that_of_torch(name):
    net = make(name).eval()
    expected = net(*inputs())
    with MultiheadByProducts():
        torch.testing.assert_close(net(*inputs()), expected, rtol=1e-5, atol=1e-6)
