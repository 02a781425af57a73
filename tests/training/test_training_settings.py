"""Optimizers, schedules, accumulation, clipping, smoothing, mixing and precision of the training loop."""

from __future__ import annotations

import functools
import io
import math

import pytest
import torch
from torch import nn

from pruning import PruningError
from pruning.errors import TrainingDiverged
from pruning.training import TrainConfig, fit
from pruning.training.distillation import distillation
from pruning.training.losses import cross_entropy
from pruning.training.mixing import MixedBatches
from pruning.training.precision import Precision
from pruning.training.state import make_optimizer
from pruning.training.torch_optimizers import named_optimizers

pytestmark = pytest.mark.numerics

#: Optimizers of torch.optim that train a network with biases by gradients alone.
NAMES = sorted(set(named_optimizers()) - {"lbfgs", "sparseadam", "muon"})


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))


def data(count=4, size=8):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count * size, 3, 2, 2, generator=generator)
    labels = images.flatten(1)[:, :3].argmax(1)
    return list(zip(images.split(size), labels.split(size), strict=True))


class Shuffled:
    """Batches in an order that is drawn in every epoch."""

    def __len__(self):
        return 4

    def __iter__(self):
        given = data()
        return iter([given[i] for i in torch.randperm(4)])


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def stored(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def train(config, resume=None, **options):
    """Train a network; return it with the states of its epochs."""
    model, states = net(), []
    torch.manual_seed(99 if resume else 1)
    fit(model, Shuffled(), config, resume=resume,
        on_epoch=lambda epoch: states.append(stored(epoch.state())), **options)  # fmt: skip
    return model, states


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_of_torch_trains_and_resumes_exactly(name):
    config = TrainConfig(3, optimizer=name, schedule="cosine", warmup=0.25)
    whole, states = train(config)
    resumed, _ = train(config, resume=states[0])
    assert same(whole, resumed) and not same(whole, net())
    optimizer = make_optimizer(net(), config, torch.device("cpu"))
    assert type(optimizer) is named_optimizers()[name]
    assert optimizer.param_groups[0]["lr"] == config.peak == optimizer.defaults["lr"]


def test_an_optimizer_equals_a_loop_of_ones_own():
    model, other = net(), net()
    config = TrainConfig(3, 0.01, "AdamW", {"betas": (0.8, 0.9)}, weight_decay=0.1, schedule="constant")
    fit(model, data(), config)
    weights, biases = ([p for p in other.parameters() if (p.ndim > 1) is want] for want in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}],
        lr=0.01, betas=(0.8, 0.9),
    )  # fmt: skip
    for _ in range(3):
        for inputs, targets in data():
            optimizer.zero_grad()
            nn.functional.cross_entropy(other(inputs), targets).backward()
            optimizer.step()
    assert same(model, other)


def test_an_optimizer_may_be_made_by_a_function():
    reference, _ = train(TrainConfig(1, 0.02, "rmsprop", {"alpha": 0.9}))
    taking_rate = functools.partial(torch.optim.RMSprop, alpha=0.9)
    for factory in (taking_rate, lambda groups: torch.optim.RMSprop(groups, lr=5.0, alpha=0.9)):
        made, _ = train(TrainConfig(1, 0.02, factory))
        assert same(made, reference)
    assert TrainConfig(1, optimizer=lambda groups: torch.optim.SGD(groups, lr=5.0)).peak == 5.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adamv"}, "did you mean 'adam"),
        ({"optimizer": "adamw", "optimizer_args": {"beta": 1}}, "no argument 'beta'; did you mean 'betas'"),
        ({"optimizer_args": ["nesterof=False"]}, "did you mean 'nesterov'"),
        ({"optimizer_args": ["betas"]}, "expected KEY=VALUE"),
        ({"optimizer": "lbfgs"}, "evaluates the loss several times"),
        ({"optimizer": 3}, "expected the name of an optimizer"),
        ({"schedule": "cosines"}, "one-cycle, cosine, step, constant; did you mean 'cosine'"),
        ({"milestones": (0.5, 1.5)}, "milestones 1.5"),
        ({"accumulate": 0}, "expected a whole number from 1"),
        ({"precision": "int8"}, "expected one of fp32, bf16, fp16"),
        ({"clip_norm": 0}, "expected a number above 0"),
    ],
)
def test_settings_that_do_not_exist_are_refused_when_they_are_made(settings, message):
    with pytest.raises(PruningError, match=message):
        TrainConfig(1, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adam", "optimizer_args": {"betas": (2, 2)}}, "optimizer adam cannot be made with"),
        ({"optimizer": "rprop", "weight_decay": 0.1}, "rprop has no weight decay"),
        ({"optimizer": "muon"}, "optimizer muon cannot be made"),
        ({"optimizer": lambda groups: 3}, "returned a int: expected a torch.optim.Optimizer"),
        ({"optimizer": lambda groups: torch.optim.SGD(net().parameters(), lr=1)}, "other parameters"),
        ({"accumulate": 5}, "accumulate 5 is larger than the epoch, which has 4 batches"),
        ({"precision": "fp16"}, "precision fp16 needs a GPU"),
    ],
)
def test_settings_that_do_not_suit_the_training_are_refused_before_it(settings, message):
    model = net()
    with pytest.raises(PruningError, match=message):
        fit(model, data(), TrainConfig(1, lr=0.1, **settings))
    assert same(model, net())


