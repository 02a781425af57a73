"""Score channels by what a layer that reads them loses, once its other inputs are refitted.

A layer multiplies its inputs x with its weights W. If channel c goes and the other inputs are refitted by
least squares, the squared error of the outputs grows by `W_cᵀ ([H⁻¹]_cc)⁻¹ W_c`, where H is the Gram matrix
of the inputs (Hassibi & Stork, Optimal Brain Surgeon, NeurIPS 1992). Channels are eliminated one after the
other, the cheapest first, with H and W of the others updated (Frantar et al., Optimal Brain Compression,
NeurIPS 2022, arXiv 2208.11580). So a score is the loss at the time when the channel goes, and the scores
of a group add up to its loss. Those of several groups do not: errors of many layers together do more harm.

Errors of outputs count by the Fisher information of the outputs, as in K-FAC. The part of an error that is
common to an example counts apart from its changes within the example, because gradients at different
positions point in similar directions. Where groups compare, the estimates are scaled to what is measured on
held-out examples (`pruning.planning.held_out`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pruning.errors import PruningError
from pruning.graph.groups import Group, Member, Trace
from pruning.graph.layers import is_weighted, weight_of
from pruning.planning.elimination import Problem, ascending, best_shrinkage, eliminate
from pruning.planning.held_out import HeldOut, Refitted, held_out
from pruning.planning.sampled_loss import SampledLoss
from pruning.planning.width_sweep import Batch
from pruning.surgery.linear_form import WeightUse, weight_uses
from pruning.training.batches import to_device
from pruning.utils.batch import Batch as Examples
from pruning.utils.modules import call, device_of, eval_mode, submodule
from pruning.utils.tree import Inputs, fresh

#: Most rows of inputs that a batch adds to the Gram matrix of a layer with a kernel.
ROWS = 1 << 15

#: Examples are observed together whose graph needs at most this many bytes.
GRAPH_BYTES = 1 << 30

#: Most values of rows that are copied at once, unless one example has more.
VALUES = 1 << 23

#: The largest number of inputs whose Gram matrix is kept.
MOST_INPUTS = 8192


def reconstruction_losses(
    model: nn.Module, trace: Trace, batches: Sequence[Batch], loss: SampledLoss
) -> dict[str, Tensor]:
    """Return by group the loss that each channel adds when it is eliminated, (channels,).

    Groups are left out that are read by no linear layer or convolution of torch with a weight of its own.

    Raises:
        PruningError: if there is no batch, or values are not finite.

    >>> from pruning.tracing.trace import trace
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    >>> batches = [(torch.randn(64, 3), None)]
    >>> losses = reconstruction_losses(net, trace(net, torch.zeros(1, 3)), batches, SampledLoss())["0"]
    >>> int((losses < 1e-2 * losses.max()).sum())  # 4 channels of rank 3
    1
    """
    if not batches:
        raise PruningError("the score reconstruction needs calibration batches; the given data has none")
    members = [m for group in trace.groups.values() for m in group.side("in")]
    layers = {m.layer: submodule(model, m.layer) for m in members}
    weights = {
        weight: name
        for name, layer in layers.items()
        if is_weighted(layer) and isinstance(weight := weight_of(layer), nn.Parameter)
        if weight[0].numel() <= MOST_INPUTS
    }
    if not weights:
        return {}
    readers: dict[str, _Reader] = {}
    device = device_of(model)
    inputs = [to_device(batch, device)[0] for batch in batches]
    with eval_mode(model), torch.enable_grad():
        most = _examples_at_once(model, trace.batch.of(inputs[0]), inputs[0])
        for number, each in enumerate(inputs):
            for part, share in _parts(each, trace.batch.of(each), held_out(each, trace.batch, number), most):
                _observe(model, part, weights, readers, loss, share)
    _require_finite(readers)
    read = {
        name: [(readers[m.layer], m) for m in group.side("in") if m.layer in readers]
        for name, group in trace.groups.items()
    }
    read = {name: pairs for name, pairs in read.items() if pairs}
    found = {}
    with eval_mode(model):
        judge = HeldOut(model, inputs, trace.batch, loss)
        for name, pairs in tqdm(read.items(), "reconstruction", disable=None, leave=False):
            group = trace.groups[name]
            losses = eliminate(group, [part for reader, member in pairs for part in reader.problems(member)])
            order = losses.argsort().tolist()
            names = {member.layer for _, member in pairs}
            scaled = judge.scaled(losses, order, _Narrowing(group, pairs), names)
            losses[order] = ascending(scaled[order])
            found[name] = losses
    return found


def _require_finite(readers: Mapping[str, _Reader]) -> None:
    for name, reader in readers.items():
        if not reader.is_finite():
            raise PruningError(
                f"layer {name!r} has inputs or gradients that are not finite on the calibration inputs; "
                "check these inputs and the model's weights"
            )


def _examples_at_once(model: nn.Module, batch: Examples, inputs: Inputs) -> int:
    """Return of how many examples the graph of a pass fits into memory, at least 1."""
    sizes = dict[int, int]()

    def note(tensor: Tensor) -> Tensor:
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = call(model, fresh(batch.first(inputs, 2)))  # some models change the form of a single one
    for held in (*model.parameters(), *model.buffers()):
        sizes.pop(held.untyped_storage().data_ptr() if held.layout is torch.strided else 0, None)
    size, examples = sum(sizes.values()), min(2, batch.size)
    del outputs
    return max(1, GRAPH_BYTES * examples // max(1, size))


def _parts(
    inputs: Inputs, batch: Examples, held: tuple[int, int], most: int
) -> Iterator[tuple[Inputs, Fraction]]:
    """Yield parts of a batch of at most so many examples, each with the share of it that is held out.

    Args:
        held: how many of the first examples are held out, and how many there are.
    """
    if held[1] <= most or not (batch.dims or batch.lists):
        yield inputs, Fraction(*held)
        return
    for start, end, share in ((0, held[0], 1), (held[0], held[1], 0)):
        for at in range(start, end, most):
            yield batch.at(inputs, torch.arange(at, min(at + most, end))), Fraction(share)


def _observe(
    model: nn.Module,
    inputs: Inputs,
    weights: dict[nn.Parameter, str],
    readers: dict[str, _Reader],
    loss: SampledLoss,
    share: Fraction,
) -> None:
    """Add one batch, of which a share is held out, to the statistics of all readers."""
    value: list[Tensor] = []

    class Run(nn.Module):
        def forward(self, given: Inputs) -> None:
            value.append(loss(model, given, None))

    uses = weight_uses(Run(), (fresh(inputs),), weights)
    gradients = torch.autograd.grad(value[0], [use.output for use in uses], allow_unused=True)
    for use, gradient in zip(uses, gradients, strict=True):
        name = weights[use.weight]  # type: ignore[index]
        if gradient is not None:
            readers.setdefault(name, _Reader(use)).add(use, gradient, share)


class _Reader:
    """Statistics of a layer's inputs and of the gradients of its outputs, over examples and within them.

    Each sum has one matrix for each part of the layer. Sums of inputs are kept for two folds of the examples,
    those to fit to and those that are held out.
    """

    def __init__(self, use: WeightUse):
        self.form, self.weight = use.form, use.weight
        self.shrinkage = dict[int, float]()
        self.matrix = use.form.matrix(use.weight)
        self.common, self.within = [torch.zeros(())] * 2, [torch.zeros(())] * 2
        self.mean, self.count = [torch.zeros(())] * 2, [0, 0]
        self.common_gradient, self.within_gradient, self.examples = torch.zeros(()), torch.zeros(()), 0

    @torch.no_grad()
    def add(self, use: WeightUse, gradient: Tensor, share: Fraction) -> None:
        """Add one use: its inputs, the gradients of the loss for its outputs, and the share held out."""
        x, output, gradient = (t.detach() for t in (use.input, use.output, gradient))
        if x.ndim == len(self.form.kernel) + 1:
            x, output, gradient = (t.unsqueeze(0) for t in (x, output, gradient))
        held = int(len(x) * share)
        for fold, (start, end) in enumerate(((held, len(x)), (0, held))):
            size = self._examples_at_once(output, len(x))
            for at in range(start, end, size):
                some = slice(at, min(at + size, end))
                self._add_inputs(fold, self._rows(x[some], output[some], len(x)))
                self._add_gradients(gradient[some])

    def _positions(self, output: Tensor, examples: int) -> int:
        """Return how many rows each example of a batch has at most."""
        positions = output.numel() // (examples * self.matrix.shape[0] * self.matrix.shape[2])
        return min(positions, max(1, ROWS // examples)) if self.form.kernel else positions

    def _examples_at_once(self, output: Tensor, examples: int) -> int:
        """Return of how many examples the rows and the gradients are copied at once."""
        rows = self._positions(output, examples) * self.matrix.shape[0] * self.matrix.shape[1]
        return max(1, VALUES // max(1, rows, output.numel() // examples))

    def _rows(self, x: Tensor, output: Tensor, examples: int) -> Tensor:
        """Return the rows of some examples of a batch, (parts, examples, positions, inputs)."""
        most = max(1, ROWS // examples) * len(x) if self.form.kernel else None
        rows = torch.cat([block for (block, _) in self.form.rows(x, output, most=most)])
        return rows.unflatten(0, (len(x), -1)).permute(2, 0, 1, 3)

    def _add_gradients(self, gradient: Tensor) -> None:
        """Add the gradients of some examples, (examples, ...)."""
        channels = gradient.reshape(len(gradient), -1, gradient.shape[-1]).mT
        if self.form.kernel:
            channels = gradient.reshape(len(gradient), self.matrix.shape[2] * len(self.matrix), -1)
        # (parts, examples, positions, outputs)
        g = channels.double().unflatten(1, (len(self.matrix), -1)).permute(1, 0, 3, 2)
        total = g.sum(2)
        inner = (g - g.mean(2, keepdim=True)).flatten(1, 2)
        self.common_gradient = self.common_gradient.to(g) + total.mT @ total
        self.within_gradient = self.within_gradient.to(g) + inner.mT @ inner
        self.examples += len(gradient)

    def _add_inputs(self, fold: int, rows: Tensor) -> None:
        mean = rows.mean(2)
        inner = (rows - mean.unsqueeze(2)).flatten(1, 2)
        self.common[fold] = self.common[fold].to(mean) + mean.mT @ mean
        self.within[fold] = self.within[fold].to(mean) + inner.mT @ inner / rows.shape[2]
        self.mean[fold] = self.mean[fold].to(mean) + mean.sum(1)
        self.count[fold] += mean.shape[1]

    def is_finite(self) -> bool:
        """Whether all sums are finite."""
        sums = (*self.common, *self.within, self.common_gradient, self.within_gradient)
        return all(bool(torch.isfinite(value).all()) for value in sums)

    def problems(self, member: Member) -> list[Problem]:
        """Return the elimination problem of each part in which the group's channels lie."""
        # In every example, common errors add up over the positions; errors within it are independent.
        common, within = self.common_gradient / self.examples, self.within_gradient / self.examples
        found = []
        for part in range(len(self.matrix)):
            owner = self._owner(member, part)
            ratio = float(common[part].trace() / within[part].trace().clamp(min=1e-300))
            ratio = 1.0 if not 0 < ratio < 1e12 else ratio
            fisher = (common[part] / ratio + within[part]) / (1 if ratio == 1.0 else 2)
            if (owner >= 0).any():
                found.append(self._problem(part, owner, ratio, fisher))
        return found

    def _owner(self, member: Member, part: int) -> Tensor:
        """Return the channel that owns each input of a part, (inputs,); -1 for inputs that stay."""
        size, taps = self.matrix.shape[1], max(1, self.weight[0, 0].numel())
        owner = torch.full((size,), -1)
        here = member.index // (size // taps) == part
        first = (member.index[here] % (size // taps)) * taps
        for tap in range(taps):
            owner[first + tap] = member.channel[here]
        return owner

    def refitted(self, member: Member, gone: Tensor) -> Refitted:
        """Return the layer without some channels, its other inputs refitted to what is not held out.

        Args:
            gone: whether each channel of the member's group is removed, (channels,).
        """
        matrix, offsets = self.matrix.clone(), []
        for part, weight in enumerate(self.matrix):
            owner = self._owner(member, part)
            lost = (gone[owner] & (owner >= 0)).to(weight.device)
            mean = self.mean[0][part] / self.count[0]
            if lost.any():
                gram = self._gram(part, 1.0, [0])
                gram.diagonal().mul_(1 + self.shrinkage[part])
                gram.diagonal().add_(1e-9 * gram.diagonal().mean().clamp(min=1e-300))
                matrix[part, lost] = 0
                by = torch.linalg.solve(gram[~lost][:, ~lost], gram[~lost][:, lost] @ weight[lost])
                matrix[part, ~lost] += by
            offsets.append(mean @ (weight - matrix[part]))
        return Refitted(
            self.form.as_weight(matrix, self.weight), torch.cat(offsets).to(self.weight), self.form
        )

    def _problem(self, part: int, owner: Tensor, ratio: float, fisher: Tensor) -> Problem:
        values, vectors = torch.linalg.eigh(fisher)
        weight = self.matrix[part] @ (vectors * values.clamp(min=0).sqrt())
        folds = [self._gram(part, ratio, [fold]) for fold in (0, 1) if self.count[fold] > 1]
        gram = self._gram(part, ratio, [fold for fold in (0, 1) if self.count[fold]])
        shrinkage = best_shrinkage(folds[0], folds[1], weight) if len(folds) == 2 else 1.0
        self.shrinkage[part] = shrinkage
        scale = gram.diagonal()
        gram = (gram + shrinkage * scale.diag()) / (1 + shrinkage)
        gram.diagonal().add_(1e-9 * scale.mean().clamp(min=1e-300))
        return Problem(owner.to(gram.device), gram, weight)

    def _gram(self, part: int, ratio: float, folds: Sequence[int]) -> Tensor:
        """Return the centered Gram matrix of the inputs, errors weighted as they affect the loss."""
        count = sum(self.count[fold] for fold in folds)
        common, within, mean = (
            torch.stack([sums[fold][part] for fold in folds]).sum(0) / count
            for sums in (self.common, self.within, self.mean)
        )
        return ratio * (common - torch.outer(mean, mean)) + within


@dataclass
class _Narrowing:
    """A group with the layers that read it, each with the member that tells which inputs are the group's."""

    group: Group
    readers: Sequence[tuple[_Reader, Member]]

    def __call__(self, removed: list[int]) -> dict[Tensor, Refitted]:
        """Return the refitted weights of the readers without some channels."""
        gone = torch.zeros(self.group.channels, dtype=torch.bool)
        gone[removed] = True
        return {reader.weight: reader.refitted(member, gone) for reader, member in self.readers}
