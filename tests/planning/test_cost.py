"""Law 6: all definitions of cost agree."""

from __future__ import annotations

from itertools import pairwise

import nets
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from models import LeNet5, YourNet
from pruning import Plan, PruningError, trace
from pruning.deploy import Latency, time_forward, time_ratio
from pruning.planning import CostModel, count, uncounted
from pruning.surgery import fold_batchnorm
from pruning.surgery.apply import apply

pytestmark = pytest.mark.quick


def flops(model, inputs):
    # Computes attention by matrix products, which every version of the counter supports.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(inputs)
    return counter.get_total_flops()


def closed_form(c1, c2, f1, f2):
    """Compute params and MACs of LeNet-5 at any widths by explicit formulas."""
    params = c1 * 9 + c1 + c2 * c1 * 9 + c2 + f1 * c2 * 25 + f1 + f2 * f1 + f2 + 10 * f2 + 10
    return params, 26 * 26 * 9 * c1 + 11 * 11 * 9 * c1 * c2 + 25 * c2 * f1 + f1 * f2 + 10 * f2


def test_the_reference_network_has_the_params_and_macs_of_the_assignment():
    cost = count(LeNet5(), torch.randn(1, 1, 28, 28))
    assert (cost.params, cost.macs) == (60_074, 199_968)
    assert cost.macs_with_bias == 199_968 + 26 * 26 * 6 + 11 * 11 * 16 + 120 + 84 + 10


@pytest.mark.parametrize("widths", [(6, 16, 120, 84), (3, 7, 8, 12), (1, 1, 1, 1), (20, 5, 64, 3)])
def test_thop_the_flop_counter_and_the_closed_form_agree(widths):
    net = YourNet(widths[:2], widths[2:])
    images = torch.randn(3, 1, 28, 28)
    cost = count(net, images)
    assert (cost.params, cost.macs) == closed_form(*widths)
    assert 2 * 3 * cost.macs == flops(net, images)


@pytest.mark.parametrize("name", nets.NETS)
def test_counts_agree_with_the_flop_counter_on_other_networks(name):
    net, images = nets.make(name), nets.images()
    cost = count(net, images)
    assert 2 * 2 * cost.macs == flops(net, images)
    assert cost.params == sum(p.numel() for p in net.parameters())


def test_the_cost_model_excludes_batchnorm_and_folding_removes_its_params():
    net = LeNet5(batch_norm=True).eval()
    images = torch.randn(2, 1, 28, 28)
    folded = fold_batchnorm(net, trace(net, images))
    assert count(net, images).macs == count(folded, images).macs == 199_968
    assert count(folded, images) == count(LeNet5(), images)


def test_counting_does_not_change_the_model():
    net = LeNet5().train()
    keys = list(net.state_dict())
    count(net, torch.randn(1, 1, 28, 28))
    assert list(net.state_dict()) == keys and net.training
    assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize("wrapped", [lambda y: (y, None), lambda y: [y], lambda y: {"y": y}])
@pytest.mark.parametrize(("layer", "shape"), [(nn.Linear(4, 8), (2, 4)), (nn.Conv2d(4, 8, 3), (2, 4, 5, 5))])
def test_a_layer_that_returns_its_output_within_a_structure_counts_the_same(layer, shape, wrapped):
    class Structured(type(layer)):
        def forward(self, x):
            return wrapped(super().forward(x))

    structured = Structured(*((4, 8) if isinstance(layer, nn.Linear) else (4, 8, 3)))
    assert count(structured, torch.zeros(shape)) == count(layer, torch.zeros(shape))


def test_layers_that_are_not_counted_are_listed():
    net = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 2))
    assert uncounted(net) == {"0": "Embedding"}


def test_products_with_parameters_of_any_module_are_counted_and_operators_of_others_are_listed():
    class Product(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 3))

        def forward(self, x):
            return x @ (2 * self.weight)

    class Foreign(Product):
        def forward(self, x):
            return torch.ops.cost_test.product(x, self.weight)

    @torch.library.custom_op("cost_test::product", mutates_args=())
    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight

    product.register_fake(lambda x, weight: x.new_empty(len(x), weight.shape[1]))
    net, x = torch.nn.Sequential(Product(), torch.nn.Linear(3, 4), Foreign()), torch.randn(2, 4)
    assert uncounted(net, trace(net, x)) == {"2": "Foreign"}
    assert uncounted(net) == {"0": "Product", "2": "Foreign"}


def test_a_token_that_is_a_parameter_is_given_to_a_module():
    class Token(torch.nn.Module):  # as timm's CaiT gives its class token to its blocks
        def __init__(self):
            super().__init__()
            self.token, self.block = torch.nn.Parameter(torch.randn(1, 1, 4)), torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.block(self.token.expand(len(x), -1, -1)) + x

    net = Token()
    assert count(net, torch.randn(2, 1, 3)).macs == 12 and net.token.requires_grad


@pytest.mark.slow
def test_a_slower_network_measures_slower_and_copies_measure_the_same():
    torch.manual_seed(0)
    small, large = LeNet5((2, 2), (4, 4)), LeNet5((32, 64), (256, 256))
    threads = torch.get_num_threads()
    times = time_forward(
        {"small": small, "again": small, "large": large}, torch.randn(16, 1, 28, 28), seconds=1.5
    )
    assert times["large"].median > 1.5 * times["small"].median
    assert 0.7 < times["again"].median / times["small"].median < 1.4
    for latency in times.values():
        assert latency.low <= latency.median <= latency.high and latency.median <= latency.p90
        assert (latency.batch_size, latency.threads) == (16, 1) and latency.samples >= 20
    assert torch.get_num_threads() == threads and small.training


