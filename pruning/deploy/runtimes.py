"""Exported files as modules: opened in the runtime that will run them, and called like any model."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pruning.errors import ExportError

#: What each format runs in; the others are torch's own.
RUNTIMES = {"onnx": "onnxruntime", "pt2": "pt2", "torchscript": "torchscript"}

#: The file inside a pt2 or TorchScript archive that holds the metadata.
METADATA = "metadata.json"


class Exported(nn.Module):
    """An exported file, opened: a module without parameters that runs on the CPU.

    Args:
        path: of a file that `export` or `quantize` wrote.
        runtime: `onnxruntime` (its CPU provider), `pt2` or `torchscript`.
        threads: of ONNX Runtime. The others run on torch's (`torch.set_num_threads`).

    `metadata` is what was stored in the file. Takes what the model took, (N, ...) for any N,
    and returns what it returned, without gradients. Raises `ExportError` for a file that is
    missing, damaged or of another format, and for a runtime that is not installed.
    """

    def __init__(self, path: str | Path, runtime: str, threads: int = 1) -> None:
        super().__init__()
        if runtime not in _OPENERS:
            raise ExportError(f"runtime {runtime!r} is unknown; there are: {', '.join(_OPENERS)}")
        self.path, self.runtime, self.metadata = Path(path), runtime, dict[str, Any]()
        if runtime == "onnxruntime":
            needed(runtime)
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise ExportError(f"{path} cannot be read: {error.strerror or error}") from error
        try:
            with quiet():
                # A function, not a child: torch's exported programs refuse to change modes.
                self._run, stored = _OPENERS[runtime](content, threads)
                self.metadata.update({key: json.loads(value) for key, value in stored.items()})
        except Exception as error:  # reading a damaged file can fail in any way
            raise ExportError(
                f"{path} is damaged or not a file that {runtime} can run: {first_line(error)}"
            ) from error

    def forward(self, *inputs: Tensor) -> Any:
        return self._run(*inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        # Past the hooks of a module, which cost as much as a layer of a small network.
        return self._run(*inputs)

    def prepared(self, *inputs: Tensor) -> Callable[[], Any]:
        """A pass over these inputs that can be repeated, to be timed.

        Of ONNX Runtime it is the session's own work: inputs and outputs are bound, as by a program
        that runs the file without torch, and nothing is converted. It returns nothing then.
        """
        if isinstance(self._run, _OnnxPass):
            return self._run.bound(*inputs)
        return functools.partial(self._run, *inputs)


Opened = tuple[Callable[..., Any], Mapping[str, Any]]


def onnx_session(content: bytes, threads: int) -> Any:
    """An ONNX model in ONNX Runtime, on the CPU. Raises `ExportError` where that is not installed."""
    onnxruntime = needed("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # what goes wrong is raised; the rest would be printed
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


class _OnnxPass:
    """A pass through a session, from tensors to tensors."""

    def __init__(self, session: Any):
        self.session = session
        self.inputs = [argument.name for argument in session.get_inputs()]
        # Where no names are given, a session asks for them anew at each call.
        self.outputs = [result.name for result in session.get_outputs()]

    def __call__(self, *inputs: Tensor) -> Any:
        outputs = [torch.from_numpy(array) for array in self.session.run(self.outputs, self._fed(inputs))]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def bound(self, *inputs: Tensor) -> Callable[[], None]:
        binding = self.session.io_binding()
        for name, array in self._fed(inputs).items():
            binding.bind_cpu_input(name, array)
        for name in self.outputs:
            binding.bind_output(name)
        return functools.partial(self.session.run_with_iobinding, binding)

    def _fed(self, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
        return {name: x.numpy(force=True) for name, x in zip(self.inputs, inputs, strict=True)}


def _open_onnx(content: bytes, threads: int) -> Opened:
    session = onnx_session(content, threads)
    stored = session.get_modelmeta().custom_metadata_map
    return _OnnxPass(session), {key: value for key, value in stored.items() if _is_json(value)}


def _is_json(text: str) -> bool:
    """Whether a property of an ONNX file, which other tools also set, can be one of ours."""
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _open_pt2(content: bytes, threads: int) -> Opened:
    extra: dict[str, Any] = {METADATA: ""}
    program = torch.export.load(io.BytesIO(content), extra_files=extra)
    return _without_gradients(program.module()), _unpacked(extra)


def _open_torchscript(content: bytes, threads: int) -> Opened:
    extra: dict[str, Any] = {METADATA: ""}
    module = torch.jit.load(io.BytesIO(content), map_location="cpu", _extra_files=extra)
    return _without_gradients(module), _unpacked(extra)


def _unpacked(extra: dict[str, Any]) -> dict[str, str]:
    values = json.loads(extra[METADATA] or "{}")
    return {key: json.dumps(value) for key, value in values.items()}


def _without_gradients(module: Callable[..., Any]) -> Callable[..., Any]:
    def run(*inputs: Tensor) -> Any:
        with torch.no_grad():
            return module(*inputs)

    return run


_OPENERS: dict[str, Callable[..., Opened]] = {
    "onnxruntime": _open_onnx,
    "pt2": _open_pt2,
    "torchscript": _open_torchscript,
}


def needed(package: str) -> Any:
    """An optional package, imported. Raises `ExportError` that says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        missing = getattr(error, "name", None) or package
        raise ExportError(
            f"ONNX needs the package {missing!r}, which cannot be imported here ({first_line(error)}): "
            "python -m pip install onnx onnxruntime onnxscript"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing of what exporters and runtimes warn, log and print about themselves."""
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
    """What an error says, in one line of at most 200 characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def difference(expected: Any, got: Any) -> float:
    """The largest difference between two outputs, relative to the largest expected value.

    Infinite where shapes differ or a value is not finite. Whole numbers are not compared: a
    choice among equals (an argmax) may fall either way.
    """
    wanted, found = pytree.tree_leaves(expected), pytree.tree_leaves(got)
    if [tuple(x.shape) for x in wanted] != [tuple(x.shape) for x in found]:
        return float("inf")
    worst = 0.0
    for one, other in zip(wanted, found, strict=True):
        if one.numel() and one.is_floating_point():
            largest = one.abs().max().item() or 1.0
            apart = (one - other).abs().max().item() / largest
            worst = max(worst, apart if apart < float("inf") else float("inf"))  # NaN included
    return worst
