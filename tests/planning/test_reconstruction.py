"""The score `reconstruction`: closed forms, redundant channels, and what a plan by it loses."""

from __future__ import annotations

import nets
import pytest
import torch
from torch import nn

from pruning import Budget, PruningError, prune, trace
from pruning.planning.reconstruction import _eliminate, _Problem, reconstruction_losses
from pruning.planning.sampled_loss import SampledLoss
from pruning.planning.scores import fisher, reconstruction
from pruning.training.losses import cross_entropy

pytestmark = [pytest.mark.quick, pytest.mark.numerics]


def least_error(gram, weight, drop):
    """Half of the least squared error without some inputs: by the normal equations, from scratch."""
    keep = [i for i in range(len(gram)) if i not in drop]
    fitted = torch.linalg.solve(gram[keep][:, keep], gram[keep] @ weight)
    error = weight.clone()
    error[keep] -= fitted
    return float((error * (gram @ error)).sum()) / 2


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize("others", [0, 4])
def test_scores_of_the_channels_that_go_first_add_up_to_the_least_squares_error(block, readers, others):
    torch.manual_seed(block + readers)
    channels, problems, systems = 8, [], []
    owner = torch.cat([torch.arange(channels).repeat_interleave(block), torch.full((others,), -1)])
    for _ in range(readers):
        owner = owner[torch.randperm(len(owner))]
        x = torch.randn(60, len(owner), dtype=torch.double) @ torch.randn(len(owner), len(owner)).double()
        gram, weight = x.T @ x / 60, torch.randn(len(owner), 5, dtype=torch.double)
        problems.append(_Problem(owner, gram, weight))
        systems.append((owner, gram, weight))
    net = nn.Sequential(nn.Linear(2, channels), nn.Linear(channels, 2))
    [group] = trace(net, torch.zeros(1, 2)).groups.values()
    scores = _eliminate(group, problems)
    order = scores.argsort().tolist()
    single = [
        sum(least_error(g, w, set((o == c).nonzero().flatten().tolist())) for o, g, w in systems)
        for c in range(channels)
    ]
    assert min(single) == pytest.approx(single[order[0]])  # the first to go is the cheapest
    for count in (1, 2, 5, channels - 1):
        gone = torch.tensor(order[:count])
        wanted = sum(
            least_error(g, w, set(torch.isin(o, gone).nonzero().flatten().tolist())) for o, g, w in systems
        )
        assert float(scores[gone].sum()) <= wanted * (1 + 1e-6)  # equal, but for the pooling
    total = sum(least_error(g, w, set((o >= 0).nonzero().flatten().tolist())) for o, g, w in systems)
    assert float(scores.sum()) == pytest.approx(total, rel=1e-6)


READERS = {
    "linear": lambda: nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 9)),
    "conv": lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 3, 3, padding=1), nn.Flatten(1)),
    "transposed": lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.ConvTranspose2d(8, 3, 2), nn.Flatten(1)),
    "flattened": lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.Flatten(1), nn.Linear(8 * 4, 3)),
}


@pytest.mark.parametrize("name", READERS)
def test_copies_of_other_channels_cost_nothing_and_one_of_each_is_kept(name):
    torch.manual_seed(0)
    net = READERS[name]().double()
    with torch.no_grad():
        net[0].weight[4:], net[0].bias[4:] = net[0].weight[:4], net[0].bias[:4]
    side = 2 if name == "flattened" else 5
    x = torch.randn(200, 4, dtype=torch.double)
    x = (
        x
        if name == "linear"
        else x[:, :, None, None] + 0.5 * torch.randn(200, 4, side, side, dtype=torch.double)
    )
    traced = trace(net, x[:2])
    scores = reconstruction_losses(net, traced, [(x, None)], SampledLoss())[next(iter(traced.groups))]
    order = scores.argsort()
    assert float(scores[order[:4]].sum()) < 0.05 * float(scores.sum())
    assert sorted(c % 4 for c in order[4:].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "name", ["residual", "inverted", "shuffled", "tokens", "grouped", "dense", "up_and_down"]
)
def test_every_group_of_every_network_is_scored_and_nothing_changes(name):
    net = nets.make(name).eval()
    images = nets.images(16)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    traced = trace(net, images[:2])
    batches = [(part, None) for part in images.split(8)]
    for score in (fisher, reconstruction):
        scores = score(net, traced, batches, cross_entropy)
        assert {g: len(s) for g, s in scores.items()} == traced.widths
        assert all(torch.isfinite(s).all() and (s >= 0).all() for s in scores.values())
        again = score(net, traced, batches, cross_entropy)
        assert all(torch.equal(again[g], s) for g, s in scores.items())
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_after_a_refit_a_plan_by_reconstruction_is_closer_than_one_by_the_norm_of_weights():
    def error(score):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(10, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 5))
        mix = torch.randn(10, 10)
        x = torch.randn(512, 10) @ mix
        step = prune(net, x[:2], Budget(macs="50%"), score=score, calibration=[(x, None)], refit=True)
        unseen = torch.randn(512, 10) @ mix
        with torch.no_grad():
            return float((step.model(unseen) - net(unseen)).norm())

    assert error("reconstruction") < 0.8 * error("l2")


def test_bad_calibration_is_reported():
    net, x = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), torch.randn(8, 4)
    traced = trace(net, x)
    with pytest.raises(PruningError, match="needs calibration batches"):
        reconstruction(net, traced, [], cross_entropy)
    x[0, 0] = torch.nan
    with pytest.raises(PruningError, match="not finite"):
        reconstruction(net, traced, [(x, None)], cross_entropy)
