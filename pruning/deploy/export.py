"""Export: a network as a file that runs without its code, checked before it takes its name."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pruning.deploy.runtimes import METADATA, RUNTIMES, Exported, difference, first_line, needed, quiet
from pruning.errors import ExportError
from pruning.surgery.batchnorm import fold_batchnorm
from pruning.tracing.trace import trace
from pruning.utils.files import replace_file
from pruning.utils.modules import copied
from pruning.utils.tree import tensors

#: The name's end of each format's files.
SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "torchscript": ".torchscript"}

#: How far an exported file's outputs may be from the model's, relative to the largest one.
TOLERANCE = 1e-5

#: The batch sizes at which they are compared.
CHECKED = (1, 3)


@dataclass(frozen=True)
class Export:
    """A file that was written and checked. `difference` is the largest seen, `size` in bytes."""

    path: Path
    format: str
    size: int
    difference: float

    def __str__(self) -> str:
        sizes = " and ".join(map(str, CHECKED))
        return (
            f"{self.path}: {self.format}, {self.size:,} bytes; reopened in {RUNTIMES[self.format]}, its "
            f"outputs are within {self.difference:.1e} of the model's, relative to the largest "
            f"(tolerance {TOLERANCE:g}), at batches of {sizes}"
        )


def export(
    model: nn.Module,
    path: str | Path,
    example_inputs: Tensor | Sequence[Tensor],
    format: str,
    *,
    metadata: Mapping[str, Any] | None = None,
) -> Export:
    """Write a model as a file for another runtime, with BatchNorm folded, for batches of any size.

    The file is reopened in that runtime and compared with the model, on noise at each batch
    size of `CHECKED`, before it takes its name.

    Args:
        model: left as it is; exported in eval mode, on the CPU.
        path: replaced where it exists.
        example_inputs: a tensor, or a sequence of tensors, with a batch dimension first.
        format: `onnx`, `pt2` (torch.export) or `torchscript`.
        metadata: plain data to store in the file, by name. The input's shape without the
            batch, the number of classes and torch's version are added.

    Raises `ExportError` when a package is not installed, when the model cannot be exported
    (an operation that the exporter lacks is named) or fixes the batch size, and when the
    outputs differ; then nothing is left behind, and a file that was there is as it was.
    """
    if format not in _WRITERS:
        raise ExportError(f"format {format!r} is unknown; there are: {', '.join(_WRITERS)}")
    examples = [example_inputs] if isinstance(example_inputs, Tensor) else list(example_inputs)
    if not examples or not all(isinstance(x, Tensor) and x.ndim and len(x) for x in examples):
        raise ExportError("export needs example inputs that are tensors with a batch dimension")
    examples = [x.detach().cpu() for x in examples]
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            needed(package)
    whole = copied(model).cpu().eval().requires_grad_(False)
    batches = [_noise(examples, size) for size in CHECKED]
    try:
        with torch.no_grad():
            runs = copied(whole)  # what a pass leaves in a model, exporters may take for fixed
            expected = [runs(*batch) for batch in batches]
    except Exception as error:  # of the user's model
        shapes = ", ".join(str(tuple(x.shape[1:])) for x in examples)
        raise ExportError(
            f"{type(model).__name__} does not run on inputs of shape {shapes}: {first_line(error)}"
        ) from error
    facts = {**_described(examples, expected[0]), **(metadata or {})}
    try:
        json.dumps(facts)
    except (TypeError, ValueError) as error:
        raise ExportError(f"the metadata is not plain data: {error}") from error

    ready = folded(whole, batches[-1])
    size = torch.export.Dim("batch")
    any_size = tuple({0: size} for _ in examples)
    try:
        with quiet():
            program = torch.export.export(ready, tuple(batches[-1]), dynamic_shapes=any_size)
            content = _WRITERS[format](ready, program, batches[-1], facts)
    except Exception as error:  # an exporter can fail in any way
        raise ExportError(f"{type(model).__name__} cannot be exported to {format}: {cause(error)}") from error

    worst = 0.0

    def check(partial: Path) -> None:
        nonlocal worst
        exported = Exported(partial, RUNTIMES[format])
        for count, batch, outputs in zip(CHECKED, batches, expected, strict=True):
            try:
                apart = difference(outputs, exported(*batch))
            except Exception as error:  # of a runtime, which can fail in any way
                raise ExportError(f"{path}: it fails at batch {count}: {first_line(error)}") from error
            if not apart <= TOLERANCE:
                raise ExportError(
                    f"{path} was not written: at batch {count} its outputs differ from the model's by "
                    f"{apart:.1e} of the largest (tolerance {TOLERANCE:g}). Does the model take "
                    "a Python value from a tensor, or draw at random?"
                )
            worst = max(worst, apart)

    replace_file(path, content, check)
    return Export(Path(path), format, len(content), worst)


def _noise(examples: list[Tensor], size: int) -> list[Tensor]:
    """`size` inputs like the examples: noise, always the same; whole numbers are repeated."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for x in examples:
        shape = (size, *x.shape[1:])
        if x.is_floating_point():
            made.append(torch.randn(shape, generator=generator).to(x.dtype))
        else:
            made.append(x[:1].expand(shape).clone())
    return made


