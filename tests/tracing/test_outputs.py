"""Which outputs of a model count: those keep their size and values, others may change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import nn

from pruning import Budget, PruningError, doctor, prune, trace
from pruning.utils.outputs import counted, named_outputs

pytestmark = pytest.mark.quick

IMAGES = torch.randn(2, 3, 8, 8)


class Pair(NamedTuple):
    logits: torch.Tensor
    features: list


@dataclass
class Result:
    logits: torch.Tensor
    features: list


FORMS = {
    "dict": (lambda logits, features: {"logits": logits, "features": features}, "logits", "features.1"),
    "tuple": (lambda logits, features: (logits, features), "0", "1.1"),
    "named": (Pair, "logits", "features.1"),
    "dataclass": (Result, "logits", "features.1"),
}


class Net(nn.Module):
    def __init__(self, form="dict"):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.head, self.form = nn.Linear(32, 4), form

    def forward(self, x):
        first = torch.relu(self.a(x))
        second = torch.relu(self.b(first))
        return FORMS[self.form][0](self.head(second.mean((2, 3))), [first, second])


@pytest.mark.parametrize("form", FORMS)
def test_only_the_outputs_that_count_keep_their_size(form):
    _, logits, second = FORMS[form]
    net = Net(form).eval()
    skipped = trace(net, IMAGES).skipped
    assert f"output {logits!r}" in skipped["head"] and f"output {second!r}" in skipped["b"]
    assert "outputs=" in skipped["b"]
    assert trace(net, IMAGES, outputs=[logits]).widths == {"a": 16, "b": 32}
    assert trace(net, IMAGES, outputs=[logits, second]).widths == {"a": 16}
    assert trace(net, IMAGES, outputs=["*"]).widths == {}
    step = prune(net, IMAGES, Budget(macs="50%"), score="l2", outputs=[logits])
    assert step.plan.widths["b"] < 32 and step.difference < 1e-4
    small = named_outputs(step.model(IMAGES))
    assert small[logits].shape == (2, 4) and small[second].shape[1] == step.plan.widths["b"]


def test_outputs_may_be_a_function_of_what_the_model_returns():
    net = Net().eval()
    found = doctor(net, IMAGES, outputs=lambda output: output["features"][1])
    assert [group.name for group in found.groups] == ["a"] and not found.trial
    assert "output 'features.1'" in found.skipped["b"]


def test_a_model_with_other_outputs_in_training_mode_keeps_those():
    class Auxiliary(Net):
        def __init__(self):
            super().__init__()
            self.auxiliary = nn.Linear(16, 4)

        def forward(self, x):
            output = super().forward(x)
            return self.auxiliary(output["features"][0].mean((2, 3))) if self.training else output

    found = trace(Auxiliary(), IMAGES, outputs=["logits"])
    assert found.widths == {"a": 16, "b": 32}
    assert [m.layer for m in found.groups["a"].side("in")] == ["b", "auxiliary"]


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (["logit"], "'logit' matches none; the model returns logits, features.0, features.1"),
        ("logits", "expected a function, or a list of names"),
        ([], "expected a function, or a list of names"),
        ([0], "0 is no name"),
        (
            lambda output: output.logits,
            "the function fails on what the model returns, logits.*AttributeError",
        ),
        (lambda output: len(output), "returns no tensor"),
    ],
)
def test_wrong_outputs_are_refused(outputs, message):
    for function in (trace, doctor):
        with pytest.raises(PruningError, match=message):
            function(Net(), IMAGES, outputs=outputs)


def test_names_reach_every_tensor_that_counts_by_default():
    loop: dict = {"a": torch.zeros(1), "b": [torch.zeros(2), {"c": torch.zeros(3)}]}
    loop["self"] = loop
    assert [*named_outputs(loop)] == ["a", "b.0", "b.1.c"]
    assert len(counted(torch.zeros(2), None)) == 1 and [*named_outputs(torch.zeros(2))] == [""]
