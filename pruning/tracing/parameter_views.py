"""Find the parameter that a tensor is a view of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning.utils.work import ComputedFromParameters


@dataclass(frozen=True)
class ParameterView:
    """A parameter that a tensor is, or is a view of.

    Attributes:
        module, attribute: names of the module that owns the parameter, and of its attribute.
        dims: by dimension of the tensor, the dimension of the parameter that it is, or the number of a span.
        spans: numbers of neighboring dimensions of the parameter that dimensions of the tensor hold together,
            as in `Rule`; empty if each holds one.
        part: of a tensor that holds a part of one dimension alone, this dimension of the parameter, the first
            position and the number of positions.
    """

    module: str
    attribute: str
    dims: dict[int, int]
    part: tuple[int, int, int] | None = None
    spans: tuple[int, ...] = ()

    def positions(self, dim: int) -> slice:
        """Return the positions along a dimension of the parameter that the tensor holds."""
        if self.part is None or self.part[0] != dim:
            return slice(None)
        return slice(self.part[1], self.part[1] + self.part[2])

    @property
    def full_name(self) -> str:
        """The name of the parameter in the model."""
        return f"{self.module}.{self.attribute}".lstrip(".")


class Weights:
    """Find the parameters of a model that tensors are views of, by their memory.

    Args:
        model: the model that runs.

    Attributes:
        computed: tells tensors that depend on parameters alone.
    """

    def __init__(self, model: nn.Module):
        self.modules = dict(model.named_modules())
        self.computed = ComputedFromParameters(model)
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
        merged = _spans(parameter, tensor) if {*strides.values()} - {*dims.values()} else None
        if merged is not None and parameter.is_contiguous():
            return ParameterView(module, attribute, merged[0], spans=merged[1])
        return ParameterView(module, attribute, dims)

    def parameter(self, place: ParameterView) -> Tensor:
        """Return the parameter that a tensor is a view of."""
        return self.modules[place.module].get_parameter(place.attribute)

    def is_parameter(self, name: str) -> bool:
        """Whether a name is that of a parameter, not of a buffer."""
        owner, _, attribute = name.rpartition(".")
        return attribute in self.modules[owner]._parameters

    def find_part(self, tensor: Tensor) -> ParameterView | None:
        """Return the parameter of which a tensor is a view, whole or with a part of one dimension alone.

        >>> layer = nn.MultiheadAttention(4, 2)
        >>> Weights(layer).find_part(layer.in_proj_weight[4:].T)
        ParameterView(module='', attribute='in_proj_weight', dims={0: 1, 1: 0}, part=(0, 4, 8), spans=())
        """
        if (whole := self.find(tensor)) is not None:
            return whole
        module, attribute, parameter = self._by_memory.get(_memory(tensor), ("", "", None))
        if parameter is None or not parameter.is_contiguous() or not tensor.numel():
            return None
        offset = int(tensor.storage_offset()) - int(parameter.storage_offset())
        for part, size in enumerate(parameter.shape):
            first, rest = divmod(offset, parameter.stride(part))
            others = {
                (n, parameter.stride(d)): d for d, n in enumerate(parameter.shape) if d != part and n > 1
            }
            dims: dict[int, int] = {}
            for d, n in enumerate(tensor.shape):
                if (n, tensor.stride(d)) in others:
                    dims[d] = others[n, tensor.stride(d)]
                elif tensor.stride(d) == parameter.stride(part) and first + n <= size:
                    dims[d] = part
            count = tensor.numel() * size // parameter.numel()
            if (
                not rest
                and first >= 0
                and len(set(dims.values())) == len(dims) == parameter.ndim == tensor.ndim
            ):
                return ParameterView(module, attribute, dims, (part, first, count))
        return None


def _spans(parameter: Tensor, tensor: Tensor) -> tuple[dict[int, int], tuple[int, ...]] | None:
    """Return which dimensions of a tensor are which spans of dimensions of a parameter, and their lengths.

    >>> _spans(weight := torch.zeros(6, 2, 3), weight.view(1, 6, 6).mT)
    ({2: 0, 1: 1}, (1, 2))
    """
    wide = sorted(
        (d for d, n in enumerate(tensor.shape) if n > 1), key=lambda d: tensor.stride()[d], reverse=True
    )
    spans, end, stride = list[int](), parameter.ndim, 1
    for d in reversed(wide):
        first, size = end, 1
        while first and (size < tensor.shape[d] or parameter.shape[first - 1] == 1):
            first -= 1
            size *= parameter.shape[first]
        if size != tensor.shape[d] or tensor.stride(d) != stride:
            return None
        spans.insert(0, end - first)
        end, stride = first, stride * size
    return ({d: number for number, d in enumerate(wide)}, tuple(spans)) if wide and not end else None


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
