"""Judge pruned networks on validation inputs: accuracy if there are labels, and what differs from dense."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.planning.bootstrap import Bootstrap
from pruning.training.batches import Batch, to_device
from pruning.training.losses import IGNORED, class_logits, classes_of, logits_for, no_such_class
from pruning.training.output_comparison import Comparison, class_dimension, comparable
from pruning.utils.batch import Batch as Examples
from pruning.utils.modules import call, device_of, eval_mode
from pruning.utils.outputs import Outputs, counted
from pruning.utils.tree import fresh, tensors
from pruning.utils.wording import number_of

#: The dense network's outputs are kept if they need at most this many bytes; else it runs each time.
MOST_BYTES = 1 << 30

#: A metric of the user's: from outputs and targets of a batch, one number for each example; higher is better.
Metric: TypeAlias = Callable[[Any, Any], Tensor]

#: Most classes that are counted one by one.
MOST_CLASSES = 10_000


class Estimate(NamedTuple):
    """A figure on the validation inputs and its bootstrap interval (see `pruning.planning.bootstrap`)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Judgement:
    """What a network reaches on the validation inputs.

    Attributes:
        metrics: by name. `accuracy`: share of right classes; `loss`: cross entropy of the labels, in nats;
            `agreement`: share of positions at which the most probable class is the dense network's;
            `divergence`: KL(dense ‖ network), in nats; `error`: squared error, relative to the dense
            outputs; `score`: the mean of the user's metric. A metric that is not finite is missing.
        change: accuracy or score minus that of the dense network, with a paired interval; None without.
        classes: by class, how often the network is right where this is the label; or, without labels, how
            often it agrees where the dense network predicts this class.
    """

    metrics: dict[str, Estimate]
    change: Estimate | None = None
    classes: dict[int, int] = field(default_factory=dict)


class _Ratio(NamedTuple):
    """A metric of one output, as numerator and denominator for each example, (examples,) each."""

    numerators: Tensor
    denominators: Tensor

    def value(self) -> float:
        return float(self.numerators.sum() / self.denominators.sum())

    def samples(self, bootstrap: Bootstrap) -> Tensor:
        """Return the ratio in each bootstrap sample, (samples,)."""
        top, bottom = bootstrap.means(torch.stack([self.numerators, self.denominators], 1)).unbind(1)
        return top / bottom.clamp(min=torch.finfo(bottom.dtype).tiny)


#: By metric and output, the parts of the ratios on each batch.
_Parts = dict[str, dict[str, list[_Ratio]]]


