"""Law 2: budgets are met exactly or rejected; ties, floors, caps and multiples are kept."""

from __future__ import annotations

import itertools

import nets
import numpy as np
import pytest
import torch
from torch import nn

from pruning import Budget, Plan, PruningError, prune, trace
from pruning.planning import Cost, CostModel, count, plan_within
from pruning.planning.options import PlanOptions
from pruning.surgery import fold_batchnorm
from pruning.surgery.apply import apply

pytestmark = [pytest.mark.quick, pytest.mark.numerics]


def traced_net(name="lenet"):
    net = nets.make(name)
    traced = trace(net, nets.images())
    return net, traced, CostModel(net, traced)


def chain(width=8):
    """One group of `width` channels; each frees 3 + 2 + 1 params and 5 MACs."""
    net = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))
    traced = trace(net, torch.randn(1, 3))
    return net, traced, CostModel(net, traced)


@pytest.mark.parametrize("name", nets.NETS)
@pytest.mark.parametrize("share", [0.8, 0.4])
def test_the_plan_meets_the_budget_and_its_predicted_cost_is_exact(name, share):
    net, traced, cost_model = traced_net(name)
    scores = {g: torch.rand(group.channels) for g, group in traced.groups.items()}
    dense = cost_model(cost_model.full)
    assert dense == count(fold_batchnorm(net, traced), nets.images())
    least = cost_model(np.ones(len(traced.groups)))
    params = round(least.params + share * (dense.params - least.params))
    macs = round(least.macs + share * (dense.macs - least.macs))
    budget = Budget(params, macs)
    plan = plan_within(budget, traced, cost_model, scores)
    small = apply(net, traced, plan)
    got = count(fold_batchnorm(small, trace(small, nets.images())), nets.images())
    assert got == cost_model(plan.widths)
    assert not budget.excess(got)


def test_the_cost_freed_by_a_channel_is_the_difference_of_two_costs():
    _, _, cost_model = traced_net("residual")
    widths = cost_model.full - 1
    freed = cost_model.freed(widths, np.array([2.0, 1.0, 3.0]))
    for i, channels in enumerate((2, 1, 3)):
        narrower = widths.copy()
        narrower[i] -= channels
        before, after = cost_model(widths), cost_model(narrower)
        for what, values in freed.items():
            assert values[i] == getattr(before, what) - getattr(after, what)


@pytest.mark.parametrize("per_cost", [True, False])
def test_equal_scores_do_not_remove_more_channels_than_needed(per_cost):
    _, traced, cost_model = chain(32)
    scores = {"0": torch.zeros(32)}
    plan = plan_within(Budget(params=2 + 24 * 6), traced, cost_model, scores, PlanOptions(per_cost=per_cost))
    assert plan.keep == {"0": tuple(range(24))}, "of equal scores, later channels are removed first"


def test_the_least_important_channels_are_dropped():
    _, traced, cost_model = chain(5)
    scores = {"0": torch.tensor([0.5, 0.1, 0.9, 0.2, 0.3])}
    plan = plan_within(Budget(macs=3 * 5), traced, cost_model, scores)
    assert plan == Plan({"0": (0, 2, 4)})


def test_a_group_with_the_lowest_scores_is_not_emptied():
    _, traced, cost_model = traced_net("lenet")
    scores = {g: torch.ones(group.channels) for g, group in traced.groups.items()}
    scores["features.conv1"] = torch.zeros(4)
    dense = cost_model(cost_model.full)
    plan = plan_within(
        Budget(macs=round(dense.macs * 0.3)), traced, cost_model, scores, PlanOptions(per_cost=False)
    )
    assert plan.widths["features.conv1"] == 1


def test_plans_respect_floor_and_cap():
    _, traced, cost_model = traced_net("lenet")
    scores = {g: torch.rand(group.channels) for g, group in traced.groups.items()}
    floor = {"features.conv1": 3}
    plan = plan_within(Budget(params="30%").resolve(cost_model(cost_model.full)), traced, cost_model, scores,
                       PlanOptions(floor=floor))  # fmt: skip
    assert plan.widths["features.conv1"] >= 3
    plan = plan_within(Budget(params="50%").resolve(cost_model(cost_model.full)), traced, cost_model, scores,
                       PlanOptions(most=0.5))  # fmt: skip
    assert all(plan.widths[g] >= group.channels / 2 for g, group in traced.groups.items())


