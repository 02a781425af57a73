"""An optimizer that is carried over to the pruned model takes the steps that it takes in the dense one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pruning import Budget, Plan, PruningError, prune, trace
from pruning.surgery.apply import apply
from pruning.surgery.optimizer_state import transfer

pytestmark = pytest.mark.quick

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}
KEPT = (0, 2, 3, 6)


def network():
    """Return a network whose channels 1, 4, 5, 7 of the first layer are dead: no gradient reaches them."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(16, 3),
    ).double()  # fmt: skip
    dead = [i for i in range(8) if i not in KEPT]
    with torch.no_grad():
        for tensor in (net[0].weight, net[0].bias, net[1].weight, net[1].bias):
            tensor[dead] = 0
        net[3].weight[:, dead] = 0
    return net


def trained(net, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(5, 2, 6, 6, generator=generator, dtype=torch.double)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), torch.arange(5) % 3).backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_next_steps_are_those_of_the_dense_model(name):
    dense = network()
    x = torch.randn(2, 2, 6, 6, dtype=torch.double)
    optimizer = OPTIMIZERS[name](dense.parameters())
    trained(dense, optimizer, 3, seed=1)
    traced, plan = trace(dense, x), Plan({"0": KEPT})
    small = apply(dense, traced, plan).train()
    other = OPTIMIZERS[name](copy.deepcopy(dense).parameters())  # a second optimizer for the dense model
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    transfer(optimizer, dense, small, traced, plan)
    dense = copy.deepcopy(dense)
    for group, own in zip(other.param_groups, [list(dense.parameters())], strict=True):
        states = [other.state[p] for p in group["params"]]
        group["params"] = own
        other.state.clear()
        other.state.update({p: s for p, s in zip(own, states, strict=True) if s})
    trained(dense, other, 2, seed=2)
    trained(small, optimizer, 2, seed=2)
    expected = apply(dense, traced, plan)
    for key, value in expected.state_dict().items():
        assert torch.allclose(value, small.state_dict()[key], rtol=1e-9, atol=1e-12), key


def test_settings_groups_and_the_schedule_stay():
    net, x = network(), torch.randn(2, 2, 6, 6, dtype=torch.double)
    groups = [{"params": net[0].parameters(), "lr": 0.3}, {"params": [*net[3].parameters(), net[6].weight]}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    trained(net, optimizer, 1, seed=1)
    schedule.step()
    step = prune(net, x, Budget(channels="50%"), score="l2")
    transfer(optimizer, net, step.model, step.trace, step.plan)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 3]
    assert [group["lr"] for group in optimizer.param_groups] == [0.15, 0.05]
    trained(step.model.train(), optimizer, 1, seed=2)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.075
    own = {id(parameter) for parameter in step.model.parameters()}
    assert all(id(p) in own for group in optimizer.param_groups for p in group["params"])


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


def test_momenta_of_a_weight_that_is_multiplied_are_divided():
    torch.manual_seed(0)
    net, x = Attending().double(), torch.randn(2, 5, 8, dtype=torch.double)
    traced = trace(net, x)
    name = next(name for name, group in traced.groups.items() if group.is_summed)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    net(x).square().sum().backward()
    optimizer.step()
    dense = {key: optimizer.state[p] for key, p in net.named_parameters()}
    plan = Plan({name: (0, 2)})
    small = apply(net, traced, plan)
    transfer(optimizer, net, small, traced, plan)
    rows = [0, 2, 4, 6] if small.q.weight.shape[0] == 4 else range(8)
    factor = (small.q.weight / net.q.weight[rows]).mean().item()  # 1 / √2 of the widths
    assert factor == pytest.approx(2**-0.5) or factor == pytest.approx(2**0.5)
    for key, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
        expected = dense["q.weight"][key][rows] / factor**power
        assert torch.allclose(optimizer.state[small.q.weight][key], expected)
        assert torch.allclose(optimizer.state[small.k.weight][key], dense["k.weight"][key][rows])


def test_states_of_other_shapes_start_anew():
    net, x = network(), torch.randn(2, 2, 6, 6, dtype=torch.double)
    optimizer = torch.optim.Adafactor(net.parameters())
    trained(net, optimizer, 1, seed=1)
    step = prune(net, x, Budget(channels="50%"), score="l2")
    transfer(optimizer, net, step.model, step.trace, step.plan)
    assert step.model[6].weight not in optimizer.state
    trained(step.model.train(), optimizer, 2, seed=2)


def test_an_optimizer_of_another_model_is_refused():
    net, x = network(), torch.randn(2, 2, 6, 6, dtype=torch.double)
    step = prune(net, x, Budget(channels="50%"), score="l2")
    with pytest.raises(PruningError, match=r"shape \(8, 2, 3, 3\) that is none of Sequential"):
        transfer(torch.optim.SGD(network().parameters(), 0.1), net, step.model, step.trace, step.plan)
