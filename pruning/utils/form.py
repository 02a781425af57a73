"""What models of the same layers and sizes have in common."""

from __future__ import annotations

from collections.abc import Hashable

from torch import nn
from torch.nn.parameter import is_lazy


def form_of(model: nn.Module) -> Hashable:
    """Return what does not depend on the values of a model's tensors.

    It is equal for two models with modules of the same types, by the same names, and with parameters and
    buffers of the same sizes, types and devices, of which the same ones are shared and the same ones frozen.

    >>> one, other = nn.Linear(2, 3), nn.Linear(2, 3)
    >>> form_of(one) == form_of(other), form_of(one) == form_of(nn.Linear(2, 4))
    (True, False)
    """
    first: dict[int, int] = {}
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return (
        tuple((name, type(module)) for name, module in model.named_modules(remove_duplicate=False)),
        tuple(
            (
                name,
                None if is_lazy(x) else x.shape,
                x.dtype,
                x.device,
                x.requires_grad,
                first.setdefault(id(x), place),
            )
            for place, (name, x) in enumerate(tensors)
        ),
    )
