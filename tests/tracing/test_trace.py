"""`trace`: which layers are pruned together, which are skipped, and for which reason."""

from __future__ import annotations

import copy

import nets
import pytest
import torch
from torch import nn
from torch.nn.utils.prune import l1_unstructured

from pruning import Budget, PruningError, doctor, load, prune, save, trace

pytestmark = pytest.mark.quick


def test_the_output_layer_is_skipped_with_the_reason():
    traced = trace(nets.make("lenet"), nets.images())
    assert "output" in traced.skipped["classifier.fc3"]


def test_features_that_are_also_an_output_are_skipped():
    class TwoOutputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 2, 1)

        def forward(self, x):
            features = self.a(x)
            return {"features": features, "logits": self.c(torch.relu(self.b(features)))}

    traced = trace(TwoOutputs(), nets.images())
    assert set(traced.groups) == {"b"} and "output" in traced.skipped["a"]
    step = prune(TwoOutputs(), nets.images(), Budget(params="80%"), score="l2")
    assert step.plan.widths["b"] < 5


def test_frozen_and_ignored_layers_are_skipped_with_the_reason():
    net = nets.make("lenet")
    net.features.conv2.weight.requires_grad_(False)
    traced = trace(net, nets.images(), ignored=["classifier.fc1"])
    assert set(traced.groups) == {"classifier.fc2"}
    assert "features.conv2.weight is frozen" in traced.skipped["features.conv2"]
    assert "features.conv2.weight is frozen" in traced.skipped["features.conv1"]
    assert "ignored" in traced.skipped["classifier.fc1"]


@pytest.mark.parametrize("ignored", ["classifier.*", nn.Linear])
def test_layers_are_ignored_by_pattern_and_by_type(ignored):
    net = nets.make("lenet")
    assert set(trace(net, nets.images(), [ignored]).groups) == {"features.conv1", "features.conv2"}


def test_layers_are_ignored_by_instance():
    net = nets.make("lenet")
    kept = trace(net, nets.images(), [net.features]).groups
    assert set(kept) == {"classifier.fc1", "classifier.fc2"}


def test_an_ignored_layer_that_does_not_exist_is_refused():
    with pytest.raises(PruningError, match=r"'clasifier\.\*' matches no layer"):
        trace(nets.make("lenet"), nets.images(), ["clasifier.*"])


def test_layers_that_share_a_weight_are_skipped():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    net[2].weight = net[0].weight
    traced = trace(net, torch.randn(2, 4))
    assert "same tensor" in traced.skipped["0"] and "same tensor" in traced.skipped["2"]
    assert traced.groups == {}


def test_a_layer_before_a_view_of_constant_size_is_skipped_and_the_rest_is_pruned():
    class Rigid(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.conv = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 1)
            self.head = nn.Linear(4 * 14 * 14, 2)

        def forward(self, x):
            return self.head(self.conv(torch.relu(self.first(x))).view(-1, 4 * 14 * 14))

    net = Rigid()
    before = copy.deepcopy(net.state_dict())
    traced = trace(net, nets.images())
    assert set(traced.groups) == {"first"}
    assert "tied to its width" in traced.skipped["conv"] and "invalid for input" in traced.skipped["conv"]
    step = prune(net, nets.images(), Budget(macs="70%"), score="l2")
    assert step.model.first.out_channels < 5 and step.model.conv.out_channels == 4
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_a_model_without_prunable_groups_is_refused_with_the_reason():
    with pytest.raises(PruningError, match=r"no prunable group.*output"):
        prune(nn.Linear(4, 2), torch.randn(2, 4), Budget(params="50%"), score="l2")


@pytest.mark.filterwarnings("ignore:.*Lazy modules:UserWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.ReLU()), "no layer was found"),
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyConv2d(2, 3)), "0.weight has no values yet"),
        (lambda: torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))), "TorchScript"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), torch.jit.script(nn.Conv2d(4, 2, 3))), "1 is TorchScript"),
    ],
)
def test_a_model_without_narrowable_layers_is_refused_with_the_reason(make, message):
    with pytest.raises(PruningError, match=message):
        prune(make(), nets.images(), Budget(params="50%"), score="l2")


def test_a_batch_of_no_examples_is_refused():
    with pytest.raises(PruningError, match="batch of no examples"):
        trace(nets.make("lenet"), nets.images(0))


def test_a_model_that_does_not_run_on_the_inputs_is_refused():
    with pytest.raises(PruningError, match="does not run on the example inputs"):
        trace(nets.make("lenet"), torch.randn(2, 1, 14, 14))


def test_a_layer_whose_weight_hooks_compute_is_skipped():
    masked = l1_unstructured(nn.Conv2d(3, 8, 3), "weight", 0.5)
    net = nn.Sequential(masked, nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)).eval()
    step = prune(net, nets.images(), Budget(params="70%"), score="l2")
    assert set(step.plan.keep) == {"2"} and "by code or hooks" in step.trace.skipped["0"]


