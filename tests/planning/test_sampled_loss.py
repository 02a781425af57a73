"""The sampled loss: its gradients have the curvature of the divergence, for every kind of output."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pruning import PruningError
from pruning.planning.sampled_loss import SampledLoss

pytestmark = pytest.mark.quick

PREDICTED = {
    "logits": torch.tensor([0.5, -1.0, 2.0]),
    "classes": torch.tensor([0.5, 0.2, 0.3]),
    "probabilities": torch.tensor([0.9, 0.3, 0.6]),
    "values": torch.tensor([0.5, -1.0, 2.0]),
}


class Given(nn.Module):
    """A model that returns one row of outputs for each example, in a list if they are no logits."""

    def __init__(self, outputs, is_list):
        super().__init__()
        self.outputs, self.is_list = nn.Parameter(outputs), is_list

    def forward(self, x):
        return [self.outputs] if self.is_list else self.outputs


@pytest.mark.parametrize("kind", PREDICTED)
@pytest.mark.parametrize("is_list", [False, True])
def test_the_mean_square_of_the_gradients_is_the_curvature_of_the_divergence(kind, is_list):
    is_list = is_list or kind == "values"
    if is_list and kind == "logits":
        pytest.skip("logits are a single tensor")
    count, step = 40000, 1e-3
    outputs = PREDICTED[kind].expand(count, 3).clone()
    model, loss = Given(outputs, is_list), SampledLoss()
    [gradient] = torch.autograd.grad(loss(model, [torch.zeros(count)], None), [model.outputs])
    squares = gradient.square().mean(0)
    dense = outputs[:1].double()
    wrap = (lambda x: [x]) if is_list else (lambda x: x)
    for i in range(3):
        moved = dense.clone()
        moved[0, i] += step
        if kind == "classes":
            # Without a softmax behind them probabilities need not add up to 1; neither do those of the loss.
            wanted = float(1 / dense[0, i])
        elif kind == "values":
            wanted = float(1 / outputs.std(correction=0) ** 2 / 3)
        else:
            wanted = 2 * loss.divergence(wrap(moved), wrap(dense)) / step**2
        assert float(squares[i]) == pytest.approx(wanted, rel=0.05)


def test_probabilities_that_are_0_or_1_give_finite_losses():
    net = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid())
    with torch.no_grad():
        net[0].weight.mul_(1e4)
    x = torch.randn(5, 2)
    assert torch.isfinite(SampledLoss()(net, x, None))
    assert SampledLoss().divergence(net(-x), net(x)) < 100


def test_outputs_that_are_not_finite_are_refused():
    net = nn.Linear(2, 3)
    with pytest.raises(PruningError, match="not finite"):
        SampledLoss()(net, torch.full((2, 2), torch.nan), None)
