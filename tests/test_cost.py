"""Law 6: one truth for cost."""

from __future__ import annotations

import nets
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import LeNet5, YourNet
from pruning import PruningError, count, fold_batchnorm, time_forward, trace, uncounted


def flops(model, inputs):
    with FlopCounterMode(display=False) as counter:
        model(inputs)
    return counter.get_total_flops()


def closed_form(c1, c2, f1, f2):
    """Params and MACs of LeNet-5 at any widths, by hand."""
    params = c1 * 9 + c1 + c2 * c1 * 9 + c2 + f1 * c2 * 25 + f1 + f2 * f1 + f2 + 10 * f2 + 10
    return params, 26 * 26 * 9 * c1 + 11 * 11 * 9 * c1 * c2 + 25 * c2 * f1 + f1 * f2 + 10 * f2


def test_the_reference_has_the_assignments_params_and_macs():
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


def test_batchnorm_costs_nothing_and_folding_it_saves_its_params():
    net = LeNet5(batch_norm=True).eval()
    images = torch.randn(2, 1, 28, 28)
    folded = fold_batchnorm(net, trace(net, images))
    assert count(net, images).macs == count(folded, images).macs == 199_968
    assert count(folded, images) == count(LeNet5(), images)


def test_counting_leaves_no_trace_in_the_model():
    net = LeNet5().train()
    keys = list(net.state_dict())
    count(net, torch.randn(1, 1, 28, 28))
    assert list(net.state_dict()) == keys and net.training
    assert not any(m._forward_hooks for m in net.modules())


def test_layers_that_the_count_leaves_out_are_listed():
    net = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 2))
    assert uncounted(net) == {"0": "Embedding"}


def test_a_slower_network_measures_slower_and_one_against_itself_the_same():
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


def test_nothing_to_time_is_an_error():
    with pytest.raises(PruningError, match="no model to time"):
        time_forward({}, torch.randn(1))
