"""The training loop and stage 3: schedules, best epoch, moving averages, resuming, losses, teachers."""

from __future__ import annotations

import nets
import pytest
import torch
from nets import ShuffledBatches, batches, same
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from data.batches import Batches
from pruning import PruningError, finetune
from pruning.errors import TrainingDiverged
from pruning.training import TrainConfig, accuracy, cross_entropy, fit
from pruning.training.distillation import distillation, with_teacher

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


class Constant(nn.Module):
    """A model that returns its weights for all inputs."""

    def __init__(self, *shape, wrap=lambda outputs: outputs):
        super().__init__()
        self.weight, self.wrap = nn.Parameter(torch.zeros(shape)), wrap

    def forward(self, _):
        return self.wrap(self.weight * 1)


@pytest.mark.parametrize(
    ("net", "targets", "said"),
    [
        (Constant(4, 1), torch.zeros(4, 1), r"outputs of shape \(4, 1\)"),
        (Constant(4, 1), LABELS, r"outputs of shape \(4, 1\)"),
        (Constant(4), LABELS, r"outputs of shape \(4,\)"),
        (Constant(4, 3, wrap=lambda outputs: {"logits": outputs}), LABELS, "the network returns a dict"),
        (Constant(4, 3, wrap=lambda outputs: (outputs, 1)), LABELS, "the network returns a tuple"),
        (Constant(4, 3), torch.zeros(4), "the targets are torch.float32"),
        (Constant(4, 3), [0, 1, 2, 0], "the targets are list"),
        (Constant(4, 3), LABELS[:, None], r"the targets have shape \(4, 1\), the outputs \(4, 3\)"),
        (Constant(4, 3, 2, 2), LABELS, "the targets have shape"),
        (Constant(4, 3), LABELS + 7, "the targets go from 7 to 7, but the network has 3 classes"),
        (Constant(4, 3), LABELS - 1, "the targets go from -1 to -1, but the network has 3 classes"),
    ],
)
def test_cross_entropy_and_accuracy_refuse_models_that_are_not_classifiers(net, targets, said):
    with pytest.raises(PruningError, match=said):
        fit(net, [(IMAGES, targets)], TrainConfig(1))
    with pytest.raises(PruningError, match=said):
        accuracy(net, [(IMAGES, targets)])


def test_labels_may_be_per_pixel_and_of_any_integer_type():
    pixels = LABELS[:, None, None].expand(4, 2, 2)
    for dtype in (torch.uint8, torch.int32, torch.long):
        fit(Constant(4, 3, 2, 2), [(IMAGES, pixels.to(dtype))], TrainConfig(1))
        assert accuracy(Constant(4, 3, 2, 2), [(IMAGES, pixels.to(dtype))]) == 1


def test_the_accuracy_excludes_targets_that_the_loss_ignores():
    weight = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [float("nan"), 0, 0]])
    net = Constant(4, 3)
    net.weight.data = weight
    assert accuracy(net, [(IMAGES, torch.tensor([0, 1, -100, -100]))]) == 0.5
    assert accuracy(net, [(IMAGES, torch.tensor([0, -100, 1, 0]))]) == pytest.approx(2 / 3), "NaN is wrong"
    with pytest.raises(PruningError, match="nothing to evaluate on"):
        accuracy(net, [(IMAGES, LABELS - 100)])


def test_validation_runs_in_eval_mode_without_gradients():
    def score(net):
        return float(not net.training and not torch.is_grad_enabled())

    seen = []
    net = fit(nets.make("lenet"), batches(1), TrainConfig(2), validate=score,
              on_epoch=lambda epoch: seen.append(epoch.score))  # fmt: skip
    assert seen == [1, 1] and not net.training
    with pytest.raises(PruningError, match="validate returned None: return one number"):
        fit(net, batches(1), TrainConfig(1), validate=lambda _: None)


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
        {"optimizer": "adam"},
        {"weight_decay": -1},
        {"schedule": "step"},
        {"warmup": 0},
        {"ema": 1},
    ],
)
def test_settings_are_validated_on_creation(bad):
    with pytest.raises(PruningError, match="expected"):
        TrainConfig(**{"epochs": 1, **bad})


def test_distillation_matches_the_closed_form():
    teacher, student = nets.make("lenet", 1), nets.make("lenet", 2)
    images, labels = batches(1)[0]
    loss = distillation(teacher, weight=0.3, temperature=2.0)(student, images, labels)
    p, q = (net(images).div(2.0).softmax(1) for net in (teacher, student))
    soft = (p * (p / q).log()).sum(1).mean() * 4
    hard = nn.functional.cross_entropy(student(images), labels)
    torch.testing.assert_close(loss, 0.7 * hard + 0.3 * soft)
    assert not student._forward_hooks


