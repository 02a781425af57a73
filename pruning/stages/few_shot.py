"""Recover what pruning lost from a few inputs without labels: fine-tune towards the dense network.

A few hundred inputs are soon learned by heart. So a quarter of them is held out, and the weights that are
kept are those of the epoch that is closest to the dense network on these; no epoch may be. BatchNorm keeps
its statistics, the peak learning rate comes from a range test, and inputs are varied: the dense network says
what the outputs should be for any input, so mixtures of two inputs are as good as new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.stages.finetune import tune
from pruning.stages.run import Run
from pruning.training.batches import to_device
from pruning.training.config import TrainConfig
from pruning.training.distillation import with_teacher
from pruning.training.image_batches import random_mirror, random_shift
from pruning.training.losses import class_logits
from pruning.training.output_comparison import Comparison
from pruning.training.range_test import mean_loss, recovery_rate
from pruning.utils.batch import Batch, find_batch
from pruning.utils.memory_format import channels_last, runs_channels_last
from pruning.utils.modules import call, device_of, eval_mode
from pruning.utils.tree import Inputs, fresh
from pruning.utils.wording import number_of

#: One of so many examples is held out.
ONE_OF = 4

#: Share of the batches whose inputs are mixed, and the images' shift as a share of their size.
MIXED, SHIFT = 0.5, 1 / 16

#: The settings of the training.
CONFIG = TrainConfig(40, optimizer="adamw", clip_norm=1.0, eval_mode=True)

#: Changes the inputs of a batch, at random; the dense network gives the outputs for them.
Vary = Callable[[Inputs], Inputs]


class Recovered(NamedTuple):
    """A pruned network after few-shot recovery.

    Attributes:
        model: the best network, in eval mode; the given one if no epoch was better.
        before, after: loss on the held-out examples, relative to the dense network's outputs.
        examples, held_out: number of examples that were trained on, and that were held out.
    """

    model: nn.Module
    before: float
    after: float
    examples: int
    held_out: int


def recover(
    model: nn.Module,
    dense: nn.Module,
    batches: Iterable[tuple[Inputs, object]],
    config: TrainConfig = CONFIG,
    *,
    vary: Vary | None = None,
    features: Sequence[str] = (),
    compare: Comparison | None = None,
    run: Run | None = None,
) -> Recovered:
    """Fine-tune a copy of a pruned model to the outputs of the dense one, on a few inputs without labels.

    The result is never further from the dense network than the given model, on the examples held out.

    Args:
        model: the pruned model. dense: the network that it was made from; neither is changed.
        batches: pairs (inputs, targets), whose targets are not read and may be None.
        config: settings of the training; without a rate, the peak is that of `recovery_rate`.
        vary: changes the inputs of each batch at random; by default `varied`.
        features, compare: see `distillation`. By default one tensor (N, classes, ...) is taken for logits if
            some of its values are no probabilities, and everything else is compared by its values.
        run: stores the state after every epoch; if it holds a state, training resumes from it.

    Raises:
        PruningError: if there are fewer than two examples, or outputs are not finite.

    >>> _ = torch.manual_seed(0)
    >>> dense, small = nn.Linear(4, 3), nn.Linear(4, 3)
    >>> batches = [(torch.randn(16, 4), None) for _ in range(4)]
    >>> done = recover(small, dense, batches, replace(CONFIG, epochs=3))
    >>> done.after < done.before, done.examples, done.held_out
    (True, 48, 16)
    """
    device = device_of(model)
    given = [to_device(batch, device)[0] for batch in batches]
    batch = find_batch(model, given[0]) if given else Batch()
    train, held, counts = split(batch, given)
    if compare is None:
        compare = comparison(dense, held)
    config = replace(config, channels_last=config.channels_last or runs_channels_last(model, given[0]))
    vary = vary or (varied if batch.dims.get(()) == 0 else unchanged)
    with channels_last(dense, runs_channels_last(dense, given[0])):
        judged, loss = with_teacher(dense, held, 1.0, 1.0, compare=compare)

        def validate(network: nn.Module) -> float:
            return -mean_loss(network, list(judged), loss)

        before = -validate(model)
        if not before < torch.inf:
            raise PruningError(
                "the pruned or the dense network has outputs that are not finite; check inputs and weights"
            )
        if config.lr is None and not (run is not None and run.state and run.state["fit"]):
            config = replace(config, lr=_rate(model, dense, train, config, compare))
        tuned = tune(
            model, _Varied(train, vary), config, validate=validate, run=run, teacher=dense, distill=1.0,
            temperature=1.0, features=features, compare=compare,
        )  # fmt: skip
        return Recovered(tuned, before, -validate(tuned), *counts)


def _rate(
    model: nn.Module,
    dense: nn.Module,
    batches: Sequence[tuple[Inputs, None]],
    config: TrainConfig,
    compare: Comparison,
) -> float:
    """Return the peak learning rate that a range test finds."""
    tried, loss = with_teacher(dense, batches, 1.0, 1.0, compare=compare)
    with channels_last(model, config.channels_last):
        return recovery_rate(model, list(tried), config, loss=loss)


def split(
    batch: Batch, batches: Sequence[Inputs]
) -> tuple[list[tuple[Inputs, None]], list[tuple[Inputs, None]], tuple[int, int]]:
    """Return batches to train on, batches that are held out, and the numbers of their examples.

    Of a batch of at least four examples the first quarter is held out; of smaller ones every fourth batch.

    Args:
        batch: along which dimensions the examples of the inputs lie. batches: inputs.

    >>> train, held, counts = split(Batch(2, {(): 0}), [torch.zeros(10, 3), torch.zeros(2, 3)])
    >>> [len(x) for x, _ in train], [len(x) for x, _ in held], counts
    ([8, 2], [2], (10, 2))
    """
    train, held = list[tuple[Inputs, None]](), list[tuple[Inputs, None]]()
    sizes = [0, 0]
    for number, inputs in enumerate(batches):
        size = batch.of(inputs).size
        out = size // ONE_OF if size >= ONE_OF else size * (number % ONE_OF == ONE_OF - 1)
        sizes = [sizes[0] + size - out, sizes[1] + out]
        if out:
            held.append((batch.first(inputs, out), None))
        if out < size:
            train.append((batch.rest(inputs, out), None))
    if not train or not held:
        total = sum(sizes)
        raise PruningError(
            f"few-shot recovery was given {number_of(total, 'example')}, of which a quarter is "
            "held out: give at least one batch of four or four batches; a few hundred examples are useful"
        )
    return train, held, (sizes[0], sizes[1])


def comparison(dense: nn.Module, batches: Sequence[tuple[Inputs, None]]) -> Comparison:
    """Return whether the outputs of a network are logits: one tensor that holds no probabilities.

    >>> comparison(nn.Identity(), [(torch.tensor([[-1.0, 2.0]]), None)])
    'logits'
    >>> comparison(nn.Sigmoid(), [(torch.tensor([[-1.0, 2.0]]), None)])
    'values'
    """
    with torch.no_grad(), eval_mode(dense):
        outputs = call(dense, fresh(batches[0][0]))
    logits = class_logits(outputs)
    if not isinstance(logits, Tensor) or logits.ndim < 2 or logits.shape[1] < 2:
        return "values"
    return "values" if bool(((logits >= 0) & (logits <= 1)).all()) else "logits"


class _Varied:
    """Batches in a random order, with inputs that are varied anew in every epoch."""

    def __init__(self, batches: Sequence[tuple[Inputs, None]], vary: Vary):
        self.batches, self.vary = batches, vary

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Inputs, None]]:
        for number in torch.randperm(len(self.batches)).tolist():
            yield self.vary(self.batches[number][0]), None


def unchanged(inputs: Inputs) -> Inputs:
    """Return the inputs as they are."""
    return inputs


def varied(inputs: Inputs) -> Inputs:
    """Vary the inputs of a batch at random: a tensor of floating-point numbers, one example after the other.

    Images (N, 1 or 3, H, W) are mirrored and shifted by up to a sixteenth of their size; every second batch
    is mixed: each input becomes a weighted mean with another one (MixUp: Zhang et al., arXiv 1710.09412).

    >>> torch.equal(varied(torch.ones(4, 7)), torch.ones(4, 7))
    True
    """
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or not inputs.ndim:
        return inputs
    if inputs.ndim == 4 and inputs.shape[1] in (1, 3):
        inputs = random_mirror()(inputs)
        if pixels := int(min(inputs.shape[2:]) * SHIFT):
            inputs = random_shift(pixels)(inputs)
    if float(torch.rand(())) < MIXED:
        share = torch.rand(len(inputs), *[1] * (inputs.ndim - 1)).to(inputs)
        other = inputs[torch.randperm(len(inputs)).to(inputs.device)]
        inputs = other.lerp(inputs, share)
    return inputs.contiguous()
