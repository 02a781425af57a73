"""A start for fine-tuning between the weights that pruning left and those of a fresh network."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn

from pruning.copies import copied
from pruning.errors import PruningError
from pruning.layers import WEIGHTED


def shrink_and_perturb(model: nn.Module, inherit: float) -> nn.Module:
    """A copy whose weights are partly drawn anew, from torch's global generator.

    A network that starts from trained weights often ends worse than one that starts fresh: it stays
    near where it was. Shrinking the weights and adding fresh ones keeps what was learnt and lets it move
    (Ash and Adams, On Warm-Starting Neural Network Training, NeurIPS 2020). Here each convolution and
    linear layer gets w ← a s w + √(1 − a²) f, where f are fresh weights, s = ‖f‖ / ‖w‖ brings
    the old ones to their size, and a is `inherit`; so the sum has about that size, too.

    Norms and other parameters stay, and so do layers that are frozen or whose weight is computed. The
    network must be trained then: what it computes has changed.

    Args:
        inherit: from 0 (fresh weights) to 1 (the old ones, at the size of fresh ones).

    Raises `PruningError` for another `inherit`.
    """
    if not 0 <= inherit <= 1:
        raise PruningError(f"inherit {inherit}: a share from 0 to 1 is needed")
    changed = copied(model)
    layers: list[Any] = [layer for layer in changed.modules() if isinstance(layer, WEIGHTED)]
    for layer in layers:
        own = dict(layer.named_parameters(recurse=False))
        if "weight" not in own or not own["weight"].requires_grad:
            continue
        fresh = copy.deepcopy(layer)
        fresh.reset_parameters()
        with torch.no_grad():
            ratio = fresh.weight.norm() / own["weight"].norm()
            shrink = inherit * ratio if ratio.isfinite() else 0.0
            for name, drawn in fresh.named_parameters(recurse=False):
                own[name].mul_(shrink).add_(drawn, alpha=math.sqrt(1 - inherit**2))
    return changed
