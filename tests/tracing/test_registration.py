"""Layers and operators that users register are pruned exactly."""

from __future__ import annotations

import re
from dataclasses import replace

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pruning import Budget, Plan, PruningError, load, prune, save, trace
from pruning.graph.layers import Rule, register_layer
from pruning.load_pruned import load_pruned
from pruning.planning import CostModel, count, uncounted
from pruning.surgery.apply import apply, channel_constants
from pruning.surgery.verify import verify
from pruning.tracing.operators import pointwise, register_operator, unlabeled

pytestmark = pytest.mark.quick


class Scaled(nn.Module):
    """A linear layer with a transposed weight, a scale for each channel and a temperature for all."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.n_in, self.n_out = n_in, n_out
        self.kernel = nn.Parameter(torch.randn(n_in, n_out) / n_in**0.5)
        self.scale, self.shift = nn.Parameter(torch.rand(n_out) + 0.5), nn.Parameter(torch.randn(n_out))
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return F.linear(x, self.kernel.T) * self.scale / self.temperature + self.shift


class Conv(nn.Module):
    """A convolution without width attributes, which adds its bias itself."""

    def __init__(self, into, out, size):
        super().__init__()
        self.kernel_size = size
        self.filters = nn.Parameter(torch.randn(out, into, size, size) / (into * size**2) ** 0.5)
        self.offset = nn.Parameter(torch.randn(out))

    def forward(self, x):
        return F.conv2d(x, self.filters) + self.offset[:, None, None]


class RootMeanSquare(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * self.gain


class Gain(nn.Module):
    """Multiply each channel of an image by a buffer's entry."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("factors", torch.rand(width) + 0.5)

    def forward(self, x):
        return x * self.factors[:, None, None]


class Table(nn.Module):
    def __init__(self, rows, width):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(width, rows))

    def forward(self, x):
        return self.rows.T[x]


RULES = {
    Scaled: Rule(
        out={"kernel": 1, "scale": 0, "shift": 0}, into={"kernel": 0}, out_count="n_out", in_count="n_in"
    ),
    Conv: Rule(out={"filters": 0, "offset": 0}, into={"filters": 1}, bias="offset"),
    RootMeanSquare: Rule(out={"gain": 0}, kind="norm", dim=-1),
    Gain: Rule(out={"factors": 0}, kind="channelwise"),
    Table: Rule(out={"rows": 0}, kind="embedding"),
}


@pytest.fixture
def registered():
    handles = [register_layer(kind, rule) for kind, rule in RULES.items()]
    yield
    for handle in handles:
        handle.remove()


class Linears(nn.Sequential):
    def __init__(self):
        super().__init__(Scaled(5, 8), RootMeanSquare(8), nn.ReLU(), Scaled(8, 6), nn.ReLU(), nn.Linear(6, 3))

    inputs = torch.randn(4, 5)


class Images(nn.Sequential):
    def __init__(self):
        middle = Conv(3, 8, 3), Gain(8), nn.BatchNorm2d(8), nn.ReLU(), Conv(8, 6, 1)
        super().__init__(*middle, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Scaled(6, 4))

    inputs = torch.randn(4, 3, 9, 9)


class Words(nn.Sequential):
    def __init__(self):
        super().__init__(Table(10, 8), nn.ReLU(), Scaled(8, 4))

    inputs = nets.words()


def made(kind):
    torch.manual_seed(0)
    return kind().eval()


@pytest.mark.parametrize("kind", [Linears, Images, Words])
@pytest.mark.parametrize("score", ["l2", "taylor"])
def test_a_registered_layer_is_pruned_exactly_and_reloads(kind, score, registered, tmp_path):
    net, inputs = made(kind), kind.inputs
    targets = torch.zeros(net(inputs).shape[:-1], dtype=torch.long)
    loss = lambda model, x, y: F.cross_entropy(model(x).flatten(0, -2), y.flatten())  # noqa: E731
    step = prune(net, inputs, Budget(channels="60%"), score=score, calibration=[(inputs, targets)], loss=loss)
    assert all(width < step.trace.groups[name].channels for name, width in step.plan.widths.items())
    assert step.difference < 1e-5 and set(step.trace.skipped) == {str(len(net) - 1)}
    small = step.model.eval()
    assert verify(net, apply(net, step.trace, step.plan), step.trace, step.plan, inputs) < 1e-5
    counted = count(small, inputs)
    cost = CostModel(small, trace(small, inputs))({})
    assert (counted.params, counted.macs) == (cost.params, cost.macs)
    assert cost.params == step.after.params and cost.macs == step.after.macs
    save(tmp_path / "small.pth", small)
    for loader in (load, load_pruned):
        assert torch.equal(loader(tmp_path / "small.pth", kind)(inputs), small(inputs))


