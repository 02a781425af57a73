"""Weights that layers compute from other parameters: weight norm in both forms, other parametrizations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import pruning
from pruning import Budget, Plan, prune, save, trace
from pruning.load_pruned import load_pruned
from pruning.planning.cost import CostModel
from pruning.planning.scores import taylor
from pruning.surgery.apply import apply
from pruning.surgery.verify import verify
from pruning.training.losses import cross_entropy

pytestmark = [pytest.mark.quick, pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")]


class Doubled(nn.Module):
    """A parametrization with an inverse."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def right_inverse(self, x: Tensor) -> Tensor:
        return x / 2


def doubled(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Doubled())


KINDS = {
    "hook": nn.utils.weight_norm,
    "parametrization": parametrizations.weight_norm,
    "columns": lambda layer: nn.utils.weight_norm(layer, dim=1),
    "own": doubled,
}


def vocoder(kind: str = "hook") -> nn.Module:
    """Convolutions and a transposed one, as in HiFi-GAN."""
    norm = KINDS[kind]
    torch.manual_seed(0)
    return nn.Sequential(
        norm(nn.Conv1d(3, 8, 3)), nn.LeakyReLU(), norm(nn.ConvTranspose1d(8, 6, 4, 2)), nn.Tanh(),
        norm(nn.Conv1d(6, 4, 3)), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_computed_weights_are_narrowed_exactly(kind, tmp_path):
    net, x = vocoder(kind), torch.randn(2, 3, 12)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    traced = trace(net, x)
    assert traced.widths == {"0": 8, "2": 6}
    plan = Plan({"0": (0, 3, 7), "2": (1, 2)})
    small = apply(net, traced, plan)
    assert verify(net, small, traced, plan, x) < 1e-4
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net(x), small(x)
    torch.testing.assert_close(small[0].weight, net[0].weight[[0, 3, 7]])
    torch.testing.assert_close(small[2].weight, net[2].weight[[0, 3, 7]][:, [1, 2]])
    torch.testing.assert_close(small[4].weight, net[4].weight[:, [1, 2]])

    cost_model = CostModel(net, traced)
    for model, widths in ((net, traced.widths), (small, plan.widths)):
        assert cost_model(widths).params == sum(p.numel() for p in model.parameters())

    pruning.save(tmp_path / "small.pth", small)
    for load in (pruning.load, load_pruned):
        assert torch.equal(load(tmp_path / "small.pth", lambda: vocoder(kind))(x), small(x))
    small.train()(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_taylor_scores_are_those_of_the_computed_weights(kind):
    net, batches = vocoder(kind), [(torch.randn(4, 3, 12), torch.arange(4))]
    plain = nn.Sequential(
        nn.Conv1d(3, 8, 3), nn.LeakyReLU(), nn.ConvTranspose1d(8, 6, 4, 2), nn.Tanh(), nn.Conv1d(6, 4, 3),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(),
    ).eval()  # fmt: skip
    net(batches[0][0])
    with torch.no_grad():
        for i in (0, 2, 4):
            plain[i].weight.copy_(net[i].weight)
            plain[i].bias.copy_(net[i].bias)
    expected = taylor(plain, trace(plain, batches[0][0]), batches, cross_entropy)
    found = taylor(net, trace(net, batches[0][0]), batches, cross_entropy)
    for group, scores in expected.items():
        torch.testing.assert_close(found[group], scores)


SPECTRAL = {"hook": nn.utils.spectral_norm, "parametrization": parametrizations.spectral_norm}


def critic(kind: str) -> nn.Module:
    norm = SPECTRAL[kind]
    torch.manual_seed(0)
    return nn.Sequential(
        norm(nn.Conv1d(3, 8, 3)), nn.LeakyReLU(), norm(nn.ConvTranspose1d(8, 6, 4, 2)), nn.Tanh(),
        norm(nn.Conv1d(6, 4, 3, groups=2)), nn.AdaptiveAvgPool1d(1), nn.Flatten(), norm(nn.Linear(4, 1)),
    )  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", SPECTRAL)
def test_spectral_norm_keeps_its_divisor_in_eval_mode_and_iterates_in_training(kind, training, tmp_path):
    net, x = critic(kind).train(training), torch.randn(2, 3, 12)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    traced = trace(net, x)
    assert traced.widths == {"0": 8, "2": 3, "4": 2}  # a part loses as many as the other
    plan = Plan({"0": (0, 3, 7), "2": (1, 2), "4": (1,)})
    small = apply(net, traced, plan)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert verify(net, small, traced, plan, x) < 1e-4
    pruning.save(tmp_path / "small.pth", small)
    for load in (pruning.load, load_pruned):
        again = load(tmp_path / "small.pth", lambda: critic(kind)).eval()
        assert torch.equal(again(x), small.eval()(x))

    small.train()
    for _ in range(3):
        small(x).sum().backward()
    norms = [torch.linalg.matrix_norm(small[i].weight.detach().flatten(1), 2) for i in (0, 4, 7)]
    torch.testing.assert_close(torch.stack(norms), torch.ones(3), rtol=1e-3, atol=0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())


@pytest.mark.parametrize("kind", SPECTRAL)
def test_a_layer_with_spectral_norm_of_which_zeros_remain_stays_finite(kind):
    net, x = (
        nn.Sequential(SPECTRAL[kind](nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2)).eval(),
        torch.randn(2, 3),
    )
    with torch.no_grad():
        (net[0].weight_orig if kind == "hook" else net[0].parametrizations.weight.original)[:2] = 0
    traced, plan = trace(net, x), Plan({"0": (0, 1)})
    assert verify(net, apply(net, traced, plan), traced, plan, x) < 1e-6


class Causal(nn.Conv2d):
    """A convolution whose weight is multiplied by a mask: the pixels above and to the left."""

    def __init__(self, into, out, groups=1):
        super().__init__(into, out, 3, padding=1, groups=groups)
        mask = torch.ones_like(self.weight)
        mask[..., 1, 1:] = mask[..., 2, :] = 0
        self.register_buffer("mask", mask)

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight * self.mask, self.bias, padding=1, groups=self.groups)


class Written(Causal):
    def forward(self, x):
        self.weight.data *= self.mask
        return nn.Conv2d.forward(self, x)


@pytest.mark.parametrize("kind", [Causal, Written])
@pytest.mark.parametrize("groups", [1, 4, 16])
def test_masks_of_weights_are_narrowed_with_them(kind, groups, tmp_path):
    def make():
        layers = [kind(3, 16), nn.ReLU(), kind(16, 16, groups), nn.ReLU(), nn.Conv2d(16, 4, 1)]
        return nn.Sequential(*layers).eval()

    net, images = make(), torch.randn(2, 3, 8, 8)
    step = prune(net, images, Budget(macs="50%"), score="l2")
    assert step.plan.widths and step.difference < 1e-4
    for layer in (step.model[0], step.model[2]):
        assert layer.mask.shape == layer.weight.shape
    save(tmp_path / "small.pth", step.model)
    assert torch.equal(pruning.load(tmp_path / "small.pth", make)(images), step.model(images))


def test_weight_norm_is_narrowed_by_the_parameters_that_it_has_now():
    net, x = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 8)), nn.Linear(8, 2)), torch.randn(4, 6)
    with torch.no_grad():
        net[0].weight_g.mul_(3)  # as loading a checkpoint does, after the weight was computed
    traced, plan = trace(net, x), Plan({"0": (0, 3, 5)})
    with torch.no_grad():
        net[0].weight_g.mul_(2)
    assert verify(net, apply(net, traced, plan), traced, plan, x) < 1e-5
