"""A loss that needs no labels: targets are drawn from what the network itself predicts.

Where a network's own outputs are the targets, the loss is at its minimum and its gradient is 0. With targets
drawn from the predicted distribution, the expected square of the gradient is the Fisher information: the
second derivative of the divergence from the dense network (Martens, JMLR 2020, arXiv 1412.1193).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.utils.modules import call
from pruning.utils.tree import Inputs, tensors

#: Probabilities are kept this far from 0 and 1, so that their logarithms are finite.
LEAST = 1e-6


class SampledLoss:
    """The negative log-likelihood of targets that are drawn from the model's own predictions.

    What outputs predict is read from their values. Tensors (N, classes, ...) whose values lie from 0 to 1
    are probabilities: of one class if they add up to 1 along dimension 1, of each value otherwise. A single
    tensor (N, classes, ...) with other values is logits. All else is taken for the means of normal
    distributions, with the standard deviation of these outputs.

    Args:
        classifier: whether a single output tensor is logits.
        seed: of the draws.

    >>> net = nn.Linear(4, 3)
    >>> bool(SampledLoss()(net, torch.randn(8, 4), None) > 0)
    True
    """

    def __init__(self, classifier: bool = True, seed: int = 0):
        self.classifier = classifier
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, model: nn.Module, inputs: Inputs, targets: object) -> Tensor:
        """Return the loss of a batch: summed over the examples, averaged over the targets of each."""
        outputs = call(model, inputs)
        values = [tensor for tensor in tensors(outputs) if tensor.requires_grad and tensor.ndim]
        if not values:
            raise PruningError(
                "no output of the network depends on its weights, so channels cannot be scored; set "
                "requires_grad=True on the weights, or use the score l1 or l2"
            )
        if not all(bool(torch.isfinite(tensor).all()) for tensor in values):
            raise PruningError(
                "the outputs on the calibration inputs are not finite; check the inputs and the weights"
            )
        return torch.stack([self._loss(x, self._kind(outputs, x)) for x in values]).sum()

    @torch.no_grad()
    def divergence(self, outputs: object, dense: object) -> float:
        """Return the divergence of outputs from a dense model's, of which this loss samples the curvature.

        It is summed over the examples and averaged over the values of each: of classes and probabilities that
        of the predicted distributions, in nats; of other outputs, half the squared difference in standard
        deviations.
        """
        total = 0.0
        for found, wanted in zip(tensors(outputs), tensors(dense), strict=True):
            if wanted.is_floating_point() and wanted.ndim:
                total += _divergence(found.double(), wanted.double(), self._kind(dense, wanted)) * len(wanted)
        return total

    def _kind(self, outputs: object, values: Tensor) -> str:
        """Return what the values of a tensor of the outputs are."""
        if values.ndim > 1 and values.shape[1] > 1:
            if bool(((values >= 0) & (values <= 1)).all()):
                sums = values.detach().float().sum(1)
                is_one = bool(((sums - 1).abs() < 1e-3).all())
                return "classes" if is_one else "probabilities"
            if self.classifier and isinstance(outputs, Tensor):
                return "logits"
        return "values"

    def _loss(self, outputs: Tensor, kind: str) -> Tensor:
        """Return the loss of one tensor of the outputs."""
        values = outputs.float()
        if kind == "values":
            scale = values.detach().std(correction=0).clamp(min=torch.finfo(values.dtype).tiny)
            noise = torch.randn(values.shape, generator=self.generator).to(values.device)
            return (values * noise).sum() / scale / (values.numel() / len(values)) ** 0.5
        if kind == "probabilities":
            values = values.clamp(LEAST, 1 - LEAST)
            drawn = torch.bernoulli(values.detach().cpu(), generator=self.generator).to(values.device)
            total = F.binary_cross_entropy(values, drawn, reduction="sum")
            return total / (values.numel() / len(values)) ** 0.5
        logs = _log_probabilities(values, kind)
        drawn = torch.multinomial(logs.detach().exp().cpu(), 1, generator=self.generator).flatten()
        total = F.nll_loss(logs, drawn.to(logs.device), reduction="sum")
        return total / (len(logs) / len(outputs)) ** 0.5


def _log_probabilities(values: Tensor, kind: str) -> Tensor:
    """Return logits or probabilities, (N, classes, ...), as logarithms, (N x positions, classes)."""
    rows = values.movedim(1, -1).flatten(0, -2)
    return rows.log_softmax(1) if kind == "logits" else rows.clamp(min=LEAST).log()


def _divergence(found: Tensor, wanted: Tensor, kind: str) -> float:
    """Return the mean divergence of outputs from those of a dense model."""
    if kind == "values":
        scale = wanted.std(correction=0).clamp(min=torch.finfo(torch.float).tiny)
        return float(((found - wanted) / scale).square().mean()) / 2
    if kind == "probabilities":
        p, q = (x.clamp(LEAST, 1 - LEAST) for x in (wanted, found))
        return float((p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean())
    p, q = (_log_probabilities(x, kind) for x in (wanted, found))
    return max(0.0, float(F.kl_div(q, p, reduction="batchmean", log_target=True)))
