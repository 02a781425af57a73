"""Structured pruning for PyTorch: trace, score, plan, apply, train; then save.

>>> from pruning import Budget, prune
>>> step = prune(model, example_inputs, Budget(macs="50%"), score="l2")    # doctest: +SKIP
>>> step.model                                        # a smaller model    # doctest: +SKIP
"""

from pruning.budget import Budget, LatencyBudget
from pruning.check import verify
from pruning.checkpoint import load, provenance, save
from pruning.config import PruneConfig, SlimConfig, TrainConfig
from pruning.cost import Cost, CostModel, count, uncounted
from pruning.curves import Sensitivity
from pruning.depth import Removable, removable, without_layer
from pruning.doctor import Diagnosis, doctor
from pruning.errors import CheckpointError, ExportError, PruningError, TrainingDiverged
from pruning.export import export
from pruning.finetune import distillation, finetune
from pruning.forms import Optimized, optimize
from pruning.graph import Group, Trace
from pruning.grouping import trace
from pruning.losses import accuracy, cross_entropy
from pruning.norms import equalize, fold_batchnorm, recalibrate
from pruning.plan import Plan, plan_within
from pruning.prune import Step, prune
from pruning.quantization import quantize
from pruning.restart import fresh_weights
from pruning.rounding import Rounding
from pruning.run import Run
from pruning.runtimes import Exported
from pruning.sensitivity import joint, sensitivity
from pruning.slimming import Slimmed, feasible, reachable, slim, tune
from pruning.sparsify import ScalePull, sparsify
from pruning.surgery import apply, channel_constants
from pruning.timing import Latency, TimeRatio, time_forward, time_ratio
from pruning.training import fit

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
