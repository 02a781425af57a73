"""Prune with torch-pruning's own high-level pruners, for comparison.

Stage 1 and the iterations use the same training loop, data and number of epochs as ours; only the
choice of channels differs. torch-pruning takes a share of channels instead of a budget, so its
pruner takes small steps until the costs are within the budget.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from pruning import Budget, PruningError, SlimConfig, trace
from pruning.graph.layers import layer_width
from pruning.planning import Cost, CostModel
from pruning.training import cross_entropy

#: The pruners of torch-pruning; see `Peer`.
KINDS = ("bn-scale", "magnitude", "taylor")
#: `reg` of BNScalePruner: its documented value.
REGULARIZATION = 1e-5
#: Number of steps in which a pruner would remove all channels.
STEPS = 200


class Peer:
    """A pruner of torch-pruning, which changes a model in place.

    Args:
        kind: `bn-scale` (BNScalePruner with BNScaleImportance), `magnitude`
            (GroupMagnitudeImportance) or `taylor` (GroupTaylorImportance), each with its documented
            defaults.
        calibration: batches for the gradients of `taylor`.
        ranking: `global` compares the channels of all layers, `group` removes the same share of each,
            `isomorphic` compares the channels of layers whose groups have the same form (Fang et al.,
            Isomorphic Pruning, ECCV 2024, arXiv 2407.04616).
    """

    def __init__(
        self,
        kind: str,
        model: nn.Module,
        example: Tensor,
        calibration: Iterable[tuple[Any, Any]] = (),
        ranking: str = "global",
    ):
        import torch_pruning as tp

        self.kind, self.model, self.example = kind, model, example
        self.calibration = list(calibration)
        self.cost_model = CostModel(model, trace(model, example))
        outputs = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
        common: dict[str, Any] = {
            "global_pruning": ranking in ("global", "isomorphic"),
            "isomorphic": ranking == "isomorphic",
            "pruning_ratio": 1.0,
            "iterative_steps": STEPS,
            "ignored_layers": outputs,
        }
        if kind == "bn-scale":
            importance = tp.importance.BNScaleImportance()
            self.pruner = tp.pruner.BNScalePruner(model, example, importance, reg=REGULARIZATION, **common)
        else:
            make = {
                "magnitude": tp.importance.GroupMagnitudeImportance,
                "taylor": tp.importance.GroupTaylorImportance,
            }
            self.pruner = tp.pruner.BasePruner(model, example, make[kind](), **common)

    def cost(self) -> Cost:
        """Return the cost of the model at its present widths, BatchNorm folded."""
        return self.cost_model(
            {name: layer_width(self.model.get_submodule(name), "out") for name in self.cost_model.groups}
        )

    def reach(self, budget: Budget) -> None:
        """Take steps until the model meets the budget; raises `PruningError` if it never does."""
        for _ in range(STEPS):
            if not budget.excess(self.cost()):
                return
            if self.kind == "taylor":
                self.model.zero_grad()
                for inputs, targets in self.calibration:
                    cross_entropy(self.model, inputs, targets).backward()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.pruner.step()
        if budget.excess(self.cost()):
            raise PruningError(f"torch-pruning's {self.kind} pruner ends at {self.cost()}, over {budget}")

    def iterate(self, config: SlimConfig, recover: Callable[[], Any]) -> None:
        """Reach the budget in the number of steps of a pipeline, and call `recover` after each."""
        dense, steps = self.cost(), config.prune.iterations
        asked = config.counts.resolve(dense)
        for step in range(1, steps + 1):
            self.reach(asked.share(dense, step, steps))
            recover()


def regularized(loss: Callable[..., Tensor], strength: float = REGULARIZATION) -> Callable[..., Tensor]:
    """Add strength · Σ|γ| to a loss; its gradient is the one that `BNScalePruner.regularize` adds."""

    def total(model: nn.Module, inputs: Any, targets: Any) -> Tensor:
        norms = [m.weight for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        return loss(model, inputs, targets) + strength * sum(weight.abs().sum() for weight in norms)

    return total


def cost(model: nn.Module, example: Tensor) -> Cost:
    """Count params and MACs with BatchNorm folded."""
    cost_model = CostModel(model, trace(model, example))
    return cost_model(cost_model.full)
