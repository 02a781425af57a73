"""Refit what pruning leaves: each layer's weights are fitted to its outputs in the dense model.

No labels and no training are needed. A layer that lost input channels, or whose inputs changed because
earlier layers did, gets the weights and the bias with which it best gives its dense outputs from what the
pruned model now feeds it: a ridge regression towards its present weights, layer after layer. It needs sums
over the calibration inputs only (Gram matrices), so its memory does not grow with their number.

The least-squares reconstruction of a pruned layer's outputs follows He et al., Channel Pruning for
Accelerating Very Deep Neural Networks, ICCV 2017, arXiv 1707.06168.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.graph.groups import Trace
from pruning.graph.layers import is_weighted, layer_width, weight_of
from pruning.graph.plan import Plan
from pruning.surgery.apply import dropped_positions, kept_positions
from pruning.surgery.linear_form import WeightUse, weight_uses
from pruning.utils.modules import eval_mode, parameter_places
from pruning.utils.tree import Inputs

#: Ridge penalties that are tried, relative to the mean variance of a layer's inputs.
RIDGES = tuple(10.0**power for power in range(-6, 3))

#: Share of the rows of each batch on which the ridge is chosen.
HELD_OUT = 4

#: Why a layer that lost inputs was left as it was.
_UNSEEN = "no linear or convolution function of torch multiplies by its weight itself"

#: A refit must reduce the squared error on the held-out rows at least by this share.
LEAST_GAIN = 0.01


@dataclass(frozen=True)
class LayerFit:
    """What refitting did to one layer.

    Attributes:
        layer: name of the layer.
        before, after: root of the squared error of its outputs, relative to its dense outputs, before and
            after the refit, on rows that were held out; NaN if they were not measured.
        ridge: the chosen ridge penalty; None if the layer was left as it was.
        reason: why the layer was left as it was; empty otherwise.
    """

    layer: str
    before: float
    after: float
    ridge: float | None = None
    reason: str = ""


def refit(
    small: nn.Module, dense: nn.Module, trace: Trace, plan: Plan, batches: Sequence[Inputs]
) -> tuple[LayerFit, ...]:
    """Fit the layers of a pruned model to their outputs in the dense model, in place.

    In the order of the forward pass, each linear layer and convolution whose outputs changed gets
    `W + argmin_D Σ ‖y − W x − D x − d‖² + λ‖D‖²` as its weights, where x are its inputs in the pruned model,
    refitted so far, and y its outputs in the dense model. The offset d goes into its bias, or into the
    running mean of the BatchNorm directly behind it. The ridge λ is chosen on a quarter of the rows of each
    batch; a layer is left as it was where no λ reduces the error on them.

    The statistics of BatchNorm are right as they are, because the outputs in front of them are fitted to
    those of the dense model: do not recalibrate them afterwards.

    Args:
        small: the pruned model, as `apply` returns it; its weights change.
        dense: the traced model; it is not changed.
        trace, plan: trace of the dense model, and the plan that `small` was made with.
        batches: calibration inputs, in the form that `trace` takes; labels are not needed.

    Returns what was done to each layer whose outputs had changed, in the order of the forward pass.
    Raises `PruningError` if there are no batches, or values in a layer are not finite.

    >>> from pruning.surgery.apply import apply
    >>> from pruning.tracing.trace import trace
    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(64, 4)
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))  # rank 4: four of eight channels suffice
    >>> traced, plan = trace(net, x), Plan({"0": (0, 1, 2, 3)})
    >>> small = apply(net, traced, plan)
    >>> [fit] = refit(small, net, traced, plan, [x])
    >>> fit.layer, torch.allclose(small(x), net(x), atol=1e-3)
    ('1', True)
    """
    if not batches:
        raise PruningError("refit needs calibration inputs, and there are none; give a few batches of inputs")
    fits: list[LayerFit] = []
    dropped = dropped_positions(trace, plan)
    readers = [name for name, side in dropped if side == "in"]
    with torch.no_grad(), eval_mode(small, dense):
        weights = _weights(dense, [name for name, layer in dense.named_modules() if is_weighted(layer)])
        order = [weights[use.weight] for use in weight_uses(dense, batches[0], weights)]
        first = next((i for i, name in enumerate(order) if name in readers), len(order))
        shared = {name for places in parameter_places(dense).values() if places[1:] for name, _ in places}
        for name in dict.fromkeys(order[first:]):
            if name in shared:
                fits.append(LayerFit(name, nan, nan, reason="another layer has the same weight"))
                continue
            drop = dropped.get((name, "out"), torch.zeros(0, dtype=torch.long))
            keep = kept_positions(layer_width(dense.get_submodule(name), "out"), drop)
            layer = _Layer(name, order.count(name), keep, trace.foldable.get(name))
            fit = _refit_layer(small, dense, layer, batches)
            if fit is not None:
                fits.append(fit)
    fits += [LayerFit(name, nan, nan, reason=_UNSEEN) for name in readers if name not in order]
    return tuple(fits)


def _weights(model: nn.Module, names: Iterable[str]) -> dict[Tensor, str]:
    """Return the weights of layers with the names of the layers; none that is computed from others."""
    found = ((weight_of(model.get_submodule(name)), name) for name in names)
    return {weight: name for weight, name in found if isinstance(weight, nn.Parameter)}


@dataclass(frozen=True)
class _Layer:
    """A layer to refit.

    Attributes:
        uses: how often a forward pass uses it.
        keep: its output channels in the dense model that the pruned model keeps.
        norm: name of the BatchNorm directly behind it, if there is one.
    """

    name: str
    uses: int
    keep: Tensor
    norm: str | None


def _refit_layer(
    small: nn.Module, dense: nn.Module, layer: _Layer, batches: Sequence[Inputs]
) -> LayerFit | None:
    """Refit one layer in place; None if its outputs did not change."""
    fits, held, use = _sums(small, dense, layer, batches)
    if use is None:
        return LayerFit(layer.name, nan, nan, reason="the pruned model uses its weight differently")
    total = fits + held
    if not total.is_finite():
        raise PruningError(
            f"layer {layer.name!r} has inputs or outputs that are not finite on the calibration inputs; "
            "check these inputs and the model's weights"
        )
    if total.error <= 1e-12 * total.size:
        return None
    offset = use.bias is not None or layer.norm is not None
    judged = held if held.count else fits
    ridge, error = _best_ridge(fits, judged, offset)
    before, after = ((value / judged.size) ** 0.5 for value in (judged.error, error))
    if not error <= (1 - LEAST_GAIN) * judged.error:
        return LayerFit(layer.name, before, before, reason="no ridge reduces the error on held-out data")
    [change], [shift] = total.solution([ridge], offset)
    use.weight.add_(use.form.as_weight(change, use.weight))
    _add_offset(small, use.bias, layer.norm, shift.flatten())
    return LayerFit(layer.name, before, after, ridge)


def _sums(
    small: nn.Module, dense: nn.Module, layer: _Layer, batches: Sequence[Inputs]
) -> tuple[_Sums, _Sums, WeightUse | None]:
    """Return the sums to fit a layer by, those to judge the fit by, and a use of the layer in `small`.

    There is no use if the pruned model does not multiply with the layer's weight as often as the dense one.
    """
    fits, held, use = _Sums(), _Sums(), None
    for inputs in batches:
        wanted, found = (
            weight_uses(model, inputs, _weights(model, [layer.name]), layer.uses) for model in (dense, small)
        )
        if len(wanted) != len(found):
            return fits, held, None
        for target, use in zip(wanted, found, strict=True):
            y = target.output.index_select(use.form.channel_dim, layer.keep.to(target.output.device))
            for rows, error, output in use.form.rows(use.input, y - use.output, y):
                cut = len(rows) - len(rows) // HELD_OUT
                fits.add(rows[:cut], error[:cut], output[:cut])
                held.add(rows[cut:], error[cut:], output[cut:])
    return fits, held, use


def _add_offset(model: nn.Module, bias: Tensor | None, norm: str | None, offset: Tensor) -> None:
    """Add an offset to a layer's outputs: through its bias, or the mean of the BatchNorm behind it."""
    if bias is not None:
        bias.add_(offset.to(bias))
    elif norm is not None:
        mean = model.get_submodule(norm).get_buffer("running_mean")
        mean.sub_(offset.to(mean))


