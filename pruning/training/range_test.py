"""Find peak learning rates that suit a trained network, and a pruned one, by short range tests."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from pruning.errors import PruningError
from pruning.training.batches import Batch, to_device
from pruning.training.config import DEFAULT_RATE, TrainConfig
from pruning.training.losses import Loss, class_logits, classes_of, cross_entropy, loss_of
from pruning.training.state import make_optimizer, set_mode
from pruning.utils import distributed
from pruning.utils.modules import call, copied, device_of, eval_mode
from pruning.utils.tree import fresh, tensors

#: Rates that are tried, ascending, with `STEPS` optimizer steps each; `_scale` scales them.
RATES = tuple(1e-4 * 2**i for i in range(13))
STEPS = 6
#: The result is this share of the largest rate at which the loss does not rise: a rise shows only after
#: more steps than the test takes, and a pruned network tolerates less than the given one.
MARGIN = 0.125
#: Rate at which the search of `recovery_rate` begins, steps of each trial, and most factors of √10 in a
#: direction. It goes on upwards if the loss falls, downwards if it falls by `CLEARLY`: in a training that is
#: longer than the trials, the higher of two rates that do alike recovers more.
FIRST, TRIAL, MOST, CLEARLY = 0.03, 30, 4, 0.2
#: Rise of the loss that is tolerated, as a share of the distance from the loss of a constant prediction.
TOLERANCE = 0.05


def range_test(
    model: nn.Module, batches: Sequence[Batch], config: TrainConfig, *, loss: Loss = cross_entropy
) -> float:
    """Return a peak learning rate at which training keeps what a trained network has learned.

    A copy of the network takes a few steps at each of several rates, each twice the one before, with the
    optimizer of `config` (range test: Smith, arXiv 1506.01186): from 1e-4 on, or from a thousandth of the
    default rate of an optimizer of torch.optim. The test ends at the first rate at which the loss of the
    batches rises above their loss before training. The result is `MARGIN` times the rate before it.

    Args:
        model: the trained network; it is not changed, and neither are the random generators.
        batches: training batches.
        config: the optimizer, its momentum and its weight decay.
        loss: see `fit`.

    Raises:
        PruningError: if there is no batch.

    >>> net = nn.Linear(2, 2)
    >>> batches = [(torch.eye(2), torch.tensor([0, 1]))]
    >>> RATES[0] / 2 * MARGIN <= range_test(net, batches, TrainConfig(1)) <= RATES[-1] * MARGIN
    True
    """
    if not batches:
        raise PruningError("a range test needs at least one training batch, and there is none; give a few")
    device = device_of(model)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        given = [to_device(batch, device) for batch in _of_several(batches)]
        scalar = loss_of(loss)
        tried = set_mode(copied(model), config)
        before = _losses(tried, given, scalar)
        limit = _tolerance(model, given, before)
        optimizer = make_optimizer(tried, config, device)
        order = itertools.cycle(range(len(given)))
        scale = _scale(config)
        kept = RATES[0] / 2 * scale
        for rate in tqdm(
            [rate * scale for rate in RATES],
            desc="range test",
            unit="rate",
            disable=distributed.rank() > 0 or None,
            leave=False,
        ):
            rises = _rises(tried, optimizer, rate, [(given[i], before[i]) for i in _take(order)], scalar)
            if not statistics.fmean(rises) <= limit:  # NaN counts as a rise
                break
            kept = rate
    return kept * MARGIN


def recovery_rate(
    model: nn.Module, batches: Sequence[Batch], config: TrainConfig, *, loss: Loss = cross_entropy
) -> float:
    """Return the peak learning rate at which a pruned network recovers most in a short training.

    Copies of the network are trained for `TRIAL` steps each, with the optimizer and the schedule of
    `config`, at rates a factor of √10 apart: from `FIRST` upwards, or else downwards, as long as the loss of
    the batches falls.

    Args:
        model: the pruned network; it is not changed, and neither are the random generators.
        batches, config, loss: see `range_test`.

    >>> net = nn.Linear(2, 2)
    >>> batches = [(torch.eye(2), torch.tensor([0, 1]))]
    >>> recovery_rate(net, batches, TrainConfig(1)) > FIRST
    True
    """
    device = device_of(model)
    given = [to_device(batch, device) for batch in _of_several(batches)]
    scalar = loss_of(loss)
    # A trial that ends above this has not recovered, but collapsed.
    most = min(mean_loss(model, given, scalar), constant_loss(model, given) or math.inf)
    losses: dict[int, float] = {}
    first = FIRST * _scale(config)

    def after(exponent: int) -> float:
        if exponent not in losses:
            rate = first * 10 ** (exponent / 2)
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                found = _loss_after(set_mode(copied(model), config), given, config, rate, scalar)
            losses[exponent] = found if found < most else math.inf
        return losses[exponent]

    best = 0
    for step, share in ((1, 1.0), (-1, 1 - CLEARLY)):
        while abs(best + step) <= MOST and after(best + step) < share * after(best):
            best += step
        if best > 0:
            break
    return first * 10 ** (best / 2)


def rate_of_longer(rate: float, steps: int, most: float) -> float:
    """Return the peak learning rate of a longer training than the trials of `recovery_rate`.

    What a high rate breaks, a longer training has the steps to mend while its rate falls, and it ends better.
    The rate grows with the square root of the steps; `benchmarks.trained` is the measurement.

    Args:
        rate: result of `recovery_rate`. steps: optimizer steps of the training.
        most: limit of the result, above which it only is if `rate` is.

    >>> rate_of_longer(0.01, 16 * TRIAL, 0.2), rate_of_longer(0.1, 16 * TRIAL, 0.2)
    (0.04, 0.2)
    """
    return max(rate, min(rate * math.sqrt(steps / TRIAL), most))


def _scale(config: TrainConfig) -> float:
    """Return the factor of the rates to try: the optimizer's default as a share of `DEFAULT_RATE`."""
    own = config.own_rate
    return 1.0 if own is None else own / DEFAULT_RATE


