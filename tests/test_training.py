"""Law 7 and the stages: determinism, resuming, and what each stage is to do."""

from __future__ import annotations

import json

import nets
import pytest
import torch
from torch import nn

from pruning import (
    Budget,
    PruneConfig,
    PruningError,
    Run,
    ScalePull,
    SlimConfig,
    TrainConfig,
    TrainingDiverged,
    accuracy,
    count,
    distillation,
    finetune,
    fit,
    slim,
    sparsify,
    trace,
)


def batches(count=4, size=16, seed=3):
    """Images whose class is the brightest of four places."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(count, size, 3, 14, 14, generator=draw)
    labels = torch.randint(0, 4, (count, size), generator=draw)
    for batch, classes in zip(images, labels, strict=True):
        for image, label in zip(batch, classes, strict=True):
            image[:, 3 * int(label) : 3 * int(label) + 3] += 1.5
    return list(zip(images, labels, strict=True))


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class Shuffled:
    """Batches in a new order each time, from the global generator, as a DataLoader gives them."""

    def __init__(self):
        self.batches = batches()

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return (self.batches[i] for i in torch.randperm(len(self.batches)).tolist())


def test_training_learns():
    net = nets.make("lenet")
    data = batches(8)
    fit(net, data, TrainConfig(8, lr=0.05))
    assert accuracy(net, data) > 0.9 and not net.training


def test_one_cycle_rises_to_the_peak_and_falls_to_almost_nothing():
    rates = []
    fit(nets.make("lenet"), batches(), TrainConfig(5, lr=0.1, warmup=0.4), after_step=rates.append)
    assert len(rates) == 20 and max(rates) == pytest.approx(0.1, rel=0.02)
    assert rates.index(max(rates)) in (7, 8) and rates[0] < 0.01 and rates[-1] < 0.01


@pytest.mark.parametrize("epochs", [1, 2])
def test_even_a_single_step_can_be_trained(epochs):
    fit(nets.make("lenet"), batches(1), TrainConfig(epochs))


def test_no_epochs_train_nothing():
    net = nets.make("lenet")
    assert same(fit(net, batches(), TrainConfig(0)), nets.make("lenet"))


def test_frozen_parameters_stay():
    net = nets.make("lenet")
    net.features.conv1.weight.requires_grad_(False)
    before = net.features.conv1.weight.clone()
    fit(net, batches(), TrainConfig(1))
    assert torch.equal(net.features.conv1.weight, before)


def test_the_best_epoch_is_kept_the_later_of_equals():
    scores, seen = iter([0.5, 0.9, 0.9, 0.2]), []

    def on_epoch(epoch):
        seen.append({key: value.clone() for key, value in epoch.state()["model"].items()})

    net = nets.make("lenet")
    fit(net, batches(), TrainConfig(4), validate=lambda _: next(scores), keep_best=True, on_epoch=on_epoch)
    assert all(torch.equal(value, seen[2][key]) for key, value in net.state_dict().items())


def test_a_moving_average_in_closed_form():
    seen = []
    net = nets.make("lenet")
    fit(net, batches(), TrainConfig(2, ema=0.75), after_step=lambda _: seen.append(nets.snapshot(net)))
    average = seen[0]
    for weights in seen[1:]:
        average = {key: 0.75 * old + 0.25 * weights[key] for key, old in average.items()}
    for key, value in net.state_dict().items():
        if not value.is_floating_point():
            continue  # the count of batches
        torch.testing.assert_close(value, average[key], rtol=1e-5, atol=1e-6)
    assert not torch.equal(net.state_dict()["classifier.fc1.weight"], seen[-1]["classifier.fc1.weight"])


@pytest.mark.parametrize("ema", [0.0, 0.5])
@pytest.mark.parametrize("stop", [1, 2, 4])
def test_training_that_is_resumed_ends_where_the_uninterrupted_one_does(stop, ema):
    def train(resume=None, keep=None):
        net = nets.make("lenet")
        states = []
        torch.manual_seed(1)
        fit(net, Shuffled(), TrainConfig(4, ema=ema), keep_best=True, resume=resume,
            validate=lambda m: accuracy(m, batches(1)),
            on_epoch=lambda epoch: states.append(pack(epoch.state())))  # fmt: skip
        return net, states

    def pack(state):
        return torch.load(unpack(state), weights_only=True)

    def unpack(state):
        import io

        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        return buffer

    whole, states = train()
    torch.manual_seed(99)
    resumed, _ = train(resume=states[stop - 1])
    assert same(whole, resumed)


def test_a_loss_that_is_no_number_stops_the_training():
    with pytest.raises(TrainingDiverged, match=r"stage x, epoch 1, by step 4.*learning rate"):
        fit(nets.make("lenet"), batches(), TrainConfig(2), loss=lambda m, x, y: m(x).sum() * float("nan"),
            label="stage x")  # fmt: skip


def test_no_batches_is_an_error():
    with pytest.raises(PruningError, match="nothing to train on"):
        fit(nets.make("lenet"), [], TrainConfig(1))
    with pytest.raises(PruningError, match="nothing to evaluate on"):
        accuracy(nets.make("lenet"), [])


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": -1},
        {"lr": 0},
        {"momentum": 1},
        {"weight_decay": -1},
        {"schedule": "step"},
        {"warmup": 0},
        {"ema": 1},
    ],
)
def test_settings_are_checked_when_they_are_made(bad):
    with pytest.raises(PruningError, match="is needed"):
        TrainConfig(**{"epochs": 1, **bad})


def test_stage_1_takes_no_moving_average():
    with pytest.raises(PruningError, match="no exact zeros"):
        SlimConfig(Budget(params=5), TrainConfig(1, ema=0.9), PruneConfig(1, TrainConfig(1)), TrainConfig(1))


# Stage 1


def test_a_pull_is_a_soft_threshold_weighted_by_what_a_channel_frees():
    net = nets.make("lenet")
    traced = trace(net, nets.images())
    pull = ScalePull(net, traced, strength=2.0)
    dense = pull.cost_model(pull.cost_model.full)
    freed = pull.cost_model.freed(pull.cost_model.full)
    norms = [net.features.bn1, net.features.bn2, net.classifier.bn1, net.classifier.bn2]
    before = [norm.weight.detach().clone() for norm in norms]
    pull.step(lr=0.25)
    for i, (norm, old) in enumerate(zip(norms, before, strict=True)):
        by = 0.25 * 2.0 * (freed["params"][i] / dense.params + freed["macs"][i] / dense.macs)
        expected = nn.functional.softshrink(old, by)
        largest = old.abs().argmax()
        expected[largest] = old[largest]  # the channel that keeps the group alive
        torch.testing.assert_close(norm.weight.detach(), expected)


def test_a_pull_under_a_budget_weighs_what_is_over_it():
    net = nets.make("lenet")
    traced = trace(net, nets.images())
    dense = ScalePull(net, traced, 1.0).dense
    # Twice over the limit on params, four times over that on MACs: excesses of 1 and 3.
    budget = Budget(params=dense.params // 2, macs=dense.macs // 4)
    weights = ScalePull(net, traced, 1.0, budget).weights
    assert weights["params"] == pytest.approx(0.5, rel=0.02)
    assert weights["macs"] == pytest.approx(1.5, rel=0.02)
    assert ScalePull(net, traced, 1.0, Budget(params=10**9)).weights == {"params": 1.0, "macs": 1.0}


def test_a_pull_strong_enough_gives_exact_zeros_and_then_pulls_by_what_is_left():
    net = nets.make("lenet")
    pull = ScalePull(net, trace(net, nets.images()), strength=1.0)
    with torch.no_grad():
        net.features.bn2.weight[:4] = 1e-4
        net.features.bn2.weight[4] = 2.0  # the largest is spared
    pull.refresh()
    pull.step(lr=1.0)
    assert (net.features.bn2.weight[:4] == 0).all() and (net.features.bn2.weight[4:] != 0).any()
    assert pull.alive()["features.conv2"] == int((net.features.bn2.weight != 0).sum())
    before = [float(threshold.max()) for _, threshold in pull.thresholds]
    pull.refresh()
    assert float(pull.thresholds[0][1].max()) < before[0], "conv1 frees less once conv2 is narrower"


def test_no_pull_is_strong_enough_to_empty_a_group():
    for name in ("lenet", "residual", "dense"):
        net = nets.make(name)
        pull = ScalePull(net, trace(net, nets.images()), strength=1e6)
        pull.step(lr=1.0)
        assert all(pull.alive()[group] == 1 for group in pull.scales)


def test_the_strength_is_found_from_the_budget():
    """Without resistance the pull over the way ahead leaves just what the budget allows."""
    net = nets.make("lenet")
    traced = trace(net, nets.images())
    budget = Budget(params="40%", macs="60%").resolve(ScalePull(net, traced, 0.0).dense)
    pull = ScalePull(net, traced, None, budget)
    pull.step(lr=1.0)
    assert pull.alive() == traced.widths, "without a way to go nothing pulls"
    pull.refresh(way=20.0)
    for _ in range(20):
        pull.step(lr=1.0 + 1e-6)
    assert not budget.excess(pull.cost_model(pull.alive()))
    pull.refresh(way=20.0)
    assert pull.strength == 0, "once the budget is met the pull ends"


def test_a_pull_that_is_resisted_grows():
    net = nets.make("lenet")
    traced = trace(net, nets.images())
    pull = ScalePull(net, traced, None, Budget(params=300))
    pull.refresh(way=20.0)
    before = pull.strength
    pull.refresh(way=10.0)  # half of the way is gone, and no scale has moved
    assert pull.resistance == 4.0 and pull.strength == pytest.approx(8 * before)
    other = ScalePull(net, traced, None, Budget(params=300))
    other.load_state_dict(pull.state_dict())
    assert other.state_dict() == pull.state_dict()


def test_sparsify_comes_half_of_the_way_to_the_budget():
    net = nets.make("lenet")
    cost_model = ScalePull(net, trace(net, nets.images()), 0.0).cost_model
    budget, dense = Budget(params="25%"), cost_model(cost_model.full)
    sparsify(net, batches(), TrainConfig(8, lr=0.05), nets.images(), budget=budget)
    left = cost_model(ScalePull(net, trace(net, nets.images()), 0.0).alive())
    assert 0.25 * dense.params < left.params < 0.75 * dense.params
    with pytest.raises(PruningError, match="found from a budget, and none was given"):
        sparsify(nets.make("lenet"), batches(), TrainConfig(1), nets.images())


def test_sparsify_turns_channels_off_where_plain_training_does_not():
    zeros = {}
    for strength in (0.0, 6.0):
        net = nets.make("lenet")
        sparsify(net, batches(), TrainConfig(6), nets.images(), strength=strength)
        zeros[strength] = sum(int((m.weight == 0).sum()) for m in net.modules()
                              if isinstance(m, nn.modules.batchnorm._BatchNorm))  # fmt: skip
    assert zeros[0.0] == 0 and zeros[6.0] >= 3


def test_sparsify_without_a_norm_says_so():
    with pytest.raises(PruningError, match="no prunable group of this model has a BatchNorm"):
        sparsify(nets.make("plain"), batches(), TrainConfig(1), nets.images(), strength=1.0)


# Stage 3


def test_distillation_in_closed_form():
    teacher, student = nets.make("lenet", 1), nets.make("lenet", 2)
    images, labels = batches(1)[0]
    loss = distillation(teacher, weight=0.3, temperature=2.0)(student, images, labels)
    p, q = (net(images).div(2.0).softmax(1) for net in (teacher, student))
    soft = (p * (p / q).log()).sum(1).mean() * 4
    hard = nn.functional.cross_entropy(student(images), labels)
    torch.testing.assert_close(loss, 0.7 * hard + 0.3 * soft)
    assert not student._forward_hooks


def test_a_teacher_of_other_classes_is_refused():
    teacher = nets.LeNet5((2,), (3,), image_shape=(3, 14, 14), classes=7)
    with pytest.raises(PruningError, match=r"teacher's outputs have shape \(16, 7\)"):
        finetune(nets.make("lenet"), batches(), TrainConfig(1), teacher=teacher)


def test_the_teacher_is_not_trained():
    teacher = nets.make("lenet", 1)
    finetune(nets.make("lenet", 2), batches(), TrainConfig(1), teacher=teacher)
    assert same(teacher, nets.make("lenet", 1))


# The pipeline


CONFIG = SlimConfig(
    Budget(params="30%", macs="50%"), sparsify=TrainConfig(2, lr=0.05),
    prune=PruneConfig(2, TrainConfig(1, lr=0.02), layers=True),
    finetune=TrainConfig(2, lr=0.05, ema=0.5), distill=0.3,
)  # fmt: skip


def pipeline(run=None, log=lambda _: None, config=CONFIG):
    torch.manual_seed(0)
    data = batches()
    return slim(nets.make("lenet"), Shuffled(), data[0][0], config,
                validate=lambda m: accuracy(m, data), calibration=data, run=run, log=log)  # fmt: skip


def test_slimming_meets_the_budget_and_reports_each_step(tmp_path):
    lines = []
    result = pipeline(Run(tmp_path / "run", {}), lines.append)
    cost_model = ScalePull(result.model, trace(result.model, nets.images()), 0).cost_model
    dense = ScalePull(result.dense, trace(result.dense, nets.images()), 0).cost_model
    got, before = cost_model(cost_model.full), dense(dense.full)
    assert got.params <= 0.3 * before.params + 0.5 and got.macs <= 0.5 * before.macs + 0.5
    assert [line.split(":")[0] for line in lines if "whole layers" not in line] == [
        "stage 1, sparsify", "stage 2, iteration 1/2", "stage 2, iteration 2/2", "stage 3, fine-tune",
    ]  # fmt: skip
    assert all("asked ≤" in line for line in lines[-3:-1]) and f"{got.params:,} params" in lines[-2]
    events = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert sum("epoch" in event for event in events) == CONFIG.epochs == 6
    assert [event["params"] for event in events if "asked" in event][-1] == got.params


def test_the_same_seed_gives_the_same_network():
    assert same(pipeline().model, pipeline().model)


@pytest.mark.parametrize("epochs", range(1, 7))
def test_an_interrupted_pipeline_resumes_to_the_same_end(epochs, tmp_path):
    whole = Run(tmp_path / "whole", {"seed": 0})
    expected = pipeline(whole)

    class Killed(Exception):
        pass

    class Mortal(Run):
        saves = 0

        def save(self, state):
            super().save(state)
            self.saves += 1
            if self.saves == epochs:
                self.note(stage="lost", epoch=0)  # happened after the state was saved
                raise Killed

    with pytest.raises(Killed):
        pipeline(Mortal(tmp_path / "cut", {"seed": 0}))
    torch.manual_seed(12345)
    resumed = pipeline(Run(tmp_path / "cut", {"seed": 0}, resume=True))
    assert same(resumed.model, expected.model) and same(resumed.dense, expected.dense)
    histories = [(tmp_path / name / "history.jsonl").read_text() for name in ("whole", "cut")]
    assert histories[0] == histories[1]


def test_a_run_is_not_mixed_with_another(tmp_path):
    Run(tmp_path / "run", {"seed": 0})
    with pytest.raises(PruningError, match="holds a run already"):
        Run(tmp_path / "run", {"seed": 0})
    with pytest.raises(PruningError, match=r"other settings \(seed\)"):
        Run(tmp_path / "run", {"seed": 1}, resume=True)
    with pytest.raises(PruningError, match="no run to resume"):
        Run(tmp_path / "elsewhere", {"seed": 0}, resume=True)


def test_an_unreachable_budget_is_refused_before_training(tmp_path):
    config = SlimConfig(Budget(params=5), TrainConfig(1), PruneConfig(1, TrainConfig(1)), TrainConfig(1))
    with pytest.raises(PruningError, match="cannot be reached"):
        pipeline(Run(tmp_path / "run", {}), config=config)
    assert not (tmp_path / "run" / "history.jsonl").exists()


def test_slim_takes_a_budget_and_batches_alone():
    torch.manual_seed(0)
    labels = torch.arange(32) % 4
    batches = [(torch.randn(32, 3, 14, 14) + labels[:, None, None, None], labels)]
    lines = []
    result = slim(nets.make("lenet"), batches, budget=Budget(macs="40%"), validate=batches, log=lines.append)
    before, after = (count(net, batches[0][0]).macs for net in (nets.make("lenet"), result.model))
    assert after <= 0.4 * before and result.epochs == 8 + 5 * 2 + 40
    assert lines[-1].startswith("stage 3, fine-tune: 40 epochs")
    with pytest.raises(PruningError, match="either a config or a budget"):
        slim(nets.make("lenet"), batches, validate=batches)


def test_zeros_are_held_once_the_budget_is_met():
    """Where stage 1 is at its goal nothing is pulled, and what is 0 does not come back."""
    net, images = nets.make("lenet"), nets.images(8)
    traced = trace(net, images)
    with torch.no_grad():
        for norm in (m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
            norm.weight[: len(norm.weight) // 2] = 0
    dense = ScalePull(net, traced, 0.0).dense
    pull = ScalePull(net, traced, None, Budget(macs="90%").resolve(dense))
    pull.refresh(way=1.0)
    alive = pull.alive()
    assert pull.strength == 0 and sum(alive.values()) < sum(traced.widths.values())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(3):
        nn.functional.cross_entropy(net.train()(images), torch.arange(8) % 4).backward()
        optimizer.step()
        pull.step(0.05)
    assert pull.alive() == alive
