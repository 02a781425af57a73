"""Decide what each group keeps: budgets, costs, scores, the search for widths.

`sensitivity` is in the file of this name; `scores.BY_NAME` lists the scores.
"""

from typing import TYPE_CHECKING

from pruning.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from pruning.planning.budget import Budget, LatencyBudget
    from pruning.planning.cost import Cost, CostModel, count, deployed_cost, uncounted
    from pruning.planning.curves import Sensitivity
    from pruning.planning.layer_times import LatencyTable
    from pruning.planning.options import PlanOptions
    from pruning.planning.scores import score_channels
    from pruning.planning.search import plan_within
    from pruning.planning.sensitivity import Joint, joint

__all__ = [
    "Budget",
    "Cost",
    "CostModel",
    "Joint",
    "LatencyBudget",
    "LatencyTable",
    "PlanOptions",
    "Sensitivity",
    "count",
    "deployed_cost",
    "joint",
    "plan_within",
    "score_channels",
    "uncounted",
]

__getattr__ = lazy_exports(__name__, __file__)
