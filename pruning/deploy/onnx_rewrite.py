"""Choose the fastest of several equivalent graphs of an ONNX file by timing them on this machine."""

from __future__ import annotations

import copy
import json
import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pruning.deploy.runtimes import Exported, relative_difference, require_package
from pruning.deploy.timing import time_forward
from pruning.errors import ExportError
from pruning.utils.files import replace_file
from pruning.utils.wording import number_of

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

#: Only convolutions with fewer channels are fused with a pooling; wider ones fill the runtime's blocks.
FUSED_CHANNELS = 32

#: Share of the time that a variant must save; less is within the error of a short measurement.
LEAST_GAIN = 0.02

#: Largest allowed difference between the outputs of variant and file, relative to the file's largest output.
TOLERANCE = 1e-5

#: Elementwise operations that may stand between a convolution and its pooling.
ACTIVATIONS = ("Relu", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Elu")


@dataclass(frozen=True)
class Optimized:
    """The file that `optimize` wrote.

    Attributes:
        path: path of the file.
        poolings: number of poolings that were fused with the convolution before them.
        ratio: time of this file divided by that of the given file, geometric mean over batch sizes.
        size: size of the file in bytes.
    """

    path: Path
    poolings: int
    ratio: float
    size: int

    def __str__(self) -> str:
        fused = f"{number_of(self.poolings, 'pooling')} fused with the convolution before"
        return f"{self.path}: {self.size:,} bytes; {fused}, {self.ratio:.2f} of the time in onnxruntime"


def optimize(
    onnx_path: str | Path,
    output: str | Path,
    *,
    batch_sizes: Sequence[int] = (1, 64),
    seconds: float = 1.0,
    threads: int = 1,
) -> Optimized:
    """Write the variant of an ONNX file that ONNX Runtime runs fastest on this machine.

    The runtime computes convolutions in blocks of 16 channels (8 without AVX-512) and pads the channels
    of a pruned network to full blocks. A convolution with C channels followed by a p x p max pooling can
    also be written as one convolution with stride p and p²C channels, C for each position in the
    pooling's window, followed by the maximum over the positions. This takes more arithmetic, but fills
    the blocks better and never writes the large image between the two. Variant k of the file has the
    first k poolings fused; all variants are timed together with the file itself.

    Args:
        onnx_path: a float32 file with a single input, as `export` writes it. For int8, quantize
            the result.
        output: path of the file to write; an existing file, also `onnx_path`, is replaced.
        batch_sizes: batch sizes at which to measure; each has equal weight.
        seconds: time to measure at each batch size.
        threads: number of threads of ONNX Runtime.

    Returns:
        The file that was written.

    Raises:
        ExportError: if the file is missing, damaged or has other inputs, or if a package is not
            installed. Then nothing is written.
    """
    onnx = require_package("onnx")
    original = Exported(onnx_path, "onnxruntime", threads)
    model = onnx.load(onnx_path)
    batches = [_noise(model, size, onnx_path) for size in batch_sizes]
    expected = [original(batch) for batch in batches]
    # The keys are numbers of fused poolings, as text, because `time_forward` takes models by name.
    variants, contents = {"0": original}, {"0": Path(onnx_path).read_bytes()}
    with tempfile.TemporaryDirectory() as folder:
        for count, variant in enumerate(_variants(model), start=1):
            written = Path(folder) / f"{count}.onnx"
            written.write_bytes(variant.SerializeToString())
            candidate = Exported(written, "onnxruntime", threads)
            differences = [
                relative_difference(outputs, candidate(x))
                for outputs, x in zip(expected, batches, strict=True)
            ]
            if max(differences) <= TOLERANCE:
                variants[str(count)], contents[str(count)] = candidate, written.read_bytes()
    ratios = _ratios(variants, batches, seconds, threads)
    best = min(ratios, key=ratios.__getitem__)
    if ratios[best] > 1 - LEAST_GAIN:
        best = "0"
    replace_file(output, contents[best])
    return Optimized(Path(output), int(best), ratios[best], len(contents[best]))


def _noise(model: ModelProto, size: int, path: str | Path) -> Tensor:
    """Return a batch of noise for the single input of a model."""
    inputs = model.graph.input
    kind = inputs[0].type.tensor_type if len(inputs) == 1 else None
    shape = [dim.dim_value for dim in kind.shape.dim[1:]] if kind is not None else [0]
    if kind is None or kind.elem_type != 1 or not all(shape):
        raise ExportError(
            f"{path} has inputs of another kind: optimize needs a file with a single float32 input whose "
            "shape is fixed except for the batch size, as export writes it"
        )
    return torch.randn(size, *shape, generator=torch.Generator().manual_seed(0))


def _ratios(
    variants: Mapping[str, Exported], batches: Sequence[Tensor], seconds: float, threads: int
) -> dict[str, float]:
    """Return each variant's time divided by the original's, the geometric mean over the batches."""
    if len(variants) == 1:
        return dict.fromkeys(variants, 1.0)
    ratios: dict[str, list[float]] = {name: [] for name in variants}
    for batch in batches:
        times = time_forward(variants, batch, seconds=seconds, threads=threads)
        for name, values in ratios.items():
            values.append(times[name].median / times["0"].median)
    return {name: statistics.geometric_mean(values) for name, values in ratios.items()}


class _PooledConv(NamedTuple):
    """A convolution and the pooling that alone reads its output, directly or after an activation.

    `weight` is the weight of the convolution, `size` the shape (N, C, H, W) of the pooling's output.
    """

    conv: NodeProto
    pool: NodeProto
    weight: np.ndarray
    size: tuple[int, ...]


def _variants(model: ModelProto) -> Iterator[ModelProto]:
    """Yield variants of the model: with the first pooling fused into its convolution, the first two, ..."""
    onnx = require_package("onnx")
    fused, count = onnx.shape_inference.infer_shapes(model), 0
    facts = {entry.key: entry.value for entry in model.metadata_props}
    while (found := _first_pooled(fused.graph)) is not None:
        _fuse(fused.graph, found)
        count += 1
        variant = copy.deepcopy(fused)
        del variant.graph.value_info[:]  # shapes between the nodes have changed
        facts["optimization"] = json.dumps({"poolings in convolutions": count})
        onnx.helper.set_model_props(variant, facts)
        onnx.checker.check_model(variant)
        yield variant


def _first_pooled(graph: GraphProto) -> _PooledConv | None:
    """Return the first pooling that can be fused with the convolution before it."""
    to_array = require_package("onnx").numpy_helper.to_array
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
        narrow = weight.ndim == len(size) == 4 and len(weight) < FUSED_CHANNELS and all(size[1:])
        if narrow and _can_fuse(conv, pool) and all(read.count(name) == 1 for name in between):
            return _PooledConv(conv, pool, weight, size)
    return None


def _attributes(node: NodeProto) -> dict[str, Any]:
    get = require_package("onnx").helper.get_attribute_value
    return {attribute.name: get(attribute) for attribute in node.attribute}


def _can_fuse(conv: NodeProto, pool: NodeProto) -> bool:
    """Return whether the convolution has stride 1 and one group, and the pooling windows do not overlap."""
    convolution, window = _attributes(conv), _attributes(pool)
    ones = [
        *convolution.get("strides", ()),
        *convolution.get("dilations", ()),
        *window.get("dilations", ()),
        convolution.get("group", 1),
    ]
    zeros = [*window.get("pads", ()), window.get("ceil_mode", 0)]
    return (
        set(ones) == {1}
        and not any(zeros)
        and window["kernel_shape"] == window.get("strides")
        and {convolution.get("auto_pad", b"NOTSET"), window.get("auto_pad", b"NOTSET")} == {b"NOTSET"}
    )


def _fuse(graph: GraphProto, found: _PooledConv) -> None:
    """Replace Conv, MaxPool by a Conv whose stride is the window, and the maximum over the positions."""
    onnx = require_package("onnx")
    conv, pool, weight, (_, channels, *image) = found
    window = _attributes(pool)["kernel_shape"]
    positions = list(np.ndindex(*window))
    kernel, values = _shifted_kernels(weight, window, positions)
    if len(conv.input) > 2:
        (bias,) = (tensor for tensor in graph.initializer if tensor.name == conv.input[2])
        values["bias"] = np.tile(onnx.numpy_helper.to_array(bias), len(positions))
    name = pool.output[0]
    # Reshape the positions to rows of a one-channel image: max pooling over rows takes less time than a
    # reduction over a dimension. In a shape, 0 keeps the batch size.
    values["rows"] = np.array([0, 1, len(positions), math.prod((channels, *image))])
    values["shape"] = np.array([0, channels, *image])
    for what, array in values.items():
        graph.initializer.append(onnx.numpy_helper.from_array(array, f"{name}.{what}"))
    del conv.input[1:]
    conv.input.extend(f"{name}.{what}" for what in ("weight", "bias") if what in values)
    pads = {key: value for key, value in _attributes(conv).items() if key == "pads"}
    del conv.attribute[:]
    for key, value in {**pads, "strides": window, "kernel_shape": kernel}.items():
        conv.attribute.append(onnx.helper.make_attribute(key, value))
    _insert_maximum(graph, pool, len(positions))
    used = {read for node in graph.node for read in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)


def _shifted_kernels(
    weight: np.ndarray, window: Sequence[int], positions: list[tuple[int, ...]]
) -> tuple[list[int], dict[str, np.ndarray]]:
    """Return the size and the weight of the fused kernel: the given weight, shifted to each position."""
    kernel = [k + p - 1 for k, p in zip(weight.shape[2:], window, strict=True)]
    wide = np.zeros((len(positions), *weight.shape[:2], *kernel), weight.dtype)
    for shifted, (down, right) in zip(wide, positions, strict=True):
        shifted[:, :, down : down + weight.shape[2], right : right + weight.shape[3]] = weight
    return kernel, {"weight": wide.reshape(-1, *wide.shape[2:])}


def _insert_maximum(graph: GraphProto, pool: NodeProto, positions: int) -> None:
    """Replace a pooling by the maximum over the positions, which are stored as channels of its input."""
    make, name = require_package("onnx").helper.make_node, pool.output[0]
    at = next(i for i, node in enumerate(graph.node) if node.output[0] == name)
    flat = _is_flattened(graph, name)
    largest = make(
        "MaxPool", [f"{name}.places"], [name if flat else f"{name}.largest"], kernel_shape=[positions, 1]
    )
    after = [largest] if flat else [largest, make("Reshape", [f"{name}.largest", f"{name}.shape"], [name])]
    pool.CopyFrom(make("Reshape", [pool.input[0], f"{name}.rows"], [f"{name}.places"]))
    for node in reversed(after):
        graph.node.insert(at + 1, node)


def _is_flattened(graph: GraphProto, name: str) -> bool:
    """Return whether a tensor has one reader that flattens all but the batch, so that any shape will do."""
    readers = [node for node in graph.node if name in node.input]
    if len(readers) != 1 or any(value.name == name for value in graph.output):
        return False
    if readers[0].op_type == "Flatten":
        return _attributes(readers[0]).get("axis", 1) == 1
    shapes = {tensor.name: tensor for tensor in graph.initializer}
    if readers[0].op_type != "Reshape" or readers[0].input[1] not in shapes:
        return False
    wanted = require_package("onnx").numpy_helper.to_array(shapes[readers[0].input[1]]).tolist()
    return len(wanted) == 2 and wanted[0] in (0, -1) and wanted[1] != 0
