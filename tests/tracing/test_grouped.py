"""Experts whose weights are one tensor: torch's grouped product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pruning import Budget, PruningError, prune, trace

if not hasattr(F, "grouped_mm"):
    pytest.skip("this version of torch has no grouped product", allow_module_level=True)

pytestmark = pytest.mark.quick

EXPERTS, WIDTH, HIDDEN = 3, 8, 16


class Experts(nn.Module):
    """Two layers of experts, of which each token uses the one that its position says."""

    def __init__(self, transposed: bool):
        super().__init__()
        self.transposed = transposed
        sizes = ((2 * HIDDEN, WIDTH), (WIDTH, HIDDEN))
        up, down = (torch.randn(EXPERTS, *(s[::-1] if transposed else s)) / 3 for s in sizes)
        self.up, self.down = nn.Parameter(up), nn.Parameter(down)

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        ends = torch.arange(1, EXPERTS + 1, device=x.device, dtype=torch.int32) * (len(x) // EXPERTS)
        return F.grouped_mm(x, weight if self.transposed else weight.transpose(1, 2), offs=ends)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.multiply(x, self.up).chunk(2, -1)
        return x + self.multiply(F.silu(gate) * up, self.down)


def network(transposed: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, WIDTH), Experts(transposed), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4))


def expected(net: nn.Sequential, kept: dict[str, list[int]], x: Tensor) -> Tensor:
    """Compute a network without channels by a loop over the experts of the dense one."""
    dense, norm, head = net[1], net[2], net[3]
    wide, hidden = torch.tensor(kept["0"]), torch.tensor(kept["1.up"])
    x, made = net[0](x)[:, wide], []
    for rows, up, down in zip(x.chunk(EXPERTS), dense.up, dense.down, strict=True):
        up, down = (up.T, down.T) if dense.transposed else (up, down)
        gate, value = (part[hidden][:, wide] for part in up.chunk(2))
        made.append((F.silu(rows @ gate.T) * (rows @ value.T)) @ down[wide][:, hidden].T)
    y = F.layer_norm(x + torch.cat(made), wide.shape, norm.weight[wide], norm.bias[wide])
    return y @ head.weight[:, wide].T + head.bias


@pytest.mark.parametrize("transposed", [False, True])
def test_all_experts_lose_the_same_channels(transposed):
    net, x = network(transposed), torch.randn(6, 5)
    step = prune(net, x, Budget(macs="60%"), score="l2")
    assert step.trace.groups["1.up"].channels == HIDDEN and not step.left_out
    macs = 5 * WIDTH + 3 * HIDDEN * WIDTH + 4 * WIDTH  # of one token, which uses one expert
    wide, hidden = step.plan.widths["0"], step.plan.widths["1.up"]
    assert (step.before.macs, step.after.macs) == (macs, 5 * wide + 3 * hidden * wide + 4 * wide)
    kept = {name: list(channels) for name, channels in step.plan.keep.items()}
    torch.testing.assert_close(step.model(x), expected(net, kept, x))


def test_widths_are_multiples_of_what_the_product_takes():
    net, x = network(False), torch.randn(6, 5)
    traced = trace(net, x)
    assert {name: group.multiple for name, group in traced.groups.items()} == {"0": 4, "1.up": 4}  # 16 bytes
    step = prune(net, x, Budget(macs="60%"), score="l2", floor=3)
    assert all(width % 4 == 0 for width in step.plan.widths.values())
    with pytest.raises(PruningError, match=r"width 6 of group '1.up': expected a multiple of 4"):
        prune(net, x, Budget(macs="60%"), score="l2", widths={"1.up": 6})
