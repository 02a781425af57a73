"""Stage 1 of a trained network: scales become 0 at the pace of a budget, in any training loop."""

from __future__ import annotations

import itertools

import nets
import pytest
import torch
from nets import batches
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pruning import Budget, PruningError, trace
from pruning.stages import PacedPull
from pruning.training import TrainConfig, accuracy, fit, fresh_statistics
from pruning.utils.modules import copied

pytestmark = pytest.mark.numerics


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    return fit(nets.make("lenet"), batches(), TrainConfig(10, lr=0.05))


def pulled(model, budget, steps, floor=1):
    return PacedPull(model, trace(model, nets.images()), budget, steps, floor=floor)


@pytest.mark.parametrize("name", ["lenet", "residual", "dense", "plain"])
@pytest.mark.parametrize(
    "budget", [Budget(macs="50%"), Budget(params="40%", macs="70%"), Budget(channels=14)]
)
def test_the_cost_falls_with_the_steps_and_never_below_the_budget(name, budget):
    model = nets.make(name)
    pull = pulled(model, budget, steps=40)
    before, costs = pull.left(), []
    for step in range(1, 41):
        pull.after_step()
        left = pull.left()
        costs.append(left)
        for what, limit in pull.budget.limits().items():
            dense = getattr(before, what)
            planned = dense - (dense - limit) * min(1.0, step / 30)
            one = max(
                dense - getattr(pull.cost_model({g: n - 1}), what) for g, n in pull.trace.widths.items()
            )
            if len(pull.budget.limits()) == 1 and pull.pulled_groups == [*pull.trace.groups]:
                assert getattr(left, what) <= planned + one, "at most one channel behind the plan"
        assert any(getattr(left, what) >= limit for what, limit in pull.budget.limits().items())
    assert all(a.macs >= b.macs and a.channels >= b.channels for a, b in itertools.pairwise(costs))
    assert min(pull.alive().values()) >= 1


def test_every_group_keeps_its_floor_and_the_report_says_that_the_budget_is_not_reached():
    model = nets.make("lenet")
    pull = pulled(model, Budget(channels=4), steps=20, floor=3)
    for _ in range(20):
        pull.after_step()
    assert {min(n, 3) for n in pull.alive().values()} == {3}
    found = pull.after_epoch()
    assert not found.reached and "not yet reached" in str(found)
    assert found.zero == found.scales - sum(found.alive.values())


def loop(model, pull, optimizer, epochs, *, accumulate=1, autocast=False, average=None):
    """Train as a user would; return the validation accuracy after every epoch."""
    scores = []
    for _ in range(epochs):
        model.train()
        for i, (images, labels) in enumerate(batches(), start=1):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                value = nn.functional.cross_entropy(model(images), labels) / accumulate
            value.backward()
            if i % accumulate:
                continue
            optimizer.step()
            pull.after_step()
            optimizer.zero_grad()
            if average is not None:
                average.update_parameters(model)
        with fresh_statistics(model, batches()):
            scores.append(accuracy(model, batches()))
    return scores


@pytest.mark.parametrize("how", ["sgd", "adamw", "accumulated", "bfloat16"])
def test_a_loop_of_ones_own_reaches_the_budget_and_keeps_the_accuracy(trained, how):
    model = copied(trained)
    epochs, accumulate = (16, 2) if how == "accumulated" else (8, 1)
    pull = pulled(model, Budget(macs="60%"), epochs * len(batches()) // accumulate)
    make = {"sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9)}.get(
        how, lambda p: torch.optim.AdamW(p, 3e-3)
    )
    before = accuracy(trained, batches())
    scores = loop(model, pull, make(model.parameters()), epochs, accumulate=accumulate,
                  autocast=how == "bfloat16")  # fmt: skip
    found = pull.after_epoch()
    assert found.reached and found.zero > 0
    assert found.left.macs <= 1.15 * found.budget.macs
    assert scores[-1] >= before - 0.03, scores


def test_the_zeros_are_copied_to_a_moving_average_of_the_weights(trained):
    model = copied(trained)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
    pull = pulled(model, Budget(macs="60%"), 16)
    loop(model, pull, torch.optim.AdamW(model.parameters(), 1e-3), 4, average=average)
    pull.copy_zeros(average.module)
    norms = [m for m in average.module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    zeros = sum(int((norm.weight == 0).sum()) for norm in norms)
    assert zeros == pull.after_epoch().zero > 0
    with fresh_statistics(average.module, batches()):
        assert accuracy(average.module, batches()) >= accuracy(trained, batches()) - 0.05


def test_channels_whose_scales_matter_least_to_the_loss_go_first():
    model = nets.make("lenet")
    pull = pulled(model, Budget(channels=24), steps=4)
    norm = model.features.bn2
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.weight.grad = torch.ones_like(m.weight)
    norm.weight.grad[:] = 1e-6
    norm.weight.data[:] = 10.0  # large, but without effect on the loss
    for _ in range(4):
        pull.after_step()
    assert pull.alive()["features.conv2"] < pull.trace.widths["features.conv2"]
    assert all(n == pull.trace.widths[g] for g, n in pull.alive().items() if g != "features.conv2")


def test_scales_at_0_stay_there_and_a_restored_pull_goes_on_like_the_first(trained):
    def steps(pull, model, first, last):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        zero = None
        for step in range(first, last):
            images, labels = batches()[step % 4]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.train()(images), labels).backward()
            optimizer.step()
            pull.after_step()
            flags = {group: values == 0 for group, values in pull.magnitudes().items()}
            assert zero is None or all(bool((flags[g] >= zero[g]).all()) for g in flags)
            zero = flags

    whole = copied(trained)
    pull = pulled(whole, Budget(macs="60%"), 16)
    steps(pull, whole, 0, 8)
    cut = copied(whole)
    other = pulled(copied(trained), Budget(macs="60%"), 16)
    resumed = PacedPull(cut, other.trace, Budget(macs="60%"), 16)
    resumed.load_state_dict(pull.state_dict())
    steps(pull, whole, 8, 16)
    steps(resumed, cut, 8, 16)
    assert nets.same(whole, cut) and pull.after_epoch() == resumed.after_epoch()


def test_a_network_that_cannot_be_pulled_and_a_training_without_steps_are_rejected():
    with pytest.raises(PruningError, match="no prunable group of this model has scales or weights"):
        pulled(nets.make("plain").requires_grad_(False), Budget(macs="50%"), 4)
    with pytest.raises(PruningError, match="steps 0: expected the number of optimizer steps"):
        pulled(nets.make("lenet"), Budget(macs="50%"), 0)
