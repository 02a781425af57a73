"""What all packages share: modules, nested tensors, comparison, processes, files."""

from pruning.utils.modules import fresh_weights

__all__ = ["fresh_weights"]
