"""Structured pruning for PyTorch: trace, score, plan, apply, train; then save.

Eight functions do the work:

>>> import tempfile, torch
>>> from torch import nn
>>> import pruning
>>> _ = torch.manual_seed(0)
>>> net = nn.Sequential(
...     nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3)
... )
>>> images, classes = torch.randn(16, 1, 8, 8), torch.arange(16) % 3
>>> batches = [(images, classes)]

`trace` finds the channel groups, and `doctor` says what pruning them would free:

>>> pruning.trace(net, images).widths
{'0': 8}
>>> pruning.doctor(net, images).groups[0].reads
['4']

`prune` removes channels within a budget, and checks that the smaller model computes what it should:

>>> step = pruning.prune(net, images, pruning.Budget(macs="50%"), score="l2")
>>> step.plan.widths, step.after.macs <= step.before.macs / 2
({'0': 4}, True)

`finetune` trains what is left; `slim` is all three stages of Network Slimming:

>>> once = pruning.training.TrainConfig(epochs=1, lr=0.01)
>>> small = pruning.finetune(step.model, batches, once)
>>> small.training
False
>>> config = pruning.SlimConfig(pruning.Budget(macs="50%"), once, pruning.stages.PruneConfig(1, once), once)
>>> result = pruning.slim(net, batches, config=config, validate=batches, log=lambda line: None)
>>> pruning.trace(result.model, images).widths
{'0': 4}

`sensitivity` measures what each group loses when it alone is narrowed:

>>> curves = pruning.sensitivity(net, images, batches, widths=2)
>>> sorted({point.group for point in curves.points})
['0']

`export` writes a file for another runtime; `save` and `load` keep the model itself:

>>> with tempfile.TemporaryDirectory() as folder:
...     exported = pruning.export(small, f"{folder}/small.pt2", images, "pt2")
...     pruning.save(f"{folder}/small.pth", small)
...     again = pruning.load(f"{folder}/small.pth", lambda: net)
>>> torch.equal(again(images), small(images))
True

Six types go with them: `Budget` and `LatencyBudget` say what the result may cost, `Trace` and `Plan` what
was found and what each group keeps, `SlimConfig` how to train, and `PruningError` what was wrong. All else
is reached through its package, such as `pruning.surgery.fold_batchnorm`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from pruning.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from pruning.checkpoint import load, save
    from pruning.deploy.export import export
    from pruning.errors import PruningError
    from pruning.graph.groups import Trace
    from pruning.graph.plan import Plan
    from pruning.planning.budget import Budget, LatencyBudget
    from pruning.planning.sensitivity import sensitivity
    from pruning.report.diagnose import doctor
    from pruning.stages.config import SlimConfig
    from pruning.stages.finetune import finetune
    from pruning.stages.prune import prune
    from pruning.stages.slim import slim
    from pruning.tracing.trace import trace

__all__ = [
    "Budget",
    "LatencyBudget",
    "Plan",
    "PruningError",
    "SlimConfig",
    "Trace",
    "doctor",
    "export",
    "finetune",
    "load",
    "prune",
    "save",
    "sensitivity",
    "slim",
    "trace",
]

#: Names that `pruning` itself had before its packages, by where they are now. They still work.
_MOVED = {
    "checkpoint": ("provenance",),
    "deploy.onnx_rewrite": ("Optimized", "optimize"),
    "deploy.quantize": ("quantize",),
    "deploy.runtimes": ("Exported",),
    "deploy.timing": ("Latency", "TimeRatio", "time_forward", "time_ratio"),
    "errors": ("CheckpointError", "ExportError", "TrainingDiverged"),
    "graph.groups": ("Group",),
    "planning.cost": ("Cost", "CostModel", "count", "uncounted"),
    "planning.curves": ("Sensitivity",),
    "planning.search": ("plan_within",),
    "planning.sensitivity": ("joint",),
    "report.diagnose": ("Diagnosis",),
    "stages.config": ("PruneConfig",),
    "stages.finetune": ("tune",),
    "stages.prune": ("Step",),
    "stages.run": ("Run",),
    "stages.feasibility": ("feasible", "reachable"),
    "stages.slim": ("Slimmed",),
    "stages.scale_pull": ("ScalePull",),
    "stages.sparsify": ("sparsify",),
    "surgery.apply": ("apply", "channel_constants"),
    "surgery.batchnorm": ("equalize", "fold_batchnorm", "recalibrate"),
    "surgery.layer_removal": ("Removable", "removable", "without_layer"),
    "surgery.verify": ("verify",),
    "training.config": ("TrainConfig",),
    "training.distillation": ("distillation",),
    "training.fake_quantize": ("Rounding",),
    "training.loop": ("fit",),
    "training.losses": ("accuracy", "cross_entropy"),
    "utils.modules": ("fresh_weights",),
}


_exported = lazy_exports(__name__, __file__)


def __getattr__(name: str) -> object:
    for module, names in _MOVED.items():
        if name in names:
            return getattr(import_module(f"pruning.{module}"), name)
    return _exported(name)