def latency(turns):
    """Return a result of `time_forward` with these turns."""
    low, median, high, p90 = np.percentile(turns, (25, 50, 75, 90))
    return Latency(median, p90, low, high, len(turns), 1, 1, tuple(turns))


def noise(turns, seed, spread=0.1):
    return np.exp(np.random.default_rng(seed).normal(0, spread, turns))


def test_the_turns_of_models_timed_together_are_stored():
    times = time_forward({"one": LeNet5(), "other": LeNet5()}, torch.randn(1, 1, 28, 28), seconds=0.1)
    for each in times.values():
        assert len(each.turns) == each.samples and np.median(each.turns) == each.median
    found = time_ratio(times["one"], times["other"])
    assert found.low <= found.median <= found.high
    assert found.median == times["one"].median / times["other"].median


@pytest.mark.parametrize("factor", [1, 2, 0.25])
def test_the_ratio_of_times_that_differ_by_a_constant_factor_is_exact(factor):
    turns = noise(50, seed=0)
    assert time_ratio(latency(factor * turns), latency(turns)) == (factor, factor, factor)


def test_disturbances_common_to_both_models_cancel_out():
    load = 1 + 9 * (np.arange(400) % 40 < 15)  # ten times as slow for 15 turns of 40
    found = time_ratio(latency(3 * load * noise(400, 1, 0.01)), latency(load * noise(400, 2, 0.01)))
    assert 2.97 < found.low < 3 < found.high < 3.03


def test_more_turns_narrow_the_interval_and_a_seed_determines_it():
    widths = []
    for turns in (25, 100, 400, 1600):
        above, below = latency(noise(turns, 1)), latency(noise(turns, 2))
        found = time_ratio(above, below)
        assert found == time_ratio(above, below) != time_ratio(above, below, seed=1)
        widths.append(found.high - found.low)
    assert all(0.3 < after / before < 0.8 for before, after in pairwise(widths)), (
        "half for four times as many"
    )
    wide = time_ratio(above, below, confidence=0.99)
    assert wide.low < found.low and found.high < wide.high


@pytest.mark.slow
@pytest.mark.parametrize("correlated", [False, True])
def test_intervals_cover_the_true_ratio_at_the_stated_confidence(correlated):
    covered, trials, turns = 0, 100, 144
    for trial in range(trials):
        # Each model has disturbances of its own, which last for about 3 turns.
        above, below = (
            np.exp(np.convolve(np.random.default_rng((trial, i)).normal(0, 0.1, turns + 2),
                               np.ones(3) if correlated else np.eye(3)[1], "valid"))
            for i in range(2)
        )  # fmt: skip
        found = time_ratio(latency(1.5 * above), latency(below), resamples=200)
        covered += found.low <= 1.5 <= found.high
    assert 0.85 * trials <= covered <= trials, "95 % of the intervals, with a sampling error of 2 %"


def test_ratios_of_models_that_were_not_timed_together_are_rejected():
    with pytest.raises(PruningError, match="3 and 4 turns: only models that were timed together"):
        time_ratio(latency(np.ones(3)), latency(np.ones(4)))
    with pytest.raises(PruningError, match="0 and 0 turns"):
        time_ratio(Latency(1, 1, 1, 1, 0, 1, 1), Latency(1, 1, 1, 1, 0, 1, 1))


def test_timing_without_a_model_is_rejected():
    with pytest.raises(PruningError, match="no model to time"):
        time_forward({}, torch.randn(1))


def test_weights_that_are_shared_or_computed_from_others_count_once():
    """The closed form and the counter agree, for the dense network and the pruned one."""
    tied = nets.Words(tied=True)
    normed = torch.nn.Sequential(
        parametrizations.weight_norm(torch.nn.Conv2d(3, 8, 3)), torch.nn.ReLU(),
        torch.nn.Conv2d(8, 6, 3), torch.nn.ReLU(), torch.nn.Conv2d(6, 2, 3),
    )  # fmt: skip
    for net, inputs in ((tied, nets.words()), (normed, nets.images())):
        traced = trace(net, inputs)
        cost_model = CostModel(net, traced)
        assert cost_model(cost_model.full).params == sum(p.numel() for p in net.parameters())
        plan = Plan({name: tuple(range(group.channels - 2)) for name, group in traced.groups.items()})
        assert plan.keep, "the model has groups"
        assert cost_model(plan.widths).params == count(apply(net, traced, plan), inputs).params


def test_inputs_in_a_dict_are_passed_by_name():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.slim = torch.nn.Linear(8, 3), torch.nn.Linear(2, 3)

        def forward(self, *, first, second):
            return self.wide(first) + self.slim(second)

    cost = count(Two(), {"second": torch.randn(4, 2), "first": torch.randn(4, 8)})
    assert cost.macs == 8 * 3 + 2 * 3


@pytest.mark.slow
def test_a_compiled_model_costs_the_same_as_the_original():
    net, images = LeNet5(), torch.randn(1, 1, 28, 28)
    assert count(torch.compile(net), images) == count(net, images)
