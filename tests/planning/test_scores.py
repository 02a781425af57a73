"""Scores against closed forms."""

from __future__ import annotations

import copy

import nets
import pytest
import torch
from torch import nn

from pruning import Budget, PruningError, trace
from pruning.planning import CostModel
from pruning.planning.scores import bn_scale, l1, l2, score_channels, taylor
from pruning.planning.search import plan_within
from pruning.training import cross_entropy

pytestmark = [pytest.mark.quick, pytest.mark.numerics]


def with_norm():
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval()
    nn.init.normal_(net[1].weight)
    nn.init.normal_(net[1].bias)
    return net, trace(net, torch.randn(2, 3))


def without_data(score, net, traced):
    return score(net, traced, [], cross_entropy)


def shares(norms):
    """Of each norm, its share of the sum of itself and all larger ones."""
    return torch.stack([norm / norms[norms >= norm].sum() for norm in norms])


def test_bn_scale_is_the_absolute_scale():
    net, traced = with_norm()
    assert torch.equal(without_data(bn_scale, net, traced)["0"], net[1].weight.detach().abs())


def test_bn_scale_of_a_residual_trunk_is_the_mean_over_its_norms():
    net = nets.make("residual")
    traced = trace(net, nets.images())
    norms = [net.stem[1], net.blocks[0].inner[4], net.blocks[1].inner[4]]
    expected = torch.stack([n.weight.detach().abs() for n in norms]).mean(0)
    torch.testing.assert_close(without_data(bn_scale, net, traced)["stem.0"], expected)


def test_bn_scale_raises_for_a_group_without_a_norm():
    net = nets.make("plain")
    with pytest.raises(PruningError, match="group '0' has no BatchNorm"):
        without_data(bn_scale, net, trace(net, nets.images()))


def test_weight_scores_are_shares_of_norms_of_weights():
    net = nets.make("plain")
    traced = trace(net, nets.images())
    weight = net[3].weight.detach()
    for score, norms in ((l1, weight.abs().sum((1, 2, 3))), (l2, weight.square().sum((1, 2, 3)))):
        torch.testing.assert_close(without_data(score, net, traced)["3"], shares(norms))
    with torch.no_grad():
        weight.zero_()
    assert without_data(l2, net, traced)["3"].tolist() == [0.0] * len(weight)


def test_weight_scores_of_a_residual_trunk_count_for_each_of_its_layers():
    net = nets.make("residual")
    traced = trace(net, nets.images())
    makers = [net.stem[0], net.blocks[0].inner[3], net.blocks[1].inner[3]]
    norms = [layer.weight.detach().square().sum((1, 2, 3)) for layer in makers]
    expected = shares(torch.stack(norms).sum(0)) * len(makers)
    torch.testing.assert_close(without_data(l2, net, traced)["stem.0"], expected)


@pytest.mark.parametrize("score", [l1, l2])
def test_a_plan_by_weights_does_not_depend_on_the_size_of_a_layers_weights(score):
    """Weights times 100, in front of a norm that divides by it, make the same network."""
    plans = []
    for factor in (1, 100):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 12, 3),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 12, 3),
            nn.ReLU(),
            nn.Conv2d(12, 2, 1),
        )
        with torch.no_grad():
            net[0].weight.mul_(factor)
        traced = trace(net, torch.zeros(1, 3, 8, 8))
        cost = CostModel(net, traced)
        budget = Budget(macs="40%").resolve(cost(cost.full))
        plans.append(plan_within(budget, traced, cost, without_data(score, net, traced)).widths)
    assert plans[0] == plans[1]


