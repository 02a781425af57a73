"""Whole layers: which can go, and that what is left does their work as well as it can."""

from __future__ import annotations

import nets
import pytest
import torch
from torch import nn

from models import CompactNet, YourNet
from pruning import (
    Budget,
    Plan,
    PruningError,
    accuracy,
    fold_batchnorm,
    load,
    prune,
    recalibrate,
    removable,
    save,
    trace,
    without_layer,
)

pytestmark = pytest.mark.numerics


def candidates(model, inputs, ignored=()):
    return removable(model, trace(model, inputs, ignored), inputs)


def without(model, name, inputs):
    traced = trace(model, inputs)
    return without_layer(model, traced, removable(model, traced, inputs)[name], [inputs]).eval()


def linear_chain(middle, *, bias=True):
    """Three linear layers, the hidden one 4 to 6, with something between it and the last."""
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


def test_convolutions_in_a_row_are_joined_as_well_as_their_border_lets_them():
    """The padding between two convolutions is 0, so only inner positions can be exact."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 2, 3), nn.Flatten(), nn.Linear(288, 2)
    )
    x = torch.randn(20, 3, 14, 14)
    small = without(net.eval(), "1", x)
    torch.testing.assert_close(small(x), net(x), rtol=1e-3, atol=1e-3)
    assert small[2].weight.shape == (2, 4, 3, 3)


def test_what_is_not_linear_is_joined_by_least_squares():
    net, x = linear_chain(nn.ReLU()), torch.randn(500, 5)
    small = without(net, "2", x)
    received = torch.relu(torch.tanh(net[0](x)))  # the ReLU behind the layer stays
    inputs = torch.cat([received, torch.ones(500, 1)], 1).double()
    best = torch.linalg.lstsq(inputs, net(x).double()).solution
    torch.testing.assert_close(small[4].weight.double(), best[:-1].T, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(small[4].bias.double(), best[-1], rtol=1e-2, atol=1e-3)


def test_the_mean_goes_into_the_norm_where_the_joined_layer_has_no_bias():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 6), nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)
    ).eval()
    x = torch.randn(200, 4)
    small = without(net, "0", x)
    assert small[1].bias is None
    torch.testing.assert_close(small(x), net(x), rtol=1e-3, atol=1e-4)


def test_residual_blocks_let_their_input_pass():
    net, x = nets.make("residual"), nets.images()
    found = candidates(net, x)
    assert [name for name, layer in found.items() if not layer.joined] == ["blocks.0", "blocks.1"]
    small = without(net, "blocks.0", x)
    expected = net.head(net.blocks[1](net.stem(x)).mean((2, 3)))
    torch.testing.assert_close(small(x), expected)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", nets.NETS)
def test_a_model_without_a_layer_runs_and_the_given_one_is_left_as_it_was(name):
    net, x = nets.make(name), nets.images(8)
    before = nets.snapshot(net)
    for layer in candidates(net, x):
        small = without(net, layer, x)
        assert small(x).shape == net(x).shape
        assert trace(small, x)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_layers_that_are_ignored_stay():
    net, x = nets.make("residual"), nets.images()
    found = candidates(net, x, ["blocks.0.*"])
    assert "blocks.0" not in found and "blocks.1" in found
    net = YourNet(batch_norm=True).eval()
    assert list(candidates(net, torch.randn(2, 1, 28, 28), ["classifier.fc1"])) == ["classifier.fc2"]


def test_the_plan_names_what_went_and_the_result_reloads(tmp_path):
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


def test_what_cannot_go_is_refused_with_what_can():
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


# Statistics taken anew


def test_recalibrated_statistics_are_those_of_the_data():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()).train()
    nn.init.normal_(net[1].running_mean)
    batches = [torch.randn(32, 3) for _ in range(3)]
    assert recalibrate(net, batches).training and net[1].momentum == 0.1
    values = [net[0](x).detach() for x in batches]
    torch.testing.assert_close(net[1].running_mean, torch.stack([v.mean(0) for v in values]).mean(0))
    torch.testing.assert_close(net[1].running_var, torch.stack([v.var(0) for v in values]).mean(0))


def test_a_calibration_set_of_one_image_changes_no_statistics():
    net = nets.make("lenet")
    before = nets.snapshot(net)
    recalibrate(net, [nets.images(1)])
    recalibrate(net, [])
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    step = prune(net, nets.images(), Budget(params="50%"), calibration=[(nets.images(1), torch.tensor([1]))])
    assert accuracy(step.model, [(nets.images(), torch.tensor([0, 1]))]) >= 0


def test_norms_that_do_not_run_keep_their_statistics():
    """An auxiliary head, say, which calibration does not reach."""

    class Aux(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.aux = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x, aux=False):
            return self.aux(x) if aux else self.norm(x)

    net = Aux()
    net.aux(torch.randn(8, 3))
    net.aux.running_mean.fill_(5)
    before = nets.snapshot(net.aux)
    recalibrate(net, [torch.randn(8, 3) + 2])
    assert all(torch.equal(before[key], value) for key, value in net.aux.state_dict().items())
    assert (net.norm.running_mean > 1).all()


def test_recalibration_that_fails_changes_nothing():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    nn.init.normal_(net[0].running_mean)
    before = nets.snapshot(net)
    with pytest.raises(RuntimeError):
        recalibrate(net, [torch.randn(8, 3), torch.randn(8, 4)])
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert net[0].momentum == 0.1


def test_frozen_norms_keep_their_statistics():
    net = nets.make("residual")
    frozen = net.stem[1].requires_grad_(False).running_mean.clone()
    others = net.blocks[0].inner[1].running_mean.clone()
    recalibrate(net, [nets.images(16)])
    assert torch.equal(net.stem[1].running_mean, frozen)
    assert not torch.equal(net.blocks[0].inner[1].running_mean, others)


def test_an_activation_that_writes_in_place_does_not_spoil_a_skip_connection(tmp_path):
    """Without its convolution, the ReLU inside a block sees the tensor that the skip adds."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=4).eval()
    x = torch.randn(4, 3, 32, 32)
    found = candidates(net, x)
    assert "layer1.0" in found and "layer1.0.conv1" in found
    for name in ("layer1.0", "layer1.0.conv1", "layer3.1.conv1"):
        small = without(net, name, x).train()
        small(x).sum().backward()
        save(tmp_path / "small.pth", small.eval())
        again = load(tmp_path / "small.pth", lambda: torchvision.models.resnet18(num_classes=4))
        torch.testing.assert_close(again(x), small(x), rtol=0, atol=0)
        again.train()(x).sum().backward()
