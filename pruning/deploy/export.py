"""Export a network to a file that runs without its Python code, and check the file."""

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
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from pruning.deploy.formats import RUNTIMES
from pruning.deploy.runtimes import (
    METADATA,
    Exported,
    first_line,
    quiet,
    relative_difference,
    require_package,
)
from pruning.errors import ExportError
from pruning.surgery.batchnorm import fold_batchnorm
from pruning.tracing.trace import trace
from pruning.utils.files import replace_file
from pruning.utils.modules import copied
from pruning.utils.tree import tensors
from pruning.utils.wrappers import unwrapped

if TYPE_CHECKING:
    from onnx import GraphProto

#: Largest allowed difference between the outputs of file and model, relative to the model's largest output.
TOLERANCE = 1e-5

#: The batch sizes at which the outputs of file and model are compared.
CHECKED = (1, 3)

#: Plain data stored in the file, by name.
Metadata: TypeAlias = Mapping[str, object]


@dataclass(frozen=True)
class Export:
    """An exported file that was written and checked.

    Attributes:
        path: path of the file.
        format: format of the file, a key of `SUFFIXES`.
        size: size of the file in bytes.
        difference: largest difference between the outputs of file and model, relative to the model's
            largest output.
    """

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
    metadata: Metadata | None = None,
) -> Export:
    """Export a model to a file for another runtime, with BatchNorm folded and a dynamic batch size.

    The file is first written under a temporary name, opened in that runtime, and compared with the
    model on noise at each batch size of `CHECKED`. Only then does it replace the file at `path`.

    Args:
        model: the model, exported in eval mode on the CPU; it is not changed.
        path: path of the file; an existing file is replaced.
        example_inputs: a tensor, or a sequence of tensors, with a batch dimension first.
        format: `onnx`, `pt2` (torch.export) or `torchscript`.
        metadata: plain data to store in the file, by name. The input's shape without the batch, the
            number of classes and torch's version are added.

    Returns:
        The path, the size and the measured difference of the file.

    Raises:
        ExportError: if a package is not installed, if the model cannot be exported (the message names
            an operation that the exporter does not support), if the model fixes the batch size, or if
            the outputs differ. Then nothing is written, and an existing file is not changed.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "net.torchscript"
    >>> written = export(nn.Linear(4, 3), path, torch.rand(2, 4), "torchscript")
    >>> written.difference <= TOLERANCE, path.stat().st_size == written.size
    (True, True)
    """
    model = unwrapped(model)
    examples = _examples(example_inputs, format)
    reference = copied(model).cpu().eval().requires_grad_(False)
    batches = [_noise(examples, size) for size in CHECKED]
    expected = _outputs(reference, batches)
    facts = _metadata(examples, expected[0], metadata or {})
    content = _converted(reference, batches[-1], format, facts)
    differences: list[float] = []

    def check(written: Path) -> None:
        exported = Exported(written, RUNTIMES[format])
        for batch, outputs in zip(batches, expected, strict=True):
            differences.append(_checked_difference(path, exported, batch, outputs))

    replace_file(path, content, check)
    return Export(Path(path), format, len(content), max(differences))


def _examples(example_inputs: Tensor | Sequence[Tensor], format: str) -> list[Tensor]:
    """Check the format and the example inputs, and return the inputs as a list on the CPU."""
    if format not in _WRITERS:
        raise ExportError(f"format {format!r} is unknown; there are: {', '.join(_WRITERS)}")
    examples = [example_inputs] if isinstance(example_inputs, Tensor) else list(example_inputs)
    if not examples or not all(isinstance(x, Tensor) and x.ndim and len(x) for x in examples):
        kinds = ", ".join(
            str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in examples
        )
        raise ExportError(
            f"export needs example inputs that are tensors with a batch dimension, got {kinds or 'none'}"
        )
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            require_package(package)
    return [x.detach().cpu() for x in examples]


