"""What all packages share: modules, nested tensors, comparison, processes, files."""

from typing import TYPE_CHECKING

from pruning.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from pruning.utils.modules import fresh_weights

__all__ = ["fresh_weights"]

__getattr__ = lazy_exports(__name__, __file__)
