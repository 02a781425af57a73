"""Tests of `Soap`, the optimizer with one matrix for all parameters."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import nets
import pytest
import torch
from nets import batches
from torch import nn

from pruning import Budget, PruningError, SlimConfig, slim
from pruning.errors import TrainingDiverged
from pruning.stages import PruneConfig
from pruning.training import TrainConfig, fit
from pruning.training.optimizers import LARGEST, Soap

pytestmark = pytest.mark.numerics


def test_soap_equals_adam_for_one_parameter():
    ours, other = (nn.Parameter(torch.tensor([2.0])) for _ in range(2))
    soap = Soap([ours], lr=0.03, momentum=0.8, memory=0.95)
    adam = torch.optim.Adam([other], lr=0.03, betas=(0.8, 0.95))
    for step in range(60):
        for p, optimizer in ((ours, soap), (other, adam)):
            p.grad = (p.detach() - 1) * (1 + step % 3)
            optimizer.step()
    assert torch.allclose(ours, other, atol=1e-5) and abs(ours.item() - 2) > 0.1


def least_squares():
    """Return a regression with correlated inputs: curvatures differ by a factor of 10,000."""
    generator = torch.Generator().manual_seed(0)
    turned, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator))
    inputs = torch.randn(400, 12, generator=generator) @ torch.diag(torch.logspace(-2, 0, 12)) @ turned
    return inputs, inputs @ torch.randn(12, 2, generator=generator)


def distance(kind, rate, steps=600, noise=None):
    """Return the final loss of a layer; `noise` seeds relative errors of 1e-6 in the gradients."""
    inputs, targets = least_squares()
    torch.manual_seed(0)
    layer = nn.Linear(12, 2)
    optimizer = kind(layer.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator, errors = torch.Generator().manual_seed(1), torch.Generator().manual_seed(noise or 0)
    for _ in range(steps):
        some = torch.randint(len(inputs), (32,), generator=generator)
        loss = nn.functional.mse_loss(layer(inputs[some]), targets[some])
        optimizer.zero_grad()
        loss.backward()
        if noise is not None:
            for p in layer.parameters():
                p.grad.mul_(1 + 1e-6 * torch.randn(p.shape, generator=errors))
        optimizer.step()
        schedule.step()
    return nn.functional.mse_loss(layer(inputs), targets).item()


def test_soap_converges_faster_on_correlated_inputs():
    sgd = min(distance(partial(torch.optim.SGD, momentum=0.9), rate) for rate in (0.03, 0.1, 0.3, 1))
    adam = min(distance(torch.optim.Adam, rate) for rate in (0.01, 0.03, 0.1, 0.3))
    assert distance(Soap, 0.1) < 0.5 * min(sgd, adam)


@pytest.mark.parametrize("rate", [0.01, 0.03, 0.1, 0.3, 1])
def test_rounding_errors_do_not_determine_the_final_loss(rate):
    ends = [distance(Soap, rate, steps=300, noise=seed) for seed in range(6)]
    assert max(ends) < 2 * min(ends)


def test_weight_decay_shrinks_weights_as_in_sgd_and_nothing_else():
    weight, bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    groups = [{"params": [weight], "weight_decay": 0.01}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = Soap(groups, lr=0.1, momentum=0.9)
    for _ in range(5):  # missing gradients count as zeros
        optimizer.step()
    assert torch.allclose(weight, torch.full((2, 2), (1 - 0.1 * 0.01 / 0.1) ** 5))
    assert torch.equal(bias, torch.ones(2))


def test_training_with_soap_lowers_the_loss():
    net = nets.make("lenet")
    losses = []
    config = TrainConfig(6, lr=0.05, optimizer="soap")
    fit(net, batches(8), config, on_epoch=lambda epoch: losses.append(epoch.train_loss))
    assert losses[-1] < 0.5 * losses[0]


def test_without_an_eigenbasis_soap_steps_as_adam(monkeypatch):
    def diverges(matrix):
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", diverges)
    ours, other = (nn.Parameter(torch.tensor([2.0, -1.0])) for _ in range(2))
    soap = Soap([ours], lr=0.03, memory=0.98)
    adam = torch.optim.Adam([other], lr=0.03, betas=(0.9, 0.98))
    for _ in range(40):
        for p, optimizer in ((ours, soap), (other, adam)):
            p.grad = p.detach() * torch.tensor([1.0, 5.0])
            optimizer.step()
    assert torch.allclose(ours, other, atol=1e-5)


def test_soap_reports_a_loss_that_is_not_finite():
    def broken(model, inputs, targets):
        return model(inputs).sum() * float("nan")

    with pytest.raises(TrainingDiverged, match="no longer finite"):
        fit(nets.make("lenet"), batches(12), TrainConfig(1, lr=0.05, optimizer="soap"), loss=broken)


def test_soap_refuses_large_networks():
    with pytest.raises(PruningError, match=f"at most {LARGEST:,} .* 5,000"):
        Soap(nn.Linear(100, 50).parameters())


@pytest.mark.parametrize(
    ("budget", "small"),
    [(Budget(macs="50%"), False), (Budget(params=5000), False), (Budget(params=4000), True)],
)
def test_soap_refuses_a_budget_that_allows_a_large_network_before_training(budget, small):
    net = nn.Sequential(nn.Conv2d(1, 40, 3), nn.ReLU(), nn.Conv2d(40, 40, 3), nn.Flatten(), nn.Linear(640, 3))
    images = torch.randn(4, 1, 8, 8)
    data = [(images, torch.tensor([0, 1, 2, 0]))]
    one, last = TrainConfig(1, lr=0.01), TrainConfig(1, lr=0.01, optimizer="soap")
    config = SlimConfig(budget, one, PruneConfig(1, one), last, strength=0.0)
    trained = []

    def loss(model, inputs, targets):
        trained.append(1)
        return nn.functional.cross_entropy(model(inputs), targets)

    with nullcontext() if small else pytest.raises(PruningError, match="use sgd"):
        slim(net, data, images, config, validate=data, loss=loss, log=lambda line: None)
    assert bool(trained) == small