def _noise(examples: list[Tensor], size: int) -> list[Tensor]:
    """Return inputs of a batch size: noise from a fixed seed; integer inputs repeat the first example."""
    generator = torch.Generator().manual_seed(0)
    batch = []
    for x in examples:
        shape = (size, *x.shape[1:])
        if x.is_floating_point():
            batch.append(torch.randn(shape, generator=generator).to(x.dtype))
        else:
            batch.append(x[:1].expand(shape).clone())
    return batch


def _outputs(model: nn.Module, batches: list[list[Tensor]]) -> list[object]:
    """Return the model's outputs on each batch."""
    try:
        with torch.no_grad():
            running = copied(model)  # exporters may treat tensors that a pass stores in a model as constants
            return [running(*batch) for batch in batches]
    except Exception as error:  # the user's model can fail in any way
        shapes = ", ".join(str(tuple(x.shape[1:])) for x in batches[0])
        raise ExportError(
            f"{type(model).__name__} does not run on inputs of shape {shapes}: {first_line(error)}"
        ) from error


def _metadata(examples: list[Tensor], outputs: object, given: Metadata) -> dict[str, object]:
    """Return the metadata to store: input shape, number of classes, torch's version, and the given data."""
    shapes = [list(x.shape[1:]) for x in examples]
    facts: dict[str, object] = {"input_shape": shapes if len(shapes) > 1 else shapes[0]}
    if isinstance(outputs, Tensor) and outputs.ndim == 2:
        facts["classes"] = outputs.shape[1]
    facts = {**facts, "torch": str(torch.__version__), **given}
    try:
        json.dumps(facts)
    except (TypeError, ValueError) as error:
        raise ExportError(
            f"the metadata cannot be stored as JSON ({error}): give dicts, lists, numbers and strings"
        ) from error
    return facts


def _converted(model: nn.Module, batch: list[Tensor], format: str, facts: Metadata) -> bytes:
    """Return the content of the file, with a dynamic batch size."""
    ready = folded(model, batch)
    batch_size = torch.export.Dim("batch")
    dynamic = tuple({0: batch_size} for _ in batch)
    try:
        with quiet():
            program = torch.export.export(ready, tuple(batch), dynamic_shapes=dynamic)
            return _WRITERS[format](ready, program, batch, facts)
    except Exception as error:  # an exporter can fail in any way
        raise ExportError(
            f"{type(model).__name__} cannot be exported to {format}: {failure_reason(error)}"
        ) from error


def _checked_difference(path: str | Path, exported: Exported, batch: list[Tensor], expected: object) -> float:
    """Return the relative difference of the file's outputs; raise `ExportError` above `TOLERANCE`."""
    size = len(batch[0])
    try:
        difference = relative_difference(expected, exported(*batch))
    except Exception as error:  # a runtime can fail in any way
        raise ExportError(
            f"{path} was not written: it fails at batch size {size}: {first_line(error)}"
        ) from error
    if not difference <= TOLERANCE:
        raise ExportError(
            f"{path} was not written: at batch size {size} its outputs differ from the model's by "
            f"{difference:.1e} of the largest (tolerance {TOLERANCE:g}). Does the model take "
            "a Python value from a tensor, or draw at random?"
        )
    return difference


def folded(model: nn.Module, batch: list[Tensor]) -> nn.Module:
    """Return the model with BatchNorm folded; the model itself where it has none, without tracing it."""
    if not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.modules()):
        return model
    # The groups of a trace lack frozen layers, but the trace still finds the norms that follow them.
    return fold_batchnorm(model, trace(model, batch)).requires_grad_(False)


