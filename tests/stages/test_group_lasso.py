"""Stage 1 of groups without BatchNorm: group lasso on weights, and the scales of other norms."""

from __future__ import annotations

import io

import nets
import pytest
import torch
from nets import batches, same
from torch import nn

from pruning import Budget, Plan, PruningError, SlimConfig, slim, trace
from pruning.graph.layer_tensors import output_rows, output_tensors, scale_rows
from pruning.stages import PacedPull, PruneConfig, ScalePull
from pruning.stages.scales import ChannelScales
from pruning.stages.sparsify import sparsify
from pruning.surgery.apply import apply
from pruning.training import TrainConfig, accuracy, fit
from pruning.training.torch_optimizers import named_optimizers
from pruning.utils.modules import copied

pytestmark = pytest.mark.numerics

OPTIMIZERS = ["sgd", "soap", *sorted(set(named_optimizers()) - {"sgd", "lbfgs", "sparseadam", "muon"})]


class Mlp(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.tanh(self.first(x)))))


class Transformer(nn.Module):
    """A pre-norm block: scales of LayerNorm on the stream, none in the MLP and in the heads."""

    def __init__(self, seed=0, norm=nn.LayerNorm):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.norm1, self.norm2, self.last = nn.Linear(6, 16), norm(16), norm(16), norm(16)
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.embed(x.unflatten(1, (4, 6)))
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        x = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return self.head(self.last(x).mean(1))


def data(features, count=4, size=16):
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(count * size, features, generator=generator)
    return list(zip(inputs.split(size), inputs[:, :3].argmax(1).split(size), strict=True))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(4, 6),
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.Conv1d(4, 6, 3, groups=2),
        nn.ConvTranspose2d(4, 6, 3),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.Embedding(5, 6),
        nn.LSTM(3, 6),
        nn.GRUCell(3, 6),
    ],
)
def test_rows_are_scaled_as_they_are_read(layer):
    factors = torch.rand(6)
    for name in output_tensors(layer):
        tensor = getattr(layer, name).detach()
        expected = output_rows(layer, name, tensor.clone()) * factors[:, None]
        scale_rows(layer, name, tensor, factors)
        assert torch.equal(output_rows(layer, name, tensor), expected)


def test_the_pull_on_weights_is_the_proximal_step_of_group_lasso():
    net = Mlp()
    pull = ScalePull(net, trace(net, torch.zeros(2, 6)), strength=1.5)
    dense, freed = pull.dense, pull.cost_model.freed(pull.cost_model.full)
    before = copied(net)
    pull.step(lr=0.2)
    zeros = 0
    for i, name in enumerate(("first", "second")):
        old, new = (
            torch.cat([getattr(n, name).weight, getattr(n, name).bias[:, None]], 1).detach()
            for n in (before, net)
        )
        sizes = old.norm(dim=1)
        by = 0.2 * 1.5 * (freed["params"][i] / dense.params + freed["macs"][i] / dense.macs) * sizes.mean()
        expected = old * (1 - by / sizes).clamp(min=0)[:, None]
        expected[sizes.argmax()] = old[sizes.argmax()]
        torch.testing.assert_close(new, expected)
        zeros += int((new == 0).all(1).sum())
    assert torch.equal(net.head.weight, before.head.weight)
    assert zeros == sum(pull.trace.widths.values()) - sum(pull.alive().values())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_leaves_exact_zeros_and_no_strength_changes_nothing(optimizer):
    config = TrainConfig(2, optimizer=optimizer)
    pulled, plain, free = Mlp(), Mlp(), Mlp()
    lr = config.peak
    sparsify(pulled, data(6), config, torch.zeros(2, 6), strength=40 / lr)
    left = ChannelScales(pulled, trace(pulled, torch.zeros(2, 6))).alive()
    assert left == {"first": 1, "second": 1}
    sparsify(free, data(6), config, torch.zeros(2, 6), strength=0.0)
    assert same(free, fit(plain, data(6), config))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_scales_of_batchnorm_become_exactly_0_under_every_optimizer(optimizer):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    config = TrainConfig(2, optimizer=optimizer)
    sparsify(net, data(6), config, torch.zeros(2, 6), strength=40 / config.peak)
    assert int((net[1].weight == 0).sum()) == 7


