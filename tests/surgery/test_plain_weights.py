"""Layers that compute their weight are replaced by layers of torch with this weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from pruning import Budget, load, prune, save
from pruning.surgery import with_plain_weights

pytestmark = pytest.mark.quick


class Binary(nn.Conv2d):
    """XNOR-Net: signs, times the mean magnitude of the filter."""

    def __init__(self, into: int, out: int):
        super().__init__(into, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.abs().mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, self.weight.sign() * scale, self.bias, padding=1)


class Rounded(nn.Module):
    """Rounds the weight to a grid for each tensor, as quantization-aware training by hand does."""

    def __init__(self, into: int, out: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(into, out, 2, 2)), nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        step = self.weight.detach().abs().max() / 7
        return F.conv_transpose2d(x, (self.weight / step).round() * step, self.bias, stride=2)


class Standardized(nn.Conv2d):
    def __init__(self, into: int, out: int):
        super().__init__(into, out, 3, groups=2, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True).reshape_as(self.weight)
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)


def spectral(into: int, out: int) -> nn.Module:
    return parametrizations.spectral_norm(nn.Conv2d(into, out, 1))


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        Binary(3, 8), nn.ReLU(), Rounded(8, 6), nn.Tanh(), Standardized(6, 8), nn.ReLU(), spectral(8, 4),
        nn.ReLU(), nn.Conv2d(4, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
def test_the_model_with_plain_weights_is_equal_and_loses_channels_everywhere(training, tmp_path):
    net, x = make().train(training), torch.randn(2, 3, 8, 8)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    plain = with_plain_weights(net, x)
    assert [type(plain[i]) for i in (0, 2, 4, 6)] == [nn.Conv2d, nn.ConvTranspose2d, nn.Conv2d, nn.Conv2d]
    assert all(module.training == training for module in (net, plain, plain[0]))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    for shape in (x.shape, (3, 3, 10, 6)):
        other = torch.randn(shape)
        assert torch.equal(plain.eval()(other), net.eval()(other))

    step = prune(plain, x, Budget(macs="40%"), score="l2")
    assert {"0", "2", "4", "6"} <= step.trace.widths.keys()
    save(tmp_path / "small.pth", step.model)
    again = load(tmp_path / "small.pth", lambda: with_plain_weights(make(), x))
    assert torch.equal(again.eval()(x), step.model.eval()(x))


class Gated(nn.Linear):
    """The weight depends on the input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * x.mean(), self.bias)


class Twice(nn.Linear):
    """More than one product."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.sign(), self.bias) + F.linear(x, self.weight.abs())


def test_weights_that_depend_on_inputs_and_code_that_does_more_stay_as_they_are():
    net, x = nn.Sequential(Gated(4, 4), Twice(4, 4), nn.Linear(4, 3)), torch.randn(2, 4)
    plain = with_plain_weights(net, x)
    assert [type(layer) for layer in plain] == [Gated, Twice, nn.Linear]
    assert with_plain_weights(Binary(3, 4), torch.randn(1, 3, 4, 4)).weight.shape == (4, 3, 3, 3)


def test_frozen_and_shared_layers_stay_frozen_and_shared():
    shared = Binary(4, 4).requires_grad_(False)
    plain = with_plain_weights(nn.Sequential(shared, nn.ReLU(), shared), torch.randn(1, 4, 4, 4))
    assert plain[0] is plain[2] and not plain[0].weight.requires_grad