@pytest.mark.slow
def test_recurrent_layers_lose_input_channels_and_share_units_with_the_layer_of_their_initial_state():
    class Starts(nn.Module):
        """A layer that computes an initial state can be narrowed, one that feeds a custom RNN cannot."""

        def __init__(self):
            super().__init__()
            self.first, self.state, self.second = nn.Linear(3, 8), nn.Linear(3, 5), nn.Linear(5, 6)
            self.read, self.last = nn.GRU(8, 5), More(6, 4)

        def forward(self, x):
            x = x.flatten(2).permute(2, 0, 1)
            read, _ = self.read(torch.relu(self.first(x)), torch.relu(self.state(x[:1])))
            return self.last(torch.relu(self.second(read)))[0]

    class More(nn.RNN):
        def forward(self, x):
            return super().forward(x * x.mean())

    traced = trace(Starts(), nets.images())
    assert {(m.layer, m.side) for m in traced.groups["first"].members} == {("first", "out"), ("read", "in")}
    assert {m.layer for m in traced.groups["state"].members} == {"state", "read", "second"}
    assert "code of its own" in traced.skipped["last"]
    step = prune(Starts(), nets.images(), Budget(channels=3), score="l2", ignored=["second", "state"])
    assert step.model.read.input_size == 3 and step.model.read.weight_ih_l0.shape == (15, 3)


@pytest.mark.parametrize("made", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("score", ["l2", "taylor"])
def test_embeddings_without_max_norm_are_narrowed(made, score, tmp_path):
    class Sentences(nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.words, self.head = made(10, 8, **options), nn.Linear(8, 3)

        def forward(self, x):
            found = self.words(x)
            return self.head(torch.relu(found if found.ndim == 2 else found.mean(1)))

    batches = [(nets.words(), torch.tensor([0, 1]))]
    net = Sentences(sparse=True)
    step = prune(net, nets.words(), Budget(channels=3), score=score, calibration=batches)
    assert step.model.words.embedding_dim == 3 and step.difference < 1e-5
    save(tmp_path / "small.pth", step.model)
    again = load(tmp_path / "small.pth", Sentences)
    assert torch.equal(again(nets.words()), step.model(nets.words()))
    assert "max_norm" in trace(Sentences(max_norm=1.0), nets.words()).skipped["words"]


def test_layers_that_do_not_run_are_skipped_with_the_reason():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.heads = nn.Conv2d(3, 8, 3), nn.ModuleList(nn.Linear(8, 4) for _ in range(2))
            self.memory = nn.LSTM(8, 8)

        def forward(self, x, task=0):
            return self.heads[task](torch.relu(self.stem(x)).mean((2, 3)))

    skipped = trace(Heads(), (nets.images(), 1)).skipped
    assert "does not run on the example inputs" in skipped["heads.0"]
    assert "output" in skipped["heads.1"] and "does not run" in skipped["memory"]
    assert not [
        why for why in trace(nets.make("attention"), nets.images()).skipped.values() if "not run" in why
    ]


class Standardized(nn.Conv2d):
    """Weight standardization (Qiao et al., arXiv 1903.10520): each row depends on all of its inputs."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class Padded(nn.Conv2d):
    """A layer with its own code, which does not mix channels."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


def test_channels_mixed_by_a_layers_own_code_are_skipped_and_the_rest_is_pruned():
    net = nn.Sequential(
        Padded(3, 8, 3), nn.ReLU(), Padded(8, 8, 3), nn.ReLU(),
        Standardized(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 2),
    )  # fmt: skip
    traced = trace(net, nets.images())
    assert set(traced.groups) == {"0", "4", "6"}
    assert "4 (Standardized) has code of its own" in traced.skipped["2"]
    step = prune(net, nets.images(), Budget(params="70%"), score="l2", ranking="group")
    assert step.model[2].out_channels == 8 and step.model[0].out_channels < 8 > 6 > step.model[4].out_channels


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", ["script", "trace"])
@pytest.mark.parametrize("inner", [nn.Conv2d(8, 8, 1), nn.Sequential(nn.Flatten(), nn.Linear(8 * 16, 8))])
def test_torchscript_that_is_ignored_keeps_its_channels(kind, inner):
    inner = inner.eval()
    scripted = (
        torch.jit.script(inner) if kind == "script" else torch.jit.trace(inner, torch.randn(2, 8, 4, 4))
    )
    last = nn.Conv2d(8, 2, 1) if isinstance(inner, nn.Conv2d) else nn.Linear(8, 2)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(), scripted, last]
    net, images = nn.Sequential(*layers).eval(), torch.randn(2, 3, 8, 8)
    with pytest.raises(PruningError, match=r"4 is TorchScript.*or list 4 as ignored"):
        trace(net, images)
    step = prune(net, images, Budget(macs="60%"), score="l2", ignored=["4"])
    assert step.plan.widths.keys() == {"0"} and step.difference < 1e-4
    assert doctor(net, images, ["4"]).trial == ""
