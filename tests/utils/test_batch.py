"""The batch of example inputs: found wherever it lies, and costs that agree with torch's flop counter."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pruning import Budget, PruningError, prune, trace
from pruning.planning import CostModel, count
from pruning.surgery import recalibrate
from pruning.utils.batch import find_batch, usual_batch

pytestmark = pytest.mark.quick


class Images(nn.Module):
    """Takes a list of images, as detection models do."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2)

    def forward(self, images):
        return self.head(torch.relu(self.norm(self.stem(torch.stack(images)))).mean((2, 3)))


class Timed(nn.Module):
    """Takes a time step before the images, as the networks of diffusion models do."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)

    def forward(self, step, x):
        return self.head(torch.relu(self.norm(self.stem(x * step.reshape(-1, 1, 1, 1)))))


class Sequence(nn.Module):
    """Takes (time, batch, features)."""

    def __init__(self):
        super().__init__()
        self.into, self.steps, self.head = nn.Linear(5, 8), nn.GRU(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.steps(torch.relu(self.into(x)))[0][-1])


class Graph(nn.Module):
    """Takes the nodes of one graph and their adjacency: there is no batch."""

    def __init__(self):
        super().__init__()
        self.into, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, nodes, adjacency):
        return self.head(adjacency @ torch.relu(self.into(adjacency @ nodes)))


CASES = {
    "images": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(4, 3, 8, 8), 4),
    "one image": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(1, 3, 8, 8), 1),
    "list": (Images, ([torch.randn(3, 8, 8) for _ in range(3)],), 3),
    "list of one": (Images, ([torch.randn(3, 8, 8)],), 1),
    "scalar step": (Timed, (torch.tensor(0.5), torch.randn(4, 3, 8, 8)), 4),
    "step of one": (Timed, (torch.tensor([0.5]), torch.randn(4, 3, 8, 8)), 4),
    "step of each": (Timed, {"step": torch.rand(4), "x": torch.randn(4, 3, 8, 8)}, 4),
    "time first": (Sequence, torch.randn(5, 2, 5), 2),
    "as many steps as examples": (Sequence, torch.randn(3, 3, 5), 3),
    "graph": (Graph, (torch.randn(6, 4), torch.rand(6, 6)), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_the_batch_is_found_and_costs_are_those_of_one_example(name):
    make, inputs, size = CASES[name]
    torch.manual_seed(0)
    model = make().eval()
    batch = find_batch(model, inputs)
    assert batch.size == size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs) if isinstance(inputs, dict) else model(
            *(inputs if isinstance(inputs, tuple) else [inputs])
        )
    found = count(model, inputs)
    if name not in ("time first", "as many steps as examples"):  # the counter has no formula for a GRU
        assert found.macs == round(counter.get_total_flops() / 2 / size)
    traced = trace(model, inputs)
    cost_model = CostModel(model, traced)
    assert traced.batch == batch
    assert abs(cost_model(cost_model.full).macs - found.macs) <= 1


@pytest.mark.parametrize("name", ["images", "list", "scalar step", "step of each", "time first"])
def test_examples_are_selected_where_they_lie(name):
    make, inputs, size = CASES[name]
    torch.manual_seed(0)
    model = make().eval()
    batch = find_batch(model, inputs)
    call = (lambda x: model(**x)) if isinstance(inputs, dict) else (lambda x: model(*x))
    given = inputs if isinstance(inputs, dict | tuple) else (inputs,)
    one, more = batch.first(given if given is inputs else inputs, 1), batch.resized(inputs, size + 2)
    one, more = (x if isinstance(x, dict | tuple) else (x,) for x in (one, more))
    whole = call(given)
    torch.testing.assert_close(call(one), whole[:1])
    torch.testing.assert_close(call(more), torch.cat([whole, whole[torch.arange(size, size + 2) % size]]))


def test_the_caller_can_state_the_number_of_examples():
    model, nodes = nn.Linear(4, 3), torch.randn(6, 4)
    assert count(model, nodes).macs == 12 and count(model, nodes, batch_size=1).macs == 72
    traced = trace(nn.Sequential(model, nn.ReLU(), nn.Linear(3, 2)), nodes, batch_size=1)
    assert traced.uses["0"].uses == 6
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(PruningError, match="expected a whole number from 1"):
            find_batch(model, nodes, wrong)


def test_statistics_are_taken_anew_behind_a_single_step():
    torch.manual_seed(0)
    model = Timed()
    recalibrate(model, [(torch.tensor([1.0]), torch.randn(16, 3, 8, 8)) for _ in range(3)])
    assert model.norm.num_batches_tracked == 3
    lone = Images()
    before = lone.norm.running_mean.clone()
    recalibrate(lone, [([torch.randn(3, 8, 8)],)])
    assert torch.equal(lone.norm.running_mean, before), "one example does not vary"


@pytest.mark.parametrize("name", ["list of one", "scalar step", "step of one"])
def test_networks_with_such_inputs_are_pruned(name):
    make, inputs, _ = CASES[name]
    torch.manual_seed(0)
    step = prune(make().eval(), inputs, Budget(macs="60%"), score="l2")
    assert step.after.macs <= 0.6 * step.before.macs


def test_the_usual_batch_is_read_off_the_form():
    assert usual_batch(torch.zeros(5, 2)).size == 5
    assert usual_batch((torch.zeros(1), torch.zeros(4, 3))).size == 4
    assert usual_batch(([torch.zeros(3, 4, 4)] * 2,)).size == 2
    assert usual_batch((torch.tensor(1.0),)).size == 1
