"""Distillation of any output and of features, and losses of models that return objects with logits."""

from __future__ import annotations

import collections
import dataclasses
import io

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy as torch_cross_entropy

from pruning import Budget, PruningError, SlimConfig, finetune, sensitivity, slim
from pruning.stages import PruneConfig
from pruning.training import TrainConfig, accuracy, cross_entropy, fit
from pruning.training.distillation import distillation, with_teacher
from pruning.training.output_comparison import relative_error, soft_loss

pytestmark = pytest.mark.numerics

INPUTS = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(8) % 3


@dataclasses.dataclass
class Output:
    """What a classifier of transformers returns."""

    loss: torch.Tensor | None
    logits: torch.Tensor
    hidden: torch.Tensor


Pair = collections.namedtuple("Pair", "logits aux_logits")
KINDS = {
    "dataclass": lambda logits, hidden: Output(None, logits, hidden),
    "mapping": lambda logits, hidden: collections.OrderedDict(logits=logits, hidden=hidden),
    "namedtuple": lambda logits, hidden: Pair(logits, hidden),
}


class Net(nn.Module):
    """A classifier whose output has one of the kinds."""

    def __init__(self, seed=0, kind=None, width=8):
        super().__init__()
        torch.manual_seed(seed)
        self.hidden, self.head, self.kind = nn.Linear(4, width), nn.Linear(width, 3), kind

    def forward(self, x):
        hidden = torch.tanh(self.hidden(x))
        return KINDS[self.kind](self.head(hidden), hidden) if self.kind else self.head(hidden)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_that_hold_logits_train_distill_and_validate_as_logits(kind):
    batches, nets = [(INPUTS, TARGETS)], []
    for each in (None, kind):
        net = Net(0, each)
        finetune(net, batches, TrainConfig(2, 0.1, label_smoothing=0.1), teacher=Net(1, each))
        nets.append((net, accuracy(net, batches)))
    (plain, score), (held, other) = nets
    assert same(plain, held) and score == other


def test_sensitivity_is_measured_on_outputs_that_hold_logits():
    batches = [(INPUTS, TARGETS)] * 2

    class Logits(Net):
        def forward(self, x):
            return KINDS["mapping"](super().forward(x), None)

    found = [sensitivity(net, INPUTS[:2], batches) for net in (Net(0), Logits(0))]
    assert found[0].to_json() == found[1].to_json()


def test_the_loss_that_an_output_holds_is_the_default_loss():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net(0)

        def forward(self, x, labels=None):
            logits = self.net(x)
            return Output(None if labels is None else 2 * logits.square().mean(), logits, logits)

    model = Own()
    given = {"x": INPUTS, "labels": TARGETS}
    assert cross_entropy(model, given, TARGETS) == 2 * model.net(INPUTS).square().mean()
    assert cross_entropy(model, {"x": INPUTS}, TARGETS) == torch_cross_entropy(model.net(INPUTS), TARGETS)
    smooth = torch_cross_entropy(model.net(INPUTS), TARGETS, label_smoothing=0.1)
    assert cross_entropy(model, given, TARGETS, 0.1) == smooth


def test_logits_of_tokens_have_their_classes_last():
    class Tokens(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return {"logits": self.head(x)}

    x, y = torch.randn(2, 5, 4), torch.arange(10).view(2, 5) % 3
    model, teacher = Tokens(0), Tokens(1)
    logits, theirs = model(x)["logits"], teacher(x)["logits"]
    assert torch.equal(cross_entropy(model, x, y), torch_cross_entropy(logits.movedim(-1, 1), y))
    assert accuracy(model, [(x, y)]) == float((logits.argmax(-1) == y).float().mean())
    p, q = theirs.softmax(-1), logits.softmax(-1)
    kl = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(distillation(teacher, 1.0, 1.0)(model, x, y), kl)


def test_dense_maps_are_compared_by_the_mean_over_positions():
    x, y = torch.randn(2, 4, 5, 5), torch.randint(3, (2, 5, 5))
    student, teacher = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1)
    p, q = teacher(x).div(2).softmax(1), student(x).div(2).softmax(1)
    kl = 4 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(distillation(teacher, 1.0, 2.0)(student, x, y), kl)


def test_embeddings_are_compared_by_their_values():
    student, teacher = nn.Linear(4, 6), nn.Linear(4, 6)
    target = torch.randn(8, 6)
    loss = distillation(teacher, 0.25, loss=nn.MSELoss())
    mine, theirs = student(INPUTS), teacher(INPUTS)
    expected = 0.75 * nn.functional.mse_loss(mine, target) + 0.25 * (mine - theirs).square().mean() / (
        theirs.square().mean()
    )
    torch.testing.assert_close(loss(student, INPUTS, target), expected)
    with_labels = soft_loss(mine, theirs, torch.arange(8) % 6, 1.0)
    assert with_labels == soft_loss(mine, theirs, None, 1.0, "logits") != soft_loss(mine, theirs, None, 1.0)


