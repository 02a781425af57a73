"""Quantization-aware training: what it computes, what it leaves unchanged, and that it lowers the loss."""

from __future__ import annotations

import copy

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning import export, finetune, trace
from pruning.deploy import Exported
from pruning.deploy.quantize import quantize
from pruning.surgery import fold_batchnorm
from pruning.training import TrainConfig
from pruning.training.fake_quantize import Rounding, rounded_weight

pytestmark = pytest.mark.numerics


def root_mean_square(a, b):
    return (a - b).square().mean().sqrt().item()


def test_a_linear_layer_matches_the_closed_form():
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[1.27, 0.504]])
    with torch.no_grad(), Rounding(layer.eval()):
        step = 2.554 / 255  # from -1 to 1.554; 0 is level 100, -1 level 0, 1.554 level 255
        rounded = 1.27 * -100 * step + 0.5 * 155 * step
        assert layer(torch.tensor([[-1.0, 1.554]])).item() == pytest.approx(rounded, abs=1e-5)
        assert layer.weight.tolist() == [[pytest.approx(1.27), pytest.approx(0.504)]]
    assert torch.equal(rounded_weight(layer), torch.tensor([[1.27, 0.5]]))


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3), nn.Conv1d(4, 6, 3), nn.Linear(4, 6)]
)
def test_each_output_channel_is_rounded_to_255_levels_of_its_own(layer):
    dim = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    with torch.no_grad():
        layer.weight.movedim(dim, 0)[3] *= 1000
    rounded = rounded_weight(layer).movedim(dim, 0).flatten(1)
    exact = layer.weight.movedim(dim, 0).flatten(1)
    step = exact.abs().amax(1, keepdim=True) / 127
    assert ((rounded - exact).abs() <= step * 0.5001).all() and not torch.equal(rounded, exact)
    levels = rounded / step
    assert torch.allclose(levels, levels.round(), atol=1e-3)


@pytest.mark.parametrize("name", nets.NETS)
def test_the_model_is_unchanged_after_the_block(name):
    net, images = nets.make(name), nets.images()
    before, state = net(images), copy.deepcopy(net.state_dict())
    with torch.no_grad(), Rounding(net):
        assert not torch.equal(net(images), before)
        assert list(net.state_dict()) == list(state)
    assert torch.equal(net(images), before)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert not any("weight" in vars(module) for module in net.modules())
    with pytest.raises(RuntimeError), Rounding(net):
        net(images[:, :1])  # a failing pass must not change the model either
    assert torch.equal(net(images), before)


def test_batchnorm_behind_a_layer_does_not_change_its_rounding():
    net, images = nets.make("lenet"), nets.images()
    folded = fold_batchnorm(net, trace(net, images))
    with torch.no_grad(), Rounding(net), Rounding(folded):
        assert torch.allclose(net(images), folded(images), atol=1e-4)


def test_a_rounded_model_is_closer_to_the_int8_file_than_the_float_model(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    hidden = [nn.Sequential(nn.Conv2d(8 if i else 3, 8, 3), nn.ReLU()) for i in range(4)]
    net = nn.Sequential(*hidden, nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    hidden[0][0].weight.data[:, 0] = 20  # its input is 0, but it sets the levels for all weights
    images = torch.randn(64, 3, 14, 14)
    images[:, 0] = 0
    export(net, tmp_path / "float.onnx", images[:2], "onnx")
    quantize(tmp_path / "float.onnx", tmp_path / "int8.onnx", [images], least_agreement=0)
    wanted = Exported(tmp_path / "int8.onnx", "onnxruntime")(images)
    with torch.no_grad():
        exact = net(images)
        with Rounding(net):
            rounded = net(images)
    assert root_mean_square(rounded, wanted) < 0.5 * root_mean_square(exact, wanted)


def separable(seed):
    """Return examples of two classes whose first of 16 inputs is always 0."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (512,), generator=draw)
    images = torch.randn(512, 16, generator=draw)
    images[:, 0] = 0
    images[:, 1] += (labels - 0.5) * 1.5
    return [(images[i : i + 64], labels[i : i + 64]) for i in range(0, 512, 64)]


def rounded_loss(net, batches):
    with torch.no_grad(), Rounding(net.eval()):
        return sum(F.cross_entropy(net(x), y).item() for x, y in batches) / len(batches)


def test_training_with_rounding_lowers_the_rounded_loss():
    torch.manual_seed(0)
    batches = separable(0)
    net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    net[0].weight.data[:, 0] = 120  # its input is 0, but it sets the levels for all weights: 0, ±0.94, …
    plain, trained = copy.deepcopy(net), copy.deepcopy(net)
    config = TrainConfig(40, weight_decay=0.0)
    finetune(plain, batches, config)
    finetune(trained, batches, config, int8=True)
    assert rounded_loss(trained, batches) < 0.9 * rounded_loss(plain, batches)


def test_resumed_training_restores_the_ranges():
    batches = separable(1)

    def trained(on_epoch=None, resume=None):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
        return finetune(net, batches, TrainConfig(3), int8=True, on_epoch=on_epoch, resume=resume)

    states = []
    whole = trained(on_epoch=lambda epoch: states.append(copy.deepcopy(epoch.state())))
    again = trained(resume=states[0])
    assert set(states[0]["extra"]) == {"0", "2"}
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
