"""Distillation: its loss, and when the teacher runs."""

from __future__ import annotations

import nets
import pytest
import torch
from nets import batches, same
from torch import nn

from pruning import PruningError, finetune
from pruning.training import TrainConfig
from pruning.training.distillation import distillation, with_teacher
from pruning.training.image_batches import ImageBatches

pytestmark = pytest.mark.numerics


def test_distillation_matches_the_closed_form():
    teacher, student = nets.make("lenet", 1), nets.make("lenet", 2)
    images, labels = batches(1)[0]
    loss = distillation(teacher, weight=0.3, temperature=2.0)(student, images, labels)
    p, q = (net(images).div(2.0).softmax(1) for net in (teacher, student))
    soft = (p * (p / q).log()).sum(1).mean() * 4
    hard = nn.functional.cross_entropy(student(images), labels)
    torch.testing.assert_close(loss, 0.7 * hard + 0.3 * soft)
    assert not student._forward_hooks


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
    source = ImageBatches(images, labels, **options)
    (net, seen), (plain, every) = distilled(source), distilled(EveryBatch(source))
    assert seen == 16 + len(images) and every == 3 * 16 * len(source)
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    changed = ImageBatches(images, labels, **options, augment=lambda batch: batch)
    assert distilled(changed)[1] == 16 + every


def test_logits_that_take_more_memory_than_the_inputs_are_not_stored():
    net, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(3, 4)) for _ in range(2))
    data = [(torch.rand(5, 3), torch.randint(4, (5,)))]
    kept, _ = with_teacher(teacher, data, 0.5, 2.0)
    assert kept is data
    finetune(net, data, TrainConfig(1), teacher=teacher)
