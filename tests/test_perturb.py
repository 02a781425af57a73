"""A start between pruned weights and fresh ones."""

from __future__ import annotations

import nets
import pytest
import torch
from torch import nn

from pruning import PruningError, recalibrate, shrink_and_perturb
from pruning.layers import WEIGHTED


def weighted(net):
    return {name: layer for name, layer in net.named_modules() if isinstance(layer, WEIGHTED)}


@pytest.mark.parametrize("name", nets.NETS)
def test_weights_are_the_stated_mixture_and_the_rest_stays(name):
    net, fresh = nets.make(name), nets.make(name)
    before = nets.snapshot(net)
    torch.manual_seed(1)
    mixed = shrink_and_perturb(net, 0.6)
    torch.manual_seed(1)
    for layer in weighted(fresh).values():
        layer.reset_parameters()
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    for layer, drawn in weighted(fresh).items():
        old, new = net.get_submodule(layer), mixed.get_submodule(layer)
        ratio = drawn.weight.norm() / old.weight.norm()
        torch.testing.assert_close(new.weight, 0.6 * ratio * old.weight + 0.8 * drawn.weight)
        if old.bias is not None:
            torch.testing.assert_close(new.bias, 0.6 * ratio * old.bias + 0.8 * drawn.bias)
    others = {key for key in before if key.rpartition(".")[0] not in weighted(fresh)}
    assert all(torch.equal(mixed.state_dict()[key], before[key]) for key in others)


def test_the_old_weights_alone_compute_the_same_behind_batchnorm_at_another_temperature():
    net, images = nets.make("lenet"), nets.images(16)
    recalibrate(net, [images])
    same = recalibrate(shrink_and_perturb(net, 1), [images])
    logits, before = same(images), net(images)
    scale = (logits * before).sum() / before.square().sum()
    torch.testing.assert_close(logits, scale * before, rtol=1e-2, atol=1e-2 * logits.abs().max().item())
    assert 0 < scale < 1


def test_no_weight_and_frozen_weights():
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    nn.init.zeros_(net[0].weight)
    net[2].requires_grad_(False)
    torch.manual_seed(0)
    changed = shrink_and_perturb(net, 0.6)
    assert changed[0].weight.isfinite().all() and changed[0].weight.any()
    assert torch.equal(changed[2].weight, net[2].weight) and torch.equal(changed[2].bias, net[2].bias)


@pytest.mark.parametrize("inherit", [-0.1, 1.1, float("nan")])
def test_a_share_beyond_its_bounds_is_refused(inherit):
    with pytest.raises(PruningError, match="from 0 to 1"):
        shrink_and_perturb(nets.make("plain"), inherit)