def test_a_checkpoint_loads_and_is_saved_again_without_the_registration(tmp_path):
    net = made(Linears)
    with register_layer(Scaled, RULES[Scaled]), register_layer(RootMeanSquare, RULES[RootMeanSquare]):
        small = prune(net, Linears.inputs, Budget(channels="60%"), score="l2").model.eval()
    save(tmp_path / "small.pth", small)
    for _ in range(2):
        again = load(tmp_path / "small.pth", Linears)
        assert again[0].n_out == small[0].n_out < 8 and again[3].n_in == small[0].n_out
        assert torch.equal(again(Linears.inputs), small(Linears.inputs))
        save(tmp_path / "small.pth", again)


def test_constants_of_removed_channels_are_added_to_the_bias_that_a_rule_names(registered):
    net = made(Images)
    nn.init.zeros_(net[2].weight[:3])
    nn.init.ones_(net[2].bias)
    traced = trace(net, Images.inputs)
    plan = Plan({"0": (3, 4, 5, 6, 7)})
    constants = channel_constants(net, traced, [Images.inputs], exact_only=True)
    small = apply(net, traced, plan, constants)
    torch.testing.assert_close(small(Images.inputs), net(Images.inputs))
    assert verify(net, small, traced, plan, Images.inputs, constants) < 1e-5


def test_a_registration_ends_with_its_block_and_applies_to_subclasses():
    class More(Scaled):
        pass

    net = nn.Sequential(More(5, 8), nn.ReLU(), Scaled(8, 3))
    inputs = torch.randn(2, 5)

    def outside_layers():
        return {m.layer for m in trace(net, inputs).groups["0"].side("self")}

    with register_layer(Scaled, RULES[Scaled]):
        assert outside_layers() == set() and not uncounted(net)
    assert outside_layers() == {"0.scale", "0.shift"}, "without the rule, only the product is recognized"


def test_channels_of_a_layer_whose_rule_contradicts_its_code_are_not_pruned():
    class Centered(Scaled):
        def forward(self, x):
            return super().forward(x - x.mean(-1, keepdim=True))

    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), Centered(8, 3))
    with register_layer(Scaled, RULES[Scaled]):
        assert "2 (Centered) has code of its own" in trace(net, torch.randn(2, 5)).skipped["0"]


@pytest.mark.parametrize(
    ("kind", "rule", "message"),
    [
        (Scaled(2, 2), RULES[Scaled], "give a subclass of nn.Module"),
        (int, RULES[Scaled], "give a subclass of nn.Module"),
        (Scaled, {"kernel": 1}, "is a dict; give a Rule"),
        (Scaled, Rule({}), "name the tensors that hold its output channels"),
        (Scaled, Rule({"scale": 0}, {"kernel": 0}), "name the weight of a weighted layer in both"),
        (Gain, Rule({"factors": 0}, {"factors": 0}, kind="norm"), "leave out into"),
        (Gain, Rule({"factors": 0}, kind="scaling"), "expected 'weighted'"),
        (Gain, Rule({"factors": 0}, kind="recurrent"), "torch's own layers"),
        (Gain, Rule({"factors": 0}, kind="channelwise", dim=1), "count it from the end"),
        (Scaled, Rule({"kernel": 1}, {"kernel": 0}, spans=(1, 2)), "leave them out"),
        (nn.Linear, RULES[Scaled], "Linear has a rule already; pass replace=True"),
    ],
)
def test_invalid_layer_registrations_are_refused(kind, rule, message):
    with pytest.raises(PruningError, match=message):
        register_layer(kind, rule)


def test_registering_a_type_again_requires_replace():
    with register_layer(Scaled, RULES[Conv]):
        with pytest.raises(PruningError, match="Scaled has a rule already; pass replace=True"):
            register_layer(Scaled, RULES[Scaled])
        with register_layer(Scaled, RULES[Scaled], replace=True):
            assert trace(made(Words), Words.inputs).skipped


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule({"kernal": 1}, {"kernal": 0}), r"layer '0'\) names the tensor 'kernal'; the layer has kernel"),
        (
            Rule({"kernel": 1}, {"kernel": 0}, "width"),
            "names the attribute 'width', which the layer does not",
        ),
        (Rule({"kernel": 1}, {"kernel": 0}, "kernel"), "names 'kernel', a Parameter; expected a number"),
        (Rule({"kernel": 2}, {"kernel": 0}), r"dimension 2 of 'kernel', which is a tensor of shape \(5, 8\)"),
        (Rule({"kernel": 0}, {"kernel": 1}, "n_out"), "says that 'kernel' has 8 channels along dimension 0"),
    ],
)
def test_a_rule_that_does_not_match_the_layer_is_refused_by_trace(rule, message):
    with register_layer(Scaled, rule), pytest.raises(PruningError, match=f"the rule for Scaled.*{message}"):
        trace(made(Linears), Linears.inputs)


