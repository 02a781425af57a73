"""Refit what pruning leaves: each layer's weights are fitted to its outputs in the dense model.

No labels and no training are needed. A layer that lost input channels, or whose inputs changed because
earlier layers did, gets the weights and the bias with which it best gives its dense outputs from what the
pruned model now feeds it: a ridge regression towards its present weights, layer after layer. It needs sums
over the calibration inputs only (Gram matrices), so its memory does not grow with their number.

The least-squares reconstruction of a pruned layer's outputs follows He et al., Channel Pruning for
Accelerating Very Deep Neural Networks, ICCV 2017, arXiv 1707.06168.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.graph.groups import Trace
from pruning.graph.layers import is_weighted, layer_width, weight_of
from pruning.graph.plan import Plan
from pruning.surgery.apply import dropped_positions, kept_positions, output_factors
from pruning.surgery.linear_form import WeightUse
from pruning.surgery.paused_pass import PassDiffers, PausedPass, Reached
from pruning.surgery.ridge import Sums, best_ridge
from pruning.surgery.sites import Site, find_sites
from pruning.utils.modules import eval_mode, parameter_places, submodule
from pruning.utils.tree import Inputs, tensors

#: The passes of as many batches pause at once as need at most this many bytes.
MOST_BYTES = 4 << 30

#: Most rows that a layer is fitted to: the larger of this number, and so many for each of its inputs.
LEAST_ROWS, ROWS_PER_INPUT = 4096, 16

#: Share of the rows of each batch on which the ridge is chosen.
HELD_OUT = 4

#: Why a layer that lost inputs was left as it was.
_UNSEEN = "no linear or convolution function of torch multiplies by its weight itself"

#: Why a layer that has a parameter of another layer was left as it was.
_SHARED = "another layer has the same weight"

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
    dropped, factors = dropped_positions(trace, plan), output_factors(dense, trace, plan)
    readers = [name for name, side in dropped if side == "in"]
    with torch.no_grad(), eval_mode(small, dense):
        sites = _plain_where_shared(find_sites(dense, max(batches, key=_values), _weights(dense)))
        order = [site.layer for site in sites]
        first = next((i for i, name in enumerate(order) if name in readers), len(order))
        shared = {name for places in parameter_places(dense).values() if places[1:] for name, _ in places}
        nothing = torch.zeros(0, dtype=torch.long)
        keep = {
            name: _Kept(
                kept_positions(
                    layer_width(submodule(dense, name), "out"), dropped.get((name, "out"), nothing)
                ),
                factors.get((name, "out")),
            )
            for name in order[first:]
            if name not in shared
        }
        pair = _Pair(small, dense, sites, keep, batches)
        fits = [fit for rows in pair.layers(first) if (fit := _fit(small, rows)) is not None]
    fits += [LayerFit(name, nan, nan, reason=_SHARED) for name in {*order[first:]} & shared]
    fits.sort(key=lambda fit: order.index(fit.layer))
    fits += [LayerFit(name, nan, nan, reason=_UNSEEN) for name in readers if name not in order]
    return tuple(fits)


def _values(inputs: Inputs) -> int:
    """Return the number of values in a batch."""
    return sum(tensor.numel() for tensor in tensors(inputs))


def _weights(model: nn.Module) -> dict[Tensor, str]:
    """Return the weights of all layers with the names of the layers; none that is computed from others."""
    found = ((weight_of(layer), name) for name, layer in model.named_modules() if is_weighted(layer))
    return {weight: name for weight, name in found if isinstance(weight, nn.Parameter)}


def _plain_where_shared(sites: Sequence[Site]) -> list[Site]:
    """Return the sites, without what follows the product where the layer or the norm is used again."""
    layers, norms = (Counter(getattr(site, what) for site in sites) for what in ("layer", "norm"))
    norms[None] = 1
    shared = [layers[site.layer] > 1 or norms[site.norm] > 1 for site in sites]
    return [Site(s.layer, size=s.size) if plain else s for s, plain in zip(sites, shared, strict=True)]


def _fit(small: nn.Module, layer: _Rows) -> LayerFit | None:
    """Refit one layer in place; None if its outputs did not change."""
    name, use = layer.site.layer, layer.use
    if use is None:
        return LayerFit(name, nan, nan, reason="the pruned model uses its weight differently")
    total = layer.fits + layer.held
    if not total.is_finite():
        raise PruningError(
            f"layer {name!r} has inputs or outputs that are not finite on the calibration inputs; "
            "check these inputs and the model's weights"
        )
    if total.error <= 1e-12 * total.size:
        return None
    offset = use.bias is not None or layer.site.norm is not None
    judged = layer.held if layer.held.count else layer.fits
    ridge, error = best_ridge(layer.fits, judged, offset)
    before, after = ((value / judged.size) ** 0.5 for value in (judged.error, error))
    if not error <= (1 - LEAST_GAIN) * judged.error:
        return LayerFit(name, before, before, reason="no ridge reduces the error on held-out data")
    [change], [shift] = total.solution([ridge], offset)
    use.weight.add_(use.form.as_weight(change, use.weight))
    _add_offset(small, use.bias, layer.site.norm, shift.flatten())
    return LayerFit(name, before, after, ridge)


def _add_offset(model: nn.Module, bias: Tensor | None, norm: str | None, offset: Tensor) -> None:
    """Add an offset to a layer's outputs: through its bias, or the mean of the BatchNorm behind it."""
    if bias is not None:
        bias.add_(offset.to(bias))
    elif norm is not None:
        mean = submodule(model, norm).get_buffer("running_mean")
        mean.sub_(offset.to(mean))


