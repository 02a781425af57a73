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
                "no output of the network depends on its weights, so channels cannot be scored"
            )
        return torch.stack([self._of_values(tensor.float()) for tensor in values]).sum()

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