class Judge:
    """Compare networks with a dense one on the same validation inputs.

    Args:
        model: the dense network; it is not changed.
        validation: pairs (inputs, targets); targets that are no classes of the outputs are not used.
        batch: the batch of the traced inputs, which tells the examples of others.
        compare: whether outputs are logits or values. With `auto`, a tensor (N, classes, ...) is logits if
            the targets are its classes, or if there are no targets.
        outputs: which outputs count, as in `trace`.
        metric: a function of (outputs, targets) that returns one number for each example, higher is better;
            it takes the place of all other metrics.

    Attributes:
        metric: the metric by which networks are compared: `accuracy`, `agreement`, `error` or `score`.
        dense: what the dense network reaches.
        examples: number of validation examples. totals: by class, how often it occurs (see `Judgement`).

    Raises:
        PruningError: if there are no inputs, outputs cannot be compared, or those of the dense network are
            not finite.

    >>> net, inputs = nn.Linear(4, 3), torch.randn(8, 4)
    >>> judge = Judge(net, [(inputs, None)], Examples(8, {(): 0}))
    >>> judge.metric, judge(net).metrics["agreement"]
    ('agreement', Estimate(value=1.0, low=1.0, high=1.0))
    """

    def __init__(
        self,
        model: nn.Module,
        validation: Sequence[Batch],
        batch: Examples,
        *,
        compare: Comparison = "auto",
        outputs: Outputs = None,
        metric: Metric | None = None,
    ):
        self.model, self.batch, self.compare, self.outputs = model, batch, compare, outputs
        self.score = metric
        self.batches = [to_device(each, device_of(model)) for each in validation]
        if not self.batches:
            raise PruningError("there are no validation inputs: give at least one batch (inputs, targets)")
        self.examples = sum(batch.of(inputs).size for inputs, _ in self.batches)
        self.kept: list[object] | None = None
        self.kept = self._finite_outputs()
        self.totals: Counter[int] = Counter()
        ratios, classes = self._ratios(model, self.totals)
        self.metric = next(name for name in ("score", "accuracy", "agreement", "error") if name in ratios)
        first = next(iter(ratios[self.metric]))
        if not first.denominators.sum():
            raise PruningError("no validation example has a label or a value: give at least one")
        self.bootstrap = Bootstrap(len(first.numerators))
        self.dense_samples = self._samples(ratios[self.metric])
        self.dense = self._judgement(ratios, classes)

    def __call__(self, model: nn.Module) -> Judgement:
        """Return what a network with the dense one's inputs and outputs reaches."""
        return self._judgement(*self._ratios(model))

    def _finite_outputs(self) -> list[object] | None:
        """Check the dense network's outputs on each batch; return them if they fit into memory."""
        kept, size = list[object](), 0
        if self.score is not None:
            return None
        for number, output in enumerate(self._run(self.model)):
            found = comparable(output)
            if not found:
                raise PruningError(
                    f"the network returns a {type(output).__name__} without floating-point tensors, which "
                    "cannot be compared"
                )
            if not all(bool(torch.isfinite(x).all()) for x in found.values()):
                raise PruningError(
                    f"the dense network's outputs on validation batch {number} are not finite: check these "
                    "inputs and the weights"
                )
            size += sum(x.numel() * x.element_size() for x in tensors(output))
            kept = [*kept, output] if size <= MOST_BYTES else []
        return kept if size <= MOST_BYTES else None

    def _run(self, model: nn.Module) -> Iterator[object]:
        """Yield the outputs that count on each batch; random numbers are the same each time."""
        for inputs, _ in self.batches:
            with torch.no_grad(), eval_mode(model), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                output = call(model, fresh(inputs))
            if self.outputs is not None:
                chosen = counted(output, self.outputs)
                output = chosen[0] if len(chosen) == 1 else chosen
            yield output

    def _ratios(
        self, model: nn.Module, totals: Counter[int] | None = None
    ) -> tuple[dict[str, list[_Ratio]], dict[int, int]]:
        """Return by metric the ratio of each output over all examples, and `Judgement.classes`.

        Args:
            totals: where to count how often each class occurs.
        """
        if self.score is not None:
            return {"score": [self._scored(model, self.score)]}, {}
        parts: _Parts = {}
        classes: Counter[int] = Counter()
        dense = self.kept if self.kept is not None else self._run(self.model)
        runs = self.kept if model is self.model and self.kept is not None else self._run(model)
        for (inputs, targets), found, wanted in zip(self.batches, runs, dense, strict=True):
            pair = _Pair(found, wanted, targets, self.batch.of(inputs).size, self.compare)
            for metric, output, ratio in pair.ratios():
                parts.setdefault(metric, {}).setdefault(output, []).append(ratio)
            classes.update(pair.right)
            if totals is not None:
                totals.update(pair.occurring)
        whole = {
            metric: [_Ratio(*map(torch.cat, zip(*each, strict=True))) for each in outputs.values()]
            for metric, outputs in parts.items()
            if all(len(each) == len(self.batches) for each in outputs.values())
        }
        return whole, dict(classes)

    def _scored(self, model: nn.Module, score: Metric) -> _Ratio:
        """Return the user's metric of a network on all examples."""
        values = []
        for (inputs, targets), output in zip(self.batches, self._run(model), strict=True):
            value, size = score(output, targets), self.batch.of(inputs).size
            if not isinstance(value, Tensor) or value.shape != (size,):
                given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise PruningError(
                    f"the metric returned {given} for {number_of(size, 'example')}: return a tensor, one "
                    "number for each"
                )
            values.append(value.detach().float().cpu())
        whole = torch.cat(values)
        if model is self.model and not bool(torch.isfinite(whole).all()):
            raise PruningError(
                "the metric of the dense network is not finite: check it, the inputs and weights"
            )
        return _Ratio(whole, torch.ones_like(whole))

    def _samples(self, ratios: Sequence[_Ratio]) -> Tensor:
        """Return the mean over the outputs in each bootstrap sample, (samples,)."""
        return torch.stack([ratio.samples(self.bootstrap) for ratio in ratios]).mean(0)

    def _judgement(self, ratios: dict[str, list[_Ratio]], classes: dict[int, int]) -> Judgement:
        metrics, change = dict[str, Estimate](), None
        for name, each in ratios.items():
            value = sum(ratio.value() for ratio in each) / len(each)
            if not isfinite(value):
                continue
            samples = self._samples(each)
            metrics[name] = _estimate(value, samples)
            if name in ("accuracy", "score"):
                lost = samples - self.dense_samples
                dense = metrics[name] if not hasattr(self, "dense") else self.dense.metrics[name]
                change = _estimate(value - dense.value, lost)
        return Judgement(metrics, change, classes)