class _Kept(NamedTuple):
    """Output channels of a layer in the dense model that the pruned model keeps.

    Attributes:
        channels: their positions, sorted, (kept,).
        factors: by which the pruned model multiplies them to keep a scale, (kept,), if it does.
    """

    channels: Tensor
    factors: Tensor | None = None

    def of(self, output: Tensor, dim: int) -> Tensor:
        """Return these channels of the dense model's output, as the pruned model should give them."""
        kept = output.index_select(dim, self.channels.to(output.device))
        return kept if self.factors is None else kept * self.factors.to(kept).view(-1, *[1] * (-1 - dim))


class _Rows:
    """The rows of one layer: its inputs in the pruned model, and the errors of its outputs.

    The error is that of the site's output, in units of the product: behind a BatchNorm it is divided by the
    norm's scale. So where a block adds its result to its input, the layer also mends the error of that input.

    Attributes:
        fits, held: sums over the rows to fit the layer by, and over those to judge the fit by.
        use: the product in the pruned model; None if it uses the weight differently.
    """

    def __init__(self, small: nn.Module, site: Site, keep: _Kept, most: int):
        self.site, self.keep, self.most = site, keep, most
        self.fits, self.held = Sums(), Sums()
        self.use: WeightUse | None = None
        norm = None if site.norm is None else small.get_submodule(site.norm)
        self.scale = None if norm is None else _scale(norm)

    def add(self, found: Reached, wanted: Reached) -> None:
        """Add one batch: the site in the pruned and in the dense model."""
        use, form = found.use, found.use.form
        self.use, dim = use, form.channel_dim
        error = self.keep.of(wanted.output, dim) - found.output
        if self.scale is not None:
            error = error / self.scale.view(-1, *[1] * (-1 - dim))
        dense = self.keep.of(wanted.use.output, dim)
        for rows, errors, outputs in form.rows(use.input, error, dense, most=self._most(use)):
            cut = len(rows) - len(rows) // HELD_OUT
            self.fits.add(rows[:cut], errors[:cut], outputs[:cut])
            self.held.add(rows[cut:], errors[cut:], outputs[cut:])

    def _most(self, use: WeightUse) -> int:
        """Return how many rows of this batch are enough."""
        inputs = use.weight.numel() // use.weight.shape[0]
        return max(LEAST_ROWS, ROWS_PER_INPUT * inputs) // self.most


