"""Latency as a budget: widths chosen by what layers take on this machine, measured.

Fewer MACs are not less time: a runtime may pad channels, or spend its time elsewhere. So the
convolutions and linear layers of a model are timed alone at several widths, in the runtime
that will run them; a plan gives up the channels that matter least for the time they free;
and whole networks are timed side by side until one meets the limit.
"""

from __future__ import annotations

import copy
import tempfile
import timeit
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pruning.budget import LatencyBudget
from pruning.cost import CostModel, time_forward
from pruning.errors import PruningError
from pruning.export import SUFFIXES, export
from pruning.graph import Inputs, Trace, call, tensors
from pruning.grouping import trace as find_groups
from pruning.importance import Groups, Scores
from pruning.layers import is_depthwise, layer_width, narrow, parts
from pruning.modes import eval_mode, hooked, thread_count
from pruning.norms import fold_batchnorm
from pruning.plan import Order, Plan, ascending, lowest_widths, most_important
from pruning.runtimes import RUNTIMES, Exported, needed
from pruning.surgery import apply

#: Widths of each side of a layer at which it is timed, at most.
POINTS = 8


@dataclass(frozen=True)
class LatencyFound:
    """What was measured: the dense and the pruned network side by side, ms per example (medians).

    `networks` counts those that were built and timed.
    """

    dense: float
    pruned: float
    networks: int

    def __str__(self) -> str:
        ratio = self.pruned / self.dense
        faster = "" if ratio < 1 else "; pruning does not make it faster here"
        return f"{self.pruned:.4f} ms, dense {self.dense:.4f} ms ({ratio:.2f}x){faster}"


def even_scores(model: nn.Module, groups: Groups) -> Scores:
    """Scores that rise from 1/n to 1 over the n channels of a group, so that all give up alike."""
    return {name: torch.arange(1, group.channels + 1) / group.channels for name, group in groups.items()}


def plan_latency(
    model: nn.Module,
    inputs: Inputs,
    trace: Trace,
    scores: Mapping[str, Tensor],
    budget: LatencyBudget,
    *,
    floor: int | Mapping[str, int] = 1,
    most: float | Mapping[str, float] = 1.0,
    multiple: int = 1,
    ranking: str = "global",
) -> tuple[Plan, LatencyFound]:
    """The channels to keep so that a forward pass takes no longer than the budget.

    Args:
        inputs: example inputs.
        trace, scores: of the model, a score per channel.
        floor, most: as `plan_within` takes them. multiple: widths are multiples of so many
            channels; which ones pay is otherwise found by measuring.

    Raises `PruningError` when no plan is fast enough; it says what the narrowest takes.
    """
    if ranking != "global":
        raise PruningError(f"ranking {ranking!r}: a budget of latency is met by the global ranking alone")
    inputs = budget.batch_of(inputs)
    order = ascending(trace, scores)
    lowest = lowest_widths(trace, order, floor, most)
    table = LatencyTable(model, inputs, trace, budget, lowest, multiple)
    path = table.path(order)
    if not np.array_equal(path[-1], lowest):
        path.append(lowest)
    with _Race(model, inputs, trace, budget) as race:
        dense, least = race.run(lowest, most_important(trace, order, lowest))
        if least > budget.target(dense):
            raise PruningError(
                f"the latency budget {budget} ({budget.target(dense):.4f} ms) cannot be reached: with every "
                f"group at its floor the network takes {least:.4f} ms per example, dense {dense:.4f} ms"
            )
        end = _search(race, table, path, order)
        if end:  # the last move may have gone further than needed
            path = _between(path[end - 1], path[end], multiple)
            end = _search(race, table, path, order)
        found = race.known[tuple(path[end])]
    return most_important(trace, order, path[end]), LatencyFound(*found, networks=len(race.known))


