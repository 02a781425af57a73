"""The training loop and stage 3: schedules, best epoch, moving averages, resuming."""

from __future__ import annotations

import nets
import pytest
import torch
from nets import ShuffledBatches, batches, same
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from pruning import PruningError
from pruning.errors import TrainingDiverged
from pruning.training import TrainConfig, accuracy, fit

pytestmark = pytest.mark.numerics


def test_training_reaches_a_high_accuracy():
    net = nets.make("lenet")
    data = batches(8)
    fit(net, data, TrainConfig(8, lr=0.05))
    assert accuracy(net, data) > 0.9 and not net.training


def test_one_cycle_rises_to_the_peak_and_falls_to_almost_zero():
    rates = []
    fit(nets.make("lenet"), batches(), TrainConfig(5, lr=0.1, warmup=0.4), after_step=rates.append)
    assert len(rates) == 20 and max(rates) == pytest.approx(0.1, rel=0.02)
    assert rates.index(max(rates)) in (7, 8) and rates[0] < 0.01 and rates[-1] < 0.01


@pytest.mark.parametrize("epochs", [1, 2])
def test_training_works_with_a_single_step(epochs):
    fit(nets.make("lenet"), batches(1), TrainConfig(epochs))


def test_zero_epochs_leave_the_weights_unchanged():
    net = nets.make("lenet")
    assert same(fit(net, batches(), TrainConfig(0)), nets.make("lenet"))


def test_frozen_parameters_stay_unchanged():
    net = nets.make("lenet")
    net.features.conv1.weight.requires_grad_(False)
    before = net.features.conv1.weight.clone()
    fit(net, batches(), TrainConfig(1))
    assert torch.equal(net.features.conv1.weight, before)


def test_the_best_epoch_is_kept_or_the_last_of_equal_ones():
    scores, seen = iter([0.5, 0.9, 0.9, 0.2]), []

    def on_epoch(epoch):
        seen.append({key: value.clone() for key, value in epoch.state()["model"].items()})

    net = nets.make("lenet")
    fit(net, batches(), TrainConfig(4), validate=lambda _: next(scores), keep_best=True, on_epoch=on_epoch)
    assert all(torch.equal(value, seen[2][key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("keep_start", [True, False])
def test_keep_start_keeps_the_initial_weights_if_they_are_best(keep_start):
    scores = iter([0.9, 0.5, 0.4] if keep_start else [0.5, 0.4])
    net, seen = nets.make("lenet"), []
    start = nets.snapshot(net)
    fit(net, batches(), TrainConfig(2), validate=lambda _: next(scores),
        keep_best=True, keep_start=keep_start,
        on_epoch=lambda epoch: seen.append((epoch.number, nets.snapshot(net))))  # fmt: skip
    assert [number for number, _ in seen] == [1, 2]
    kept = start if keep_start else seen[0][1]
    assert all(torch.equal(value, kept[key]) for key, value in net.state_dict().items())


def test_the_moving_average_matches_the_closed_form():
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


@pytest.mark.parametrize(("ema", "optimizer"), [(0.0, "sgd"), (0.5, "sgd"), (0.0, "soap")])
@pytest.mark.parametrize("stop", [1, 2, 4])
def test_resumed_training_gives_exactly_the_result_of_uninterrupted_training(stop, ema, optimizer):
    def train(resume=None, keep=None):
        net = nets.make("lenet")
        states = []
        torch.manual_seed(1)
        config = TrainConfig(4, ema=ema, optimizer=optimizer)
        fit(net, ShuffledBatches(), config, keep_best=True, resume=resume,
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


def test_a_loss_that_is_not_finite_raises():
    with pytest.raises(TrainingDiverged, match=r"stage x, epoch 1, by step 4.*learning rate"):
        fit(nets.make("lenet"), batches(), TrainConfig(2), loss=lambda m, x, y: m(x).sum() * float("nan"),
            label="stage x")  # fmt: skip


def test_empty_batches_are_refused():
    with pytest.raises(PruningError, match="nothing to train on"):
        fit(nets.make("lenet"), [], TrainConfig(1))
    with pytest.raises(PruningError, match="nothing to evaluate on"):
        accuracy(nets.make("lenet"), [])


IMAGES, LABELS = torch.zeros(4, 3, 14, 14), torch.zeros(4, dtype=torch.long)


def test_batches_without_a_length_are_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([(IMAGES[0], LABELS[0])] * 8)

    with pytest.raises(PruningError, match="have no length"):
        fit(nets.make("lenet"), DataLoader(Stream(), 4), TrainConfig(1))


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": -1},
        {"lr": 0},
        {"momentum": 1},
        {"optimizer": "adamv"},
        {"weight_decay": -1},
        {"schedule": "steps"},
        {"warmup": 0},
        {"ema": 1},
    ],
)
def test_settings_are_validated_on_creation(bad):
    with pytest.raises(PruningError, match="expected"):
        TrainConfig(**{"epochs": 1, **bad})


def test_training_works_inside_no_grad():
    with torch.no_grad():
        net = fit(nets.make("lenet"), batches(2), TrainConfig(1))
    assert same(net, fit(nets.make("lenet"), batches(2), TrainConfig(1)))


def test_batches_of_one_example_and_numpy_arrays_are_refused():
    net = nn.Sequential(nn.Flatten(), nn.Linear(588, 4), nn.BatchNorm1d(4))
    with pytest.raises(PruningError, match="drop_last=True"):
        fit(net, [(IMAGES, LABELS), (IMAGES[:1], LABELS[:1])], TrainConfig(1))
    with pytest.raises(PruningError, match=r"numpy arrays: tensors were expected"):
        fit(net, [(IMAGES.numpy(), LABELS.numpy())], TrainConfig(1))