def _described(examples: list[Tensor], outputs: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "input_shape": [list(x.shape[1:]) for x in examples]
        if len(examples) > 1
        else list(examples[0].shape[1:])
    }
    if isinstance(outputs, Tensor) and outputs.ndim == 2:
        facts["classes"] = outputs.shape[1]
    return {**facts, "torch": str(torch.__version__)}


def folded(model: nn.Module, batch: list[Tensor]) -> nn.Module:
    """The model with BatchNorm folded; tracing is for those that have one."""
    if not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.modules()):
        return model
    # A trace leaves frozen layers out of the groups, but finds the norms behind them.
    return fold_batchnorm(model, trace(model, batch)).requires_grad_(False)


def cause(error: BaseException) -> str:
    """What an exporter stumbled on, in one line: of a chain of errors the first one."""
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(before)
    for link in chain:
        lacking = re.search(r"No (?:ONNX function|decompositions?) .*?op='([\w:.]+)'", str(link))
        if lacking:
            return f"the exporter lacks the operation {lacking[1]}; replace it in the model"
    if any(
        "marked batch as dynamic" in str(link) or "Constraints violated (batch)" in str(link)
        for link in chain
    ):
        return "its code fixes the batch size: take sizes from x.shape (len(x) is a fixed number)"
    return f"{type(error).__name__}: {first_line(chain[-1])}"


def _to_onnx(model: nn.Module, program: Any, batch: list[Tensor], facts: Mapping[str, Any]) -> bytes:
    """The program as an ONNX model, with names that say nothing of this machine."""
    onnx = needed("onnx")
    numbers = [""] if len(batch) == 1 else [f"_{i + 1}" for i in range(len(batch))]
    outputs = len(tensors(model(*batch)))
    made: Any = torch.onnx.export(
        program,
        input_names=[f"input{number}" for number in numbers],
        output_names=["output"] if outputs == 1 else [f"output_{i + 1}" for i in range(outputs)],
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    proto = made.model_proto
    _activate_before_pooling(proto.graph)
    # Beside every node stands where in whose code it comes from: half of a small file.
    for part in (proto, proto.graph, *proto.functions):
        del part.metadata_props[:]
    values = (*proto.graph.input, *proto.graph.output, *proto.graph.value_info, *proto.graph.initializer)
    for part in (*proto.graph.node, *(node for f in proto.functions for node in f.node), *values):
        del part.metadata_props[:]
        part.doc_string = ""
    onnx.helper.set_model_props(proto, {key: json.dumps(value) for key, value in facts.items()})
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def _activate_before_pooling(graph: Any) -> None:
    """Conv, MaxPool, ReLU become Conv, ReLU, MaxPool, in place; the outputs stay the same.

    In PyTorch the other order is cheaper. ONNX Runtime computes a ReLU together with the
    convolution before it, where it costs nothing.
    """
    readers: dict[str, list[int]] = {}
    for place, node in enumerate(graph.node):
        for name in node.input:
            readers.setdefault(name, []).append(place)
    makers = {name: node for node in graph.node for name in node.output}
    visible = {value.name for value in graph.output}
    for place, pool in enumerate(graph.node):
        if pool.op_type != "MaxPool" or len(pool.output) > 1:
            continue
        source, between = pool.input[0], pool.output[0]
        behind = readers.get(between, [])
        alone = readers[source] == [place] and len(behind) == 1 and not {source, between} & visible
        if not alone or graph.node[behind[0]].op_type != "Relu":
            continue
        if source not in makers or makers[source].op_type != "Conv":
            continue
        relu = graph.node[behind[0]]
        first, second = copy.deepcopy(relu), copy.deepcopy(pool)
        first.input[0], first.output[0] = source, between
        second.input[0], second.output[0] = between, relu.output[0]
        pool.CopyFrom(first)
        relu.CopyFrom(second)
        noted = [i for i, value in enumerate(graph.value_info) if value.name == between]
        for i in reversed(noted):  # the value between them has another shape now
            del graph.value_info[i]


def _to_pt2(model: nn.Module, program: Any, batch: list[Tensor], facts: Mapping[str, Any]) -> bytes:
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # paths of this machine
    with contextlib.suppress(AttributeError):  # older versions of torch keep the noise in the file
        program.example_inputs = None
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA: json.dumps(facts)})
    return buffer.getvalue()


def _to_torchscript(model: nn.Module, program: Any, batch: list[Tensor], facts: Mapping[str, Any]) -> bytes:
    """A frozen trace. That torch.export can follow the model too rules out decisions by data."""
    traced: Any = torch.jit.freeze(torch.jit.trace(model, tuple(batch), check_trace=False).eval())
    buffer, result = io.BytesIO(), io.BytesIO()
    torch.jit.save(traced, buffer, _extra_files={METADATA: json.dumps(facts)})
    with zipfile.ZipFile(buffer) as whole, zipfile.ZipFile(result, "w") as kept:
        for entry in whole.infolist():
            if not entry.filename.endswith(".debug_pkl"):  # where the code lay on this machine
                kept.writestr(entry, whole.read(entry))
    return result.getvalue()


_WRITERS: dict[str, Callable[[nn.Module, Any, list[Tensor], Mapping[str, Any]], bytes]] = {
    "onnx": _to_onnx,
    "pt2": _to_pt2,
    "torchscript": _to_torchscript,
}
