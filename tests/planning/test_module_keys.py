"""Modules as keys of widths, floors and shares, in place of the names of groups."""

from __future__ import annotations

import nets
import pytest
import torch
from torch import nn

from pruning import Budget, PruningError, prune, trace
from pruning.planning.options import PlanOptions, per_group
from pruning.stages import frontier

pytestmark = pytest.mark.quick


def step(net, **options):
    return prune(net, nets.images(), Budget(macs="100%"), score="l2", **options)


def test_modules_stand_for_the_groups_whose_channels_they_make():
    net = nets.make("lenet")
    convolutions = [name for name, m in net.features.named_children() if isinstance(m, nn.Conv2d)]
    whole = trace(net, nets.images()).widths
    inside = {f"features.{name}" for name in convolutions} & whole.keys()
    assert inside and inside != whole.keys()
    found = step(net, widths={net.features: "50%"}).plan.widths
    assert found == {name: round(n / 2) if name in inside else n for name, n in whole.items()}
    one = net.get_submodule(min(inside))
    assert step(net, widths={one: 2, "features.*": 3}).plan.widths[min(inside)] == 3, "the last key applies"
    assert step(net, widths={"features.*": 3, one: 2}).plan.widths[min(inside)] == 2
    assert step(net, floor={one: 2}, most={one: 0.5}).plan.widths == whole


def test_a_module_of_a_sum_stands_for_the_group_that_it_belongs_to():
    net = nets.make("residual")
    traced = trace(net, nets.images())
    name, group = next((n, g) for n, g in traced.groups.items() if len(g.side("out")) > 1)
    last = net.get_submodule(group.side("out")[-1].layer)
    assert step(net, widths={last: 2}).plan.widths[name] == 2


@pytest.mark.parametrize(
    ("key", "told"),
    [
        (
            lambda net: net[2],
            r"2 \(Linear\) makes no channels that can be removed \(its channels are the model",
        ),
        (lambda net: net[1], r"1 \(ReLU\) makes no channels that can be removed; give a name or pattern"),
        (
            lambda net: nn.Linear(2, 2),
            "widths: the Linear is no module of Sequential; give a name or pattern",
        ),
        (lambda net: 3, r"widths: 3 is of type int; give a name or pattern of groups \(0\) or a module"),
    ],
)
def test_other_keys_are_refused(key, told):
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(PruningError, match=told):
        prune(net, torch.zeros(1, 4), Budget(channels="50%"), score="l2", widths={key(net): 4})


def test_a_frontier_takes_modules_too():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    options = PlanOptions(widths={net[0]: 4})
    found = frontier(
        net, torch.zeros(1, 4), [(torch.randn(8, 4), None)], points=2, score="l2", options=options
    )
    assert {point.plan.widths["0"] for point in found.points} == {4}


def test_a_key_that_is_no_text_matches_no_group():
    with pytest.raises(PruningError, match="matches no group of this model; its groups: a"):
        per_group(PlanOptions(widths={nn.ReLU(): 2}).widths, ["a"])