class _Sums:
    """Sums over rows that determine a layer's ridge regression, for each of its parts.

    Attributes:
        gram: Σ [x 1]^T [x 1], (parts, inputs + 1, inputs + 1).
        cross: Σ [x 1]^T e, (parts, inputs + 1, outputs).
        error, size: Σ e² and Σ y² over all parts and outputs.
    """

    def __init__(self) -> None:
        self.gram, self.cross = torch.zeros(()), torch.zeros(())
        self.error, self.size, self.count = 0.0, 0.0, 0

    def add(self, rows: Tensor, error: Tensor, outputs: Tensor) -> None:
        """Add rows (rows, parts, inputs), their errors e and dense outputs y (rows, parts, outputs)."""
        x = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2).transpose(0, 1)
        self.gram = self.gram.to(x) + x.mT @ x
        self.cross = self.cross.to(x) + x.mT @ error.transpose(0, 1)
        self.error += float(error.square().sum())
        self.size += float(outputs.square().sum())
        self.count += len(rows)

    def __add__(self, other: _Sums) -> _Sums:
        total = _Sums()
        total.gram = self.gram + other.gram
        total.cross = self.cross + other.cross
        total.error, total.size = self.error + other.error, self.size + other.size
        total.count = self.count + other.count
        return total

    def is_finite(self) -> bool:
        """Whether all sums are finite."""
        sums = (self.gram.sum(), self.cross.sum(), torch.tensor([self.error, self.size]).sum())
        return all(bool(torch.isfinite(value)) for value in sums)

    def solution(self, ridges: Sequence[float], offset: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Return for each ridge the change of the weights (parts, inputs, outputs) and of the bias."""
        gram, cross = self.gram[:, :-1, :-1], self.cross[:, :-1]
        mean, error_mean = self.gram[:, :-1, -1:] / self.count, self.cross[:, -1:] / self.count
        if offset:
            gram, cross = gram - self.count * mean @ mean.mT, cross - self.count * mean @ error_mean
        values, vectors = torch.linalg.eigh(gram)
        values, along = values.clamp(min=0), vectors.mT @ cross
        unit = values.mean(1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
        weights, shifts = [], []
        for ridge in ridges:
            weights.append(vectors @ (along / (values + ridge * unit).unsqueeze(2)))
            shift = error_mean - mean.mT @ weights[-1]
            shifts.append((shift if offset else torch.zeros_like(shift)).squeeze(1))
        return weights, shifts

    def error_after(self, weight: Tensor, shift: Tensor) -> float:
        """Return the squared error on these rows after a change of the weights and the bias."""
        change = torch.cat([weight, shift.unsqueeze(1)], 1)
        return self.error + float((change * (self.gram @ change - 2 * self.cross)).sum())


def _best_ridge(fits: _Sums, held: _Sums, offset: bool) -> tuple[float, float]:
    """Return the ridge with the least error on held-out rows, and this error."""
    weights, shifts = fits.solution(RIDGES, offset)
    errors = [held.error_after(weight, shift) for weight, shift in zip(weights, shifts, strict=True)]
    best = min(range(len(RIDGES)), key=lambda i: (errors[i], i))
    return RIDGES[best], max(errors[best], 0.0)
