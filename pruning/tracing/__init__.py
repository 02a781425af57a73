"""Find the channel groups of a model in one forward pass. `trace` is in the file of this name."""

from pruning.tracing.labels import Labels
from pruning.tracing.operation import Operation
from pruning.tracing.operators import register_operator

__all__ = ["Labels", "Operation", "register_operator"]