def test_channels_at_0_are_removed_without_a_change():
    net = Mlp()
    traced = trace(net, torch.zeros(2, 6))
    ScalePull(net, traced, strength=8.0).step(lr=0.5)
    alive = {group: values > 0 for group, values in ChannelScales(net, traced).magnitudes().items()}
    assert any(not flags.all() for flags in alive.values())
    plan = Plan({group: tuple(flags.nonzero().flatten().tolist()) for group, flags in alive.items()})
    small = apply(net, traced, plan)
    torch.testing.assert_close(small(data(6)[0][0]), net(data(6)[0][0]))


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_scales_of_other_norms_are_pulled_where_there_are_some(norm):
    net = Transformer(norm=norm)
    traced = trace(net, torch.randn(2, 24))
    scales = ChannelScales(net, traced)
    stream = next(name for name in traced.groups if name == "embed")
    assert set(scales.norms) == {stream} and "up" in scales.rows and len(scales.rows) > 1
    pull = ScalePull(net, traced, strength=1e6)
    pull.step(lr=1.0)
    assert {pull.alive()[group] for group in pull.pulled_groups} == {1}
    assert all(int((layer.weight != 0).sum()) == 1 for layer in (net.norm1, net.norm2, net.last))
    assert not (net.embed.weight == 0).any()


def stored(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("pace", [None, 1])
def test_stage_1_of_a_transformer_resumes_exactly(pace):
    config, budget = TrainConfig(4, 3e-3, "adamw"), Budget(macs="40%")

    def train(resume=None):
        net, states = Transformer(), []
        if resume is not None:
            net.load_state_dict(resume["model"])
        sparsify(net, data(24), config, torch.randn(2, 24), budget=budget, pace=pace, resume=resume,
                 on_epoch=lambda epoch: states.append(stored(epoch.state())))  # fmt: skip
        return net, states

    whole, states = train()
    assert same(whole, train(states[1])[0])
    scales = ChannelScales(whole, trace(whole, torch.randn(2, 24)))
    assert scales.left().macs < scales.dense.macs
    assert all(bool(torch.isfinite(p).all()) for p in whole.parameters())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_pull_on_weights_reaches_half_of_the_way_to_the_budget(optimizer):
    net = Mlp()
    dense = ChannelScales(net, trace(net, torch.zeros(2, 6))).dense
    config = TrainConfig(8, 0.05 if optimizer == "sgd" else 5e-3, optimizer)
    sparsify(net, data(6), config, torch.zeros(2, 6), budget=Budget(macs="25%"))
    left = ChannelScales(net, trace(net, torch.zeros(2, 6))).left()
    assert 0.25 * dense.macs < left.macs < 0.75 * dense.macs


def test_a_paced_pull_shrinks_the_weights_that_matter_least_and_ignores_skipped_steps():
    net = Mlp()
    pull = PacedPull(net, trace(net, torch.zeros(2, 6)), Budget(channels=14), steps=8)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    net.second.weight.grad[:4] = 0
    net.second.bias.grad[:4] = 0
    for step in range(8):
        pull.after_step()
        if step == 5:
            before = {group: values.clone() for group, values in pull.importance.items()}
            net.first.weight.grad[0, 0] = float("inf")
    assert all(torch.equal(before[group], values) for group, values in pull.importance.items())
    assert pull.alive() == {"first": 8, "second": 6} and not net.second.weight[:4].any()
    assert str(pull.after_epoch()).startswith("4 of 18 channels are 0 (weights ≠ 0 in 8-6)")
    other = Mlp(1)
    pull.copy_zeros(other)
    assert not other.second.weight[:4].any() and not other.second.bias[:4].any()


def test_frozen_and_computed_weights_are_not_pulled():
    net = Mlp()
    net.first.bias.requires_grad_(False)
    nn.utils.parametrizations.weight_norm(net.second)
    with pytest.raises(PruningError, match="no prunable group of this model has scales or weights"):
        ScalePull(net, trace(net, torch.zeros(2, 6)), strength=1.0)


@pytest.mark.parametrize("trained", [False, True])
def test_slim_pulls_a_network_without_norms(trained):
    net, lines = nets.make("plain"), []
    if trained:
        fit(net, batches(), TrainConfig(12, 0.02))
    once = TrainConfig(3, 0.02)
    config = SlimConfig(Budget(macs="50%"), once, PruneConfig(1, once), once)
    result = slim(net, batches(), config=config, validate=batches(), log=lines.append)
    scales = ChannelScales(result.sparsified, trace(result.sparsified, nets.images()))
    assert scales.rows and scales.left().macs < scales.dense.macs
    assert any("weights ≠ 0 in" in line for line in lines)
    assert accuracy(result.model, batches()) > 0.3
