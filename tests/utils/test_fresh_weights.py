"""Reinitialization of pruned networks."""

from __future__ import annotations

import nets
import pytest
import torch
from torch import nn

from models import CompactNet, YourNet
from pruning import Budget, PruningError, prune
from pruning.utils import fresh_weights
from pruning.utils.compare import outputs_of

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    "make",
    [
        lambda: YourNet((3, 4), (6,), batch_norm=True, image_shape=(3, 14, 14)),
        lambda: CompactNet(((4,), (5, 6)), separable=True, batch_norm=True, image_shape=(3, 14, 14)),
    ],
)
def test_fresh_weights_are_those_of_a_new_network_of_the_same_widths(make):
    torch.manual_seed(5)
    new = make()
    used = make()
    with torch.no_grad():
        for tensor in used.state_dict().values():
            tensor.add_(1)
    before = nets.snapshot(used)
    torch.manual_seed(5)
    fresh = fresh_weights(used)
    assert nets.same(fresh, new), "each layer is initialized by its own rule, in the same order"
    assert all(torch.equal(before[key], value) for key, value in used.state_dict().items())


@pytest.mark.parametrize("name", ["residual", "inverted", "grouped", "multiplied", "dense"])
def test_a_pruned_network_with_fresh_weights_has_its_widths(name):
    step = prune(nets.make(name), nets.images(), Budget(macs="50%"), score="l2")
    fresh = fresh_weights(step.model)
    shapes = {key: value.shape for key, value in step.model.state_dict().items()}
    assert {key: value.shape for key, value in fresh.state_dict().items()} == shapes
    (outputs,) = outputs_of(fresh, nets.images())
    assert not torch.equal(outputs, outputs_of(step.model, nets.images())[0])


def test_frozen_parameters_are_not_initialized():
    net = nets.make("lenet")
    net.features.conv1.requires_grad_(False)
    net.norm = nn.BatchNorm2d(3).requires_grad_(False)
    net.norm.running_mean.fill_(2)
    fresh = fresh_weights(net)
    assert fresh.norm.running_mean.eq(2).all()
    assert torch.equal(fresh.features.conv1.weight, net.features.conv1.weight)
    assert not torch.equal(fresh.features.conv2.weight, net.features.conv2.weight)
    assert not fresh.features.conv1.weight.requires_grad


def test_attention_and_its_projection_are_initialized():
    net = nn.MultiheadAttention(8, 2)
    fresh = fresh_weights(net)
    assert not torch.equal(fresh.in_proj_weight, net.in_proj_weight)
    assert fresh.out_proj.bias.eq(0).all()


def test_a_parameter_that_no_layer_initializes_is_refused():
    with pytest.raises(
        PruningError, match="'layer_scale' cannot be initialized: Scaled has no reset_parameters"
    ):
        fresh_weights(nets.make("scaled"))
