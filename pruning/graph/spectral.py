"""Spectral norm, in both APIs of torch: a weight W / σ with σ = uᵀ W v (Miyato et al., arXiv 1802.05957).

In eval mode u and v are constants, and σ is what they give: that of the dense weight must stay the divisor of
the narrow one. So W is narrowed, u and v are its own singular vectors, and v is scaled until uᵀ W v is the
former σ. In training mode torch's power iteration starts from these vectors and normalizes them, so σ becomes
the norm of the narrow weight: the layer stays as Lipschitz as spectral norm lets it be.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

#: Power iterations for the singular vectors of a narrowed weight; training goes on with these.
_ITERATIONS = 20


@dataclass(frozen=True)
class Spectral:
    """The parts of a spectral norm.

    Attributes:
        layer, name: the layer, and the weight that it computes.
        holder, original: the module that holds W, and the name of W there.
        vectors, u, v: the module that holds u and v, and their names there.
        dim: the dimension of W that becomes the rows of the matrix.
    """

    layer: nn.Module
    name: str
    holder: nn.Module
    original: str
    vectors: nn.Module
    u: str
    v: str
    dim: int

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.movedim(self.dim, 0).flatten(1)

    def _sigma(self) -> Tensor:
        matrix = self._matrix(self.holder.get_parameter(self.original).detach())
        u, v = (self.vectors.get_buffer(name) for name in (self.u, self.v))
        return torch.dot(u, torch.mv(matrix, v))

    def weight(self) -> Tensor:
        """Return the weight that the layer computes in eval mode; unlike an access, it changes no vector."""
        return self.holder.get_parameter(self.original).detach() / self._sigma()

    def set_weight(self, value: Tensor) -> None:
        """Let the layer compute this weight, of any shape, in eval mode, in place."""
        sigma, old = self._sigma(), self.holder.get_parameter(self.original)
        new = value * sigma
        if not new.is_meta and not new.any():
            new = torch.full_like(new, 1e-12)  # the zero matrix has no singular vectors, and 0 / 0 is NaN
        u, v = _singular_vectors(self._matrix(new))
        v = v * (sigma / torch.dot(u, torch.mv(self._matrix(new), v)))
        setattr(self.holder, self.original, nn.Parameter(new, requires_grad=old.requires_grad))
        setattr(self.vectors, self.u, u)
        setattr(self.vectors, self.v, v)
        if self.holder is self.layer:  # the older API sets the weight before each pass
            setattr(self.layer, self.name, value)


def _singular_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return nearly the singular vectors of the largest singular value, as power iteration finds them."""
    if matrix.is_meta:
        return matrix.new_empty(len(matrix)), matrix.new_empty(matrix.shape[1])
    u = v = F.normalize(matrix[matrix.square().sum(1).argmax()], dim=0)  # not orthogonal to all rows
    for _ in range(_ITERATIONS):
        u = F.normalize(torch.mv(matrix, v), dim=0)
        v = F.normalize(torch.mv(matrix.T, u), dim=0)
    return u, v


def spectral_norm(layer: nn.Module, name: str) -> Spectral | None:
    """Return the spectral norm by which a layer computes one of its tensors; None if it does not.

    >>> layer = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))
    >>> half, found = layer.eval().weight[:2], spectral_norm(layer, "weight")
    >>> found.set_weight(half.detach())
    >>> torch.allclose(layer.weight, half), spectral_norm(layer, "bias")
    (True, None)
    """
    if parametrize.is_parametrized(layer, name):
        holder = layer.get_submodule(f"parametrizations.{name}")
        parts = [*holder.children()]
        if len(parts) == 1 and isinstance(part := parts[0], _SpectralNorm) and hasattr(part, "_u"):
            return Spectral(layer, name, holder, "original", part, "_u", "_v", part.dim)
        return None
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm) and hook.name == name:
            names = f"{name}_orig", layer, f"{name}_u", f"{name}_v"
            return Spectral(layer, name, layer, *names, hook.dim)
    return None


def has_spectral_hook(layer: nn.Module, name: str) -> bool:
    """Whether a layer computes a tensor by the older spectral norm of torch.

    >>> has_spectral_hook(nn.utils.spectral_norm(nn.Linear(3, 4)), "weight")
    True
    """
    return any(isinstance(h, SpectralNorm) and h.name == name for h in layer._forward_pre_hooks.values())
