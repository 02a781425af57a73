"""Measure the time of convolutions and linear layers at several widths, each alone, on this machine."""

from __future__ import annotations

import copy
import math
import timeit
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from pruning.deploy.runtimes import onnx_session, require_package
from pruning.graph.deformable import DeformableConv
from pruning.graph.layer_tensors import narrow
from pruning.graph.layers import (
    channel_dim,
    holds_layers,
    is_depthwise,
    is_inferred,
    layer_width,
    parts,
    rule_of,
)
from pruning.graph.rule import Side
from pruning.planning.budget import LatencyBudget
from pruning.planning.cost import CostModel
from pruning.planning.search import Order
from pruning.utils.held_weight import HeldWeight
from pruning.utils.modules import call, eval_mode, hooked, on_input, submodule, thread_count
from pruning.utils.tree import Inputs

#: Largest number of widths of each side of a layer at which it is timed.
MAX_WIDTHS = 8

#: Output widths (outputs,), input widths (inputs,), and milliseconds per example, (outputs, inputs).
_TimeGrid = tuple[np.ndarray, np.ndarray, np.ndarray]


class LatencyTable:
    """The times of a model's layers at several widths, each layer measured alone on this machine.

    Times between measured widths are interpolated bilinearly in output and input channels.

    Args:
        model: the traced model; it is not changed.
        inputs: example inputs with the batch size to time.
        cost_model: of this model.
        budget: names the runtime and its number of threads.
        lowest: least width of each group, (groups,).
        multiple: widths are multiples of this number of channels; one for all groups, or (groups,).

    Attributes:
        candidates: by group, the widths that a plan may choose.
        times: by layer, its output widths, input widths and grid of times.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        cost_model: CostModel,
        budget: LatencyBudget,
        lowest: np.ndarray,
        multiple: np.ndarray | int = 1,
    ):
        self.cost_model = cost_model
        self.full = cost_model.full
        multiples = np.broadcast_to(multiple, self.full.shape)
        self.candidates = [
            _candidates(int(low), int(full), int(step))
            for low, full, step in zip(lowest, self.full, multiples, strict=True)
        ]
        trace = cost_model.trace
        budget = replace(budget, batch_size=budget.batch_size or trace.batch.size)
        shapes_of = _input_shapes(model, inputs, [name for name in cost_model.layers if name])
        grid_sides = self._grid_sides()
        known: dict[tuple[object, ...], np.ndarray] = {}  # layers of the same kind are timed once
        self.times: dict[str, _TimeGrid] = {}
        with thread_count(budget.threads), torch.inference_mode():
            for name, shapes in shapes_of.items():
                layer = submodule(model, name)
                if is_inferred(layer):
                    layer, shapes = _product(layer, trace.uses[name].positions * (budget.batch_size or 1))
                outs, ins = grid_sides[name]
                kind = (type(layer), layer.extra_repr(), tuple(shapes), tuple(outs), tuple(ins))
                if kind not in known:
                    known[kind] = _time_grid(layer, shapes, outs, ins, budget)
                self.times[name] = outs, ins, known[kind]

    def milliseconds(self, widths: np.ndarray) -> np.ndarray:
        """Return the sum of the times of all layers, in milliseconds per example, () or (plans,).

        Args:
            widths: widths of the groups, (groups,), or of several plans, (groups, plans).
        """
        total = np.zeros(widths.shape[1:])
        for name, (out, into) in self.cost_model.sides(widths).items():
            if name in self.times:
                total = total + _interpolated(*self.times[name], out, into)
        return total

    def path(self, order: Order) -> list[np.ndarray]:
        """Return a sequence of widths, (groups,) each, from the full widths to ever faster networks.

        Each step narrows one group to one of its candidate widths: the step with the lowest score lost
        per time freed. Widths that are no faster than a wider one are skipped.
        """
        groups = self.cost_model.groups
        dropped_score = {g: np.concatenate([[0.0], np.cumsum(scores)]) for g, (_, scores) in order.items()}
        path = [self.full.copy()]
        while True:
            widths = path[-1]
            moves = [(i, w) for i, ws in enumerate(self.candidates) for w in ws if w < widths[i]]
            if not moves:
                return path
            plans = np.repeat(widths[:, None], len(moves), 1)
            losses = np.empty(len(moves))
            for column, (i, w) in enumerate(moves):
                plans[i, column] = w
                total = dropped_score[groups[i]]
                losses[column] = total[int(self.full[i] - w)] - total[int(self.full[i] - widths[i])]
            freed = self.milliseconds(widths) - self.milliseconds(plans)
            value = np.where(freed > 0, losses / np.maximum(freed, 1e-12), np.inf)
            # Of equal values take the move that frees the least time: the path then has more steps.
            best = min(range(len(moves)), key=lambda k: (value[k], freed[k]))
            if not np.isfinite(value[best]):
                return path
            path.append(plans[:, best].copy())

    def _grid_sides(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return by layer the output and input widths at which to time it."""
        narrowest = np.array([widths[0] for widths in self.candidates], dtype=np.float64)
        ends = self.cost_model.sides(np.stack([narrowest, self.full], 1))
        alone = []  # by group, the sides of all layers at each width of this group alone
        for i, widths in enumerate(self.candidates):
            plans = np.repeat(self.full[:, None], len(widths), 1)
            plans[i] = widths
            alone.append(self.cost_model.sides(plans))
        grid = {}
        for name, (out, into) in ends.items():
            sides = []
            for which, (low, high) in enumerate((out, into)):
                moved = [s[name][which] for s in alone if s[name][which][0] != s[name][which][-1]]
                if len(moved) == 1:
                    sides.append(np.unique(moved[0].round()))
                else:  # a fixed side, or one of several groups
                    sides.append(np.unique(np.linspace(low, high, MAX_WIDTHS if high > low else 1).round()))
            grid[name] = (sides[0], sides[1])
        return grid


