"""Statistics of BatchNorm for a validation, and the range test of learning rates."""

from __future__ import annotations

import itertools

import nets
import pytest
import torch
from nets import batches, same
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pruning import Budget, PruningError, prune
from pruning.training import TrainConfig, accuracy, cross_entropy, fit, fresh_statistics
from pruning.training.range_test import MARGIN, RATES, constant_loss, range_test, recovery_rate
from pruning.utils.modules import copied

pytestmark = pytest.mark.numerics


def norms_of(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def test_statistics_are_those_of_the_batches_within_the_block_and_restored_behind_it():
    model, before = nets.make("lenet").train(), None
    before = nets.snapshot(model)
    images = torch.cat([x for x, _ in batches()])
    expected = model.features.conv1(images).mean((0, 2, 3)).detach()
    with fresh_statistics(model, batches()) as same_model:
        assert same_model is model and model.training
        torch.testing.assert_close(model.features.bn1.running_mean, expected)
    after = nets.snapshot(model)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(norm.momentum == 0.1 for norm in norms_of(model))


def test_reading_a_shuffled_loader_does_not_change_the_draws_of_training():
    data = DataLoader(TensorDataset(*map(torch.cat, zip(*batches(), strict=True))), 16, shuffle=True)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with fresh_statistics(nets.make("lenet"), data):
        pass
    torch.manual_seed(7)
    with fresh_statistics(nets.make("lenet"), data, most=1):
        pass
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), expected)


def test_validating_with_fresh_statistics_does_not_change_the_training():
    def trained(statistics, scores):
        torch.manual_seed(0)
        return fit(nets.make("lenet"), batches(), TrainConfig(3, lr=0.05), statistics=statistics,
                   validate=lambda m: accuracy(m, batches()), on_epoch=lambda e: scores.append(e.train_loss),
                   )  # fmt: skip

    plain, fresh = [], []
    one, other = trained((), plain), trained(batches(), fresh)
    assert plain == fresh, "the losses of the same training"
    weights = [dict(m.named_parameters()) for m in (one, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    with fresh_statistics(one, batches()):
        assert same(one, other), "the network that is returned has the statistics that were validated"


def test_a_network_whose_running_statistics_lag_is_validated_as_it_would_ship():
    """After one step from other weights, the running statistics are mostly those of the other weights."""
    torch.manual_seed(0)
    model = fit(nets.make("lenet"), batches(), TrainConfig(10, lr=0.05))
    with torch.no_grad():
        model.features.conv1.weight.mul_(8)  # without effect behind a norm
        model.features.bn1.running_var.mul_(0.01)
    stale = accuracy(model, batches())
    with fresh_statistics(model, batches()):
        assert accuracy(model, batches()) > 0.95 > stale


def test_the_range_test_finds_a_rate_that_keeps_a_trained_network_and_changes_nothing():
    torch.manual_seed(0)
    model = fit(nets.make("lenet"), batches(), TrainConfig(10, lr=0.05))
    before, random = nets.snapshot(model), torch.get_rng_state()
    rate = range_test(model, batches(), TrainConfig(1))
    assert all(torch.equal(before[key], value) for key, value in nets.snapshot(model).items())
    assert torch.equal(random, torch.get_rng_state())
    assert rate == range_test(model, batches(), TrainConfig(1)), "it is deterministic"
    for factor in (1, 0.25):
        tuned = fit(copied(model), batches(), TrainConfig(4, lr=rate * factor))
        assert accuracy(tuned, batches()) >= accuracy(model, batches()) - 0.02


def test_a_steeper_loss_needs_a_proportionally_lower_rate():
    """On a quadratic, plain SGD is stable below 2 / curvature; the rate follows the curvature."""

    class Point(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, 1))

        def forward(self, x):
            return x * self.weight

    rates = []
    for curvature in (20.0, 80.0, 320.0):
        loss = lambda model, x, y, c=curvature: c / 2 * (model(x) - y).square().mean() + 0.1  # noqa: E731
        given = [(torch.ones(4, 1), torch.full((4, 1), target)) for target in (0.99, 1.01, 0.98)]
        rates.append(range_test(Point(), given, TrainConfig(1, momentum=0.0), loss=loss))
        assert rates[-1] <= 2 / curvature
    for lower, higher in itertools.pairwise(reversed(rates)):
        assert 2 * lower <= higher <= 8 * lower, "four times the curvature, up to a step of the test"
    assert RATES[0] * MARGIN < rates[2] and rates[0] < RATES[-1] * MARGIN


def test_the_loss_of_a_constant_prediction_is_the_entropy_of_the_classes():
    labels = torch.tensor([0, 0, 0, 1])
    found = constant_loss(nn.Linear(3, 2), [(torch.zeros(4, 3), labels)])
    assert found == pytest.approx(-(0.75 * torch.tensor(0.75).log() + 0.25 * torch.tensor(0.25).log()).item())
    assert constant_loss(nn.Linear(3, 2), [(torch.zeros(4, 3), torch.zeros(4, 2) - 1.0)]) is None


def test_a_range_test_without_batches_is_rejected():
    with pytest.raises(PruningError, match="at least one training batch"):
        range_test(nn.Linear(2, 2), [], TrainConfig(1))


def test_the_recovery_rate_is_one_at_which_a_short_training_recovers_most():
    torch.manual_seed(0)
    model = fit(nets.make("lenet"), batches(), TrainConfig(10, lr=0.05))
    pruned = prune(model, nets.images(), Budget(macs="50%"), calibration=batches()).model
    before, random = nets.snapshot(pruned), torch.get_rng_state()
    rate = recovery_rate(pruned, batches(), TrainConfig(1))
    assert all(torch.equal(before[key], value) for key, value in nets.snapshot(pruned).items())
    assert torch.equal(random, torch.get_rng_state())

    def loss_after(lr):
        tuned = fit(copied(pruned), batches(), TrainConfig(8, lr=lr))
        with torch.no_grad():
            return sum(float(cross_entropy(tuned.train(), *batch)) for batch in batches())

    assert loss_after(rate) < loss_after(rate / 100)


def test_a_network_that_collapses_at_high_rates_recovers_at_lower_ones():
    """With inputs of ten times the size, the rates that a linear classifier bears are a hundredth."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(64, 8), torch.arange(64) % 4
    inputs[torch.arange(64), labels] += 3
    rates = []
    for size in (1.0, 30.0):
        given = [(inputs * size, labels)] * 4
        model = nn.Linear(8, 4)
        with torch.no_grad():
            model.weight.copy_(torch.eye(8)[:4] / size)
            model.bias.zero_()
        rates.append(recovery_rate(model, given, TrainConfig(1)))
    assert rates[1] < rates[0] / 10
