"""The quickest form of an ONNX file: equivalent graphs, measured on the machine at hand."""

from __future__ import annotations

import copy
import json
import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pruning.deploy.runtimes import Exported, difference, needed
from pruning.deploy.timing import time_forward
from pruning.errors import ExportError
from pruning.utils.files import replace_file

#: Poolings are taken into convolutions of fewer channels; wider ones fill the runtime's blocks anyway.
NARROW = 32

#: A form must be quicker by this share to be preferred; less is within the error of a short measurement.
GAIN = 0.02

#: How far its outputs may be from those of the file, relative to the largest one.
TOLERANCE = 1e-5

#: What may stand between a convolution and its pooling: operations on every value alone.
ACTIVATIONS = ("Relu", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Elu")


@dataclass(frozen=True)
class Optimized:
    """A file in its quickest form.

    `poolings` counts those that were taken into the convolution before them; `ratio` is its time
    divided by that of the file it was made of, the geometric mean over the batch sizes; `size` is
    in bytes.
    """

    path: Path
    poolings: int
    ratio: float
    size: int

    def __str__(self) -> str:
        taken = f"{self.poolings} pooling{'s' * (self.poolings != 1)} taken into the convolution before"
        return f"{self.path}: {self.size:,} bytes; {taken}, {self.ratio:.2f} of the time in onnxruntime"


def optimize(
    onnx_path: str | Path,
    output: str | Path,
    *,
    batch_sizes: Sequence[int] = (1, 64),
    seconds: float = 1.0,
    threads: int = 1,
) -> Optimized:
    """Write an ONNX file in the form that ONNX Runtime runs quickest on this machine.

    The runtime computes convolutions on blocks of 16 channels (8 without AVX-512), and those of
    a pruned network are padded to them. So a convolution of C channels and the p x p pooling
    behind it are also written as one convolution with stride p and p²C channels, C for each place
    of the pooling's window, and the largest over the places. That is more arithmetic, but on
    fuller blocks, and the large image between the two is never written. The poolings are taken
    in from the first one on; each form is timed beside the file as it is, and the quickest written.

    Args:
        onnx_path: a float32 file with a single input, as `export` writes it. For int8, quantize
            the result.
        output: replaced where it exists; may be the same file.
        batch_sizes: to be quick at, all alike. seconds: to measure at each of them.
        threads: of ONNX Runtime.

    Raises `ExportError` for a file that is missing, damaged or has other inputs, and for a
    package that is missing; then nothing is written.
    """
    onnx = needed("onnx")
    whole = Exported(onnx_path, "onnxruntime", threads)
    model = onnx.load(onnx_path)
    batches = [_noise(model, size, onnx_path) for size in batch_sizes]
    expected = [whole(batch) for batch in batches]
    running, contents = {"0": whole}, {"0": Path(onnx_path).read_bytes()}
    with tempfile.TemporaryDirectory() as folder:
        for count, form in enumerate(_forms(model), start=1):
            written = Path(folder) / f"{count}.onnx"
            written.write_bytes(form.SerializeToString())
            candidate = Exported(written, "onnxruntime", threads)
            apart = [difference(outputs, candidate(x)) for outputs, x in zip(expected, batches, strict=True)]
            if max(apart) <= TOLERANCE:
                running[str(count)], contents[str(count)] = candidate, written.read_bytes()
    ratios = _ratios(running, batches, seconds, threads)
    best = min(ratios, key=ratios.__getitem__)
    if ratios[best] > 1 - GAIN:
        best = "0"
    replace_file(output, contents[best])
    return Optimized(Path(output), int(best), ratios[best], len(contents[best]))


def _noise(model: Any, size: int, path: str | Path) -> Tensor:
    """A batch for the single input of a model."""
    inputs = model.graph.input
    kind = inputs[0].type.tensor_type if len(inputs) == 1 else None
    shape = [dim.dim_value for dim in kind.shape.dim[1:]] if kind is not None else [0]
    if kind is None or kind.elem_type != 1 or not all(shape):
        raise ExportError(f"{path}: optimize takes files with a single float32 input of a fixed shape")
    return torch.randn(size, *shape, generator=torch.Generator().manual_seed(0))


def _ratios(
    running: Mapping[str, Exported], batches: Sequence[Tensor], seconds: float, threads: int
) -> dict[str, float]:
    """The time of each form divided by the first's: the geometric mean over the batches."""
    if len(running) == 1:
        return dict.fromkeys(running, 1.0)
    found: dict[str, list[float]] = {name: [] for name in running}
    for batch in batches:
        times = time_forward(running, batch, seconds=seconds, threads=threads)
        for name, ratios in found.items():
            ratios.append(times[name].median / times["0"].median)
    return {name: statistics.geometric_mean(ratios) for name, ratios in found.items()}


class _Pooled(NamedTuple):
    """A convolution, and the pooling that alone reads it, directly or behind an activation.

    `weight` is the convolution's, `size` (N, C, H, W) the shape of what the pooling gives.
    """

    conv: Any
    pool: Any
    weight: np.ndarray
    size: tuple[int, ...]


def _forms(model: Any) -> Iterator[Any]:
    """The model with its first pooling taken into the convolution before, with its first two, and so on."""
    onnx = needed("onnx")
    form, taken = onnx.shape_inference.infer_shapes(model), 0
    facts = {entry.key: entry.value for entry in model.metadata_props}
    while (found := _first_pooled(form.graph)) is not None:
        _take_in(form.graph, found)
        taken += 1
        made = copy.deepcopy(form)
        del made.graph.value_info[:]  # between the two there are other shapes now
        facts["optimization"] = json.dumps({"poolings in convolutions": taken})
        onnx.helper.set_model_props(made, facts)
        onnx.checker.check_model(made)
        yield made


def _first_pooled(graph: Any) -> _Pooled | None:
    """The first pooling that the convolution before it can take in."""
    to_array = needed("onnx").numpy_helper.to_array
    makers = {name: node for node in graph.node for name in node.output}
    read = [name for node in graph.node for name in node.input] + [value.name for value in graph.output]
    weights = {tensor.name: tensor for tensor in graph.initializer}
    shapes = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.value_info, *graph.output)
    }
    for pool in graph.node:
        if pool.op_type != "MaxPool" or len(pool.output) > 1:
            continue
        conv, between = makers.get(pool.input[0]), [pool.input[0]]
        if conv is not None and conv.op_type in ACTIVATIONS:
            between.append(conv.input[0])
            conv = makers.get(conv.input[0])
        if conv is None or conv.op_type != "Conv" or not set(conv.input[1:]) <= weights.keys():
            continue
        weight, size = to_array(weights[conv.input[1]]), shapes.get(pool.output[0], ())
        narrow = weight.ndim == len(size) == 4 and len(weight) < NARROW and all(size[1:])
        if narrow and _side_by_side(conv, pool) and all(read.count(name) == 1 for name in between):
            return _Pooled(conv, pool, weight, size)
    return None