def test_a_container_without_logits_is_compared_as_the_mean_of_its_tensors():
    mine = {"a": torch.randn(8, 3), "b": [torch.randn(8, 5, 5), torch.arange(8)]}
    theirs = {"a": torch.randn(8, 3), "b": [torch.randn(8, 5, 5), torch.arange(8)]}
    found = soft_loss(mine, theirs, None, 4.0)
    terms = relative_error(mine["a"], theirs["a"]), relative_error(mine["b"][0], theirs["b"][0])
    torch.testing.assert_close(found, (terms[0] + terms[1]) / 2)
    with pytest.raises(PruningError, match=r"the student returns a, b\.0, the teacher a"):
        soft_loss(mine, {"a": theirs["a"]}, None, 4.0)
    with pytest.raises(PruningError, match="without floating-point tensors"):
        soft_loss(mine, torch.arange(3).tolist(), None, 4.0)
    with pytest.raises(PruningError, match=r"teacher's outputs 'a' have shape \(8, 4\)"):
        soft_loss(mine, {**theirs, "a": torch.randn(8, 4)}, None, 4.0)


def test_outputs_of_a_teacher_that_are_stored_give_the_same_training():
    class Every:
        def __len__(self):
            return 1

        def __iter__(self):
            return iter([(wide, TARGETS)])

    wide, trained = torch.cat([INPUTS] * 4, 1), []
    for batches in ([(wide, TARGETS)], Every()):
        torch.manual_seed(0)
        net, teacher = (nn.Sequential(nn.Linear(16, 4), Net(i, "mapping")) for i in (0, 1))
        batches, loss = with_teacher(teacher, batches, 0.5, 2.0)
        assert (loss.teacher is None) == isinstance(batches, list)
        trained.append(fit(net, batches, TrainConfig(2, 0.1), loss=loss))
    assert same(*trained)


def test_features_of_other_widths_are_projected_and_resume_exactly():
    teacher, batches = Net(1, width=12), [(INPUTS, TARGETS)] * 3

    def train(resume=None):
        net, states = Net(0), []

        def keep(epoch):
            buffer = io.BytesIO()
            torch.save(epoch.state(), buffer)
            buffer.seek(0)
            states.append(torch.load(buffer, weights_only=True))

        torch.manual_seed(5 if resume is None else 6)
        finetune(net, batches, TrainConfig(3, 0.05, "adamw"), teacher=teacher, distill=0.9,
                 features=["hidden"], on_epoch=keep, resume=resume)  # fmt: skip
        return net, states

    whole, states = train()
    resumed, later = train(states[0])
    assert same(whole, resumed) and torch.equal(later[-1]["learned"]["0.weight"],
                                                states[-1]["learned"]["0.weight"])  # fmt: skip
    assert not torch.equal(states[0]["learned"]["0.weight"], states[1]["learned"]["0.weight"])

    plain = finetune(Net(0), batches, TrainConfig(3, 0.05, "adamw"), teacher=teacher, distill=0.9)
    assert not same(plain, whole)


def test_features_of_equal_shape_need_no_projection():
    teacher, student = Net(1), Net(0)
    loss = distillation(teacher, 0.5, features={"hidden": "hidden"})
    without = distillation(teacher, 0.5)(student, INPUTS, TARGETS)
    added = 0.5 * relative_error(student.hidden(INPUTS), teacher.hidden(INPUTS))
    torch.testing.assert_close(loss(student, INPUTS, TARGETS), without + added)
    assert not student.hidden._forward_hooks and not teacher.hidden._forward_hooks


def test_features_that_do_not_exist_or_do_not_fit_are_refused():
    batches = [(INPUTS, TARGETS)]
    with pytest.raises(PruningError, match="the teacher has no such module; did you mean 'hidden'"):
        distillation(Net(1), 0.5, features=["hiden"])
    with pytest.raises(PruningError, match="the model has no such module; did you mean 'hidden'"):
        fit(Net(), batches, TrainConfig(1), loss=distillation(Net(1), 0.5, features=["hiden=hidden"]))
    other = nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(PruningError, match=r"shape \(8, 8\), the teacher's '0' \(8, 2, 2\)"):
        fit(Net(), batches, TrainConfig(1), loss=distillation(other, 0.5, features=["hidden=0"]))
    with pytest.raises(PruningError, match="trained with the model"):
        distillation(Net(1, width=9), 0.5, features=["hidden"])(Net(), INPUTS, TARGETS)
    with pytest.raises(PruningError, match="distill is 0"):
        SlimConfig(Budget(macs="50%"), distill_features=["hidden"])
    once = TrainConfig(1, compile=True)
    with pytest.raises(PruningError, match="compile=False"):
        SlimConfig(Budget(macs="50%"), finetune=once, distill=0.5, distill_features=["hidden"])


def test_slim_compares_features_of_narrower_networks():
    net, once = Net(0), TrainConfig(1, 0.05)
    config = SlimConfig(
        Budget(channels=4), once, PruneConfig(2, once), once, strength=0.0,
        distill=0.5, distill_features=["hidden"],
    )  # fmt: skip
    batches = [(INPUTS, TARGETS)]
    result = slim(net, batches, config=config, validate=batches, log=lambda line: None)
    assert result.model.hidden.out_features == 4