def rates(config):
    seen = []
    fit(net(), data(5), config, after_step=seen.append)
    return seen


def test_schedules_match_their_closed_forms():
    cosine = rates(TrainConfig(4, 0.5, schedule="cosine", warmup=0.2))
    assert cosine[:4] == pytest.approx([0.5 * (0.04 + 0.96 * i / 4) for i in range(4)])
    assert cosine[4:] == pytest.approx([0.25 * (1 + math.cos(math.pi * i / 16)) for i in range(16)])
    step = rates(TrainConfig(4, 0.5, schedule="step", milestones=(0.75, 0.5), step_factor=0.2))
    assert step == pytest.approx([0.5] * 10 + [0.1] * 5 + [0.02] * 5)
    assert rates(TrainConfig(1, 0.5, schedule="constant", warmup=0.4))[2:] == [0.5] * 3
    with pytest.raises(PruningError, match="schedule cosine"):
        TrainConfig(1, warmup=0)


def test_accumulated_gradients_equal_those_of_larger_batches():
    """Also where the last step of an epoch has fewer batches."""
    for count in (4, 5):
        one, other, small = net(), net(), data(count)
        images, labels = (torch.cat(parts) for parts in zip(*small, strict=True))
        large = list(zip(images.split(16), labels.split(16), strict=True))
        for model, batches, accumulate in ((one, small, 2), (other, large, 1)):
            config = TrainConfig(3, 0.1, accumulate=accumulate, clip_norm=0.5)
            fit(model, batches, config)
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b)


def test_gradients_are_clipped_to_a_norm():
    config = TrainConfig(1, 1.0, momentum=0, schedule="constant", clip_norm=1e-3)
    before, moved = net(), []
    model = net()

    def measure(lr):
        change = [(a - b).detach().flatten() for a, b in
                  zip(model.parameters(), before.parameters(), strict=True)]  # fmt: skip
        moved.append(float(torch.cat(change).norm()))
        before.load_state_dict(model.state_dict())

    fit(model, data(), config, after_step=measure)
    assert moved == pytest.approx([1e-3] * 4, rel=1e-3)


def test_label_smoothing_equals_that_of_torch_also_with_a_teacher():
    inputs, targets = data()[0]
    smooth = nn.CrossEntropyLoss(label_smoothing=0.2)
    assert torch.equal(cross_entropy(net(), inputs, targets, 0.2), smooth(net()(inputs), targets))
    own, given = net(), net()
    fit(own, data(), TrainConfig(2, 0.1, label_smoothing=0.2))
    fit(given, data(), TrainConfig(2, 0.1), loss=smooth)
    assert same(own, given)
    fit(own, data(), TrainConfig(1, 0.1, label_smoothing=0.2), loss=distillation(net(1), 0.5))
    fit(given, data(), TrainConfig(1, 0.1), loss=distillation(net(1), 0.5, loss=smooth))
    assert same(own, given)
    with pytest.raises(PruningError, match="is for the default loss, and MSELoss is given"):
        fit(net(), data(), TrainConfig(1, label_smoothing=0.2), loss=nn.MSELoss())


