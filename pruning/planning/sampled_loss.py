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


class SampledLoss:
    """The negative log-likelihood of targets that are drawn from the model's own predictions.

    The outputs of a classifier, (N, classes, ...), are logits. Any other outputs are taken for means of
    normal distributions, with the standard deviation of these outputs.

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
        if self.classifier and isinstance(outputs, Tensor) and outputs.ndim > 1 and outputs.shape[1] > 1:
            return self._of_classes(outputs)
        values = [tensor for tensor in tensors(outputs) if tensor.requires_grad and tensor.ndim]
        if not values:
            raise PruningError(
                "no output of the network depends on its weights, so channels cannot be scored; set "
                "requires_grad=True on the weights, or use the score l1 or l2"
            )
        return torch.stack([self._of_values(tensor.float()) for tensor in values]).sum()

    def divergence(self, outputs: object, dense: object) -> float:
        """Return the divergence of outputs from a dense model's, of which this loss samples the curvature.

        It is summed over the examples and averaged over the values of each: of logits, that of the predicted
        distributions, in nats; of other outputs, half the squared difference in standard deviations.
        """
        if self.classifier and isinstance(dense, Tensor) and dense.ndim > 1 and dense.shape[1] > 1:
            assert isinstance(outputs, Tensor)
            found, wanted = (
                x.movedim(1, -1).flatten(0, -2).double().log_softmax(1) for x in (outputs, dense)
            )
            each = F.kl_div(found, wanted, reduction="batchmean", log_target=True)
            return float(each.clamp(min=0)) * len(dense)
        total = 0.0
        for found, wanted in zip(tensors(outputs), tensors(dense), strict=True):
            if wanted.is_floating_point() and wanted.ndim:
                scale = wanted.double().std(correction=0).clamp(min=torch.finfo(wanted.dtype).tiny)
                total += float(((found - wanted).double() / scale).square().mean()) / 2 * len(wanted)
        return total

    def _of_classes(self, outputs: Tensor) -> Tensor:
        logits = outputs.movedim(1, -1).flatten(0, -2).float()
        predicted = logits.detach().softmax(1).cpu()
        if not torch.isfinite(predicted).all():
            raise PruningError(
                "the outputs on the calibration inputs are not finite; check the inputs and the weights"
            )
        drawn = torch.multinomial(predicted, 1, generator=self.generator).flatten()
        total = F.cross_entropy(logits, drawn.to(logits.device), reduction="sum")
        return total / (len(logits) / len(outputs)) ** 0.5

    def _of_values(self, means: Tensor) -> Tensor:
        scale = means.detach().std(correction=0).clamp(min=torch.finfo(means.dtype).tiny)
        noise = torch.randn(means.shape, generator=self.generator).to(means.device)
        return (means * noise).sum() / scale / (means.numel() / len(means)) ** 0.5