def _attributes(node: Any) -> dict[str, Any]:
    get = needed("onnx").helper.get_attribute_value
    return {attribute.name: get(attribute) for attribute in node.attribute}


def _side_by_side(conv: Any, pool: Any) -> bool:
    """Whether a convolution takes every step, in one group, and the pooling's windows do not overlap."""
    how, window = _attributes(conv), _attributes(pool)
    ones = [
        *how.get("strides", ()),
        *how.get("dilations", ()),
        *window.get("dilations", ()),
        how.get("group", 1),
    ]
    zeros = [*window.get("pads", ()), window.get("ceil_mode", 0)]
    return (
        set(ones) == {1}
        and not any(zeros)
        and window["kernel_shape"] == window.get("strides")
        and {how.get("auto_pad", b"NOTSET"), window.get("auto_pad", b"NOTSET")} == {b"NOTSET"}
    )


def _take_in(graph: Any, found: _Pooled) -> None:
    """Conv, pooling become a Conv whose stride is the window, and the largest over its places."""
    onnx = needed("onnx")
    conv, pool, weight, (_, channels, *image) = found
    window = _attributes(pool)["kernel_shape"]
    places = list(np.ndindex(*window))
    kernel = [k + p - 1 for k, p in zip(weight.shape[2:], window, strict=True)]
    wide = np.zeros((len(places), *weight.shape[:2], *kernel), weight.dtype)
    for copied, (down, right) in zip(wide, places, strict=True):
        copied[:, :, down : down + weight.shape[2], right : right + weight.shape[3]] = weight
    made = {"weight": wide.reshape(-1, *wide.shape[2:])}
    if len(conv.input) > 2:
        (bias,) = (tensor for tensor in graph.initializer if tensor.name == conv.input[2])
        made["bias"] = np.tile(onnx.numpy_helper.to_array(bias), len(places))
    name = pool.output[0]
    # The places become the rows of an image of one channel: pooling over them costs less than a
    # reduction over a dimension does. 0 is the batch's own size.
    made["rows"] = np.array([0, 1, len(places), math.prod((channels, *image))])
    made["shape"] = np.array([0, channels, *image])
    for what, array in made.items():
        graph.initializer.append(onnx.numpy_helper.from_array(array, f"{name}.{what}"))
    del conv.input[1:]
    conv.input.extend(f"{name}.{what}" for what in ("weight", "bias") if what in made)
    kept = {key: value for key, value in _attributes(conv).items() if key == "pads"}
    del conv.attribute[:]
    for key, value in {**kept, "strides": window, "kernel_shape": kernel}.items():
        conv.attribute.append(onnx.helper.make_attribute(key, value))
    make = onnx.helper.make_node
    at = next(i for i, node in enumerate(graph.node) if node.output[0] == name)
    flat = _flattens(graph, name)
    largest = make(
        "MaxPool", [f"{name}.places"], [name if flat else f"{name}.largest"], kernel_shape=[len(places), 1]
    )
    after = [largest] if flat else [largest, make("Reshape", [f"{name}.largest", f"{name}.shape"], [name])]
    pool.CopyFrom(make("Reshape", [pool.input[0], f"{name}.rows"], [f"{name}.places"]))
    for node in reversed(after):
        graph.node.insert(at + 1, node)
    used = {read for node in graph.node for read in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)


def _flattens(graph: Any, name: str) -> bool:
    """Whether all that reads a tensor is a flattening of all but the batch, to which any shape will do."""
    readers = [node for node in graph.node if name in node.input]
    if len(readers) != 1 or any(value.name == name for value in graph.output):
        return False
    if readers[0].op_type == "Flatten":
        return _attributes(readers[0]).get("axis", 1) == 1
    shapes = {tensor.name: tensor for tensor in graph.initializer}
    if readers[0].op_type != "Reshape" or readers[0].input[1] not in shapes:
        return False
    wanted = needed("onnx").numpy_helper.to_array(shapes[readers[0].input[1]]).tolist()
    return len(wanted) == 2 and wanted[0] in (0, -1) and wanted[1] != 0
