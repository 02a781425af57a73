"""Deploy a model: export it to other runtimes, quantize it to int8, and time it.

`export` and `quantize` are defined in the files of the same names.
"""

from typing import TYPE_CHECKING

from pruning.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from pruning.deploy.export import Export
    from pruning.deploy.onnx_rewrite import Optimized, optimize
    from pruning.deploy.quantize import Quantized
    from pruning.deploy.registration import register_runtime
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
    "register_runtime",
    "time_forward",
    "time_ratio",
]

__getattr__ = lazy_exports(__name__, __file__)
