"""Export a network to a file that runs without its Python code, and check the file."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from pruning.deploy.formats import RUNTIMES
from pruning.deploy.runtimes import (
    Exported,
    first_line,
    quiet,
    relative_difference,
    require_package,
)
from pruning.deploy.signature import Dynamic, Signature, arguments_of, signature_of, with_arguments
from pruning.deploy.writers import WRITERS
from pruning.errors import ExportError
from pruning.surgery.batchnorm import fold_batchnorm
from pruning.tracing.trace import trace
from pruning.utils.compare import TOLERANCE as ROUNDING
from pruning.utils.compare import doubled
from pruning.utils.files import replace_file
from pruning.utils.modules import call, copied
from pruning.utils.paths import tensors_with_paths
from pruning.utils.tree import Inputs, fresh
from pruning.utils.wrappers import unwrapped

#: Largest allowed difference between the outputs of file and model, relative to the model's largest output.
TOLERANCE = 1e-5

#: Where the outputs differ by more, both are compared with the model in double precision: the file may
#: deviate from it by `TOLERANCE`, or by this many times the deviation of the model, if that is rounding.
OF_ROUNDING = 4

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
        batched: whether batches may have any size.
        dynamic: other dimensions that may have any size: `x:2`.
    """

    path: Path
    format: str
    size: int
    difference: float
    batched: bool = True
    dynamic: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f"at batches of {' and '.join(map(str, CHECKED))}"
        if not self.batched:
            where = "at other sizes, too" if self.dynamic else "at the sizes of the example inputs: all are "
            where += "" if self.dynamic else "fixed, because no batch was found; --dynamic NAME:DIM frees one"
        elif self.dynamic:
            where += " and other sizes"
        free = f"; dynamic: {', '.join(self.dynamic)}" if self.dynamic else ""
        return (
            f"{self.path}: {self.format}, {self.size:,} bytes; reopened in {RUNTIMES[self.format]}, its "
            f"outputs are within {self.difference:.1e} of the model's, relative to the largest "
            f"(tolerance {TOLERANCE:g}), {where}{free}"
        )


def export(
    model: nn.Module,
    path: str | Path,
    example_inputs: Inputs,
    format: str,
    *,
    dynamic: Dynamic | None = None,
    metadata: Metadata | None = None,
) -> Export:
    """Export a model to a file for another runtime, with BatchNorm folded and a dynamic batch size.

    The file is first written under a temporary name, opened in that runtime, and compared with the
    model on noise at each batch size of `CHECKED`. Only then does it replace the file at `path`. The
    batch is the dimension that `pruning.utils.batch.find_batch` finds; without one, as in a network on one
    graph, the sizes are fixed but for those that `dynamic` names. A single input is called `input` in the
    file; several, or keyword arguments, have the names of the arguments of `forward`.

    Args:
        model: the model, exported in eval mode on the CPU; it is not changed.
        path: path of the file; an existing file is replaced.
        example_inputs: a tensor, a sequence of arguments, or a mapping of keyword arguments. Arguments that
            are no tensors, such as `use_cache=False`, become constants of the file.
        format: `onnx`, `pt2` (torch.export), `torchscript`, or one of `register_runtime`.
        dynamic: dimensions besides the batch that may have any size, by the name of an input:
            `{"x": (2, 3)}`. The file is compared with the model at another size, too.
        metadata: plain data to store in the file, by name. The input's shape without the batch, the
            number of classes and torch's version are added.

    Returns:
        The path, the size and the measured difference of the file.

    Raises:
        ExportError: if a package is not installed, if the model cannot be exported (the message names
            an operation that the exporter does not support), if the model fixes the batch size or a
            dimension that shall be dynamic, or if the outputs differ. Then nothing is written, and an
            existing file is not changed.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "net.torchscript"
    >>> written = export(nn.Linear(4, 3), path, torch.rand(2, 4), "torchscript")
    >>> written.difference <= TOLERANCE, path.stat().st_size == written.size
    (True, True)
    """
    model = unwrapped(model)
    _require_exportable(model, format)
    reference = copied(model).cpu().eval().requires_grad_(False)
    signature = signature_of(reference, example_inputs, dynamic or {})
    batches = _examples(reference, signature)
    expected = _outputs(reference, batches, signature)
    facts = _metadata(signature, expected[0], metadata or {})
    content = _converted(reference, signature.example(CHECKED[-1]), signature, format, facts)
    cases = list(zip(batches, expected, strict=True))
    difference = _written(path, content, cases, signature, format, reference)
    batched = bool(signature.batch.dims)
    return Export(Path(path), format, len(content), difference, batched, signature.asked)


def _written(
    path: str | Path,
    content: bytes,
    cases: Sequence[tuple[Inputs, object]],
    signature: Signature,
    format: str,
    model: nn.Module,
) -> float:
    """Write the file if its outputs are those of the model, and return their largest difference.

    Args:
        cases: inputs, each with the outputs of the model.
    """
    differences: list[float] = []

    def check(written: Path) -> None:
        exported = Exported(written, RUNTIMES[format])
        for batch, outputs in cases:
            differences.append(_checked_difference(path, exported, batch, outputs, signature, model))

    replace_file(path, content, check)
    return max(differences)


def _require_exportable(model: nn.Module, format: str) -> None:
    """Check that the format is known, that its packages are installed, and that the model is all Python."""
    if format not in WRITERS:
        raise ExportError(f"format {format!r} is unknown; there are: {', '.join(WRITERS)}")
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            require_package(package)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            what = f"the module {name!r} of {type(model).__name__}" if name else "the model"
            raise ExportError(
                f"{what} is TorchScript, which no exporter takes: put the module there from which it was made"
            )


