"""SOAP with one matrix for all parameters: an optimizer for very small networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pruning.errors import PruningError

#: Most parameters; two matrices of float32 with so many rows and columns take 128 MiB, and while the
#: eigenvectors are found a few of float64 with 128 MiB each.
LARGEST = 4096
#: Share by which what two parameters' gradients have in common is reduced.
SHRINKAGE = 1e-3
#: Smallest second moment along an axis, as a share of the largest. With float32 a projection has an error
#: of about 1e-7 of the largest, which must stay small beside the root of the second moment: 1e-4.
FLOOR = 1e-8


def require_small(params: Iterable[Tensor], budget: int | None = None) -> None:
    """Raise `PruningError` unless a network is small enough for `Soap` once its params meet a budget."""
    size = sum(p.numel() for p in params if p.ndim > 1)
    size = size if budget is None else min(size, budget)
    if size > LARGEST:
        raise PruningError(
            f"the optimizer soap is for networks of at most {LARGEST:,} parameters, and this one may keep "
            f"{size:,}: take sgd, or slim with a budget of params"
        )


class Soap(torch.optim.Optimizer):
    """Adam in the eigenbasis of the gradients' second moments.

    SOAP (Vyas et al., arXiv 2409.11321) keeps such a basis for the rows and one for the columns of
    every weight. A pruned network can be small enough for the thing that these approximate: the
    matrix of all parameters by all parameters (full-matrix AdaGrad: Duchi et al., JMLR 2011), which
    also knows how one layer's weights depend on another's.

    With gradient g, mean m <- momentum m + (1 - momentum) g, and products P <- memory P +
    (1 - memory) g g^T, both corrected for their bias as in Adam, a step is

        p <- p - lr B (B^T m) / (sqrt(max(v, FLOOR max(v))) + 1e-8),    v <- memory v + (1 - memory) (B^T g)^2

    B is the identity at first, so that the first steps are Adam's. After every max(10, n // 10) steps, of
    n parameters, B and v are replaced by the eigenvectors and eigenvalues of P with its off-diagonal
    elements times 1 - SHRINKAGE.

    Rounding does not decide where this goes. P has at most as many non-zero eigenvalues as there were
    steps: the others would be rounding errors, their eigenvectors arbitrary, and a division by the roots
    would amplify what rounding leaves of m along them. Shrinkage towards the diagonal (Schaefer &
    Strimmer, Stat. Appl. Genet. Mol. Biol. 4:32, 2005) gives these directions SHRINKAGE times what Adam
    knows of them; an eigenvalue is therefore at least SHRINKAGE times the smallest diagonal element.
    Differences still grow where the training itself amplifies them, at rates far above the default: on
    one of three noise-free regressions, ends at 0.3 and 1, all below 1e-8, differed by factors of 5 and 6.

    A step costs a few products of P with a vector. The eigenvectors, in double precision, are found so
    seldom that they cost about as much again: together 2.6 ms of one CPU thread a step for 750 parameters,
    11 ms for 1,500.

    Args:
        params: of one floating-point device; groups may differ in `weight_decay`.
        lr: about how far a parameter moves in a step; 0.03 to 0.06 were best for small CNNs.
        momentum: decay of the mean of the gradients.
        memory: decay of the mean of their products. It has to outlast the fall of the gradients: where v
            falls faster than `lr` does, steps grow again as the loss falls (Reddi et al., arXiv
            1904.09237), and small differences grow with them. At 0.98 a noise-free regression did so.
        weight_decay: with the effect that it has in SGD with the same momentum, but not part of the
            gradients (Loshchilov & Hutter, arXiv 1711.05101).

    Raises `PruningError` for more than `LARGEST` weights; biases and scales of norms come on top.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.05,
        momentum: float = 0.9,
        memory: float = 0.99,
        weight_decay: float = 0.0,
    ):
        defaults = {"lr": lr, "momentum": momentum, "memory": memory, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        require_small(self._params)

    @property
    def _params(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, with the gradients that the parameters have; those without stand for zeros."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params, settings = self._params, self.param_groups[0]
        momentum, memory = settings["momentum"], settings["memory"]
        gradient = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in params]
        )
        state = self.state[params[0]]
        if not state:
            state.update(_start(gradient))
        state["steps"] += 1
        steps = state["steps"]

        state["products"].mul_(memory).addr_(gradient, gradient, alpha=1 - memory)
        state["mean"].lerp_(gradient, 1 - momentum)
        due = steps % max(10, len(gradient) // 10) == 0
        if not (due and self._turn(state)):
            turned = state["basis"].T.mv(gradient)
            state["square"].mul_(memory).addcmul_(turned, turned, value=1 - memory)
        mean = state["basis"].T.mv(state["mean"]) / (1 - momentum**steps)
        square = state["square"] / (1 - memory**steps)
        square = square.clamp(min=FLOOR * square.max())
        update = state["basis"].mv(mean / (square.sqrt() + 1e-8))

        parts = iter(update.split([p.numel() for p in params]))
        for group in self.param_groups:
            shrink = 1 - group["lr"] * group["weight_decay"] / (1 - momentum)
            for p in group["params"]:
                p.mul_(shrink).sub_(next(parts).view(p.shape), alpha=group["lr"])
        return loss

    @staticmethod
    def _turn(state: dict[str, Any]) -> bool:
        """Find the eigenbasis of the shrunk products, and the second moments along its axes: the eigenvalues.

        False, and all stays, where there is none: of products that are not finite, of which the loss
        will tell, or where the decomposition does not converge, as it can with many equal eigenvalues.
        """
        if not torch.isfinite(state["products"]).all():
            return False
        shrunk = state["products"].double()
        shrunk.mul_(1 - SHRINKAGE).diagonal().div_(1 - SHRINKAGE)
        try:
            values, basis = torch.linalg.eigh(shrunk)
        except torch.linalg.LinAlgError:
            return False
        state["basis"], state["square"] = basis.float(), values.clamp_(min=0).float()
        return True


def _start(gradient: Tensor) -> dict[str, Any]:
    matrix = gradient.new_zeros(len(gradient), len(gradient))
    return {
        "steps": 0,
        "mean": torch.zeros_like(gradient),
        "square": torch.zeros_like(gradient),
        "products": matrix,
        "basis": torch.eye(len(gradient), out=torch.empty_like(matrix)),
    }
