"""Write exported programs as ONNX, torch.export or TorchScript."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import zipfile
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import nn
from torch.export import ExportedProgram

from pruning.deploy.runtimes import METADATA, first_line, require_package
from pruning.deploy.signature import Signature, arguments_of
from pruning.errors import ExportError
from pruning.utils.tree import Inputs, tensors

if TYPE_CHECKING:
    from onnx import GraphProto

#: Plain data stored in the file, by name.
Facts: TypeAlias = Mapping[str, object]


def _to_onnx(
    model: nn.Module,
    program: ExportedProgram,
    batch: Inputs,
    signature: Signature,
    facts: Facts,
) -> bytes:
    """Return the program as an ONNX model, without the paths of source files."""
    onnx = require_package("onnx")
    args, kwargs = arguments_of(batch)
    outputs = len(tensors(model(*args, **kwargs)))
    converted = torch.onnx.export(
        program,
        input_names=list(signature.names.values()),
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


def _to_pt2(
    model: nn.Module,
    program: ExportedProgram,
    batch: Inputs,
    signature: Signature,
    facts: Facts,
) -> bytes:
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
    model: nn.Module,
    program: ExportedProgram,
    batch: Inputs,
    signature: Signature,
    facts: Facts,
) -> bytes:
    """Return a frozen TorchScript trace.

    Tracing records only one branch of data-dependent control flow. A model that torch.export has
    exported to a program has none, because torch.export rejects it.
    """
    args, kwargs = arguments_of(batch)
    try:
        traced = torch.jit.trace(
            model, args or None, example_kwarg_inputs=kwargs or None, check_trace=False, strict=False
        )
        traced = torch.jit.freeze(traced.eval())
    except RuntimeError as error:
        raise ExportError(f"{_untraceable(error)}; --to onnx and --to pt2 can take it") from None
    buffer, result = io.BytesIO(), io.BytesIO()
    torch.jit.save(traced, buffer, _extra_files={METADATA: json.dumps(facts)})
    with zipfile.ZipFile(buffer) as archive, zipfile.ZipFile(result, "w") as cleaned:
        for entry in archive.infolist():
            if not entry.filename.endswith(".debug_pkl"):  # it has the paths of source files
                cleaned.writestr(entry, archive.read(entry))
    return result.getvalue()


def _untraceable(error: RuntimeError) -> str:
    """Return in words why TorchScript cannot take a model."""
    text = str(error)
    if "Only tensors, lists, tuples of tensors, or dictionary" in text or "cannot infer type" in text:
        return (
            "TorchScript takes outputs and inputs of tensors, and of lists, tuples and dicts of these, alone"
        )
    return f"TorchScript cannot trace it: {first_line(error)}"


#: A function that returns the content of a file.
Writer: TypeAlias = Callable[[nn.Module, ExportedProgram, Inputs, Signature, Facts], bytes]

#: By format, the function that writes it. `register_runtime` adds those of users.
WRITERS: dict[str, Writer] = {
    "onnx": _to_onnx,
    "pt2": _to_pt2,
    "torchscript": _to_torchscript,
}
