"""`verify`: what is compared, and that it finds a wrong surgery."""

from __future__ import annotations

import collections
import copy
import types

import nets
import pytest
import torch
from torch import nn

from pruning import Budget, Plan, PruningError, doctor, prune, trace
from pruning.surgery.apply import apply
from pruning.surgery.batchnorm import recalibrate
from pruning.surgery.verify import _run_masked, rounding_error, verify, with_random_weights
from pruning.utils.compare import TOLERANCE, compare, outputs_of

pytestmark = [pytest.mark.quick, pytest.mark.numerics]


def test_verify_detects_wrong_surgery():
    net, images = nets.make("lenet"), nets.images()
    traced = trace(net, images)
    plan = Plan({"features.conv1": (0, 2)})
    small = apply(net, traced, plan)
    with torch.no_grad():
        small.features.conv1.weight[0, 0, 0, 0] += 1
    with pytest.raises(PruningError, match="not equivalent"):
        verify(net, small, traced, plan, images)


class Slotted:
    __slots__ = ("features", "logits")

    def __init__(self, logits, features):
        self.logits, self.features = logits, features


class Answers(nn.Module):
    """A model that returns an object unknown to torch's pytree."""

    def __init__(self, hold):
        super().__init__()
        self.a, self.b, self.c, self.hold = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 2, 1), hold

    def forward(self, x):
        features = torch.relu(self.a(x))
        return self.hold(self.c(torch.relu(self.b(features))), features)


@pytest.mark.parametrize(
    "hold",
    [
        nets.Answer,
        Slotted,
        lambda logits, features: types.SimpleNamespace(found=[{"a": features}], logits=logits),
        lambda logits, features: collections.UserDict(logits=logits, features=features),
    ],
)
def test_outputs_inside_objects_are_compared(hold):
    net, images = Answers(hold), nets.images()
    traced = trace(net, images)
    assert set(traced.groups) == {"b"} and "output" in traced.skipped["a"]
    plan = Plan({"b": (1, 3)})
    small = apply(net, traced, plan)
    assert verify(net, small, traced, plan, images) <= TOLERANCE
    with torch.no_grad():
        small.a.weight.add_(1)
    with pytest.raises(PruningError, match="not equivalent"):
        verify(net, small, traced, plan, images)


def test_outputs_without_a_tensor_are_refused():
    net = Answers(lambda logits, features: nets.Answer(logits.sum().tolist(), None))
    with pytest.raises(PruningError, match="returns no tensor"):
        prune(net, nets.images(), Budget(params="80%"), score="l2")


def test_complex_outputs_are_compared():
    assert compare([torch.ones(3) * 1j], [torch.zeros(3) * 1j])[1] == 1
    assert compare([torch.ones(3) * 1j], [torch.ones(3) * 1j]) == ("", 0)


def test_infinite_outputs_equal_only_the_same_infinity():
    masked = torch.tensor([1.0, -float("inf")])
    assert compare([masked], [masked.clone()]) == ("", 0)
    assert compare([masked], [-masked])[0] and compare([masked], [torch.zeros(2)])[0]
    assert compare([masked * 0], [masked * 0])[0], "NaN equals nothing"


class Restless(nn.Module):
    """A model that counts its passes, changes its input in place and draws random numbers in eval mode."""

    def __init__(self):
        super().__init__()
        self.a = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 6, 3))
        self.b, self.c, self.d = nn.Conv2d(6, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, batch):
        self.passes += 1
        x = batch.pop("images")
        x -= 0.5
        x = torch.relu(self.b(self.a(x)))
        x = x + self.c(x).sigmoid() * torch.randn_like(x)
        return self.d(nn.functional.dropout(x, 0.5, training=True))


def test_a_model_with_state_and_random_numbers_is_pruned_and_left_unchanged():
    torch.manual_seed(0)
    net, images = Restless().train(), nets.images()
    batch = {"images": images.clone()}
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    calibration = [(({"images": images.clone()},), torch.zeros(2, 10, 10).long())]
    assert not doctor(net, (batch,)).trial
    assert torch.equal(torch.get_rng_state(), state)
    for score, data in (("l2", []), ("taylor", calibration)):
        step = prune(net, (batch,), Budget(macs="70%"), score=score, calibration=data)
        assert step.plan.widths["b"] < 8 and step.model.c.out_channels == step.plan.widths["b"]
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert torch.equal(batch["images"], images) and torch.equal(calibration[0][0][0]["images"], images)
    small = step.model
    with torch.no_grad():
        small.c.weight.zero_()  # the scale of the noise is compared, too
    traced = trace(net, (batch,))
    with pytest.raises(PruningError, match="not equivalent"):
        verify(net, small, traced, step.plan, (batch,))


def test_double_precision_distinguishes_amplified_rounding_from_an_error():
    class Coarse(nn.Module):
        """Rounds to steps of 1/4096 in single precision, a thousandth of its outputs."""

        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 8, 3, bias=False)

        def forward(self, x):
            return self.last(torch.relu(self.first(x))) + 4096 - 4096

    torch.manual_seed(0)
    net, images = Coarse(), torch.randn(8, 3, 32, 32)
    step = prune(net, images, Budget(channels=20), score="l2", check=False)
    small = outputs_of(step.model, images)
    assert compare(_run_masked(net, step.trace, step.plan, images, {}), small)[1] > TOLERANCE
    assert verify(net, step.model, step.trace, step.plan, images) < 1e-9
    with torch.no_grad():
        step.model.last.weight[0, 0] += 0.01
    with pytest.raises(PruningError, match="outputs differ"):
        verify(net, step.model, step.trace, step.plan, images)


@pytest.mark.parametrize("depth", [4, 24])
def test_random_weights_keep_one_example_in_range(depth):
    """Statistics of BatchNorm come from the positions of the only example, so that depth does not add up."""
    blocks = [
        layer for _ in range(depth) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    ]
    net = nn.Sequential(nn.Conv2d(3, 8, 3), *blocks)
    images = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = with_random_weights(net, images)(images)
    assert 0.1 < outputs.std() < 10
    assert rounding_error(net, images) < 1e-5


def test_statistics_of_one_example_need_several_positions():
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3)).eval()
    recalibrate(net, [torch.ones(1, 3, 4, 4) * 7], one_example=True)
    assert torch.equal(net[1].running_mean, torch.zeros(3)), "one position has no variance"