def _estimate(value: float, samples: Tensor) -> Estimate:
    low, high = Bootstrap.interval(samples)
    return Estimate(value, float(low), float(high))


class _Pair:
    """Outputs of a network and of the dense one on a batch.

    Attributes:
        right, occurring: by class, how often the network is right, and how often the class occurs.
    """

    def __init__(self, found: object, wanted: object, targets: object, size: int, compare: Comparison):
        self.found, self.wanted, self.targets = found, wanted, targets
        self.size, self.compare = size, compare
        self.right: Counter[int] = Counter()
        self.occurring: Counter[int] = Counter()

    def ratios(self) -> Iterator[tuple[str, str, _Ratio]]:
        """Yield metric, name of the output and ratio."""
        found, wanted = comparable(self.found), comparable(self.wanted)
        shapes = [{name: tuple(x.shape) for name, x in each.items()} for each in (found, wanted)]
        if shapes[0] != shapes[1]:
            raise PruningError(
                f"the pruned network returns outputs of shapes {shapes[0]}, the dense one {shapes[1]}: only "
                "outputs of the same shapes can be compared; name those that can by outputs= (--outputs)"
            )
        # The examples are counted one by one if all outputs hold them along their first dimension.
        units = self.size if all(x.ndim and len(x) == self.size for x in wanted.values()) else 1
        for name, x in wanted.items():
            dim = self._class_dimension(x)
            pair = found[name].detach(), x.detach()
            if dim is None:
                new, old = (each.reshape(units, -1).float().cpu() for each in pair)
                yield "error", name, _Ratio((new - old).square().sum(1), old.square().sum(1))
            else:
                labels = self._labels(x.movedim(dim, 1), units) if len(wanted) == 1 else None
                new, old = (each.movedim(dim, -1).reshape(units, -1, x.shape[dim]).float() for each in pair)
                for metric, ratio in self._of_classes(new, old, labels):
                    yield metric, name, ratio

    def _class_dimension(self, x: Tensor) -> int | None:
        compare = self.compare
        if compare == "auto" and isinstance(self.wanted, Tensor) and not isinstance(self.targets, Tensor):
            compare = "logits"
        return class_dimension(self.wanted, x, self.targets, compare)

    def _labels(self, logits: Tensor, units: int) -> Tensor | None:
        """Return the labels as classes, (units, positions); None if the targets are no classes of logits.

        Args:
            logits: (N, classes, ...).
        """
        if not isinstance(self.targets, Tensor):
            return None
        labels = classes_of(self.targets, class_logits(logits, self.targets))
        try:
            logits_for(labels, logits)
        except PruningError:
            return None
        counts = labels != IGNORED
        if bool((counts & ((labels < 0) | (labels >= logits.shape[1]))).any()):
            raise no_such_class(logits, labels)
        return labels.reshape(units, -1)

    def _of_classes(self, new: Tensor, old: Tensor, labels: Tensor | None) -> Iterator[tuple[str, _Ratio]]:
        """Yield the ratios of logits (units, positions, classes)."""
        truth = old.argmax(2)
        counts = torch.ones_like(truth, dtype=torch.bool) if labels is None else labels != IGNORED
        says = new.argmax(2).masked_fill(new.isnan().any(2), -1)  # argmax takes NaN for the largest
        number = counts.sum(1).float().cpu()
        agrees = (says == truth) & counts
        new, old = new.log_softmax(2), old.log_softmax(2)
        divergence = (old.exp() * (old - new)).sum(2).clamp(min=0)
        divergence = torch.where(counts, divergence, 0)
        right = agrees if labels is None else (says == labels) & counts
        if labels is not None:
            missed = -new.gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
            yield "accuracy", _Ratio(right.sum(1).float().cpu(), number)
            yield "loss", _Ratio(torch.where(counts, missed, 0).sum(1).cpu(), number)
        yield "agreement", _Ratio(agrees.sum(1).float().cpu(), number)
        yield "divergence", _Ratio(divergence.sum(1).cpu(), number)
        if new.shape[2] <= MOST_CLASSES:
            classes = truth if labels is None else labels
            self.right, self.occurring = _count(classes[right]), _count(classes[counts])


def _count(classes: Tensor) -> Counter[int]:
    found, numbers = classes.unique(return_counts=True)
    return Counter(dict(zip(found.tolist(), numbers.tolist(), strict=True)))
