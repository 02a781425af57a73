"""Structured pruning for PyTorch: trace, score, plan, apply, train; then save.

>>> from pruning import Budget, prune
>>> step = prune(model, example_inputs, Budget(macs="50%"), score="l2")    # doctest: +SKIP
>>> step.model                                        # a smaller model    # doctest: +SKIP
"""

from pruning.checkpoint import load, provenance, save
from pruning.deploy.export import export
from pruning.deploy.onnx_rewrite import Optimized, optimize
from pruning.deploy.quantize import quantize
from pruning.deploy.runtimes import Exported
from pruning.deploy.timing import Latency, TimeRatio, time_forward, time_ratio
from pruning.errors import CheckpointError, ExportError, PruningError, TrainingDiverged
from pruning.graph.groups import Group, Trace
from pruning.graph.plan import Plan
from pruning.planning.budget import Budget, LatencyBudget
from pruning.planning.cost import Cost, CostModel, count, uncounted
from pruning.planning.curves import Sensitivity
from pruning.planning.search import plan_within
from pruning.planning.sensitivity import joint, sensitivity
from pruning.report.diagnose import Diagnosis, doctor
from pruning.stages.config import PruneConfig, SlimConfig
from pruning.stages.feasibility import feasible, reachable
from pruning.stages.finetune import finetune, tune
from pruning.stages.prune import Step, prune
from pruning.stages.run import Run
from pruning.stages.slim import Slimmed, slim
from pruning.stages.sparsify import ScalePull, sparsify
from pruning.surgery.apply import apply, channel_constants
from pruning.surgery.batchnorm import equalize, fold_batchnorm, recalibrate
from pruning.surgery.layer_removal import Removable, removable, without_layer
from pruning.surgery.verify import verify
from pruning.tracing.trace import trace
from pruning.training.config import TrainConfig
from pruning.training.distillation import distillation
from pruning.training.fake_quantize import Rounding
from pruning.training.loop import fit
from pruning.training.losses import accuracy, cross_entropy
from pruning.utils.modules import fresh_weights

__all__ = [
    "Budget",
    "CheckpointError",
    "Cost",
    "CostModel",
    "Diagnosis",
    "ExportError",
    "Exported",
    "Group",
    "Latency",
    "LatencyBudget",
    "Optimized",
    "Plan",
    "PruneConfig",
    "PruningError",
    "Removable",
    "Rounding",
    "Run",
    "ScalePull",
    "Sensitivity",
    "SlimConfig",
    "Slimmed",
    "Step",
    "TimeRatio",
    "Trace",
    "TrainConfig",
    "TrainingDiverged",
    "accuracy",
    "apply",
    "channel_constants",
    "count",
    "cross_entropy",
    "distillation",
    "doctor",
    "equalize",
    "export",
    "feasible",
    "finetune",
    "fit",
    "fold_batchnorm",
    "fresh_weights",
    "joint",
    "load",
    "optimize",
    "plan_within",
    "provenance",
    "prune",
    "quantize",
    "reachable",
    "recalibrate",
    "removable",
    "save",
    "sensitivity",
    "slim",
    "sparsify",
    "time_forward",
    "time_ratio",
    "trace",
    "tune",
    "uncounted",
    "verify",
    "without_layer",
]
