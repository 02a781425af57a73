"""`slim` of a trained network: it is recognized, its score is the reference, nothing better is lost."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import nets
import pytest
import torch
from killed import CopiedRun
from nets import ShuffledBatches, batches, same
from torch import nn

from pruning import Budget, SlimConfig, slim, trace
from pruning.planning import count
from pruning.stages import PruneConfig, Run
from pruning.stages.given import Given, assess, class_counts
from pruning.stages.scales import ChannelScales
from pruning.training import TrainConfig, accuracy, fit, fresh_statistics
from pruning.training.range_test import rate_of_longer
from pruning.utils.modules import copied

pytestmark = pytest.mark.numerics

CONFIG = SlimConfig(Budget(macs="50%"), TrainConfig(2), PruneConfig(2, TrainConfig(1)), TrainConfig(2))


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    return fit(nets.make("lenet"), batches(), TrainConfig(10, lr=0.05))


def pipeline(model, run=None, lines=None, config=CONFIG, validate=None):
    torch.manual_seed(0)
    log = (lambda _: None) if lines is None else lines.append
    return slim(model, ShuffledBatches(), batches()[0][0], config, calibration=batches(),
                validate=batches() if validate is None else validate, run=run, log=log)  # fmt: skip


def scored(model, validate=None):
    examples = batches() if validate is None else None
    return assess(model, validate or (lambda m: accuracy(m, batches())), examples, batches())


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", ["lenet", "residual", "dense"])
def test_an_untrained_network_is_recognized(name, seed):
    torch.manual_seed(seed)
    found = scored(nets.make(name))
    assert not found.trained and "like a fresh network" in str(found)


def test_a_trained_network_is_recognized_by_batches_and_by_a_function(trained):
    random = torch.get_rng_state()
    found = scored(trained)
    assert found.trained and found.examples == 64 and found.score == accuracy(trained, batches())
    assert scored(trained, lambda m: -1.0).trained, "by the training examples, whatever the score means"
    assert torch.equal(random, torch.get_rng_state())
    collapsed = copied(trained)
    with torch.no_grad():
        for m in collapsed.modules():
            if isinstance(m, nn.Linear):
                m.weight.zero_()
    assert not scored(collapsed).trained


def test_a_network_at_chance_is_told_what_a_trained_one_has():
    torch.manual_seed(0)
    untrained = nn.Sequential(nn.Flatten(), nn.LazyLinear(4))
    data = batches()
    untrained(data[0][0])
    labels = torch.cat([y for _, y in data])
    share = float(labels.bincount().max()) / len(labels)
    chance = share + 2 * math.sqrt(share * (1 - share) / len(labels))
    at_chance = assess(untrained, lambda m: 0.0, data, data)
    assert str(at_chance).endswith(f"fresh network (a trained one has more than {chance:.4f})")
    seemingly = assess(untrained, lambda m: 1.0, data, data)
    assert not seemingly.trained and "of training loss, and this one has" in str(seemingly)


def test_networks_other_than_classifiers_are_compared_with_fresh_weights():
    torch.manual_seed(0)
    inputs = torch.randn(64, 4)
    data = [(inputs, inputs.sum(1, keepdim=True) * 3)] * 4
    make = lambda: nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))  # noqa: E731
    loss = lambda m, x, y: (m(x) - y).square().mean()  # noqa: E731
    validate = lambda m: -float(loss(m, *data[0]))  # noqa: E731
    fitted = fit(make(), data, TrainConfig(20, lr=0.01), loss=loss)
    assert assess(fitted, validate, None, data, loss).trained
    assert not assess(make(), validate, None, data, loss).trained


def test_the_spread_of_few_examples_and_missing_classes_are_stated(trained):
    few = [(x[:10], y[:10]) for x, y in batches()[:1]]
    found = assess(trained, lambda m: accuracy(m, few), few, batches())
    assert found.trained and found.examples == 10 and f"standard error {found.error:.3f}" in str(found)
    one = [(x[y == 1], y[y == 1]) for x, y in batches()]
    assert class_counts(trained, one).tolist() == [0, int(sum((y == 1).sum() for _, y in batches())), 0, 0]
    assert "none of them of class 0, 2, 3" in str(assess(trained, lambda m: 1.0, one, batches()))


@pytest.mark.parametrize(("examples", "score", "said"), [
    (10_000, 0.86, 0.04), (10_000, 0.88, 0), (10, 0.75, 0), (10, 0.6, 0.3), (0, 0.85, 0.05),
])  # fmt: skip
def test_a_shortfall_is_more_than_three_points_and_more_than_the_spread(examples, score, said):
    assert Given(0.9, True, examples).shortfall(score) == pytest.approx(said)
    assert Given(0.9, False, examples).shortfall(score) == 0
    assert Given(-100.0, True).shortfall(-200.0) == 0, "the unit is unknown"
    assert Given(0.9, True, 100).error == pytest.approx(math.sqrt(0.9 * 0.1 / 100))


def test_a_trained_network_keeps_its_accuracy_and_stage_1_stays_within_the_budget(trained, tmp_path):
    lines = []
    result = pipeline(trained, Run(tmp_path / "run", {}), lines)
    assert result.given is trained and result.dense is trained and result.reference.trained
    assert lines[0].startswith(f"given network: validation {accuracy(trained, batches()):.4f} on 64 examples")
    assert "range tests find peak rates of" in lines[0]
    target = count(trained, nets.images()).macs // 2
    scales = ChannelScales(result.sparsified, trace(result.sparsified, nets.images()))
    assert target < scales.left().macs < scales.dense.macs
    assert count(result.model, nets.images()).macs <= target
    assert result.score == accuracy(result.model, batches()) >= result.reference.score - 0.1
    events = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert events[0]["validation"] == result.reference.score and events[0]["rate"] == result.reference.rate
    assert events[-1] == {"stage": "result", "made_by": result.stage, "validation": result.score}
    rates = {stage: max(e["lr"] for e in events if "lr" in e and e["stage"].startswith(f"stage {stage}"))
             for stage in (1, 2, 3)}  # fmt: skip
    gentle, rate = result.reference.gentle, result.reference.rate
    assert rates[1] <= gentle <= rate and rates[2] <= rate / 2
    assert rates[3] <= rate_of_longer(rate, 2 * len(batches()), most=0.3)
    met = [e["validation"] for e in events if e["stage"] in ("stage 2, iteration 2/2", "stage 3, fine-tune")]
    assert result.score == max(met), "the best of all that met the budget"


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    """The result of a run that was not interrupted, its folder and its lines, and its earlier states."""
    folder, copies, lines = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("copies"), []
    return pipeline(trained, CopiedRun(folder, {}, copies), lines), folder, lines, copies


@pytest.mark.parametrize("epochs", range(1, 7))
def test_an_interrupted_run_of_a_trained_network_ends_like_the_whole_one(trained, whole, epochs):
    expected, folder, lines, copies = whole
    cut, again = copies / str(epochs), []
    torch.manual_seed(12345)
    resumed = pipeline(trained, Run(cut, {}, resume=True), again)
    assert same(resumed.model, expected.model) and same(resumed.sparsified, expected.sparsified)
    assert (resumed.stage, resumed.score, resumed.epochs) == (expected.stage, expected.score, expected.epochs)
    assert resumed.reference == expected.reference and lines[-len(again) :] == again
    histories = [(run / "history.jsonl").read_text() for run in (folder, cut)]
    assert histories[0] == histories[1]


def test_a_better_network_of_an_earlier_stage_is_the_result(trained, tmp_path):
    """Stage 3 from fresh weights at a tiny rate ends at chance; that of stage 2 is kept."""
    lines = []
    config = replace(CONFIG, restart=True, finetune=TrainConfig(1, lr=1e-6))
    result = pipeline(trained, Run(tmp_path / "run", {}), lines, config)
    assert result.stage == "stage 2, iteration 2/2"
    assert result.score == accuracy(result.model, batches()) > 0.8
    assert lines[-1].startswith("the best network within the budget is that of stage 2, iteration 2/2")
    assert "points below the given network: fine-tune for more epochs (now 1)" in lines[-2]
    untrained = pipeline(nets.make("lenet"), None, [], replace(config, finetune=TrainConfig(1, lr=1e-6)))
    assert untrained.score == accuracy(untrained.model, batches())


def test_a_budget_that_the_given_network_meets_never_makes_it_worse(trained):
    lines = []
    result = pipeline(trained, None, lines, replace(CONFIG, budget=Budget(macs="100%")))
    assert result.score >= result.reference.score
    skipped = [line for line in lines if "not run, the network is within its budget already" in line]
    assert len(skipped) == 2 and result.epochs == 2 + 2


def test_iterations_that_have_nothing_to_do_are_not_run(trained, tmp_path):
    """A group of few wide channels meets the budgets of several iterations at once."""
    run, lines = Run(tmp_path / "run", {}), []
    prune = PruneConfig(12, TrainConfig(1))
    result = pipeline(trained, run, lines, replace(CONFIG, budget=Budget(macs="60%"), prune=prune))
    steps = [json.loads(line) for line in run.history.read_text().splitlines() if "asked" in line][1:]
    widths = [step["widths"] for step in steps]
    assert all(a != b for a, b in itertools.pairwise(widths)), "every step removes something"
    skipped = sum("not run" in line for line in lines)
    assert skipped + len(steps) == 12 and skipped > 0 and result.epochs == 2 + len(steps) + 2


def test_a_trained_network_without_norms_is_pulled_by_its_weights():
    torch.manual_seed(0)
    lines, model = [], fit(nets.make("plain"), batches(), TrainConfig(30, lr=0.1))
    result = pipeline(model, None, lines)
    scales = ChannelScales(result.sparsified, trace(result.sparsified, nets.images()))
    assert result.reference.trained and scales.rows and scales.left().macs < scales.dense.macs
    assert "weights ≠ 0 in" in lines[1]


def test_a_trained_network_that_cannot_be_pulled_is_not_trained_in_stage_1():
    torch.manual_seed(0)
    lines, model = [], fit(nets.make("plain"), batches(), TrainConfig(30, lr=0.1))
    for layer in model:
        if hasattr(layer, "weight"):
            torch.nn.utils.parametrizations.weight_norm(layer)  # its weight is computed
    result = pipeline(model, None, lines)
    assert same(result.sparsified, model) and "so there is nothing to train" in lines[1]


def test_given_rates_are_not_searched(trained):
    lines = []
    pipeline(trained, None, lines, replace(CONFIG, rate=0.004))
    assert "range tests" not in lines[0]


def compared_with_fresh_statistics():
    """Return a list of pairs, and a validation that adds its score and that with fresh statistics."""
    pairs = []

    def validate(model):
        score = accuracy(model, batches())
        with fresh_statistics(model, batches()):
            pairs.append((score, accuracy(model, batches())))
        return score

    return pairs, validate


def test_every_validation_is_with_the_statistics_of_the_present_weights(trained):
    """The first is that of the given network, whose statistics are as given."""
    pairs, validate = compared_with_fresh_statistics()
    lagging = copied(trained)
    for m in lagging.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_var.mul_(0.8)
    pipeline(lagging, None, [], validate=validate)
    assert len(pairs) > 10 and all(abs(score - fresh) <= 1 / 64 for score, fresh in pairs[1:]), pairs


def test_untrained_networks_with_short_epochs_are_validated_so_too():
    pairs, validate = compared_with_fresh_statistics()
    result = pipeline(nets.make("lenet"), None, [], validate=validate)
    assert not result.reference.trained
    assert all(abs(score - fresh) <= 1 / 64 for score, fresh in pairs[1:]), pairs