def test_a_registered_layer_that_contains_another_is_refused():
    class Holder(Scaled):
        def __init__(self):
            super().__init__(5, 8)
            self.norm = nn.BatchNorm1d(8)

    with (
        register_layer(Scaled, RULES[Scaled]),
        pytest.raises(PruningError, match=r"holds another, 'norm' \(BatchNorm1d\)"),
    ):
        trace(nn.Sequential(Holder(), nn.Linear(8, 3)), torch.randn(2, 5))


@torch.library.custom_op("pruning_tests::mix", mutates_args=())
def mix(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x * y.sigmoid()


@torch.library.custom_op("pruning_tests::swap_halves", mutates_args=())
def swap_halves(x: torch.Tensor) -> torch.Tensor:
    return torch.cat(x.chunk(2, 1)[::-1], 1)


mix.register_fake(lambda x, y: torch.empty_like(x))
swap_halves.register_fake(lambda x: torch.empty_like(x))


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.head(swap_halves(mix(self.a(x), self.b(x))))


def exchanged(labels, operation):
    found = labels.of(operation.operands[0])
    left, right = found.chunk(2, 1)
    labels.tie(left, right, "halves of one tensor keep as many channels each")
    labels.put(operation.output, torch.cat([right, left], 1))


def test_a_registered_operator_is_followed_and_pruned_exactly():
    net, images = made(Mixed), nets.images()
    assert "uses it in pruning_tests::mix" in trace(net, images).skipped["a"]
    with register_operator("pruning_tests::mix", pointwise):
        assert "uses it in pruning_tests::swap_halves" in trace(net, images).skipped["a"]
        with register_operator("pruning_tests::swap_halves", exchanged):
            step = prune(net, images, Budget(channels=2), score="l2")
    assert step.plan.widths == {"a": 2} and step.difference < 1e-5
    assert step.model.a.out_channels == step.model.b.out_channels == 4
    assert "a" in trace(net, images).skipped


@pytest.mark.parametrize(
    ("name", "rule", "message"),
    [
        ("relu", pointwise, "'relu' has a rule already; pass replace=True"),
        ("aten::cat", pointwise, "'cat' has a rule already; pass replace=True"),
        ("pruning_tests::mix", "pointwise", "is a str; give a function"),
        (mix, pointwise, "not an operator name"),
        ("two words", pointwise, "not an operator name"),
        ("pruning_tests::mixx", pointwise, "no operator .*did you mean pruning_tests::mix"),
        ("nowhere::mix", pointwise, "no operator 'nowhere::mix'"),
    ],
)
def test_an_operator_that_cannot_be_registered_is_refused(name, rule, message):
    with pytest.raises(PruningError, match=message):
        register_operator(name, rule)


def test_an_error_in_a_registered_rule_is_not_attributed_to_the_model():
    def wrong(labels, operation):
        raise KeyError("mistyped")

    with (
        register_operator("relu", wrong, replace=True),
        pytest.raises(PruningError, match=r"could not be followed: KeyError.*error in a registered rule"),
    ):
        trace(nets.make("lenet"), nets.images())


@torch.library.custom_op("registration::turn", mutates_args=())
def turn(x: torch.Tensor) -> torch.Tensor:
    return x.roll(1, 1)


turn.register_fake(torch.empty_like)


@torch.library.custom_op("registration::pairs", mutates_args=())
def pairs(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x * 2, x * 3


pairs.register_fake(lambda x: (torch.empty_like(x), torch.empty_like(x)))


class Turned(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(turn(self.first(x)))


def test_a_group_that_fails_the_check_is_left_out_with_the_registered_rule_named():
    def same(labels, operation):
        labels.put(operation.output, labels.of(operation.operands[0]))

    budget = Budget(channels="50%")
    with (
        register_operator("registration::turn", same),
        pytest.raises(PruningError, match="the rule that was registered for registration::turn may be wrong"),
    ):
        prune(Turned(), torch.randn(3, 4), budget, score="l2")


def nothing(labels, operation):
    labels.of(operation.operands[0])


def flat(labels, operation):
    labels.put(operation.output, labels.of(operation.operands[0]).flatten())


def half(labels, operation):
    labels.put(operation.output, labels.of(operation.operands[0])[:, :4])


def real(labels, operation):
    labels.put(operation.output, labels.of(operation.operands[0]).float())


def written(labels, operation):
    labels.put(operation.output, "channels")


def listed(labels, operation):
    labels.put([operation.output], labels.of(operation.operands[0]))


def crossed(labels, operation):
    found = labels.of(operation.operands[0])
    labels.tie(found, found.view(-1, 1), "all of them")
    labels.put(operation.output, found)


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        (nothing, r"its output, of shape \(2, 8\), no labels; call labels.put"),
        (flat, r"labels of shape \(8,\) for its output of shape \(2, 8\); .* \(1 or 2, 1 or 8\)"),
        (half, r"labels of shape \(1, 4\) for its output of shape \(2, 8\)"),
        (real, "labels of type float32 for its output"),
        (written, "gives a str in place of labels"),
        (listed, "puts labels on a list, and not on each tensor of it"),
        (crossed, r"ties labels of shape \(1, 8\) to labels of shape \(8, 1\), which pairs each with all"),
    ],
)
def test_labels_that_do_not_fit_are_the_fault_of_the_registered_rule(rule, told):
    with register_operator("registration::turn", rule):
        reason = trace(Turned(), torch.randn(2, 4)).skipped["first"]
    assert re.search(rf"the rule registered for registration::turn \({rule.__name__}\).*{told}", reason), (
        reason
    )
    assert reason.count("to let it be pruned") == 1 and "register_operator" not in reason


def test_a_reason_that_a_registered_rule_gives_has_the_cure_of_this_rule():
    def mixed(labels, operation):
        labels.fix(labels.of(operation.operands[0]), "turn mixes them")

    with register_operator("registration::turn", mixed):
        reason = trace(Turned(), torch.randn(2, 4)).skipped["first"]
    told = "the rule registered for registration::turn (mixed) says; change this rule to let it be pruned"
    assert reason == f"turn mixes them (as {told})"


def test_a_rule_of_the_toolkit_that_does_not_apply_names_itself():
    class Pairs(Turned):
        def forward(self, x):
            return self.last(pairs(self.first(x))[0])

    with register_operator("registration::pairs", pointwise):  # which is for a single output
        reason = trace(Pairs(), torch.randn(2, 4)).skipped["first"]
    assert "the rule registered for registration::pairs (pointwise) does not apply" in reason
    with register_operator("registration::pairs", unlabeled):  # which says that its output has no channels
        assert "no layer" in trace(Pairs(), torch.randn(2, 4)).skipped["first"]


def test_an_error_in_a_registered_rule_tells_the_rule_and_what_it_was_given():
    told = r"registered rule, the rule registered for registration::turn \(<lambda>\).*: \(1, 8\) of \(3, 8\)"
    with (
        register_operator("registration::turn", lambda labels: None),
        pytest.raises(PruningError, match=told),
    ):
        trace(Turned(), torch.randn(3, 4))


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        (replace(RULES[Scaled], dim=-2), "input of 0 has 5 channels along dimension -2, and its shape is"),
        (replace(RULES[Scaled], dim=-3), "along dimension -3"),
        (Rule({"kernel": 1, "scale": 0, "shift": 0}, kind="norm"), "input of 0 has 8 channels along"),
    ],
)
def test_a_registered_layer_whose_calls_contradict_its_rule_is_named_with_it(rule, told):
    net = nn.Sequential(Scaled(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    with register_layer(Scaled, rule):
        step = prune(net, torch.randn(2, 5), Budget(channels="50%"), score="l2")
    assert (
        "the rule registered for Scaled says" in step.trace.skipped["0"] and told in step.trace.skipped["0"]
    )
    assert step.trace.widths == {"2": 6} and step.model[2].out_features == 3
    counted = count(net, torch.randn(2, 5))
    assert step.before.params == counted.params and (rule.kind == "norm" or step.before.macs == counted.macs)


def test_a_rule_without_a_tensor_of_the_layer_is_named():
    net = nn.Sequential(Scaled(5, 8), nn.ReLU(), Scaled(8, 3))
    with register_layer(Scaled, Rule({"kernel": 1}, {"kernel": 0})):
        reason = trace(net, torch.randn(2, 5)).skipped["0"]
    assert "the rule registered for Scaled names every tensor that holds channels" in reason


def test_a_layer_that_returns_a_tuple_is_told_so():
    class Paired(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.pair = nn.Linear(4, 6), Paired(6, 8)
            self.hidden, self.last = nn.Linear(8, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.last(self.hidden(self.pair(self.first(x))[0]))

    net, inputs = Net(), torch.randn(2, 4)
    traced = trace(net, inputs)
    assert traced.widths == {"hidden": 5}
    assert traced.skipped["first"] == traced.skipped["pair"]
    assert "pair returns a tuple, no tensor; let the layer return one tensor" in traced.skipped["pair"]
    with FlopCounterMode(display=False) as counter:
        net(inputs)
    assert CostModel(net, traced)({}).macs == counter.get_total_flops() / 2 / len(inputs)
