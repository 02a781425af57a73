"""Measure the time of convolutions and linear layers at several widths, each alone, on this machine."""

from __future__ import annotations

import copy
import math
import timeit
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from pruning.deploy.runtimes import onnx_session, require_package
from pruning.graph.deformable import DeformableConv
from pruning.graph.layer_tensors import narrow
from pruning.graph.layers import Side, channel_dim, holds_layers, is_depthwise, layer_width, parts, rule_of
from pruning.planning.budget import LatencyBudget
from pruning.planning.cost import CostModel
from pruning.planning.search import Order
from pruning.utils.modules import call, eval_mode, hooked, on_input, thread_count
from pruning.utils.tree import Inputs

#: Most widths of each side of a layer at which it is timed.
MAX_WIDTHS = 8

#: Output widths (outputs,), input widths (inputs,), and milliseconds per example, (outputs, inputs).
_TimeGrid = tuple[np.ndarray, np.ndarray, np.ndarray]


class LatencyTable:
    """The time of the layers of a model at several widths, each measured alone on this machine.

    Times between measured widths are interpolated in the output and the input channels.

    Args:
        model: the traced model; it is not changed.
        inputs: example inputs, as many examples as one pass has.
        cost_model: of this model.
        budget: gives the runtime and its threads.
        lowest: least width of each group, (groups,).
        multiple: widths are multiples of this number of channels.

    Attributes:
        candidates: for each group the widths that a plan may choose.
        times: for each layer its grid of times.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        cost_model: CostModel,
        budget: LatencyBudget,
        lowest: np.ndarray,
        multiple: int = 1,
    ):
        self.cost_model = cost_model
        self.full = cost_model.full
        self.candidates = [
            _candidates(int(low), int(full), multiple) for low, full in zip(lowest, self.full, strict=True)
        ]
        shapes_of = _input_shapes(model, inputs, [name for name in cost_model.layers if name])
        grid_sides = self._grid_sides()
        known: dict[tuple[object, ...], np.ndarray] = {}  # layers of the same kind are timed once
        self.times: dict[str, _TimeGrid] = {}
        with thread_count(budget.threads), torch.inference_mode():
            for name, shapes in shapes_of.items():
                layer = model.get_submodule(name)
                outs, ins = grid_sides[name]
                kind = (type(layer), layer.extra_repr(), tuple(shapes), tuple(outs), tuple(ins))
                if kind not in known:
                    known[kind] = _time_grid(layer, shapes, outs, ins, budget)
                self.times[name] = outs, ins, known[kind]

    def milliseconds(self, widths: np.ndarray) -> np.ndarray:
        """Return the time of all layers together, per example.

        Args:
            widths: of the groups, (groups,), or (groups, plans) for one value per plan.
        """
        total = np.zeros(widths.shape[1:])
        for name, (out, into) in self.cost_model.sides(widths).items():
            if name in self.times:
                total = total + _interpolated(*self.times[name], out, into)
        return total

    def path(self, order: Order) -> list[np.ndarray]:
        """Return widths from the full ones on, (groups,) each, as the time of the layers falls.

        Each step narrows the group, to one of its candidate widths, whose channels have the lowest
        score for the time that this frees. A width that is no faster than a wider one frees nothing
        and is passed over.
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
            # Of equal values take the shortest move: the path then has more places to stop.
            best = min(range(len(moves)), key=lambda k: (value[k], freed[k]))
            if not np.isfinite(value[best]):
                return path
            path.append(plans[:, best].copy())

    def _grid_sides(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """For every layer the output and input channels to time it at."""
        narrowest = np.array([widths[0] for widths in self.candidates], dtype=np.float64)
        ends = self.cost_model.sides(np.stack([narrowest, self.full], 1))
        alone = []  # the sides of all layers as one group alone takes each of its widths
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
    """Widths from the lowest to the full one: all of few, else `MAX_WIDTHS` evenly spaced."""
    allowed = [w for w in range(lowest, full + 1) if w % multiple == 0 or w in (lowest, full)]
    if len(allowed) <= MAX_WIDTHS:
        return np.array(allowed, dtype=np.float64)
    # Even shares of the full width: of 64 channels multiples of 8, which runtimes pad to.
    steps = [round(full * k / MAX_WIDTHS / multiple) * multiple for k in range(1, MAX_WIDTHS + 1)]
    return np.array(sorted({lowest, full, *(w for w in steps if lowest <= w <= full)}), dtype=np.float64)


def _input_shapes(model: nn.Module, inputs: Inputs, names: list[str]) -> dict[str, list[torch.Size]]:
    """The shapes that each layer receives in a forward pass, one for each time it runs."""
    shapes: dict[str, list[torch.Size]] = {}

    def watch(name: str) -> Callable[[Tensor], None]:
        return lambda x: shapes.setdefault(name, []).append(x.shape)

    handles = [on_input(model.get_submodule(name), watch(name)) for name in names]
    with hooked(handles), torch.no_grad(), eval_mode(model):
        call(model, inputs)
    return shapes


def _time_grid(
    layer: nn.Module, shapes: list[torch.Size], outs: np.ndarray, ins: np.ndarray, budget: LatencyBudget
) -> np.ndarray:
    """Milliseconds per example of a layer at each of its widths, (outputs, inputs)."""
    found = np.empty((len(outs), len(ins)))
    for i, out in enumerate(outs):
        for j, into in enumerate(ins):
            small = _narrowed(layer, int(out), int(into))
            found[i, j] = sum(_milliseconds(small, shape, budget) for shape in shapes)
    return found


def _narrowed(layer: nn.Module, out: int, into: int) -> nn.Module:
    """A copy of a layer with these output and input channels, an equal number in each of its parts."""
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
    """Time one layer alone, per example: the least of several repeats."""
    weight, sizes = layer.get_parameter(rule_of(layer).weight), list(shape)
    sizes[channel_dim(layer)] = layer_width(layer, "in")
    x = torch.randn(sizes).to(weight)
    args = (x, _zero_offsets(layer, x)) if isinstance(layer, DeformableConv) else (x,)
    run: Callable[[], object] = partial(layer, *args)
    if holds_layers(layer) or isinstance(layer, DeformableConv):
        # The layers inside it keep their widths, and its own code may compute the offsets: call torch's.
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
    return min(timer.repeat(3, passes)) / passes / len(x) * 1000


def _zero_offsets(layer: DeformableConv, x: Tensor) -> Tensor:
    """The offsets with which a deformable convolution is a plain one."""
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
    """One layer in ONNX Runtime; exporting it with torch would take longer than all its timings."""
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
    """Interpolate a grid of times bilinearly at (plans,) or single widths."""

    def place(grid: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Index of the grid point below, and the share of the way to the next."""
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
