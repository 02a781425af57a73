"""Run a model elsewhere: exported files, int8, timing.

`export` and `quantize` are in the files of these names.
"""

from pruning.deploy.export import Export
from pruning.deploy.onnx_rewrite import Optimized, optimize
from pruning.deploy.quantize import Quantized
from pruning.deploy.runtimes import Exported
from pruning.deploy.timing import Latency, TimeRatio, time_forward, time_ratio

__all__ = [
    "Export",
    "Exported",
    "Latency",
    "Optimized",
    "Quantized",
    "TimeRatio",
    "optimize",
    "time_forward",
    "time_ratio",
]
