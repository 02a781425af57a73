"""Losses and accuracy: what they compute, and the models and targets that they reject."""

from __future__ import annotations

import nets
import pytest
import torch
from nets import batches, same
from torch import nn

from pruning import PruningError
from pruning.training import TrainConfig, accuracy, cross_entropy, fit
from pruning.training.distillation import distillation

pytestmark = pytest.mark.numerics

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
        (Constant(4, 3, wrap=lambda outputs: {"scores": outputs}), LABELS, "the network returns a dict"),
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


def test_accuracy_takes_the_most_probable_class_of_soft_targets():
    net, (images, labels) = nets.make("lenet"), batches()[0]
    soft = nn.functional.one_hot(labels, 4) * 0.7 + 0.075
    assert accuracy(net, [(images, soft)]) == accuracy(net, [(images, labels)])


def test_cross_entropy_takes_probabilities_as_targets():
    net, (inputs, targets) = nn.Sequential(nn.Flatten(), nn.Linear(588, 4)), batches()[0]
    shares = nn.functional.one_hot(targets, 4).float()
    torch.testing.assert_close(cross_entropy(net, inputs, shares), cross_entropy(net, inputs, targets))
    with pytest.raises(PruningError, match="integer targets"):
        cross_entropy(net, inputs, shares[:, :3])
    with pytest.raises(PruningError, match="integer targets"):
        cross_entropy(net, inputs, shares + shares.roll(1, 1))  # several classes at once
