"""Count parameters and MACs; no other file does.

Convention: one multiply-add is one MAC; counts are for one example. MACs include convolutions, linear
and recurrent layers, and exclude biases, norms (folded for deployment), activations and pooling. A
second count includes biases, because some published figures do.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pruning.errors import PruningError
from pruning.graph.cost_rows import RowTable
from pruning.graph.deformable import count_deformable
from pruning.graph.groups import Trace
from pruning.graph.layers import WEIGHTED, bias_of, is_read_by_parent, is_weighted, rule_for
from pruning.graph.recurrent import RECURRENT
from pruning.surgery.statistics import plain_attention
from pruning.tracing.trace import trace
from pruning.utils.batch import find_batch
from pruning.utils.meta import Shapes, without_computing
from pruning.utils.modules import call
from pruning.utils.tree import Inputs, tensors
from pruning.utils.wrappers import unwrapped

_COUNTED = (*WEIGHTED, *RECURRENT)


@dataclass(frozen=True)
class Cost:
    """The cost of a network: parameters, MACs for one example, channels of its groups.

    `CostModel` sets `channels`; `count`, which knows no groups, leaves it 0. Comparisons ignore it.

    >>> print(Cost(params=1485, macs=47398, macs_with_bias=50000))
    1,485 params, 47,398 MACs
    """

    params: int
    macs: int
    macs_with_bias: int
    channels: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return f"{self.params:,} params, {self.macs:,} MACs"


def count(model: nn.Module, inputs: Inputs, batch_size: int | None = None) -> Cost:
    """Count the parameters and MACs of a model with thop and PyTorch's flop counter.

    thop counts layers, but not functional calls such as attention. PyTorch's flop counter counts both,
    and the larger number of MACs is returned. A layer type that neither knows counts 0 (`uncounted`
    lists such layers). If the model runs on the meta device, no values are computed.

    Args:
        model: it is not changed. Fold its BatchNorm first to get the cost of the deployed network.
        inputs: example inputs of one call.
        batch_size: number of examples in them, by which the MACs are divided; by default it is found, see
            `find_batch`.

    Returns:
        The cost of one example.

    >>> count(nn.Linear(3, 4), torch.zeros(2, 3))
    Cost(params=16, macs=12, macs_with_bias=16, channels=0)
    """
    model = unwrapped(model)
    batch = find_batch(model, inputs, batch_size).size
    return without_computing(partial(_counted, batch=batch), model, inputs)


def deployed_cost(model: nn.Module, inputs: Inputs, batch_size: int | None = None) -> Cost:
    """Return the cost of a network as it would be deployed: BatchNorm that can be folded counts as folded.

    These are the figures of budgets and plans, whether BatchNorm is folded in the given model or not. A
    model that cannot be traced is counted as it is (`count`, whose arguments it takes).

    >>> norm = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    >>> deployed_cost(norm, torch.zeros(2, 3)).params, count(norm, torch.zeros(2, 3)).params
    (16, 24)
    """
    model = unwrapped(model)
    try:
        return CostModel(model, trace(model, inputs, batch_size=batch_size))({})
    except PruningError:
        return count(model, inputs, batch_size)


def _counted(probe: nn.Module, inputs: Inputs, batch: int) -> Cost:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # thop imports distutils
        # Not `profile`: that of ultralytics' thop, which takes thop's name, also counts products of tensors.
        from thop import profile_origin
    count_deformable()
    params = sum(p.numel() for p in probe.parameters())
    probe.eval()
    whole = _WithInputs(probe, inputs)
    # The flop counter does not know the CPU's kernel of attention.
    with torch.no_grad(), plain_attention(), _without_gradients(probe):
        with Shapes(), FlopCounterMode(display=False) as flops, _BiasCounter(probe) as biases:
            call(probe, inputs)
        try:
            with Shapes():
                macs, _ = profile_origin(whole, inputs=(), custom_ops=_thop_rules(probe), verbose=False)
        except (IndexError, AttributeError):
            # thop's rules need the input by position, and an output that is a tensor.
            macs = 0
    macs = max(macs, flops.get_total_flops() / 2)
    return Cost(params, round(macs / batch), round((macs + biases.total) / batch))


@contextlib.contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """Let no parameter require gradients: the flop counter fails on views of those that do."""
    required = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in required:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in required:
            parameter.requires_grad_(True)


class _WithInputs(nn.Module):
    """A model together with its inputs: thop passes inputs by position only."""

    def __init__(self, model: nn.Module, inputs: Inputs):
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self) -> object:
        return call(self.model, self.inputs)


def _thop_rules(model: nn.Module) -> dict[type[nn.Module], Callable[..., None]]:
    """Return the rules that replace thop's own, by layer type."""
    rules: dict[type[nn.Module], Callable[..., None]] = {}
    for layer in model.modules():
        if isinstance(layer, nn.modules.conv._ConvTransposeNd):
            rules[type(layer)] = _count_transposed
        elif isinstance(layer, RECURRENT):
            rules[type(layer)] = _count_recurrent
        elif not isinstance(layer, _COUNTED):
            rules[type(layer)] = _count_nothing
    return rules


def _count_nothing(layer: nn.Module, args: object, output: object) -> None:
    """Count no MACs."""


def _count_transposed(
    layer: nn.modules.conv._ConvTransposeNd, args: tuple[Tensor, ...], output: object
) -> None:
    """Count each weight once per input position; thop's own rule uses the output positions."""
    layer.get_buffer("total_ops").add_(args[0].numel() * layer.weight[0].numel())