@pytest.mark.parametrize("share", [20, 40, 60, 80])
def test_widths_are_multiples_without_removing_more_than_needed(share):
    _, traced, cost_model = chain(30)
    plan = plan_within(Budget(params=f"{share}%").resolve(cost_model(cost_model.full)), traced, cost_model,
                       {"0": torch.rand(30)}, PlanOptions(multiple=8, floor=1))  # fmt: skip
    width = plan.widths["0"]
    limit = ((30 * 6 + 2) * share // 100 - 2) // 6
    assert width == max(w for w in (1, 8, 16, 24, 30) if w <= limit)


@pytest.mark.parametrize("ranking", ["global", "group"])
@pytest.mark.parametrize(("multiple", "most"), [(8, 1.0), (4, 1.0), (3, 1.0), (8, 0.6)])
def test_no_width_is_below_the_multiple_unless_a_floor_is_given(ranking, multiple, most):
    layers = [nn.Linear(3, 40), nn.ReLU(), nn.Linear(40, 5), nn.ReLU(), nn.Linear(5, 2)]
    net = nn.Sequential(*layers)
    traced = trace(net, torch.zeros(1, 3))
    cost_model = CostModel(net, traced)
    scores = {name: torch.rand(group.channels) for name, group in traced.groups.items()}
    options = PlanOptions(ranking, multiple=multiple, most=most)
    rounded = lambda n: -(-n // multiple) * multiple  # noqa: E731
    least = {
        "0": rounded(max(multiple, 40 * (1 - most))),
        "2": min(5, rounded(max(multiple, 5 * (1 - most)))),
    }
    tightest = Budget(params=cost_model(least).params)
    plan = plan_within(tightest, traced, cost_model, scores, options)
    assert plan.widths == least
    with pytest.raises(PruningError, match="at the floor of every group"):
        plan_within(Budget(params=tightest.params - 1), traced, cost_model, scores, options)
    given = PlanOptions(ranking, multiple=multiple, floor={"0": 1})
    lowest = {"0": 1, "2": min(5, rounded(multiple))}
    plan = plan_within(Budget(params=cost_model(lowest).params), traced, cost_model, scores, given)
    assert plan.widths == lowest


def test_dropped_channels_that_fit_the_budget_are_restored():
    """The last dropped channel may free more than needed; channels that still fit are restored."""
    _, traced, cost_model = traced_net("lenet")
    torch.manual_seed(0)
    for share in (30, 50, 70):
        budget = Budget(params=f"{share}%").resolve(cost_model(cost_model.full))
        scores = {g: torch.rand(group.channels) for g, group in traced.groups.items()}
        widths = plan_within(budget, traced, cost_model, scores).widths
        freed_by_last_step = cost_model.freed(np.array(list(widths.values()), float) + 1)["params"]
        slack = budget.params - cost_model(widths).params
        assert slack < freed_by_last_step.max(), "no dropped channel would still fit"


def test_an_unreachable_budget_raises_with_the_least_reachable_costs():
    _, traced, cost_model = traced_net("lenet")
    scores = {g: torch.ones(group.channels) for g, group in traced.groups.items()}
    floor = cost_model(dict.fromkeys(traced.groups, 1))
    least = rf"cannot be reached.*features.conv1 1.*{floor.params} params. Raise the budget \(see"
    with pytest.raises(PruningError, match=least):
        plan_within(Budget(params=10), traced, cost_model, scores)
    plan = plan_within(Budget(params=floor.params), traced, cost_model, scores)
    assert set(plan.widths.values()) == {1}


@pytest.mark.parametrize(
    ("options", "ignored", "told"),
    [
        (
            PlanOptions(most=0.5),
            (),
            r"Raise the budget, or the share .* \(`most`\), or lower the floors \(see",
        ),
        (PlanOptions(), ("features.conv1",), r"Raise the budget, or ignore fewer layers \(see"),
        (PlanOptions(widths={"*conv2": 3}), (), r"Raise the budget, or give fewer exact widths \(see"),
        (PlanOptions(alike=["features.*"], floor=2), (), r"\(`most`\), or lower the floors \(see"),
    ],
)
def test_an_unreachable_budget_names_only_what_limits_it(options, ignored, told):
    net = nets.make("lenet")
    traced = trace(net, nets.images(), ignored)
    scores = {g: torch.ones(group.channels) for g, group in traced.groups.items()}
    with pytest.raises(PruningError, match=told):
        plan_within(Budget(params=10), traced, CostModel(net, traced), scores, options)


def test_a_budget_above_the_dense_cost_keeps_all_channels():
    _, traced, cost_model = chain()
    assert plan_within(Budget(params=10**9), traced, cost_model, {"0": torch.rand(8)}).widths == {"0": 8}


@pytest.mark.parametrize("scores", [torch.ones(7), torch.full((8,), float("nan"))])
def test_scores_of_a_wrong_shape_or_not_finite_are_rejected(scores):
    _, traced, cost_model = chain()
    with pytest.raises(PruningError, match="scores of group '0'"):
        plan_within(Budget(params=20), traced, cost_model, {"0": scores})


@pytest.mark.parametrize("limit", [0, -5, "0%", "101%", "many", "1.5", "nan", "inf", ""])
def test_limits_other_than_counts_and_percentages_are_rejected(limit):
    with pytest.raises(PruningError, match="params budget"):
        Budget(params=limit)


def test_a_budget_without_a_limit_is_rejected():
    with pytest.raises(PruningError, match="give params, macs or channels"):
        Budget()


def test_budgets_are_parsed_from_counts_and_percentages():
    dense = Cost(params=8000, macs=90_000, macs_with_bias=0)
    assert Budget("25%", "50k").resolve(dense) == Budget(2000, 50_000)
    assert Budget("1,485", "1.5M").resolve(dense) == Budget(1485, 1_500_000)


@pytest.mark.parametrize("per_cost", [True, False])
def test_a_budget_on_channels_is_met_exactly_alone_and_with_other_limits(per_cost):
    _, traced, cost_model = traced_net("residual")
    scores = {g: torch.rand(group.channels) for g, group in traced.groups.items()}
    dense = cost_model(cost_model.full)
    assert dense.channels == sum(traced.widths.values())
    half = Budget(channels="50%").resolve(dense)
    plan = plan_within(half, traced, cost_model, scores, PlanOptions(per_cost=per_cost))
    assert sum(plan.widths.values()) == half.channels == cost_model(plan.widths).channels
    both = Budget(channels="50%", params="20%").resolve(dense)
    assert not both.excess(cost_model(plan_within(both, traced, cost_model, scores).widths))


def test_budget_shares_shrink_by_equal_ratios_and_end_at_the_budget():
    start, budget = Cost(1600, 300, 0), Budget(params=100, macs=500)
    shares = [budget.share(start, step, 4) for step in (1, 2, 3, 4)]
    assert [share.params for share in shares] == [800, 400, 200, 100]
    assert {share.macs for share in shares} == {500}, "a limit that is met already does not change"


def test_a_plan_is_unchanged_by_a_json_round_trip():
    plan = Plan({"a": (2, 0), "b": (1,)})
    assert plan.keep["a"] == (0, 2) and Plan.from_json(plan.to_json()) == plan
    assert hash(plan) == hash(Plan.from_json(plan.to_json()))


def test_a_percentage_is_never_exceeded_by_rounding():
    assert Budget("33%").resolve(Cost(params=499, macs=1, macs_with_bias=1)).params == 164  # 164.67
    assert (
        Budget("29%").resolve(Cost(params=100, macs=1, macs_with_bias=1)).params == 29
    )  # 28.999... in floats
    assert Budget(macs="1%").resolve(Cost(params=1, macs=50, macs_with_bias=1)).macs == 1, "at least 1"


@pytest.mark.parametrize(
    "limit",
    [{"multiple": 0}, {"multiple": -2}, {"multiple": 2.5}, {"floor": 0}, {"floor": 2.5}, {"floor": {"*": 0}}],
)
def test_floors_and_multiples_must_be_whole_numbers_of_at_least_1(limit):
    with pytest.raises(PruningError, match="whole number"):
        PlanOptions(**limit)
    with pytest.raises(PruningError, match="whole number"):
        prune(nets.make("lenet"), nets.images(), Budget(params="50%"), score="l2", **limit)


def test_unknown_rankings_and_invalid_shares_are_rejected():
    with pytest.raises(PruningError, match="one of global, group"):
        PlanOptions(ranking="local")
    for most in (-0.1, 1.5, {"fc": 2.0}):
        with pytest.raises(PruningError, match="from 0 to 1"):
            PlanOptions(most=most)


def test_options_for_unknown_groups_are_rejected():
    _, traced, cost_model = chain(8)
    for option in ({"floor": {"9": 2}}, {"most": {"9": 0.5}}, {"widths": {"9": 2}}):
        with pytest.raises(PruningError, match="'9' matches no group of this model; its groups: 0"):
            plan_within(Budget(params=30), traced, cost_model, {"0": torch.rand(8)}, PlanOptions(**option))


def test_scores_may_be_lists_of_numbers():
    _, traced, cost_model = chain(3)
    plan = plan_within(Budget(channels=1), traced, cost_model, {"0": [0.5, 2.0, 1.0]})
    assert plan.keep["0"] == (1,)


def test_a_step_keeps_a_subset_of_the_channels_of_the_last_plan():
    """Planned alone, a step from 5-6 to 1,755 params and 56,207 MACs gives 5-4, which excludes 4-5."""
    net, images = nets.LeNet5((5, 6), (), image_shape=(1, 28, 28), classes=10), torch.randn(2, 1, 28, 28)
    share, target = Budget(params=1755, macs=56_207), Budget(params=1485, macs=47_400)

    def score(_, groups):
        first, second = groups
        return {first: torch.tensor([8.0, 7, 6, 5, 2]), second: torch.tensor([3.0, 2, 1.5, 1, 0.6, 0.5])}

    alone = prune(net, images, share, score=score)
    assert list(alone.plan.widths.values()) == [5, 4]
    step = prune(net, images, share, score=score, towards=target)
    assert list(step.plan.widths.values()) == [4, 5]
    last = prune(net, images, target, score=score)
    assert all(set(kept) <= set(step.plan.keep[name]) for name, kept in last.plan.keep.items())


def test_exchanges_improve_a_greedy_plan():
    """Three channels of the second convolution each score less than one of the first, but more in total."""
    net = nets.LeNet5((5, 6), (), image_shape=(1, 28, 28), classes=10)
    traced = trace(net, torch.randn(2, 1, 28, 28))
    first, second = traced.groups
    scores = {first: torch.tensor([9.0, 8, 7, 6, 2.5]), second: torch.tensor([9.0, 8, 1.1, 1.1, 1.1, 0.5])}
    plan = plan_within(Budget(params=1485, macs=47_400), traced, CostModel(net, traced), scores)
    assert list(plan.widths.values()) == [4, 5], "5-2, the result of single steps, loses 3.8; 4-5 loses 3.0"


@pytest.mark.parametrize("name", ["lenet", "residual"])
def test_plans_lose_little_more_than_the_exhaustive_optimum(name):
    _, traced, cost_model = traced_net(name)
    widths = np.array(list(itertools.product(*(range(1, int(n) + 1) for n in cost_model.full))), float)
    costs = [cost_model(w) for w in widths]
    dense, least = costs[-1], costs[0]
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        scores = {g: torch.rand(group.channels, generator=draw) ** 3 for g, group in traced.groups.items()}
        share = torch.rand(2, generator=draw).tolist()
        budget = Budget(
            params=round(least.params + share[0] * (dense.params - least.params)),
            macs=round(least.macs + share[1] * (dense.macs - least.macs)),
        )
        lost = np.zeros(len(widths))
        for i, values in enumerate(scores.values()):
            lost += np.concatenate(([0.0], np.cumsum(np.sort(values.numpy()))))[::-1][
                widths[:, i].astype(int)
            ]
        best = min(loss for loss, cost in zip(lost, costs, strict=True) if not budget.excess(cost))
        plan = plan_within(budget, traced, cost_model, scores)
        assert not budget.excess(cost_model(plan.widths))
        got = sum(float(scores[g].sum() - scores[g][list(kept)].sum()) for g, kept in plan.keep.items())
        assert got <= 1.05 * best + 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_exchanges_respect_floors_caps_multiples_and_exact_widths(seed):
    _, traced, cost_model = traced_net("residual")
    torch.manual_seed(seed)
    scores = {g: torch.rand(group.channels) ** 4 for g, group in traced.groups.items()}
    *_, last = traced.groups
    full = dict(zip(cost_model.groups, cost_model.full, strict=True))
    budget = Budget(macs="70%", params="75%").resolve(cost_model(cost_model.full))
    options = PlanOptions(multiple=2, floor=3, most={"*": 0.5}, widths={last: 5})
    widths = plan_within(budget, traced, cost_model, scores, options).widths
    assert not budget.excess(cost_model(widths)) and widths.pop(last) == 5
    for group, width in widths.items():
        assert width % 2 == 0 or width in (3, full[group])
        assert width >= max(3, full[group] / 2)


def test_a_width_given_as_a_share_is_rounded_to_the_multiple_and_a_count_is_exact():
    _, traced, cost_model = traced_net("residual")
    scores = {g: torch.rand(group.channels) for g, group in traced.groups.items()}
    full = dict(zip(cost_model.groups, cost_model.full, strict=True))
    everything = Budget(macs="100%").resolve(cost_model(cost_model.full))
    for share in (10, 40, 65, 90, 100):
        options = PlanOptions(multiple=4, widths={"*": f"{share}%"})
        for group, width in plan_within(everything, traced, cost_model, scores, options).widths.items():
            whole, wanted = int(full[group]), full[group] * share / 100
            assert width % 4 == 0 or width == whole
            assert share < 100 or width == whole
            assert all(abs(width - wanted) <= abs(other - wanted) for other in range(4, whole + 1, 4))
    options = PlanOptions(multiple=4, floor=4, widths={"*": 3})
    assert set(plan_within(everything, traced, cost_model, scores, options).widths.values()) == {3}
