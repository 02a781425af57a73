"""Few-shot recovery: towards the dense network, on inputs without labels, and never worse."""

from __future__ import annotations

from dataclasses import replace

import nets
import pytest
import torch
from nets import same
from torch import nn

from pruning import Budget, PruningError, prune
from pruning.stages import Run
from pruning.stages.few_shot import CONFIG, recover, varied
from pruning.training import TrainConfig, fit
from pruning.utils.modules import eval_mode

pytestmark = pytest.mark.numerics

SHORT = replace(CONFIG, epochs=4, lr=3e-3)


@pytest.fixture(scope="module")
def pruned():
    """A dense network, one that was pruned from it, and batches without labels."""
    torch.manual_seed(0)
    dense, images = nets.make("lenet").eval(), torch.randn(64, 3, 14, 14)
    batches = [(part, None) for part in images.split(16)]
    step = prune(dense, images[:2], Budget(macs="70%"), score="l2", calibration=batches)
    return dense, step.model, batches


def held_out_loss(model, dense, batches):
    """Return the mean divergence from the dense network on the first quarter of each batch, in nats."""
    with torch.no_grad(), eval_mode(model, dense):
        terms = []
        for x, _ in batches:
            p, q = (net(x[: len(x) // 4]).softmax(1) for net in (dense, model))
            terms.append(float((p * (p / q).log()).sum(1).mean()))
    return sum(terms) / len(terms)


def test_a_pruned_network_comes_closer_to_the_dense_one_on_examples_held_out(pruned):
    dense, small, batches = pruned
    kept, buffers = nets.snapshot(small), dict(small.named_buffers())
    torch.manual_seed(1)
    done = recover(small, dense, batches, SHORT)
    assert (done.examples, done.held_out) == (48, 16)
    for found, model in ((done.before, small), (done.after, done.model)):
        assert found == pytest.approx(held_out_loss(model, dense, batches), rel=1e-4)
    assert done.after < 0.9 * done.before
    assert all(torch.equal(value, kept[key]) for key, value in small.state_dict().items())
    for name, value in done.model.named_buffers():  # the statistics of BatchNorm
        assert torch.equal(value, buffers[name])
    assert not done.model.training


def test_the_given_weights_are_kept_if_every_epoch_is_worse(pruned):
    dense, small, batches = pruned
    done = recover(small, dense, batches, replace(SHORT, optimizer="sgd", lr=5.0, epochs=2))
    assert same(done.model, small) and done.after == done.before


def test_labels_are_not_read(pruned):
    dense, small, batches = pruned
    results = []
    for targets in (None, "a label"):
        torch.manual_seed(1)
        given = [(x, targets) for x, _ in batches]
        results.append(recover(small, dense, given, replace(SHORT, epochs=1)).model)
    assert same(*results)


def test_a_resumed_recovery_gives_the_same_weights(pruned, tmp_path):
    dense, small, batches = pruned
    torch.manual_seed(1)
    whole = recover(small, dense, batches, SHORT, run=Run(tmp_path / "whole", {}))

    class Stop(Exception):
        pass

    cut = Run(tmp_path / "cut", {})

    def stop(line, event):
        if event["epoch"] == 3:
            raise Stop

    cut.observe = stop
    torch.manual_seed(1)
    with pytest.raises(Stop):
        recover(small, dense, batches, SHORT, run=cut)
    del cut
    resumed = recover(small, dense, batches, SHORT, run=Run(tmp_path / "cut", {}, resume=True))
    assert same(resumed.model, whole.model) and resumed.after == whole.after


class Values(nn.Module):
    """A network that returns two tensors, of which none are logits."""

    def __init__(self, width):
        super().__init__()
        self.body, self.head = nn.Linear(4, width), nn.Linear(width, 3)

    def forward(self, x):
        y = self.body(x).tanh()
        return {"embedding": self.head(y), "probability": self.head(y).sigmoid()}


def test_networks_without_logits_are_recovered_by_their_values():
    torch.manual_seed(0)
    dense, x = Values(12), torch.randn(64, 4)
    batches = [(part, None) for part in x.split(8)]
    small = prune(dense, x[:2], Budget(channels="50%"), score="l2", check=False).model
    done = recover(small, dense, batches, replace(CONFIG, epochs=10))  # the rate is found
    assert done.after < 0.5 * done.before


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([], "was given 0 examples"),
        ([(torch.randn(3, 3, 14, 14), None)], "was given 3 examples"),
        ([(torch.full((4, 3, 14, 14), torch.nan), None)], "not finite"),
    ],
)
def test_too_few_examples_and_values_that_are_not_finite_are_refused(pruned, batches, said):
    with pytest.raises(PruningError, match=said):
        recover(pruned[1], pruned[0], batches, SHORT)


def test_images_are_mirrored_shifted_and_mixed_and_other_tensors_mixed_only():
    torch.manual_seed(0)
    images = torch.rand(8, 3, 32, 32)
    found = [varied(images) for _ in range(8)]
    assert all(x.shape == images.shape for x in found) and len({float(x.sum()) for x in found}) == 8
    rows = torch.rand(8, 5)
    low, high = rows.amin(0), rows.amax(0)
    seen = [varied(rows) for _ in range(8)]
    assert any(torch.equal(x, rows) for x in seen) and not all(torch.equal(x, rows) for x in seen)
    assert all(((x >= low - 1e-6) & (x <= high + 1e-6)).all() for x in seen)
    tokens = torch.arange(8)
    assert varied(tokens) is tokens


def test_training_in_evaluation_mode_computes_gradients_of_the_network_that_is_validated():
    """One step of plain SGD: weights move along the gradient in eval mode, and dropout leaves nothing out."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.9), nn.Linear(4, 2))
    with torch.no_grad():
        net[1].running_mean.fill_(0.5)
    x, y = torch.randn(6, 3), torch.arange(6) % 2
    nn.functional.cross_entropy(net.eval()(x), y).backward()
    wanted = net[0].weight.detach() - 0.1 * net[0].weight.grad
    config = TrainConfig(1, lr=0.1, momentum=0, schedule="constant", eval_mode=True)
    fit(net, [(x, y)], config)
    torch.testing.assert_close(net[0].weight.detach(), wanted)
    assert torch.equal(net[1].running_mean, torch.full((4,), 0.5))
