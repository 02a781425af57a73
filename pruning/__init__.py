"""Structured pruning for PyTorch: trace, score, plan, apply, train; then save.

>>> from pruning import Budget, prune
>>> step = prune(model, example_inputs, Budget(macs="50%"), score="l2")    # doctest: +SKIP
>>> step.model                                        # a smaller model    # doctest: +SKIP
"""

from pruning.budget import Budget
from pruning.checkpoint import load, provenance, save
from pruning.config import PruneConfig, SlimConfig, TrainConfig
from pruning.cost import Cost, CostModel, Latency, TimeRatio, count, time_forward, time_ratio, uncounted
from pruning.depth import Removable, removable, without_layer
from pruning.doctor import Diagnosis, doctor
from pruning.errors import CheckpointError, ExportError, PruningError, TrainingDiverged
from pruning.export import export, quantize
from pruning.finetune import distillation, finetune
from pruning.forms import Optimized, optimize
from pruning.graph import Group, Trace, trace
from pruning.plan import Plan, plan_within
from pruning.prune import Step, prune
from pruning.runtimes import Exported
from pruning.sensitivity import Sensitivity, joint, sensitivity
from pruning.slimming import Run, Slimmed, reachable, slim, tune
from pruning.sparsify import ScalePull, sparsify
from pruning.surgery import apply, channel_constants, equalize, fold_batchnorm, recalibrate, verify
from pruning.training import accuracy, cross_entropy, fit

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
    "Optimized",
    "Plan",
    "PruneConfig",
    "PruningError",
    "Removable",
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
    "finetune",
    "fit",
    "fold_batchnorm",
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
