"""Open exported files in their runtimes, as modules that are called like any model."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from pruning.errors import ExportError
from pruning.utils.paths import tensors_with_paths
from pruning.utils.tree import tensors, tensors_among

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

#: Name of the file inside a pt2 or TorchScript archive that holds the metadata.
METADATA = "metadata.json"

#: A function from input tensors to the outputs of the model, nested like the model's own outputs.
ForwardPass: TypeAlias = Callable[..., Any]

#: A function that opens the content of a file for a number of threads, and returns its forward pass and its
#: metadata: JSON by name.
Opener: TypeAlias = Callable[[bytes, int], tuple[ForwardPass, Mapping[str, str]]]


class Exported(nn.Module):
    """An opened exported file: a module without parameters that runs on the CPU.

    It takes the inputs of the model, by position or by name, for any batch size and any size of the other
    dynamic dimensions, and returns the model's outputs without gradients. `metadata` holds the plain data
    stored in the file.

    Args:
        path: path of a file that `export` or `quantize` wrote.
        runtime: `onnxruntime` (its CPU provider), `pt2`, `torchscript`, or one of `register_runtime`.
        threads: number of threads of ONNX Runtime; the other runtimes use `torch.set_num_threads`.

    Raises:
        ExportError: if the file is missing, damaged or of another format, or if the runtime is unknown
            or not installed.

    >>> import tempfile
    >>> from pruning import export
    >>> path = Path(tempfile.mkdtemp()) / "net.torchscript"
    >>> _ = export(nn.Linear(4, 3), path, torch.rand(2, 4), "torchscript")
    >>> Exported(path, "torchscript")(torch.rand(5, 4)).shape
    torch.Size([5, 3])
    """

    def __init__(self, path: str | Path, runtime: str, threads: int = 1) -> None:
        super().__init__()
        if runtime not in OPENERS:
            raise ExportError(f"runtime {runtime!r} is unknown; there are: {', '.join(OPENERS)}")
        self.path, self.runtime, self.metadata = Path(path), runtime, dict[str, Any]()
        if runtime == "onnxruntime":
            require_package(runtime)
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise ExportError(f"{path} cannot be read: {error.strerror or error}; check the path") from error
        try:
            with quiet():
                # A function, not a child module: exported programs of torch do not allow eval() and train().
                self._run, stored = OPENERS[runtime](content, threads)
                self.metadata.update({key: json.loads(value) for key, value in stored.items()})
        except Exception as error:  # reading a damaged file can fail in any way
            raise ExportError(
                f"{path} is damaged or not a file that {runtime} can run: {first_line(error)}; "
                "export the network again"
            ) from error

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self._run(*inputs, **named)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        # Skip the checks for hooks in nn.Module.__call__: they take as long as a layer of a small network.
        return self._run(*inputs, **named)

    def prepared(self, *inputs: Tensor) -> Callable[[], object]:
        """Return a function that runs the forward pass on these inputs, for timing.

        With ONNX Runtime it runs the session with bound inputs and outputs and returns nothing. This
        times the runtime alone, as in a program without torch, without conversions of tensors.
        """
        if isinstance(self._run, _OnnxPass):
            return self._run.bound(*inputs)
        return functools.partial(self._run, *inputs)


def onnx_session(content: bytes, threads: int) -> InferenceSession:
    """Open an ONNX model in ONNX Runtime, on the CPU.

    Raises:
        ExportError: if ONNX Runtime is not installed.
    """
    onnxruntime = require_package("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # fatal only: errors are raised as exceptions anyway
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


class _OnnxPass:
    """Run the forward pass of a session on tensors."""

    def __init__(self, session: InferenceSession):
        self.session = session
        self.inputs = [argument.name for argument in session.get_inputs()]
        # Given no names, a session would look them up at every call.
        self.outputs = [result.name for result in session.get_outputs()]

    def __call__(self, *inputs: object, **named: object) -> Tensor | tuple[Tensor, ...]:
        feeds = self._feeds(inputs, named)
        outputs = [torch.from_numpy(array) for array in self.session.run(self.outputs, feeds)]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def bound(self, *inputs: Tensor) -> Callable[[], None]:
        binding = self.session.io_binding()
        for name, array in self._feeds(inputs, {}).items():
            binding.bind_cpu_input(name, array)
        for name in self.outputs:
            binding.bind_output(name)
        return functools.partial(self.session.run_with_iobinding, binding)

    def _feeds(self, inputs: Sequence[object], named: Mapping[str, object]) -> dict[str, np.ndarray]:
        given = tensors_among(inputs)
        feeds = {name: x.numpy(force=True) for name, x in zip(self.inputs, given, strict=not named)}
        for path, x in tensors_with_paths(named):
            feeds["_".join(map(str, path))] = x.numpy(force=True)
        return feeds


def _open_onnx(content: bytes, threads: int) -> tuple[ForwardPass, Mapping[str, str]]:
    session = onnx_session(content, threads)
    stored = session.get_modelmeta().custom_metadata_map
    return _OnnxPass(session), {key: value for key, value in stored.items() if _is_json(value)}


def _is_json(text: str) -> bool:
    """Return whether a metadata entry is JSON, as `export` writes it; other tools write other entries."""
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _open_pt2(content: bytes, threads: int) -> tuple[ForwardPass, Mapping[str, str]]:
    extra: dict[str, object] = {METADATA: ""}
    program = torch.export.load(io.BytesIO(content), extra_files=extra)
    return _without_gradients(program.module()), _stored(extra)


def _open_torchscript(content: bytes, threads: int) -> tuple[ForwardPass, Mapping[str, str]]:
    extra: dict[str, object] = {METADATA: ""}
    module = torch.jit.load(io.BytesIO(content), map_location="cpu", _extra_files=extra)
    return _without_gradients(module), _stored(extra)


def _stored(extra: Mapping[str, object]) -> dict[str, str]:
    content = extra[METADATA] or "{}"
    assert isinstance(content, str | bytes)
    return {key: json.dumps(value) for key, value in json.loads(content).items()}


def _without_gradients(module: ForwardPass) -> ForwardPass:
    def run(*inputs: object, **named: object) -> object:
        with torch.no_grad():
            return module(*inputs, **named)

    return run


#: By runtime, the function that opens its files.
OPENERS: dict[str, Opener] = {
    "onnxruntime": _open_onnx,
    "pt2": _open_pt2,
    "torchscript": _open_torchscript,
}


def require_package(name: str) -> ModuleType:
    """Import an optional package.

    Raises:
        ExportError: if it cannot be imported; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = getattr(error, "name", None) or name
        raise ExportError(
            f"ONNX needs the package {missing!r}, which cannot be imported here ({first_line(error)}): "
            "python -m pip install onnx onnxruntime onnxscript"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the warnings, logs and prints of exporters and runtimes."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 200 characters; if empty, the error's type."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def relative_difference(expected: object, got: object) -> float:
    """Return the largest difference between two nested outputs, relative to the largest expected value.

    It is infinite if shapes differ or a value is not finite. Integer outputs are not compared, because
    an argmax may choose either of two equal values.

    >>> relative_difference(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 3.0]))
    0.25
    """
    expected_leaves, got_leaves = tensors(expected), tensors(got)
    if [tuple(x.shape) for x in expected_leaves] != [tuple(x.shape) for x in got_leaves]:
        return float("inf")
    largest = 0.0
    for one, other in zip(expected_leaves, got_leaves, strict=True):
        if one.numel() and one.is_floating_point():
            scale = one.abs().max().item() or 1.0
            difference = (one - other).abs().max().item() / scale
            largest = max(largest, difference if difference < float("inf") else float("inf"))  # also for NaN
    return largest