def criterion(logits, targets):
    return nn.functional.cross_entropy(logits, targets)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.functional.cross_entropy, criterion])
def test_a_function_of_outputs_and_targets_can_be_the_loss(loss):
    nets_ = [fit(nets.make("lenet"), batches(2), TrainConfig(1), loss=each) for each in (loss, cross_entropy)]
    assert same(*nets_)
    teacher, (images, labels) = nets.make("lenet", 1), batches(1)[0]
    soft = [distillation(teacher, 0.5, loss=each)(nets_[0], images, labels) for each in (loss, cross_entropy)]
    assert torch.equal(*soft)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (None, "loss None is not callable: give a function of"),
        (lambda model, x, y: model(x).sum(1), r"the loss returned \(16,\): a tensor with one element"),
        (lambda model, x, y: 1.0, "the loss returned float"),
        (lambda model, x, y: model(x).mean().detach(), "does not depend on the network"),
    ],
)
def test_an_invalid_loss_is_refused(loss, said):
    with pytest.raises(PruningError, match=said):
        fit(nets.make("lenet"), batches(1), TrainConfig(1), loss=loss)


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


def test_accuracy_takes_the_most_probable_class_of_soft_targets():
    net, (images, labels) = nets.make("lenet"), batches()[0]
    soft = nn.functional.one_hot(labels, 4) * 0.7 + 0.075
    assert accuracy(net, [(images, soft)]) == accuracy(net, [(images, labels)])


def test_a_teacher_with_another_number_of_classes_is_refused():
    teacher = nets.LeNet5((2,), (3,), image_shape=(3, 14, 14), classes=7)
    with pytest.raises(PruningError, match=r"teacher's outputs have shape \(16, 7\)"):
        finetune(nets.make("lenet"), batches(), TrainConfig(1), teacher=teacher)


def test_the_teacher_is_not_trained():
    teacher = nets.make("lenet", 1)
    finetune(nets.make("lenet", 2), batches(), TrainConfig(1), teacher=teacher)
    assert same(teacher, nets.make("lenet", 1))


class Counted(nn.Module):
    """A teacher that counts the examples it sees."""

    def __init__(self):
        super().__init__()
        self.net, self.seen = nets.make("lenet", 1), 0

    def forward(self, images):
        self.seen += len(images)
        return self.net(images)


def distilled(data, epochs=3):
    teacher, net = Counted(), nets.make("lenet", 2)
    torch.manual_seed(0)
    finetune(net, data, TrainConfig(epochs), teacher=teacher, distill=0.7, temperature=2.0)
    return net, teacher.seen


class EveryBatch:
    """Batches that do not declare whether they are the same in every epoch."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def test_the_teacher_runs_once_on_inputs_that_repeat():
    given = batches()
    examples = sum(len(labels) for _, labels in given)
    (net, seen), (plain, every) = distilled(given), distilled(EveryBatch(given))
    first = len(given[0][1])
    assert (seen, every) == (first + examples, 3 * examples) and same(net, plain)


def test_the_teacher_runs_once_on_images_in_memory_unless_they_are_augmented():
    images, labels = torch.randint(256, (40, 3, 14, 14), dtype=torch.uint8), torch.arange(40) % 4
    options = {"batch_size": 16, "mean": 0.4, "std": 0.2, "shuffle": True, "drop_last": True}
    source = Batches(images, labels, **options)
    (net, seen), (plain, every) = distilled(source), distilled(EveryBatch(source))
    assert seen == 16 + len(images) and every == 3 * 16 * len(source)
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    changed = Batches(images, labels, **options, augment=lambda batch: batch)
    assert distilled(changed)[1] == 16 + every


def test_logits_that_take_more_memory_than_the_inputs_are_not_stored():
    net, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(3, 4)) for _ in range(2))
    data = [(torch.rand(5, 3), torch.randint(4, (5,)))]
    kept, _ = with_teacher(teacher, data, 0.5, 2.0)
    assert kept is data
    finetune(net, data, TrainConfig(1), teacher=teacher)


def test_cross_entropy_takes_probabilities_as_targets():
    net, (inputs, targets) = nn.Sequential(nn.Flatten(), nn.Linear(588, 4)), batches()[0]
    shares = nn.functional.one_hot(targets, 4).float()
    torch.testing.assert_close(cross_entropy(net, inputs, shares), cross_entropy(net, inputs, targets))
    with pytest.raises(PruningError, match="integer targets"):
        cross_entropy(net, inputs, shares[:, :3])
    with pytest.raises(PruningError, match="integer targets"):
        cross_entropy(net, inputs, shares + shares.roll(1, 1))  # several classes at once
