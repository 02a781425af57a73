"""Measure what channels cost: on held-out inputs, with the layers that read them refitted.

A second-order estimate compares the channels of one group well, but not those of different groups: how much
an error in an early layer matters at the end depends on all layers behind it, and a fit to few inputs is
worse on others. So the loss of each group is measured at a few widths, and its estimates are scaled to match.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pruning.planning.prefix_cache import PrefixCache
from pruning.planning.sampled_loss import SampledLoss
from pruning.surgery.linear_form import FUNCTIONS, LinearForm
from pruning.utils.batch import Batch
from pruning.utils.modules import call
from pruning.utils.tree import Inputs, fresh

#: One of so many examples is held out, and the most examples to measure on.
ONE_OF, EXAMPLES = 4, 32

#: Shares of a group's channels at whose removal the loss is measured.
REMOVED = (0.1, 0.3, 0.5, 0.75)

#: Least factor between measured and estimated losses, so that no order is lost.
LEAST_FACTOR = 1e-3


class Refitted(NamedTuple):
    """A weight that takes the place of a layer's, and what is added to the layer's outputs, (outputs,)."""

    weight: Tensor
    offset: Tensor
    form: LinearForm


def held_out(inputs: Inputs, batch: Batch, number: int) -> tuple[int, int]:
    """Return how many of a batch's first examples are held out, and how many there are.

    Of a batch of at least four it is a quarter; of smaller ones every fourth is held out.

    Args:
        batch: the batch of the traced inputs. number: of these inputs, from 0.

    >>> held_out(torch.zeros(16, 3), Batch(), 0), held_out(torch.zeros(1, 3), Batch(), 3)
    ((4, 16), (1, 1))
    """
    size = batch.of(inputs).size
    return (size // ONE_OF if size >= ONE_OF else size * (number % ONE_OF == ONE_OF - 1)), size


class HeldOut:
    """The examples that are held out, with the dense model's outputs on them.

    Args:
        model: the dense model, in eval mode.
        batches: inputs; `held_out` tells which examples of them are measured on.
        batch: the batch of the traced inputs.
        loss: gives the divergence of outputs.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Inputs], batch: Batch, loss: SampledLoss):
        self.model, self.loss, self.size = model, loss, 0
        self.batches: list[Inputs] = []
        for number, inputs in enumerate(batches):
            count = min(held_out(inputs, batch, number)[0], EXAMPLES - self.size)
            if count > 0:
                self.batches.append(batch.of(inputs).resized(inputs, count))
                self.size += count
        with torch.no_grad():
            self.dense = [call(model, fresh(inputs)) for inputs in self.batches]

    @torch.no_grad()
    def loss_with(self, weights: Mapping[Tensor, Refitted], cache: PrefixCache | None = None) -> float:
        """Return the mean divergence from the dense model where layers have other weights.

        Args:
            weights: of the layers, by their present weight. cache: of what is computed before these layers.
        """
        total = 0.0
        for number, (inputs, dense) in enumerate(zip(self.batches, self.dense, strict=True)):
            given = fresh(inputs)
            with _Replaced(weights), nullcontext() if cache is None else cache.replayed(number):
                outputs = call(self.model, given)
            total += self.loss.divergence(outputs, dense)
        return total / self.size

    def scaled(
        self,
        losses: Tensor,
        order: Sequence[int],
        refitted: Callable[[list[int]], Mapping[Tensor, Refitted]],
        layers: set[str],
    ) -> Tensor:
        """Scale a group's estimated losses to those that are measured, (channels,).

        Args:
            losses: estimates, by channel. order: the channels, the least important first.
            refitted: returns the weights of the layers that read the group without some channels.
            layers: names of the layers whose weights these are.
        """
        counts = sorted({round(share * len(order)) for share in REMOVED} - {0, len(order)})
        if not self.size or not counts:
            return losses
        cache = PrefixCache(self.model, layers, self.batches)
        measured = [self.loss_with(refitted(list(order[:count])), cache) for count in counts]
        found = losses.clone()
        found[list(order)] = match(losses[list(order)], counts, measured)
        return found


def match(steps: Tensor, counts: Sequence[int], measured: Sequence[float]) -> Tensor:
    """Scale steps so that the first `counts[i]` add up to `measured[i]`; the last factor holds to the end.

    Measured values that fall are taken for level. Not finite ones are ignored.

    >>> match(torch.tensor([1.0, 1.0, 2.0, 2.0]), [2, 3], [1.0, 5.0])
    tensor([0.5000, 0.5000, 4.0000, 4.0000])
    """
    found, start, before = steps.clone(), 0, 0.0
    for count, value in zip(counts, measured, strict=True):
        if not value < torch.inf:
            continue
        part = steps[start:count]
        total = float(part.sum())
        factor = max((value - before) / total, LEAST_FACTOR) if total > 0 else 1.0
        found[start:count], found[count:] = part * factor, steps[count:] * factor
        start, before = count, max(before, value)
    return found


class _Replaced(TorchFunctionMode):
    """Multiply with other weights, and add an offset to the products."""

    def __init__(self, weights: Mapping[Tensor, Refitted]):
        super().__init__()
        self.weights = {id(weight): new for weight, new in weights.items()}

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        given = [*args, *kwargs.values()] if func in FUNCTIONS else []
        new = next((self.weights[id(value)] for value in given if id(value) in self.weights), None)
        if new is None:
            return func(*args, **kwargs)
        values = [new.weight if id(value) in self.weights else value for value in given]
        product = func(*values[: len(args)], **dict(zip(kwargs, values[len(args) :], strict=True)))
        assert isinstance(product, Tensor)
        return product + new.offset.view(-1, *[1] * (-1 - new.form.channel_dim))
