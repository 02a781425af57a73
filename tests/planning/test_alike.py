"""Groups that match a pattern get one width."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from pruning import Budget, PruningError, prune, trace
from pruning.planning.cost import CostModel
from pruning.planning.options import PlanOptions
from pruning.planning.search import plan_within
from pruning.stages.config import SlimConfig
from pruning.stages.feasibility import feasible

pytestmark = pytest.mark.quick


def network(widths=(6, 6, 5)):
    torch.manual_seed(0)
    sizes = [4, *widths, 3]
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]), torch.randn(2, 4)


@pytest.mark.parametrize("share", [0.8, 0.5, 0.3])
@pytest.mark.parametrize("ranking", ["global", "group"])
def test_alike_groups_have_one_width_and_the_budget_is_met(share, ranking):
    net, x = network()
    step = prune(net, x, Budget(macs=f"{share:.0%}"), score="l2", alike=["[02]"], ranking=ranking)
    assert step.plan.widths["0"] == step.plan.widths["2"]
    assert step.after.macs <= share * step.before.macs


def test_alike_groups_each_keep_their_most_important_channels():
    net, x = network()
    traced = trace(net, x)
    scores = {"0": torch.arange(6.0), "2": -torch.arange(6.0), "4": torch.full((5,), 100.0)}
    options = PlanOptions(alike=["0", "2", "[02]"])
    plan = plan_within(Budget(channels=11), traced, CostModel(net, traced), scores, options)
    assert dict(plan.keep) == {"0": (3, 4, 5), "2": (0, 1, 2), "4": (0, 1, 2, 3, 4)}


def test_a_pattern_may_be_several_joined_by_commas():
    net, x = network((6, 6, 6))
    step = prune(net, x, Budget(macs="40%"), score="l2", alike=["0, 4"])
    assert step.plan.widths["0"] == step.plan.widths["4"]
    with pytest.raises(PruningError, match="matches no group"):
        prune(net, x, Budget(macs="40%"), score="l2", alike=["x,y"])


def test_slim_refuses_groups_that_cannot_be_alike_before_it_trains():
    net, x = network()
    config = SlimConfig.within(Budget(macs="50%"))
    for alike, message in ((("*",), "different numbers of channels"), (("x",), "matches no group")):
        with pytest.raises(PruningError, match=message):
            feasible(net, x, replace(config, prune=replace(config.prune, alike=alike)))
    with pytest.raises(PruningError, match="expected a list of names"):
        replace(config.prune, alike="[02]")


@pytest.mark.parametrize("seed", range(5))
def test_the_plan_is_nearly_the_best_of_all_with_alike_groups(seed):
    net, x = network()
    traced, generator = trace(net, x), torch.Generator().manual_seed(seed)
    cost = CostModel(net, traced)
    scores = {name: torch.rand(g.channels, generator=generator) for name, g in traced.groups.items()}
    limit = Budget(macs=round(0.55 * cost({}).macs))

    def kept(widths):
        return sum(
            float(s.sort().values[len(s) - w :].sum()) for s, w in zip(scores.values(), widths, strict=True)
        )

    choices = [(a, a, b) for a in range(1, 7) for b in range(1, 6)]
    best = max(kept(w) for w in choices if not limit.excess(cost(np.array(w, float))))
    plan = plan_within(limit, traced, cost, scores, PlanOptions(alike=["[02]"]))
    assert kept(plan.widths.values()) >= 0.97 * best


def test_groups_that_cannot_be_alike_are_refused_with_the_cure():
    net, x = network()
    with pytest.raises(PruningError, match=r"different numbers of channels.*0 6.*4 5.*a pattern for each"):
        prune(net, x, Budget(macs="50%"), score="l2", alike=["[024]"])
    with pytest.raises(PruningError, match=r"'fc' matches no group.*0, 2, 4"):
        prune(net, x, Budget(macs="50%"), score="l2", alike=["fc"])
    with pytest.raises(PruningError, match="expected a list"):
        PlanOptions(alike="fc")
    with pytest.raises(PruningError, match="exclude one another"):
        prune(net, x, Budget(macs="50%"), score="l2", alike=["[02]"], widths={"0": 3, "2": 4})


@pytest.mark.parametrize("ranking", ["global", "group"])
def test_alike_groups_of_different_sizes_keep_one_share(ranking):
    net, x = network((12, 4, 6))
    step = prune(net, x, Budget(macs="50%"), score="l2", alike=["[02]"], ranking=ranking)
    widths = step.plan.widths
    assert widths["0"] == 3 * widths["2"] < 12 and step.after.macs <= step.before.macs / 2
    with pytest.raises(PruningError, match="exclude one another"):
        prune(net, x, Budget(macs="50%"), score="l2", alike=["[02]"], widths={"0": 7})