def failure_reason(error: BaseException) -> str:
    """Return the reason why an exporter failed, in one line: the error that caused all others."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    for link in chain:
        unsupported = re.search(r"No (?:ONNX function|decompositions?) .*?op='([\w:.]+)'", str(link))
        if unsupported:
            return f"the exporter does not support the operation {unsupported[1]}; replace it in the model"
    if any(
        "marked batch as dynamic" in str(link) or "Constraints violated (batch)" in str(link)
        for link in chain
    ):
        return "its code fixes the batch size: use x.shape[0], not len(x), which is a constant when exported"
    return f"{type(error).__name__}: {first_line(chain[-1])}"


def _to_onnx(model: nn.Module, program: ExportedProgram, batch: list[Tensor], facts: Metadata) -> bytes:
    """Return the program as an ONNX model, without the paths of source files."""
    onnx = require_package("onnx")
    numbers = [""] if len(batch) == 1 else [f"_{i + 1}" for i in range(len(batch))]
    outputs = len(tensors(model(*batch)))
    converted = torch.onnx.export(
        program,
        input_names=[f"input{number}" for number in numbers],
        output_names=["output"] if outputs == 1 else [f"output_{i + 1}" for i in range(outputs)],
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    assert converted is not None
    proto = converted.model_proto
    _activate_before_pooling(proto.graph)
    # Every node stores the source line that it comes from; this doubles the size of a small file.
    for part in (proto, proto.graph, *proto.functions):
        del part.metadata_props[:]
    values = (*proto.graph.input, *proto.graph.output, *proto.graph.value_info, *proto.graph.initializer)
    for part in (*proto.graph.node, *(node for f in proto.functions for node in f.node), *values):
        del part.metadata_props[:]
        part.doc_string = ""
    onnx.helper.set_model_props(proto, {key: json.dumps(value) for key, value in facts.items()})
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def _activate_before_pooling(graph: GraphProto) -> None:
    """Turn Conv, MaxPool, ReLU into the equivalent Conv, ReLU, MaxPool, in place.

    PyTorch runs the first order faster. ONNX Runtime runs the second faster: it fuses a ReLU with the
    convolution before it, at no cost.
    """
    readers: dict[str, list[int]] = {}
    for place, node in enumerate(graph.node):
        for name in node.input:
            readers.setdefault(name, []).append(place)
    makers = {name: node for node in graph.node for name in node.output}
    graph_outputs = {value.name for value in graph.output}
    for place, pool in enumerate(graph.node):
        if pool.op_type != "MaxPool" or len(pool.output) > 1:
            continue
        source, between = pool.input[0], pool.output[0]
        after = readers.get(between, [])
        is_chain = readers[source] == [place] and len(after) == 1 and not {source, between} & graph_outputs
        if not is_chain or graph.node[after[0]].op_type != "Relu":
            continue
        if source not in makers or makers[source].op_type != "Conv":
            continue
        relu = graph.node[after[0]]
        first, second = copy.deepcopy(relu), copy.deepcopy(pool)
        first.input[0], first.output[0] = source, between
        second.input[0], second.output[0] = between, relu.output[0]
        pool.CopyFrom(first)
        relu.CopyFrom(second)
        outdated = [i for i, value in enumerate(graph.value_info) if value.name == between]
        for i in reversed(outdated):  # the shape of the value between the two has changed
            del graph.value_info[i]


def _to_pt2(model: nn.Module, program: ExportedProgram, batch: list[Tensor], facts: Metadata) -> bytes:
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # it has the paths of source files
    with contextlib.suppress(AttributeError):  # older versions of torch keep the inputs in the file
        program.example_inputs = None
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA: json.dumps(facts)})
    return buffer.getvalue()


def _to_torchscript(
    model: nn.Module, program: ExportedProgram, batch: list[Tensor], facts: Metadata
) -> bytes:
    """Return a frozen TorchScript trace.

    Tracing records only one branch of data-dependent control flow. A model that torch.export has
    exported to a program has none, because torch.export rejects it.
    """
    traced = torch.jit.freeze(torch.jit.trace(model, tuple(batch), check_trace=False).eval())
    buffer, result = io.BytesIO(), io.BytesIO()
    torch.jit.save(traced, buffer, _extra_files={METADATA: json.dumps(facts)})
    with zipfile.ZipFile(buffer) as archive, zipfile.ZipFile(result, "w") as cleaned:
        for entry in archive.infolist():
            if not entry.filename.endswith(".debug_pkl"):  # it has the paths of source files
                cleaned.writestr(entry, archive.read(entry))
    return result.getvalue()


_WRITERS: dict[str, Callable[[nn.Module, ExportedProgram, list[Tensor], Metadata], bytes]] = {
    "onnx": _to_onnx,
    "pt2": _to_pt2,
    "torchscript": _to_torchscript,
}
