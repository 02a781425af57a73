"""Whole layers: which can be removed, and how well the model without them is refitted."""

from __future__ import annotations

import nets
import pytest
import torch
from torch import nn

from models import CompactNet, YourNet
from pruning import Budget, Plan, PruningError, load, prune, save, trace
from pruning.surgery import fold_batchnorm, removable, without_layer

pytestmark = pytest.mark.numerics


def candidates(model, inputs, ignored=()):
    return removable(model, trace(model, inputs, ignored), inputs)


def without(model, name, inputs):
    traced = trace(model, inputs)
    return without_layer(model, traced, removable(model, traced, inputs)[name], [inputs]).eval()


def linear_chain(middle, *, bias=True):
    """Three linear layers, the hidden one from 4 to 6 units, with a module between it and the last."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 6), middle, nn.Linear(6, 3, bias=bias)
    ).eval()


def test_linear_neighbours_are_joined_exactly():
    x = torch.randn(200, 5)
    for middle in (nn.Identity(), nn.BatchNorm1d(6)):
        net = linear_chain(middle)
        small = without(net, "2", x)
        fresh = torch.randn(50, 5)
        torch.testing.assert_close(small(fresh), net(fresh), rtol=1e-3, atol=1e-4)
        assert small[4].in_features == 4 and isinstance(small[2], nn.Identity)


def test_consecutive_convolutions_are_joined_exactly_except_at_the_border():
    """With zero padding between two convolutions, only inner positions can be exact."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 2, 3), nn.Flatten(), nn.Linear(288, 2)
    )
    x = torch.randn(20, 3, 14, 14)
    small = without(net.eval(), "1", x)
    torch.testing.assert_close(small(x), net(x), rtol=1e-3, atol=1e-3)
    assert small[2].weight.shape == (2, 4, 3, 3)


def test_layers_with_an_activation_between_them_are_joined_by_least_squares():
    net, x = linear_chain(nn.ReLU()), torch.randn(500, 5)
    small = without(net, "2", x)
    received = torch.relu(torch.tanh(net[0](x)))  # the ReLU behind the layer stays
    inputs = torch.cat([received, torch.ones(500, 1)], 1).double()
    best = torch.linalg.lstsq(inputs, net(x).double()).solution
    torch.testing.assert_close(small[4].weight.double(), best[:-1].T, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(small[4].bias.double(), best[-1], rtol=1e-2, atol=1e-3)


def test_the_norm_takes_the_offset_if_the_joined_layer_has_no_bias():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 6), nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)
    ).eval()
    x = torch.randn(200, 4)
    small = without(net, "0", x)
    assert small[1].bias is None
    torch.testing.assert_close(small(x), net(x), rtol=1e-3, atol=1e-4)


def test_a_residual_block_is_replaced_by_its_input():
    net, x = nets.make("residual"), nets.images()
    found = candidates(net, x)
    assert [name for name, layer in found.items() if not layer.joined] == ["blocks.0", "blocks.1"]
    small = without(net, "blocks.0", x)
    expected = net.head(net.blocks[1](net.stem(x)).mean((2, 3)))
    torch.testing.assert_close(small(x), expected)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", nets.NETS)
def test_a_model_without_a_layer_runs_and_the_given_model_is_unchanged(name):
    net, x = nets.make(name), nets.images(8)
    before = nets.snapshot(net)
    for layer in candidates(net, x):
        small = without(net, layer, x)
        assert small(x).shape == net(x).shape
        assert trace(small, x)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_ignored_layers_are_not_removable():
    net, x = nets.make("residual"), nets.images()
    found = candidates(net, x, ["blocks.0.*"])
    assert "blocks.0" not in found and "blocks.1" in found
    net = YourNet(batch_norm=True).eval()
    assert list(candidates(net, torch.randn(2, 1, 28, 28), ["classifier.fc1"])) == ["classifier.fc2"]


def test_the_plan_names_the_removed_layers_and_the_result_reloads(tmp_path):
    torch.manual_seed(0)
    net, x = YourNet(batch_norm=True).eval(), torch.randn(64, 1, 28, 28)
    labels = torch.arange(64) % 10
    step = prune(net, x[:4], Budget(params=1485), calibration=[(x, labels)],
                 remove=["classifier.fc2", "classifier.fc1"])  # fmt: skip
    assert step.plan.removed == ("classifier.fc2", "classifier.fc1")
    assert set(step.plan.widths) == {"features.conv1", "features.conv2"}
    assert Plan.from_json(step.plan.to_json()) == step.plan and step.after.params <= 1485
    small = YourNet.like(fold_batchnorm(step.model, trace(step.model, x[:4])))
    assert len(small.widths) == 2 and small.config["hidden"] == []
    for model in (small, step.model):
        save(tmp_path / "small.pth", model)
        torch.testing.assert_close(load(tmp_path / "small.pth")(x), model.eval()(x), rtol=0, atol=0)
    torch.testing.assert_close(small(x), step.model.eval()(x), rtol=1e-4, atol=1e-5)


def test_removing_another_layer_is_refused_with_the_removable_ones():
    net, x = YourNet(batch_norm=True), torch.randn(8, 1, 28, 28)
    with pytest.raises(
        PruningError, match=r"'features.conv2' cannot be removed.*classifier.fc1, classifier.fc2"
    ):
        prune(net, x, Budget(params="50%"), score="l2", remove=["features.conv2"])
    with pytest.raises(
        PruningError, match=r"calibration data is needed to join classifier\.fc2 and classifier\.fc3"
    ):
        prune(net, x, Budget(params="50%"), score="l2", remove=["classifier.fc2"])


@pytest.mark.parametrize("options", [{}, {"padded": True, "slope": 0.2}])
def test_separable_networks_are_pruned_and_rebuilt(options):
    torch.manual_seed(0)
    net = CompactNet(((8,), (12, 12)), separable=True, batch_norm=True, **options).eval()
    x = torch.randn(4, 1, 28, 28)
    step = prune(net, x, Budget(params="50%"), score="l2")
    small = CompactNet.like(fold_batchnorm(step.model, trace(step.model, x)))
    assert small.widths == tuple(step.plan.widths.values())
    assert small.config == net.config | {"stages": small.config["stages"], "batch_norm": False}
    torch.testing.assert_close(small(x), step.model(x), rtol=1e-4, atol=1e-5)


def test_an_in_place_activation_does_not_change_a_skip_connection(tmp_path):
    """Without its convolution, the ReLU inside a block reads the tensor that the skip connection adds."""
    resnet = pytest.importorskip("torchvision").models.resnet

    def make():
        return resnet.ResNet(resnet.BasicBlock, [1, 2, 1, 1], num_classes=4)

    torch.manual_seed(0)
    net, x = make().eval(), torch.randn(4, 3, 16, 16)
    found = candidates(net, x)
    assert "layer1.0" in found and "layer1.0.conv1" in found
    for name in ("layer1.0", "layer1.0.conv1", "layer2.1.conv1"):
        small = without(net, name, x).train()
        small(x).sum().backward()
        save(tmp_path / "small.pth", small.eval())
        again = load(tmp_path / "small.pth", make)
        torch.testing.assert_close(again(x), small(x), rtol=0, atol=0)
        again.train()(x).sum().backward()