class _Pair:
    """The pruned and the dense model, run side by side on the calibration batches.

    Args:
        keep: by layer to refit, its output channels in the dense model that the pruned model keeps.
    """

    def __init__(
        self,
        small: nn.Module,
        dense: nn.Module,
        sites: Sequence[Site],
        keep: Mapping[str, _Kept],
        batches: Sequence[Inputs],
    ):
        self.small, self.dense, self.sites, self.keep, self.batches = small, dense, sites, keep, batches
        self.uses = Counter(site.layer for site in sites)

    def layers(self, first: int) -> Iterator[_Rows]:
        """Yield the rows of each layer in turn, from site `first`; its weights may be changed then.

        The passes of as many batches as fit into memory pause at each site. The others run to a layer that
        is to be fitted and end there, until they fit: later sites of a network often hold less.
        """
        done: set[str] = set()
        with contextlib.ExitStack() as stack:
            pairs: list[tuple[PausedPass, PausedPass]] = []
            reached: list[tuple[Reached, Reached] | None] = []
            for number, site in enumerate(self.sites[first:], first):
                reached.clear()  # what is held there would be held during the next passes
                reached += map(_proceed, pairs)
                for inputs in self.batches[len(pairs) : self._most_passes(number)]:
                    pairs.append(self._start(stack, inputs))
                    reached.append(self._run_to(pairs[-1], number))
                if site.layer in self.keep and site.layer not in done:
                    done.add(site.layer)
                    yield self._rows(site, reached if self.uses[site.layer] == 1 else [])

    def _most_passes(self, number: int) -> int:
        """Return how many batches of both models fit into memory at a site and all later ones."""
        return MOST_BYTES // max(1, 2 * max(site.size for site in self.sites[number:]))

    def _rows(self, site: Site, reached: list[tuple[Reached, Reached] | None]) -> _Rows:
        """Return the rows of a layer: of the first batches, which have reached it, and of all others."""
        rows = _Rows(self.small, site, self.keep[site.layer], len(self.batches) * self.uses[site.layer])
        others = self._passes(site.layer, self.batches[len(reached) :])
        for found in itertools.chain(reached, others):
            if found is None:
                rows.use = None
                break
            rows.add(*found)
        return rows

    def _passes(self, layer: str, batches: Sequence[Inputs]) -> Iterator[tuple[Reached, Reached] | None]:
        """Yield all uses of a layer, from passes of one batch after the other."""
        last = max(i for i, site in enumerate(self.sites) if site.layer == layer)
        for inputs in batches:
            with contextlib.ExitStack() as stack:
                pair = self._start(stack, inputs)
                for site in self.sites[: last + 1]:
                    found = _proceed(pair)
                    if site.layer == layer or found is None:
                        yield found

    def _run_to(self, pair: tuple[PausedPass, PausedPass], number: int) -> tuple[Reached, Reached] | None:
        """Run both models to a site; None if they do not have the same sites."""
        found = None
        for _ in range(number + 1):
            if (found := _proceed(pair)) is None:
                break
        return found

    def _start(self, stack: contextlib.ExitStack, inputs: Inputs) -> tuple[PausedPass, PausedPass]:
        small, dense = (
            stack.enter_context(PausedPass(model, inputs, _weights(model), self.sites))
            for model in (self.small, self.dense)
        )
        return small, dense


def _proceed(pair: tuple[PausedPass, PausedPass]) -> tuple[Reached, Reached] | None:
    """Run both models to their next site; None if they do not have the same one."""
    try:
        small, dense = (each.proceed() for each in pair)
    except PassDiffers:
        return None
    return None if small is None or dense is None else (small, dense)


def _scale(norm: nn.Module) -> Tensor:
    """Return what a BatchNorm multiplies each channel with; infinite instead of almost 0."""
    scale = (norm.get_buffer("running_var").double() + float(norm.eps)).rsqrt()  # type: ignore[arg-type]
    if isinstance(norm.weight, Tensor):
        scale = scale * norm.weight.detach().double()
    return scale.masked_fill(scale.abs() <= 1e-6 * scale.abs().max(), torch.inf)