def _candidates(lowest: int, full: int, multiple: int) -> np.ndarray:
    """Return all allowed widths if they are at most `MAX_WIDTHS`, else evenly spaced ones."""
    allowed = [w for w in range(lowest, full + 1) if w % multiple == 0 or w in (lowest, full)]
    if len(allowed) <= MAX_WIDTHS:
        return np.array(allowed, dtype=np.float64)
    # Equal shares of the full width: for 64 channels multiples of 8, to which runtimes pad.
    steps = [round(full * k / MAX_WIDTHS / multiple) * multiple for k in range(1, MAX_WIDTHS + 1)]
    return np.array(sorted({lowest, full, *(w for w in steps if lowest <= w <= full)}), dtype=np.float64)


def _input_shapes(model: nn.Module, inputs: Inputs, names: list[str]) -> dict[str, list[torch.Size]]:
    """Return by layer the shapes of its inputs in a forward pass, one per call.

    Parameters that code multiplies by (`HeldWeight`) are not called, and have no shapes.
    """
    shapes: dict[str, list[torch.Size]] = {}

    def watch(name: str) -> Callable[[Tensor], None]:
        return lambda x: shapes.setdefault(name, []).append(x.shape)

    handles = [on_input(submodule(model, name), watch(name)) for name in names]
    with hooked(handles), torch.no_grad(), eval_mode(model):
        call(model, inputs)
    held: dict[str, list[torch.Size]] = {
        name: [] for name in names if isinstance(submodule(model, name), HeldWeight)
    }
    return shapes | held


def _time_grid(
    layer: nn.Module, shapes: list[torch.Size], outs: np.ndarray, ins: np.ndarray, budget: LatencyBudget
) -> np.ndarray:
    """Return the time of a layer at all pairs of widths, (outputs, inputs), in milliseconds per example."""
    found = np.empty((len(outs), len(ins)))
    for i, out in enumerate(outs):
        for j, into in enumerate(ins):
            small = _narrowed(layer, int(out), int(into))
            found[i, j] = sum(_milliseconds(small, shape, budget) for shape in shapes)
    return found


def _product(layer: nn.Module, positions: float) -> tuple[nn.Linear, list[torch.Size]]:
    """Return a linear layer, and the shape of its input, that multiply as often as an inferred layer does.

    The code of such a layer runs other operations, too, so the layer itself cannot be called at any width.
    """
    weight = layer.get_parameter(rule_of(layer).weight)
    into, out = layer_width(layer, "in"), layer_width(layer, "out")
    product = nn.Linear(into, out, bias=False, device=weight.device, dtype=weight.dtype)
    return product, [torch.Size((max(1, round(positions * weight.numel() / (into * out))), into))]