def _loss_after(
    model: nn.Module, batches: Sequence[Batch], config: TrainConfig, rate: float, loss: Loss
) -> float:
    """Train for `TRIAL` steps, and return the mean loss of the batches."""
    optimizer, order = make_optimizer(model, config, device_of(model)), itertools.cycle(batches)
    with torch.enable_grad():
        steps = tqdm(
            range(TRIAL),
            desc=f"range test, rate {rate:.2g}",
            unit="step",
            disable=distributed.rank() > 0 or None,
            leave=False,
        )
        for step in steps:
            for group in optimizer.param_groups:
                group["lr"] = rate * config.rate((step + 1) / TRIAL)
            optimizer.zero_grad(set_to_none=True)
            inputs, targets = next(order)
            loss(model, fresh(inputs), targets).backward()
            optimizer.step()
    return statistics.fmean(_losses(model, batches[:TRIAL], loss))


def _of_several(batches: Sequence[Batch]) -> Sequence[Batch]:
    """Return the batches of several examples; BatchNorm cannot train on one."""
    several = [batch for batch in batches if any(x.ndim and len(x) > 1 for x in tensors(batch[0]))]
    return several or batches


def _take(order: Iterator[int]) -> list[int]:
    return list(itertools.islice(order, STEPS))


def _losses(model: nn.Module, batches: Sequence[Batch], loss: Loss) -> list[float]:
    """Return the loss of each batch."""
    with torch.no_grad():
        return [loss(model, fresh(inputs), targets).item() for inputs, targets in batches]


def mean_loss(model: nn.Module, batches: Sequence[Batch], loss: Loss) -> float:
    """Return the mean loss of batches, in eval mode.

    Args:
        loss: function of (model, inputs, targets), see `loss_of`.
    """
    device = device_of(model)
    with eval_mode(model):
        return statistics.fmean(_losses(model, [to_device(batch, device) for batch in batches], loss))


def _rises(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rate: float,
    batches: Sequence[tuple[Batch, float]],
    loss: Loss,
) -> list[float]:
    """Take one step on each batch, and return by how much its loss has risen since before the test."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    rises = []
    for (inputs, targets), before in batches:
        optimizer.zero_grad(set_to_none=True)
        value = loss(model, fresh(inputs), targets)
        value.backward()
        optimizer.step()
        rises.append(value.item() - before)
    return rises


def _tolerance(model: nn.Module, batches: Sequence[Batch], before: Sequence[float]) -> float:
    """Return the rise of the mean loss that is tolerated."""
    mean = statistics.fmean(before)
    noise = statistics.stdev(before) / STEPS**0.5 if len(before) > 1 else 0.0
    constant = constant_loss(model, batches)
    scale = abs(mean) if constant is None else max(constant - mean, 0.0)
    return max(noise, TOLERANCE * scale)


def constant_loss(model: nn.Module, batches: Sequence[Batch]) -> float | None:
    """Return the cross entropy of the best constant prediction; None if the batches have no classes."""
    with torch.no_grad(), eval_mode(model):
        inputs, targets = to_device(batches[0], device_of(model))
        outputs = class_logits(call(model, fresh(inputs)), targets)
    found = [targets for _, targets in batches]
    if not isinstance(outputs, Tensor) or outputs.ndim < 2:
        return None
    if not all(isinstance(targets, Tensor) for targets in found):
        return None
    labels = torch.cat([classes_of(targets.to(outputs.device), outputs).flatten().cpu() for targets in found])
    if labels.is_floating_point() or not len(labels := labels[labels >= 0]):
        return None
    shares = torch.bincount(labels.long()).float() / len(labels)
    return float(F.cross_entropy(shares.clamp(min=1e-12).log()[None], shares[None]))
