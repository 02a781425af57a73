"""Stage 1: the pull on BatchNorm scales, and the search for its strength."""

from __future__ import annotations

import nets
import pytest
import torch
from nets import batches
from torch import nn

from pruning import Budget, PruningError, SlimConfig, trace
from pruning.stages import PruneConfig, ScalePull
from pruning.stages.scales import ChannelScales
from pruning.stages.sparsify import sparsify
from pruning.training import TrainConfig

pytestmark = pytest.mark.numerics


def test_stage_1_refuses_a_moving_average():
    with pytest.raises(PruningError, match="no exact zeros"):
        SlimConfig(Budget(params=5), TrainConfig(1, ema=0.9), PruneConfig(1, TrainConfig(1)), TrainConfig(1))


def test_the_pull_is_a_soft_threshold_weighted_by_the_cost_that_a_channel_frees():
    net = nets.make("lenet")
    traced = trace(net, nets.images())
    pull = ScalePull(net, traced, strength=2.0)
    dense = pull.cost_model(pull.cost_model.full)
    freed = pull.cost_model.freed(pull.cost_model.full)
    norms = [net.features.bn1, net.features.bn2, net.classifier.bn1, net.classifier.bn2]
    before = [norm.weight.detach().clone() for norm in norms]
    pull.step(lr=0.25)
    for i, (norm, old) in enumerate(zip(norms, before, strict=True)):
        by = 0.25 * 2.0 * (freed["params"][i] / dense.params + freed["macs"][i] / dense.macs)
        expected = nn.functional.softshrink(old, by)
        largest = old.abs().argmax()
        expected[largest] = old[largest]  # the channel that keeps the group alive
        torch.testing.assert_close(norm.weight.detach(), expected)


def test_the_pull_under_a_budget_is_weighted_by_the_excess_over_each_limit():
    net = nets.make("lenet")
    traced = trace(net, nets.images())
    dense = ChannelScales(net, traced).dense
    # Twice the limit on params, four times the limit on MACs: excesses of 1 and 3.
    budget = Budget(params=dense.params // 2, macs=dense.macs // 4)
    weights = ScalePull(net, traced, 1.0, budget).weights
    assert weights["params"] == pytest.approx(0.5, rel=0.02)
    assert weights["macs"] == pytest.approx(1.5, rel=0.02)
    assert ScalePull(net, traced, 1.0, Budget(params=10**9)).weights == {"params": 1.0, "macs": 1.0}


def test_a_strong_pull_gives_exact_zeros_and_is_reweighted_for_the_remaining_channels():
    net = nets.make("lenet")
    pull = ScalePull(net, trace(net, nets.images()), strength=1.0)
    with torch.no_grad():
        net.features.bn2.weight[:4] = 1e-4
        net.features.bn2.weight[4] = 2.0  # the largest scale is not pulled
    pull.refresh()
    pull.step(lr=1.0)
    assert (net.features.bn2.weight[:4] == 0).all() and (net.features.bn2.weight[4:] != 0).any()
    assert pull.alive()["features.conv2"] == int((net.features.bn2.weight != 0).sum())
    before = [float(threshold.max()) for _, threshold in pull.thresholds]
    pull.refresh()
    assert float(pull.thresholds[0][1].max()) < before[0], "conv1 frees less once conv2 is narrower"


def test_a_pull_never_empties_a_group():
    for name in ("lenet", "residual", "dense"):
        net = nets.make(name)
        pull = ScalePull(net, trace(net, nets.images()), strength=1e6)
        pull.step(lr=1.0)
        assert all(pull.alive()[group] == 1 for group in pull.norms)


def test_the_strength_is_derived_from_the_budget():
    """Without resistance, the pull over the remaining steps leaves the channels that the budget allows."""
    net = nets.make("lenet")
    traced = trace(net, nets.images())
    budget = Budget(params="40%", macs="60%").resolve(ChannelScales(net, traced).dense)
    pull = ScalePull(net, traced, None, budget)
    pull.step(lr=1.0)
    assert pull.alive() == traced.widths, "no pull without remaining learning rates"
    pull.refresh(way=20.0)
    for _ in range(20):
        pull.step(lr=1.0 + 1e-6)
    assert not budget.excess(pull.cost_model(pull.alive()))
    pull.refresh(way=20.0)
    assert pull.strength == 0, "the pull ends once the budget is met"


def test_the_pull_grows_when_gradients_resist_it():
    net = nets.make("lenet")
    traced = trace(net, nets.images())
    pull = ScalePull(net, traced, None, Budget(params=300))
    pull.refresh(way=20.0)
    before = pull.strength
    pull.refresh(way=10.0)  # half of the learning rates are used, and no scale has moved
    assert pull.resistance == 4.0 and pull.strength == pytest.approx(8 * before)
    other = ScalePull(net, traced, None, Budget(params=300))
    other.load_state_dict(pull.state_dict())
    assert other.state_dict() == pull.state_dict()


def test_sparsify_reaches_half_of_the_way_to_the_budget():
    net = nets.make("lenet")
    cost_model = ChannelScales(net, trace(net, nets.images())).cost_model
    budget, dense = Budget(params="25%"), cost_model(cost_model.full)
    sparsify(net, batches(), TrainConfig(8, lr=0.05), nets.images(), budget=budget)
    left = ChannelScales(net, trace(net, nets.images())).left()
    assert 0.25 * dense.params < left.params < 0.75 * dense.params
    with pytest.raises(PruningError, match="from a budget, and budget is None"):
        sparsify(nets.make("lenet"), batches(), TrainConfig(1), nets.images())


def test_sparsify_zeroes_channels_that_plain_training_does_not():
    zeros = {}
    for strength in (0.0, 6.0):
        net = nets.make("lenet")
        sparsify(net, batches(), TrainConfig(6), nets.images(), strength=strength)
        zeros[strength] = sum(int((m.weight == 0).sum()) for m in net.modules()
                              if isinstance(m, nn.modules.batchnorm._BatchNorm))  # fmt: skip
    assert zeros[0.0] == 0 and zeros[6.0] >= 3


def test_sparsify_rejects_a_network_whose_weights_are_frozen():
    net = nets.make("plain")
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.startswith(list(trace(net, nets.images()).skipped)[-1]))
    with pytest.raises(PruningError, match="no prunable group of this model has scales or weights"):
        sparsify(net, batches(), TrainConfig(1), nets.images(), strength=1.0)


def test_zero_scales_stay_zero_once_the_budget_is_met():
    """Once the budget of stage 1 is met, the pull stops, and scales that are 0 stay 0."""
    net, images = nets.make("lenet"), nets.images(8)
    traced = trace(net, images)
    with torch.no_grad():
        for norm in (m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
            norm.weight[: len(norm.weight) // 2] = 0
    dense = ChannelScales(net, traced).dense
    pull = ScalePull(net, traced, None, Budget(macs="90%").resolve(dense))
    pull.refresh(way=1.0)
    alive = pull.alive()
    assert pull.strength == 0 and sum(alive.values()) < sum(traced.widths.values())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(3):
        nn.functional.cross_entropy(net.train()(images), torch.arange(8) % 4).backward()
        optimizer.step()
        pull.step(0.05)
    assert pull.alive() == alive


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_pull_works_on_scales_of_any_dtype(dtype):
    net = nets.make("lenet").to(dtype)
    pull = ScalePull(net, trace(net, nets.images().to(dtype)), strength=1e9)
    pull.step(lr=1.0)
    assert set(pull.alive().values()) == {1}, "all but the largest of each group"