@pytest.mark.parametrize("mixing", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_mixed_images_resume_exactly_and_keep_the_share_of_each_class(mixing):
    config = TrainConfig(3, 0.1, label_smoothing=0.1, **mixing)
    whole, states = train(config)
    assert same(whole, train(config, resume=states[1])[0])
    assert not same(whole, train(TrainConfig(3, 0.1, label_smoothing=0.1))[0])
    for (images, targets), (given, labels) in zip(MixedBatches(data(), config, 3), data(), strict=True):
        torch.testing.assert_close(targets.sum(0), torch.bincount(labels, minlength=3).float())
        torch.testing.assert_close(images.sum(0), given.sum(0), msg="pairs exchange what they mix")


def test_only_images_with_classes_are_mixed():
    for batch in ((torch.zeros(2, 12), torch.zeros(2).long()), (torch.zeros(2, 3, 2, 2), torch.zeros(2))):
        with pytest.raises(PruningError, match=r"need images \(N, C, H, W\) and integer classes"):
            fit(net(), [batch], TrainConfig(1, mixup=0.2))
    with pytest.raises(PruningError, match="the network has 3 classes"):
        fit(net(), [(torch.zeros(2, 3, 2, 2), torch.tensor([1, 7]))], TrainConfig(1, cutmix=1.0))


def test_bf16_rounds_the_forward_pass_alone():
    half, states = train(TrainConfig(4, 0.1, precision="bf16"))
    full, _ = train(TrainConfig(4, 0.1))
    assert {p.dtype for p in half.parameters()} == {torch.float32} and not same(half, full)
    for a, b in zip(half.parameters(), full.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
    assert same(half, train(TrainConfig(4, 0.1, precision="bf16"), resume=states[1])[0])


@pytest.fixture
def scaled(monkeypatch):
    """Let fp16 train on a CPU, where it has no use, to test the scale of the loss."""
    monkeypatch.setattr("pruning.training.loop.require_precision", lambda name, device: None)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop", "soap"])
def test_a_scaled_loss_resumes_exactly_and_skips_steps_that_overflow(scaled, optimizer):
    config = TrainConfig(4, 0.02, optimizer, precision="fp16", ema=0.5, clip_norm=1.0)
    steps = []

    def loss(model, inputs, targets):
        steps.append(0)
        factor = float("inf") if len(steps) % 7 == 3 else 1.0
        return cross_entropy(model, inputs, targets) * factor

    whole, states = train(config, loss=loss)
    scales = [state["scaler"]["scale"] for state in states]
    assert scales[0] < 65536 and all(bool(torch.isfinite(p).all()) for p in whole.parameters())
    del steps[8:]
    assert same(whole, train(config, resume=states[1], loss=loss)[0])


def test_a_scaled_loss_that_is_never_finite_ends_the_training(scaled):
    config = TrainConfig(1, 0.02, precision="fp16")
    with pytest.raises(TrainingDiverged, match="no longer finite"):
        fit(net(), data(), config, loss=lambda m, x, y: m(x).sum() * float("nan"))


def test_the_true_gradients_of_a_scaled_loss_are_those_of_the_loss():
    model, plain = net(), net()
    precision = Precision("fp16", torch.device("cpu"))
    inputs, targets = data()[0]
    precision.backward(cross_entropy(model, inputs, targets))
    cross_entropy(plain, inputs, targets).backward()
    for network, step in ((model, precision.step), (plain, lambda o, c, p: o.step())):
        step(torch.optim.SGD(network.parameters(), 0.1), None, network.parameters())
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_compiled_network_trains_the_same_weights(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    teacher = net(1)
    compiled, _ = train(TrainConfig(2, 0.1, compile=True), loss=distillation(teacher, 0.5))
    plain, _ = train(TrainConfig(2, 0.1), loss=distillation(teacher, 0.5))
    for a, b in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_network_that_cannot_be_compiled_is_reported_in_one_line(monkeypatch):
    def refuse(*given):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=refuse))
    with pytest.raises(
        PruningError, match=r"torch.compile fails on this network \(.*no compiler.*compile=Fal"
    ):
        fit(net(), data(), TrainConfig(1, compile=True))
