"""The score `reconstruction`: closed forms, redundant channels, and what a plan by it loses."""

from __future__ import annotations

import copy

import nets
import pytest
import torch
from torch import nn

from pruning import Budget, PruningError, prune, trace
from pruning.planning.elimination import Problem, eliminate
from pruning.planning.held_out import HeldOut, Refitted, match
from pruning.planning.reconstruction import GRAPH_BYTES, _examples_at_once, reconstruction_losses
from pruning.planning.sampled_loss import SampledLoss
from pruning.planning.scores import fisher, reconstruction
from pruning.surgery.linear_form import LinearForm
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
        problems.append(Problem(owner, gram, weight))
        systems.append((owner, gram, weight))
    net = nn.Sequential(nn.Linear(2, channels), nn.Linear(channels, 2))
    [group] = trace(net, torch.zeros(1, 2)).groups.values()
    scores = eliminate(group, problems)
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
        net[0].weight[:4] = torch.eye(4, dtype=torch.double).view_as(net[0].weight[:4])
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


@pytest.mark.parametrize("batches", ["one", "many", "single examples"])
@pytest.mark.parametrize("classifier", [True, False])
def test_losses_are_measured_on_the_examples_that_are_held_out(batches, classifier):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4), nn.ReLU(), nn.Linear(4, 3))
    x = torch.randn(32, 6)
    size = {"one": 32, "many": 16, "single examples": 1}[batches]
    parts = x.split(size)
    held = torch.cat([p[: size // 4] if size > 1 else p[: int(i % 4 == 3)] for i, p in enumerate(parts)])
    judge = HeldOut(net, parts, trace(net, x[:2]).batch, SampledLoss(classifier))
    assert torch.equal(torch.cat(judge.batches), held)
    with torch.no_grad():
        dense, zeroed = net(held), copy.deepcopy(net)
        zeroed[2].weight.zero_()
        zeroed[2].bias += 1
        nothing = Refitted(zeroed[2].weight, torch.ones(4), LinearForm())
        found = judge.loss_with({net[2].weight: nothing})
        if classifier:
            p, q = dense.double().softmax(1), zeroed(held).double().softmax(1)
            wanted = float((p * (p / q).log()).sum(1).mean())
        else:  # standard deviations are those of each batch
            outputs = [(net(part), zeroed(part)) for part in judge.batches]
            errors = [((b - a) / a.std(correction=0)).square().mean() / 2 * len(a) for a, b in outputs]
            wanted = float(sum(errors) / len(held))
    assert found == pytest.approx(wanted, rel=1e-4)


def test_measured_losses_scale_the_steps_between_them():
    steps = torch.arange(1.0, 9.0)
    found = match(steps, [2, 5], [6.0, 30.0])
    assert float(found[:2].sum()) == pytest.approx(6) and float(found[:5].sum()) == pytest.approx(30)
    torch.testing.assert_close(found[5:], steps[5:] * 2)
    falling = match(steps, [2, 5], [6.0, 3.0])
    assert (falling > 0).all() and float(falling[:5].sum()) == pytest.approx(6, rel=0.01)
    assert torch.equal(match(steps, [2], [float("nan")]), steps)


def test_a_groups_score_tells_how_much_the_layers_behind_it_amplify_its_error():
    """The second of two equal blocks is followed by weights times 0.01: its channels cost less."""
    torch.manual_seed(0)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = (
                nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(2)
            )
            self.other.load_state_dict(self.one.state_dict())
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.one(x) + 0.01 * self.other(x))

    net, x = Twice(), torch.randn(64, 8)
    scores = reconstruction_losses(net, trace(net, x[:2]), [(x, None)], SampledLoss())
    totals = {name: float(score.sum()) for name, score in scores.items()}
    assert totals["other.0"] < 1e-2 * totals["one.0"]


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


def test_calibration_inputs_of_another_type_give_the_same_plan_and_weights():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(32, 4)

    def pruned(inputs):
        return prune(net, x[:2], Budget(channels=4), calibration=[(inputs, None)], refit=True)

    plain, double = pruned(x), pruned(x.double())
    assert plain.plan == double.plan
    assert all(map(torch.equal, plain.model.state_dict().values(), double.model.state_dict().values()))


@pytest.mark.parametrize("score", [None, "l2"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x[:0], r"batch 1 has inputs of shape \(0, 4\)"),
        (lambda x: x.long(), r"batch 1 has torch.int64 inputs, the example inputs are torch.float32"),
        (lambda x: x / 0, "batch 1 has inputs that are not finite"),
    ],
)
def test_calibration_inputs_that_are_no_inputs_are_refused(change, said, score):
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(8, 4)
    batches = [(x, None), (change(x), None)]
    with pytest.raises(PruningError, match=said):
        prune(net, x[:2], Budget(channels=4), calibration=batches, score=score, refit=True)


def test_fewer_positions_than_channels_are_enough():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 3)), torch.randn(8, 4)
    step = prune(net, x[:2], Budget(channels=20), calibration=[(x, None)], refit=True)
    assert all(torch.isfinite(value).all() for value in step.model.state_dict().values())


def test_rows_that_are_copied_in_parts_give_the_same_scores(monkeypatch):
    net = nets.make("residual").eval()
    batches = [(part, None) for part in nets.images(32).split(8)]
    traced = trace(net, batches[0][0][:2])
    whole = reconstruction_losses(net, traced, batches, SampledLoss())
    monkeypatch.setattr("pruning.planning.reconstruction.VALUES", 1)
    parts = reconstruction_losses(net, traced, batches, SampledLoss())
    assert parts.keys() == whole.keys()
    for name, losses in whole.items():
        torch.testing.assert_close(parts[name], losses, rtol=1e-5, atol=1e-9)


def test_examples_whose_graphs_do_not_fit_into_memory_together_are_observed_in_parts(monkeypatch):
    sizes = []

    class Counted(SampledLoss):
        def __call__(self, model, inputs, targets):
            sizes.append(len(inputs))
            return super().__call__(model, inputs, targets)

    net = nets.make("residual").eval()
    batches = [(part, None) for part in nets.images(32).split(8)]
    traced = trace(net, batches[0][0][:2])
    reconstruction_losses(net, traced, batches, Counted())
    assert sizes == [8] * 4
    size = GRAPH_BYTES // _examples_at_once(net, traced.batch.of(batches[0][0]), batches[0][0])
    assert size > 800  # bytes of an example, rounded up
    monkeypatch.setattr("pruning.planning.reconstruction.GRAPH_BYTES", 4 * size + 4)
    sizes.clear()
    losses = reconstruction_losses(net, traced, batches, Counted())
    assert sizes == [2, 4, 2] * 4  # a quarter of each batch is held out
    assert all(bool(torch.isfinite(each).all()) for each in losses.values())