def _search(race: _Race, table: LatencyTable, path: list[np.ndarray], order: Order) -> int:
    """The first place on a path whose network is fast enough; the last one is known to be.

    The table says how the time of the layers falls along the path; a race, where the whole
    network stands.
    """
    layers = [float(table.milliseconds(widths)) for widths in path]
    slow, fast = (0, 1.0), (len(path) - 1, race.share(path[-1]))  # place, share of the dense time
    if tuple(path[0]) in race.known:
        slow = (0, race.share(path[0]))
        if slow[1] <= race.target(path[0]):
            return 0
    halve = False
    while fast[0] - slow[0] > 1:
        # Interpolate between what was measured, every other time halve what is left.
        middle = (slow[0] + fast[0]) // 2
        if not halve:
            span = (layers[slow[0]] - layers[fast[0]]) / max(slow[1] - fast[1], 1e-9)
            wanted = layers[fast[0]] + (race.target(path[fast[0]]) - fast[1]) * span
            middle = next((k for k in range(slow[0], fast[0]) if layers[k] <= wanted), fast[0])
            middle = min(max(middle, slow[0] + 1), fast[0] - 1)
        race.run(path[middle], most_important(race.trace, order, path[middle]))
        here = (middle, race.share(path[middle]))
        if here[1] <= race.target(path[middle]):
            fast = here
        else:
            slow = here
        halve = not halve
    return fast[0]


