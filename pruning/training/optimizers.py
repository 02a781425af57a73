"""SOAP with one matrix for all parameters: an optimizer for very small networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pruning.errors import PruningError

#: Largest number of parameters. At this size two float32 matrices take 128 MiB together, and the
#: eigendecomposition temporarily takes a few float64 matrices of 128 MiB each.
LARGEST = 4096
#: Relative reduction of the off-diagonal second moments.
SHRINKAGE = 1e-3
#: Smallest second moment along an axis, as a share of the largest. A float32 projection has an error of
#: about 1e-7 of the largest; the square root of the second moment, 1e-4 at this bound, is much larger.
FLOOR = 1e-8


def require_small(params: Iterable[Tensor], budget: int | None = None) -> None:
    """Raise `PruningError` if a network has too many parameters for `Soap`, even at a budget of params."""
    size = sum(p.numel() for p in params if p.ndim > 1)
    size = size if budget is None else min(size, budget)
    if size > LARGEST:
        raise PruningError(
            f"the optimizer soap supports networks of at most {LARGEST:,} parameters, and this one may keep "
            f"{size:,}: use sgd, or slim with a smaller budget of params"
        )


class Soap(torch.optim.Optimizer):
    """Adam in the eigenbasis of the gradients' second moments.

    SOAP (Vyas et al., arXiv 2409.11321) keeps one such basis for the rows and one for the columns of
    every weight. They approximate the second-moment matrix of all parameters (full-matrix AdaGrad:
    Duchi et al., JMLR 2011), which also has the correlations between layers. A pruned network can be
    small enough to use that matrix itself.

    With gradient g, mean m <- momentum m + (1 - momentum) g, and products P <- memory P +
    (1 - memory) g g^T, both corrected for their bias as in Adam, a step is

        p <- p - lr B (B^T m) / (sqrt(max(v, FLOOR max(v))) + 1e-8),    v <- memory v + (1 - memory) (B^T g)^2

    B is the identity at first, so the first steps equal Adam's. With n parameters, every max(10, n // 10)
    steps B and v are replaced by the eigenvectors and eigenvalues of P, whose off-diagonal elements are
    first multiplied by 1 - SHRINKAGE.

    This shrinkage keeps rounding errors small. P has at most as many non-zero eigenvalues as steps were
    taken. Without shrinkage the other eigenvalues would be rounding errors and their eigenvectors
    arbitrary, and dividing by their square roots would amplify the rounding errors of m. Shrinkage
    towards the diagonal (Schaefer & Strimmer, Stat. Appl. Genet. Mol. Biol. 4:32, 2005) gives these
    directions SHRINKAGE times Adam's second moments, so every eigenvalue is at least SHRINKAGE times the
    smallest diagonal element. At learning rates far above the default, training itself still amplifies
    small differences: on one of three noise-free regressions the final losses at rates 0.3 and 1, all
    below 1e-8, differed between runs by factors of 5 and 6.

    A step costs a few products of P with a vector. The eigendecomposition, in double precision, costs about
    as much again on average: in total 2.6 ms per step on one CPU thread for 750 parameters, 11 ms for 1,500.

    Args:
        params: floating-point parameters on one device; groups may differ in `weight_decay`.
        lr: approximate change of a parameter per step; 0.03 to 0.06 were best for small CNNs.
        momentum: decay of the mean of the gradients.
        memory: decay of the mean of their products. If v decreases faster than `lr`, steps grow again as
            the loss falls (Reddi et al., arXiv 1904.09237), and so do small differences; this happened
            with 0.98 on a noise-free regression.
        weight_decay: decoupled from the gradients (Loshchilov & Hutter, arXiv 1711.05101), scaled to have
            the same effect as in SGD with the same momentum.

    Raises:
        PruningError: for more than `LARGEST` weights; biases and scales of norms are not counted.
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
        """Take one step; the gradient of a parameter without one counts as 0."""
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
            state.update(_initial_state(gradient))
        state["steps"] += 1
        steps = state["steps"]

        state["products"].mul_(memory).addr_(gradient, gradient, alpha=1 - memory)
        state["mean"].lerp_(gradient, 1 - momentum)
        is_due = steps % max(10, len(gradient) // 10) == 0
        if not (is_due and self._update_basis(state)):
            rotated = state["basis"].T.mv(gradient)
            state["square"].mul_(memory).addcmul_(rotated, rotated, value=1 - memory)
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
    def _update_basis(state: dict[str, Any]) -> bool:
        """Replace basis and second moments by the eigenvectors and eigenvalues of the shrunk products.

        Return False without a change if the products are not finite (the training loop then reports the
        loss), or if the decomposition does not converge, which can happen with many equal eigenvalues.
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


def _initial_state(gradient: Tensor) -> dict[str, Any]:
    matrix = gradient.new_zeros(len(gradient), len(gradient))
    return {
        "steps": 0,
        "mean": torch.zeros_like(gradient),
        "square": torch.zeros_like(gradient),
        "products": matrix,
        "basis": torch.eye(len(gradient), out=torch.empty_like(matrix)),
    }