def _examples(model: nn.Module, signature: Signature) -> list[Inputs]:
    """Return inputs to compare outputs on: at each batch size, then at other sizes of dynamic dimensions."""
    batches = [signature.example(size) for size in (CHECKED if signature.batch.dims else CHECKED[-1:])]
    if not signature.dynamic:
        return batches
    for sizes in signature.other_sizes():
        example = signature.example(CHECKED[-1], sizes)
        with contextlib.suppress(Exception):  # of any kind: the model does not run at these sizes
            with torch.no_grad():
                call(copied(model), fresh(example))
            return [*batches, example]
    raise ExportError(
        f"dynamic {' '.join(signature.asked)}: {type(model).__name__} runs at no other size than "
        "that of the example inputs; leave out what its code fixes"
    )


def _outputs(model: nn.Module, batches: list[Inputs], signature: Signature) -> list[object]:
    """Return the model's outputs on each batch."""
    try:
        with torch.no_grad():
            running = copied(model)  # exporters may treat tensors that a pass stores in a model as constants
            return [call(running, fresh(batch)) for batch in batches]
    except Exception as error:  # the user's model can fail in any way
        shapes = ", ".join(str(tuple(shape)) for shape in signature.shapes())
        raise ExportError(
            f"{type(model).__name__} does not run on inputs of shape {shapes}: {first_line(error)}; "
            "give example inputs that it takes"
        ) from error


def _metadata(signature: Signature, outputs: object, given: Metadata) -> dict[str, object]:
    """Return the metadata to store: input shape, number of classes, torch's version, and the given data."""
    shapes = signature.shapes()
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


def _converted(model: nn.Module, batch: Inputs, signature: Signature, format: str, facts: Metadata) -> bytes:
    """Return the content of the file, with a dynamic batch size."""
    ready = folded(model, batch)
    if isinstance(batch, Mapping):
        ready = copied(ready)
        ready.forward = with_arguments(ready.forward, batch)
    args, kwargs = arguments_of(batch)
    try:
        with quiet():
            program = torch.export.export(ready, args, kwargs, dynamic_shapes=signature.dynamic_shapes(ready))
            return WRITERS[format](ready, program, batch, signature, facts)
    except Exception as error:  # an exporter can fail in any way
        raise ExportError(
            f"{type(model).__name__} cannot be exported to {format}: {failure_reason(error)}; "
            "change this code of the model, or try another format"
        ) from error


def _checked_difference(
    path: str | Path,
    exported: Exported,
    batch: Inputs,
    expected: object,
    signature: Signature,
    model: nn.Module,
) -> float:
    """Return the relative difference of the file's outputs; raise `ExportError` if it is not rounding."""
    held = dict(tensors_with_paths(batch))
    where = f"batch size {next((held[path].shape[d] for path, d in signature.batch.dims.items()), 1)}"
    if signature.dynamic or not signature.batch.dims:
        where = "inputs of shape " + ", ".join(str(tuple(x.shape)) for x in held.values())
    cure = "; --to onnx takes sizes from tensors" if exported.runtime == RUNTIMES["torchscript"] else ""
    args, kwargs = arguments_of(batch)
    try:
        got = exported(*args, **kwargs)
    except Exception as error:  # a runtime can fail in any way
        raise ExportError(
            f"{path} was not written: it fails at {where}: {first_line(error)}{cure}"
        ) from error
    difference = relative_difference(expected, got)
    if difference > TOLERANCE and (exact := _exact_outputs(model, batch)) is not None:
        of_file, of_model = (relative_difference(exact, outputs) for outputs in (got, expected))
        if of_file <= TOLERANCE or (of_model <= ROUNDING and of_file <= OF_ROUNDING * of_model):
            return of_file
    if not difference <= TOLERANCE:
        raise ExportError(
            f"{path} was not written: at {where} its outputs differ from the model's by "
            f"{difference:.2e} of the largest (tolerance {TOLERANCE:g}). Does the model take "
            f"a Python value from a tensor, or draw at random?{cure and ' TorchScript keeps sizes that '}"
            f"{cure and 'Python code computes; --to onnx does not.'}"
        )
    return difference


def _exact_outputs(model: nn.Module, batch: Inputs) -> object:
    """Return a model's outputs in double precision; None if it does not run so."""
    with contextlib.suppress(Exception), torch.no_grad():  # the model's code may demand another type
        running, inputs = doubled(model, batch)
        return call(running, fresh(inputs))
    return None


def folded(model: nn.Module, batch: Inputs) -> nn.Module:
    """Return the model with BatchNorm folded; the model itself where it has none, without tracing it."""
    if not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.modules()):
        return model
    # The groups of a trace lack frozen layers, but the trace still finds the norms that follow them.
    return fold_batchnorm(model, trace(model, batch)).requires_grad_(False)


def failure_reason(error: BaseException) -> str:
    """Return the reason why an exporter failed, in one line: the error that caused all others."""
    if isinstance(error, ExportError):
        return str(error)
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
    for link in chain:
        fixed = re.search(
            r"marked L\['(\w+)'\](.*?)\.size\(\)\[(\d+)\] as dynamic .* specialized it .* \((\d+)\)",
            str(link),
        )
        if fixed:
            name, inner, dim, size = fixed.groups()
            return (
                f"{name}{inner}:{dim} cannot be dynamic, its code fixes it to {size}, or it equals a "
                "dimension that is not dynamic: name that one, too, or leave this one out"
            )
    return f"{type(error).__name__}: {first_line(chain[-1])}"