def test_scores_do_not_depend_on_the_default_dtype():
    net = nets.make("plain")
    traced = trace(net, nets.images())
    expected = without_data(l1, net, traced)["3"]
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(without_data(l1, net, traced)["3"], expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_weight_scores_of_a_grouped_transposed_convolution():
    """The weights [inputs of part g, channel] compute an output channel of part g."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 8, 3, groups=2, bias=False), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )
    traced = trace(net, nets.images())
    weight = net[1].weight.detach().abs()
    by_output = torch.cat([weight[:3].sum((0, 2, 3)), weight[3:].sum((0, 2, 3))])
    norms = by_output[:4] + by_output[4:]
    torch.testing.assert_close(without_data(l1, net, traced)["1"], shares(norms))


def test_taylor_is_exact_where_the_loss_is_linear():
    """If the loss is linear in γ and β, the first-order change equals the change by removal."""
    net, traced = with_norm()
    net[2] = nn.Identity()
    batches = [(torch.randn(5, 3), None) for _ in range(3)]

    def loss(model, inputs, _):
        return model(inputs).sum()

    def loss_without(channel, inputs):
        cut = copy.deepcopy(net)
        with torch.no_grad():
            cut[1].weight[channel] = cut[1].bias[channel] = 0
        return loss(cut, inputs, None)

    scores = taylor(net, traced, batches, loss)["0"]
    for channel in range(4):
        changes = [loss(net, x, None) - loss_without(channel, x) for x, _ in batches]
        expected = torch.stack(changes).square().mean()
        torch.testing.assert_close(scores[channel], expected.detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", nets.NETS)
def test_taylor_scores_every_network_and_does_not_change_it(name):
    net, images = nets.make(name), nets.images(3)
    before = copy.deepcopy(net.state_dict())
    traced = trace(net, images)
    scores = taylor(net, traced, [(images, None)], lambda model, x, _: model(x).square().sum())
    assert {g: s.shape for g, s in scores.items()} == {
        g: (group.channels,) for g, group in traced.groups.items()
    }
    assert all((s >= 0).all() and s.any() for s in scores.values())
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_a_dead_channel_has_the_score_0():
    net, traced = with_norm()
    with torch.no_grad():
        net[1].weight[2] = net[1].bias[2] = 0
    batch = (torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 1, 0]))
    for scores in (taylor(net, traced, [batch], cross_entropy), without_data(bn_scale, net, traced)):
        assert scores["0"][2] == 0 and scores["0"].any()


def test_taylor_turns_cudnn_off_for_recurrent_layers():
    net, seen = nets.make("lines"), []
    net.read.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.enabled))
    before = torch.backends.cudnn.enabled
    taylor(net, trace(net, nets.images()), [(nets.images(4), torch.arange(4))], cross_entropy)
    assert seen[-1] is False and torch.backends.cudnn.enabled is before


def test_taylor_needs_a_batch_and_a_finite_loss():
    net, traced = with_norm()
    with pytest.raises(PruningError, match="at least one calibration batch"):
        taylor(net, traced, [], cross_entropy)
    with pytest.raises(PruningError, match="loss on calibration batch 0 is nan"):
        taylor(net, traced, [(torch.full((2, 3), float("nan")), torch.tensor([0, 1]))], cross_entropy)


@pytest.mark.parametrize("score", ["l1", "l2", "taylor"])
def test_the_channels_of_an_embedding_are_scored_by_their_weights(score):
    net = nets.Words()
    with torch.no_grad():
        net.words.weight[:, [0, 1, 3]] = 0
    batches = [(nets.words(), torch.tensor([0, 1]))]
    scores = score_channels(net, trace(net, nets.words()), score, batches, cross_entropy)["words"]
    assert scores[2] > 0 and scores[[0, 1, 3]].tolist() == [0, 0, 0]


def test_a_score_function_takes_model_and_groups_or_all_four_arguments():
    net, seen = nets.make("plain"), []
    traced = trace(net, nets.images())

    def by_groups(model, groups, offset=1.0):
        seen.append((model, groups))
        return {name: torch.full((group.channels,), offset) for name, group in groups.items()}

    def by_data(model, trace, batches, loss):
        seen.append((model, trace, batches, loss))
        return by_groups(model, trace.groups, 2.0)

    for score, first in ((by_groups, (net, traced.groups)), (by_data, (net, traced, [1], cross_entropy))):
        seen.clear()
        scores = score_channels(net, traced, score, [1], cross_entropy)
        assert seen[0] == first and scores.keys() == traced.groups.keys()


def test_an_unknown_score_is_rejected_with_the_known_names():
    net = nets.make("plain")
    for score in ("l3", 2):
        with pytest.raises(
            PruningError, match=r"choose one of: taylor, bn_scale, l1, l2, random, sensitivity"
        ):
            score_channels(net, trace(net, nets.images()), score, [], cross_entropy)