def _narrowed(layer: nn.Module, out: int, into: int) -> nn.Module:
    """Return a copy of a layer with these widths, with the same number of channels in each of its parts."""
    small, several = copy.deepcopy(layer).eval(), parts(layer)
    wanted: dict[Side, int] = {"out": out, "in": into}
    if is_depthwise(layer):
        each = layer_width(layer, "out") // layer_width(layer, "in")
        wanted = {"out": max(1, out // each) * each}
    for side, width in wanted.items():
        of = layer_width(layer, side) // several
        first = torch.arange(max(1, width // several))
        narrow(small, side, torch.cat([first + part * of for part in range(several)]))
    return small


def _milliseconds(layer: nn.Module, shape: torch.Size, budget: LatencyBudget) -> float:
    """Return the time of one layer, in milliseconds per example: the minimum of several repeats."""
    weight, sizes = layer.get_parameter(rule_of(layer).weight), list(shape)
    sizes[channel_dim(layer)] = layer_width(layer, "in")
    x = torch.randn(sizes).to(weight)
    args = (x, _zero_offsets(layer, x)) if isinstance(layer, DeformableConv) else (x,)
    run: Callable[[], object] = partial(layer, *args)
    if holds_layers(layer) or isinstance(layer, DeformableConv):
        # Call torch's forward: layers inside keep their widths, and own code may compute the offsets.
        torchs = ("torch.nn.", "torchvision.ops.")
        base = next(kind for kind in type(layer).__mro__ if kind.__module__.startswith(torchs))
        run = partial(base.forward, layer, *args)  # type: ignore[attr-defined]
    if budget.runtime == "onnxruntime" and isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
        run = _in_onnxruntime(layer, x, budget.threads)
    if weight.is_cuda:
        run = partial(_run_and_synchronize, run)
    timer = timeit.Timer(run)
    timer.timeit(2)
    passes = max(1, round(0.001 / max(timer.timeit(1), 1e-9)))
    return min(timer.repeat(3, passes)) / passes / (budget.batch_size or 1) * 1000


def _zero_offsets(layer: DeformableConv, x: Tensor) -> Tensor:
    """Return the zero offsets with which a deformable convolution equals a plain one."""
    names = ("padding", "dilation", "kernel_size", "stride")
    paddings, dilations, kernels, strides = (getattr(layer, name) for name in names)
    sizes = [
        (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        for size, pad, dilation, kernel, stride in zip(
            x.shape[2:], paddings, dilations, kernels, strides, strict=True
        )
    ]
    return x.new_zeros(len(x), 2 * math.prod(kernels), *sizes)


def _run_and_synchronize(run: Callable[[], object]) -> None:
    run()
    torch.cuda.synchronize()


def _in_onnxruntime(
    layer: nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear, x: Tensor, threads: int
) -> Callable[[], object]:
    """Return a function that runs one layer in ONNX Runtime.

    The graph is built by hand: an export with torch would take longer than all timings of the layer.
    """
    onnx = require_package("onnx")
    held = {"w": layer.get_parameter("weight"), "b": getattr(layer, "bias", None)}
    initial = {name: t.detach().float().cpu() for name, t in held.items() if t is not None}
    make = onnx.helper.make_node
    if isinstance(layer, nn.Linear):
        initial["w"] = initial["w"].T.contiguous()
        product = make("MatMul", ["x", "w"], ["p" if "b" in initial else "y"])
        nodes = [product, *([make("Add", ["p", "b"], ["y"])] if "b" in initial else [])]
    else:
        twice = layer._reversed_padding_repeated_twice  # (last begin, last end, ..., first end)
        pads = [*twice[0::2][::-1], *twice[1::2][::-1]]
        sizes = {"strides": list(layer.stride), "dilations": list(layer.dilation), "group": layer.groups}
        nodes = [make("Conv", ["x", *initial], ["y"], pads=pads, **sizes)]
    describe, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes,
        "layer",
        [describe("x", kind, list(x.shape))],
        [describe("y", kind, None)],
        [onnx.numpy_helper.from_array(value.numpy(), name) for name, value in initial.items()],
    )
    opset = onnx.helper.make_opsetid("", 17)
    proto = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    session = onnx_session(proto.SerializeToString(), threads)
    return partial(session.run, None, {"x": x.float().cpu().numpy()})


def _interpolated(
    outs: np.ndarray, ins: np.ndarray, times: np.ndarray, out: np.ndarray, into: np.ndarray
) -> np.ndarray:
    """Interpolate a grid of times bilinearly at output and input widths, () or (plans,) each."""

    def place(grid: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the index of the grid point below, and the fraction of the way to the next point."""
        if len(grid) == 1:
            return np.zeros_like(at, dtype=int), np.zeros_like(at, dtype=float)
        index = np.clip(np.searchsorted(grid, at, side="right") - 1, 0, len(grid) - 2)
        share = (at - grid[index]) / (grid[index + 1] - grid[index])
        return index, np.clip(share, 0.0, 1.0)

    i, a = place(outs, np.asarray(out))
    j, b = place(ins, np.asarray(into))
    up, right = np.minimum(i + 1, len(outs) - 1), np.minimum(j + 1, len(ins) - 1)
    return (
        (1 - a) * (1 - b) * times[i, j]
        + a * (1 - b) * times[up, j]
        + (1 - a) * b * times[i, right]
        + a * b * times[up, right]
    )
