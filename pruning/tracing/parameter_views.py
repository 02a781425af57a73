"""Find the parameter that a tensor is a view of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ParameterView:
    """A parameter that a tensor is, or is a view of.

    Attributes:
        module, attribute: names of the module that owns the parameter, and of its attribute.
        dims: by dimension of the tensor, the dimension of the parameter that it is.
    """

    module: str
    attribute: str
    dims: dict[int, int]

    @property
    def full_name(self) -> str:
        """The name of the parameter in the model."""
        return f"{self.module}.{self.attribute}".lstrip(".")


class Weights:
    """Find the parameters of a model that tensors are views of, by their memory.

    Args:
        model: the model that runs.
    """

    def __init__(self, model: nn.Module):
        self.modules = dict(model.named_modules())
        #: Types of modules whose rules this pass has inferred.
        self.inferred: set[type[nn.Module]] = set()
        self._by_memory: dict[int, tuple[str, str, Tensor]] = {}
        for name, module in self.modules.items():
            if isinstance(module, torch.jit.ScriptModule):  # its tensors keep their size
                continue
            for attribute, parameter in module.named_parameters(recurse=False):
                self._by_memory.setdefault(_memory(parameter), (name, attribute, parameter))

    def find(self, tensor: Tensor) -> ParameterView | None:
        """Return the parameter of which a tensor is a view with whole dimensions; None if there is none."""
        module, attribute, parameter = self._by_memory.get(_memory(tensor), ("", "", None))
        if parameter is None or parameter.numel() != tensor.numel():
            return None
        strides = {(n, parameter.stride(d)): d for d, n in enumerate(parameter.shape) if n > 1}
        dims = {
            d: strides[n, tensor.stride(d)]
            for d, n in enumerate(tensor.shape)
            if (n, tensor.stride(d)) in strides
        }
        return ParameterView(module, attribute, dims)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
