"""The three stages of slimming, and the folder of a run.

`sparsify`, `prune`, `finetune` and `slim` are defined in the files of the same names.
"""

from typing import TYPE_CHECKING

from pruning.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from pruning.stages.budget_sweep import frontier
    from pruning.stages.config import PruneConfig, SlimConfig
    from pruning.stages.feasibility import feasible, reachable
    from pruning.stages.finetune import tune
    from pruning.stages.frontier_result import Frontier, FrontierPoint
    from pruning.stages.paced_pull import PacedPull
    from pruning.stages.prune import Step
    from pruning.stages.run import Run
    from pruning.stages.scale_pull import ScalePull
    from pruning.stages.scales import ChannelScales
    from pruning.stages.slim import Slimmed

__all__ = [
    "ChannelScales",
    "Frontier",
    "FrontierPoint",
    "PacedPull",
    "PruneConfig",
    "Run",
    "ScalePull",
    "SlimConfig",
    "Slimmed",
    "Step",
    "feasible",
    "frontier",
    "reachable",
    "tune",
]

__getattr__ = lazy_exports(__name__, __file__)