def _between(wide: np.ndarray, slim: np.ndarray, multiple: int) -> list[np.ndarray]:
    """From one to the other in at most `POINTS` steps: along the group in which they differ."""
    count = int(max(1, min(POINTS, (wide - slim).max() // multiple)))
    steps = [wide + (slim - wide) * k / count for k in range(count + 1)]
    rounded = [np.maximum(slim, np.round(widths / multiple) * multiple) for widths in steps[1:-1]]
    return [wide, *rounded, slim]


class LatencyTable:
    """What the layers of a model take at several widths, measured alone on this machine.

    Times between measured widths are interpolated, in the output and the input channels.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        trace: Trace,
        budget: LatencyBudget,
        lowest: np.ndarray,
        multiple: int = 1,
    ):
        self.cost_model = CostModel(model, trace)
        self.full = self.cost_model.full
        #: For every group the widths that a plan may choose, from its floor to its full width.
        self.candidates = [
            _candidates(int(low), int(full), multiple) for low, full in zip(lowest, self.full, strict=True)
        ]
        received = _received(model, inputs, [name for name in self.cost_model.layers if name])
        full_sides = self.cost_model.sides(self.full)
        grid_sides = self._grid_sides()
        known: dict[Any, np.ndarray] = {}  # layers of one kind are timed once
        self.times: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        with thread_count(budget.threads), torch.inference_mode():
            for name, shapes in received.items():
                layer = model.get_submodule(name)
                outs, ins = grid_sides[name]
                if not np.array_equal(full_sides[name], [outs[-1], ins[-1]]):
                    raise AssertionError(f"{name}: the grid does not end at the full width")
                kind = (type(layer), layer.extra_repr(), tuple(shapes), tuple(outs), tuple(ins))
                if kind not in known:
                    known[kind] = _times(layer, shapes, outs, ins, budget)
                self.times[name] = outs, ins, known[kind]

    def _grid_sides(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """For every layer the output and input channels to time it at."""
        narrow_to = np.array([widths[0] for widths in self.candidates], dtype=np.float64)
        ends = self.cost_model.sides(np.stack([narrow_to, self.full], 1))
        alone = {}
        for i, widths in enumerate(self.candidates):
            plans = np.repeat(self.full[:, None], len(widths), 1)
            plans[i] = widths
            alone[i] = self.cost_model.sides(plans)
        grid = {}
        for name, (out, into) in ends.items():
            sides = []
            for which, (low, high) in enumerate((out, into)):
                moved = [s[name][which] for s in alone.values() if s[name][which][0] != s[name][which][-1]]
                if len(moved) == 1:
                    sides.append(np.unique(moved[0].round()))
                else:  # fixed, or of several groups
                    sides.append(np.unique(np.linspace(low, high, POINTS if high > low else 1).round()))
            grid[name] = (sides[0], sides[1])
        return grid

    def milliseconds(self, widths: np.ndarray) -> Any:
        """Of all layers together, per example: for widths (groups,), or (groups, plans) for each plan."""
        total: Any = 0.0
        for name, (out, into) in self.cost_model.sides(widths).items():
            if name in self.times:
                total = total + _interpolated(*self.times[name], out, into)
        return total

    def path(self, order: Order) -> list[np.ndarray]:
        """Widths from the full ones on, (groups,) each, as the layers' time falls.

        At every step the group is narrowed, to one of its candidate widths, whose channels
        matter least for the time that this frees. A width that is no faster than a wider one
        frees nothing, and is passed over.
        """
        groups = self.cost_model.groups
        lost = {g: np.concatenate([[0.0], np.cumsum(scores)]) for g, (_, scores) in order.items()}
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
                gone = lost[groups[i]]
                losses[column] = gone[int(self.full[i] - w)] - gone[int(self.full[i] - widths[i])]
            freed = self.milliseconds(widths) - self.milliseconds(plans)
            value = np.where(freed > 0, losses / np.maximum(freed, 1e-12), np.inf)
            # Of moves that lose equally little for it the shortest: the path has more places to stop.
            best = min(range(len(moves)), key=lambda k: (value[k], freed[k]))
            if not np.isfinite(value[best]):
                return path
            path.append(plans[:, best].copy())


def _candidates(lowest: int, full: int, multiple: int) -> np.ndarray:
    """Widths from the floor to the full one: all of few, else `POINTS` evenly spaced."""
    allowed = [w for w in range(lowest, full + 1) if w % multiple == 0 or w in (lowest, full)]
    if len(allowed) <= POINTS:
        return np.array(allowed, dtype=np.float64)
    # Even shares of the full width: of 64 channels multiples of 8, which runtimes like.
    steps = [round(full * k / POINTS / multiple) * multiple for k in range(1, POINTS + 1)]
    return np.array(sorted({lowest, full, *(w for w in steps if lowest <= w <= full)}), dtype=np.float64)


def _received(model: nn.Module, inputs: Inputs, names: list[str]) -> dict[str, list[torch.Size]]:
    """The shapes that each layer receives in a forward pass, one for each time it runs."""
    shapes: dict[str, list[torch.Size]] = {}

    def hook(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda _, args: shapes.setdefault(name, []).append(args[0].shape)

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    with hooked(handles), torch.no_grad(), eval_mode(model):
        call(model, inputs)
    return shapes


def _times(
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
    """A copy of a layer with so many output and input channels, as many of each of its parts."""
    small = copy.deepcopy(layer).eval()
    for side, width in (("out", out), ("in", into)):
        full = layer_width(layer, "out" if side == "out" else "in")
        if side == "in" and is_depthwise(layer):
            continue
        each, of = max(1, width // parts(layer)), full // parts(layer)
        keep = torch.cat([torch.arange(each) + part * of for part in range(parts(layer))])
        narrow(small, "out" if side == "out" else "in", keep)
    return small


def _milliseconds(layer: nn.Module, shape: torch.Size, budget: LatencyBudget) -> float:
    """Of one layer alone, per example: the least of several turns."""
    weight = layer.get_parameter("weight")
    dim = -1 if isinstance(layer, nn.Linear) else 1 - len(shape) if len(shape) > weight.ndim - 1 else 0
    sizes = list(shape)
    sizes[dim] = layer_width(layer, "in")
    x = torch.randn(sizes).to(weight)
    run: Callable[[], Any] = lambda: layer(x)  # noqa: E731
    if budget.runtime == "onnxruntime" and isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
        run = _onnx_layer(layer, x, budget.threads)
    if weight.is_cuda:
        run = partial(_and_wait, run)
    timer = timeit.Timer(run)
    timer.timeit(2)
    passes = max(1, round(0.001 / max(timer.timeit(1), 1e-9)))
    return min(timer.repeat(3, passes)) / passes / len(x) * 1000


def _and_wait(run: Callable[[], Any]) -> None:
    run()
    torch.cuda.synchronize()


def _onnx_layer(layer: nn.Module, x: Tensor, threads: int) -> Callable[[], Any]:
    """One layer in ONNX Runtime; exporting it by torch would take longer than all its timings."""
    onnx, onnxruntime = needed("onnx"), needed("onnxruntime")
    weight, bias = layer.get_parameter("weight").detach().cpu(), getattr(layer, "bias", None)
    initial = {"w": weight}
    if isinstance(bias, nn.Parameter):
        initial["b"] = bias.detach().cpu()
    has_bias = "b" in initial
    if isinstance(layer, nn.Linear):
        initial["w"] = weight.T.contiguous()
        nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["p" if has_bias else "y"])]
        if has_bias:
            nodes.append(onnx.helper.make_node("Add", ["p", "b"], ["y"]))
    else:
        conv: Any = layer
        twice = conv._reversed_padding_repeated_twice  # (last begin, last end, ..., first end)
        nodes = [
            onnx.helper.make_node(
                "Conv",
                ["x", *initial],
                ["y"],
                strides=list(conv.stride),
                dilations=list(conv.dilation),
                group=conv.groups,
                pads=[*twice[0::2][::-1], *twice[1::2][::-1]],
            )
        ]
    describe = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "layer",
        [describe("x", onnx.TensorProto.FLOAT, list(x.shape))],
        [describe("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(value.float().numpy(), name) for name, value in initial.items()],
    )
    opset = onnx.helper.make_opsetid("", 17)
    proto = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {"x": x.float().cpu().numpy()}
    return lambda: session.run(None, feed)


def _interpolated(outs: np.ndarray, ins: np.ndarray, times: np.ndarray, out: Any, into: Any) -> Any:
    """Bilinear, at (plans,) or single widths."""

    def place(grid: np.ndarray, at: Any) -> tuple[Any, Any]:
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


class _Race:
    """Times pruned networks beside the dense one, as they will ship: BatchNorm folded, in their runtime."""

    def __init__(self, model: nn.Module, inputs: Inputs, trace: Trace, budget: LatencyBudget):
        self.model, self.inputs, self.trace, self.budget = model, inputs, trace, budget
        self.folder = tempfile.TemporaryDirectory()
        #: (dense, pruned) in milliseconds per example, by widths.
        self.known: dict[tuple[float, ...], tuple[float, float]] = {}

    def __enter__(self) -> _Race:
        dense = self.model if self.budget.dense is None else self.budget.dense
        traced = self.trace if dense is self.model else find_groups(dense, self.inputs)
        self.dense = self._shipped(dense, traced, "dense")
        return self

    def __exit__(self, *_: object) -> None:
        del self.dense
        self.folder.cleanup()

    def run(self, widths: np.ndarray, plan: Plan) -> tuple[float, float]:
        """Milliseconds per example of the dense network and of the plan's."""
        key = tuple(widths)
        if key not in self.known:
            pruned = self._shipped(apply(self.model, self.trace, plan), self.trace, "pruned")
            networks = {"dense": self.dense, "pruned": pruned}
            seconds, threads = self.budget.seconds, self.budget.threads
            times = time_forward(networks, self.inputs, seconds=seconds, threads=threads)
            self.known[key] = (times["dense"].median, times["pruned"].median)
        return self.known[key]

    def share(self, widths: np.ndarray) -> float:
        """The time of known widths, of the dense network's."""
        dense, pruned = self.known[tuple(widths)]
        return pruned / dense

    def target(self, widths: np.ndarray) -> float:
        """The share that the budget allows, by the dense network's time in the same race."""
        dense, _ = self.known[tuple(widths)]
        return self.budget.target(dense) / dense

    def _shipped(self, model: nn.Module, trace: Trace, name: str) -> nn.Module:
        folded = fold_batchnorm(model, trace)
        if self.budget.runtime == "eager":
            return folded
        format = next(f for f, runtime in RUNTIMES.items() if runtime == self.budget.runtime)
        path = Path(self.folder.name) / f"{name}{SUFFIXES[format]}"
        if isinstance(self.inputs, Mapping):
            raise PruningError(f"{self.budget.runtime} takes tensors by position, not by name")
        export(folded, path, tensors(self.inputs), format)
        return Exported(path, self.budget.runtime, self.budget.threads)
