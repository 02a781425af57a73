"""Fresh weights for a pruned network: what pruning found is its widths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pruning.copies import copied
from pruning.errors import PruningError


def fresh_weights(model: nn.Module) -> nn.Module:
    """A copy of a model whose layers have made their weights anew, as an untrained one has them.

    Every layer draws them by its own `reset_parameters`, from torch's global generator, in the
    order of `model.modules()`. Frozen parameters stay as they are. Small networks can be better
    trained from fresh weights than from those that pruning leaves (Liu et al., Rethinking the
    Value of Network Pruning, ICLR 2019, arXiv 1810.05270).

    Raises `PruningError` for a parameter of a module that has no `reset_parameters`.
    """
    model = copied(model)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    covered: set[int] = set()
    for module in model.modules():
        reset, own = _reset(module), {id(p) for p in module.parameters(recurse=False)}
        if reset is None or (own and own <= covered):
            continue
        covered |= own
        if own and not any(p.requires_grad for p in module.parameters(recurse=False)):
            continue  # the statistics of a frozen norm stay, too
        reset()
        if isinstance(module, nn.MultiheadAttention):  # it does what its projection holds in its own way
            covered |= {id(p) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if name in frozen:
            with torch.no_grad():
                parameter.copy_(frozen[name])
        elif id(parameter) not in covered:
            kind = type(model.get_submodule(name.rpartition(".")[0])).__name__
            raise PruningError(
                f"parameter {name!r} cannot be made anew: {kind} has no reset_parameters. Give it one, "
                "freeze it, or fine-tune the weights that pruning leaves"
            )
    return model


def _reset(module: nn.Module) -> Callable[[], Any] | None:
    """What makes the weights of a module anew; attention's has another name."""
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    return reset if callable(reset) else None