def _count_recurrent(layer: nn.RNNBase | nn.RNNCellBase, args: object, output: object) -> None:
    """Count each weight once per time step; thop's own rules also count biases and gates."""
    steps = tensors(args)[0].numel() / layer.input_size
    layer.get_buffer("total_ops").add_(
        round(steps * sum(p.numel() for p in layer.parameters() if p.ndim > 1))
    )


class _BiasCounter:
    """Count the additions of biases in convolutions and linear layers, within a `with` block."""

    def __init__(self, model: nn.Module):
        self.total = 0
        layers = {m: m for m in model.modules() if is_weighted(m)}
        for parent in model.modules():  # a layer that its parent reads does not run itself
            layers.update((m, parent) for m in parent.children() if is_read_by_parent(parent, m))
        self.handles = [
            runs.register_forward_hook(self._add) for m, runs in layers.items() if bias_of(m) is not None
        ]

    def _add(self, layer: nn.Module, args: object, output: object) -> None:
        self.total += sum(x.numel() for x in tensors((output,))[:1])

    def __enter__(self) -> _BiasCounter:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def uncounted(model: nn.Module, traced: Trace | None = None) -> dict[str, str]:
    """Return the layers with weights that the MACs do not include: name to type.

    Args:
        traced: trace of the model. Of modules that the table of layers does not know, those are listed whose
            code calls operators of other libraries: the products of torch are counted. Without it, all
            such modules with parameters are listed.

    >>> uncounted(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)))
    {'0': 'Embedding'}
    """
    model = unwrapped(model)
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if list(module.parameters(recurse=False))
        and (
            (traced is None or name in traced.foreign)
            if (rule := rule_for(module)) is None
            else rule.kind == "embedding"
        )
    }


class CostModel:
    """The cost of a traced model in closed form, for any widths of its groups.

    Every weight has (output width) × (input width) × (kernel size) elements, and each width is a
    constant plus a linear function of the group widths (in attention, of their products), so the cost of
    a plan needs no surgery.
    BatchNorm that can be folded counts as folded.

    Widths are a vector in the order of `groups`, (groups,).

    Args:
        model: the traced model; it is not changed.
        trace: of this model.

    Attributes:
        trace: the trace. groups: names of the groups. full: their full widths, (groups,).
        layers: the layer of each row of the closed form; empty for rows without a timed layer.

    >>> from pruning.tracing.trace import trace
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> cost_model = CostModel(net, trace(net, torch.zeros(1, 3)))
    >>> cost_model({"0": 2})
    Cost(params=14, macs=10, macs_with_bias=14, channels=2)
    """

    def __init__(self, model: nn.Module, trace: Trace):
        model = unwrapped(model)
        self.trace, self.groups = trace, list(trace.groups)
        self.full = np.array([trace.groups[g].channels for g in self.groups], dtype=np.float64)
        table = RowTable(model, trace)
        rows, self._terms = table.rows, table.terms
        self.layers = [row.layer for row in rows]
        self.fixed_params, self.fixed_macs = table.fixed_params, table.fixed_macs

        def column(name: str, *shape: int) -> np.ndarray:
            return np.array([getattr(row, name) for row in rows], dtype=np.float64).reshape(len(rows), *shape)

        terms = len(self._terms.full)
        self._out, self._in = column("out", terms), column("into", terms)
        self._out_fixed, self._in_fixed = column("out_fixed"), column("in_fixed")
        self._params, self._macs = column("params"), column("macs")
        self._bias, self._bias_macs = column("bias"), column("bias_macs")

    def __call__(self, widths: np.ndarray | Mapping[str, int]) -> Cost:
        """Return the cost at the given widths; groups that a mapping does not name have full width."""
        if isinstance(widths, Mapping):
            widths = np.array([widths.get(g, n) for g, n in zip(self.groups, self.full, strict=True)], float)
        out, into = self._widths(widths)
        weights = out * into
        macs = self.fixed_macs + weights @ self._macs
        params = self.fixed_params + weights @ self._params + out @ self._bias
        with_bias = macs + out @ self._bias_macs
        return Cost(round(params), round(macs), round(with_bias), round(widths.sum()))

    def freed(self, widths: np.ndarray, channels: np.ndarray | float = 1.0) -> dict[str, np.ndarray]:
        """Return, by kind of cost, the amount freed by narrowing each group alone by `channels`, (groups,).

        The amounts are exact: a weight that loses channels on both sides is counted once.
        """
        out, into = self._widths(widths)
        lost_out, lost_in = (self._terms.lost(side, widths, channels) for side in (self._out, self._in))
        weights = out[:, None] * lost_in + into[:, None] * lost_out - lost_out * lost_in
        return {
            "params": self._params @ weights + self._bias @ lost_out,
            "macs": self._macs @ weights,
            "channels": np.broadcast_to(channels, widths.shape),
        }

    def sides(self, widths: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return the output and input channels of every convolution and linear layer that runs.

        Args:
            widths: widths of the groups, (groups,), or of several plans, (groups, plans).

        Returns:
            By layer (output channels, input channels), () or (plans,) each. A depthwise convolution
            has 1 input channel.
        """
        fixed, terms = (self._out_fixed, self._in_fixed), self._terms.at(widths)
        out, into = (
            side @ terms + (offset if widths.ndim == 1 else offset[:, None])
            for side, offset in zip((self._out, self._in), fixed, strict=True)
        )
        return {name: (out[i], into[i]) for i, name in enumerate(self.layers) if name}

    def _widths(self, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the output and the input width of every row."""
        terms = self._terms.at(widths)
        return self._out @ terms + self._out_fixed, self._in @ terms + self._in_fixed
