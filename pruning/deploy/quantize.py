"""Quantization of exported networks to 8 bits, after training."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pruning.deploy.runtimes import Exported, first_line, quiet, require_package
from pruning.deploy.timing import Latency, time_forward
from pruning.errors import ExportError
from pruning.utils.files import replace_file
from pruning.utils.tree import Inputs, tensors

if TYPE_CHECKING:
    from onnxruntime.quantization import CalibrationDataReader


@dataclass(frozen=True)
class Quantized:
    """An int8 file that was written and checked.

    Attributes:
        size, float_size: of the int8 and the float32 file, in bytes.
        agreement: share of the calibration images whose largest output is at the same place in both
            files, 0 to 1.
        images: number of calibration images.
        time, float_time: of a forward pass over one example, on one thread; the files took turns.
    """

    path: Path
    size: int
    float_size: int
    agreement: float
    images: int
    time: Latency
    float_time: Latency

    def __str__(self) -> str:
        return (
            f"{self.path}: int8, {self.size:,} bytes (float32 {self.float_size:,}); reopened in onnxruntime, "
            f"it agrees with float32 on {self.agreement:.2%} of {self.images:,} calibration images and "
            f"takes {self.time.median:.4f} ms (float32 {self.float_time.median:.4f})"
        )


def quantize(
    onnx_path: str | Path,
    output: str | Path,
    calibration_batches: Iterable[Inputs],
    *,
    least_agreement: float = 0.9,
    reduce_range: bool = False,
    faster: bool = False,
) -> Quantized:
    """Write an ONNX file with weights and activations of 8 bits (post-training, static, QDQ).

    Args:
        onnx_path: a float32 classifier with a single input, as `export` writes it.
        output: replaced where it exists.
        calibration_batches: inputs (N, ...) or pairs (inputs, targets) of the training split;
            their activations set the ranges.
        least_agreement: least share of calibration images whose largest output must be that of the
            float32 file, 0 to 1.
        reduce_range: use weights of 7 bits, for processors on which products of 8 bits overflow
            (x86 with AVX2 or AVX-512 but without VNNI).
        faster: refuse an int8 file that is not faster than float32 on this machine.

    Raises:
        ExportError: for fewer than 2 calibration images, a damaged file, a package that is not
            installed, and an int8 file that agrees less than asked or, with `faster`, is not faster;
            then nothing is written.
    """
    require_package("onnx")
    original = Exported(onnx_path, "onnxruntime")
    batches = _calibration(calibration_batches)
    try:
        with quiet(), tempfile.TemporaryDirectory() as folder:
            content = _quantized(Path(onnx_path), Path(folder), batches, reduce_range)
    except ExportError:
        raise
    except Exception as error:  # of ONNX Runtime's quantizer, which can fail in any way
        raise ExportError(f"{onnx_path} cannot be quantized: {first_line(error)}") from error

    measured: list[tuple[float, Latency, Latency]] = []

    def check(written: Path) -> None:
        int8 = Exported(written, "onnxruntime")
        agreement = _checked_agreement(output, original, int8, batches, least_agreement)
        measured.append((agreement, *_checked_times(output, original, int8, batches[0][:1], faster)))

    replace_file(output, content, check)
    agreement, time, float_time = measured[0]
    float_size, images = Path(onnx_path).stat().st_size, sum(map(len, batches))
    return Quantized(Path(output), len(content), float_size, agreement, images, time, float_time)


def _calibration(given: Iterable[Inputs]) -> list[Tensor]:
    """Return the inputs of the batches, on the CPU."""
    batches = [tensors(batch)[0].detach().cpu() for batch in given]
    count = sum(len(batch) for batch in batches)
    if count < 2:
        raise ExportError(
            f"{count} calibration image{'s' * (count != 1)}: the ranges of activations cannot be told from "
            "fewer than 2; give some hundreds of the training split"
        )
    return batches


def _checked_agreement(
    output: str | Path, original: Exported, int8: Exported, batches: list[Tensor], least: float
) -> float:
    """Return the share of images on which both files choose the same class; raise where it is too low."""
    try:
        same = [int8(x).argmax(1) == original(x).argmax(1) for x in batches]
    except Exception as error:  # of a runtime, which can fail in any way
        raise ExportError(f"{output}: it fails on the calibration images: {first_line(error)}") from error
    agreement = sum(int(each.sum()) for each in same) / sum(each.numel() for each in same)
    if agreement < least:
        raise ExportError(
            f"{output} was not written: int8 agrees with float32 on {agreement:.1%} of "
            f"{sum(map(len, batches))} calibration images, {least:.1%} was asked. Calibrate on more images, "
            "train with quantization in mind, or try reduce_range=True"
        )
    return agreement


def _checked_times(
    output: str | Path, original: Exported, int8: Exported, example: Tensor, faster: bool
) -> tuple[Latency, Latency]:
    """Return the times of the int8 and the float32 file; raise where int8 must be faster and is not."""
    times = time_forward({"float32": original, "int8": int8}, example, seconds=1.0)
    if faster and times["int8"].median >= times["float32"].median:
        raise ExportError(
            f"{output} was not written: it takes {times['int8'].median:.4f} ms an example here, float32 "
            f"{times['float32'].median:.4f} ms: it is not faster. Ship the float32 file"
        )
    return times["int8"], times["float32"]


def _quantized(path: Path, folder: Path, batches: list[Tensor], reduce_range: bool) -> bytes:
    """Return the content of the int8 file, with the metadata of the float32 file."""
    onnx, quantization = require_package("onnx"), require_package("onnxruntime.quantization")
    preprocessing = require_package("onnxruntime.quantization.shape_inference")
    (argument,) = onnx.load(path).graph.input
    prepared, result = folder / "prepared.onnx", folder / "int8.onnx"
    preprocessing.quant_pre_process(path, prepared, skip_symbolic_shape=True)
    quantization.quantize_static(
        prepared,
        result,
        _reader(quantization, argument.name, batches),
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        reduce_range=reduce_range,
    )
    proto = onnx.load(result)
    facts = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    facts["quantization"] = json.dumps({"bits": 8, "images": sum(map(len, batches)), "format": "QDQ"})
    onnx.helper.set_model_props(proto, facts)
    return proto.SerializeToString()


def _reader(quantization: ModuleType, name: str, batches: list[Tensor]) -> CalibrationDataReader:
    """Return the batches in the form that ONNX Runtime's calibration takes."""

    base: Any = quantization.CalibrationDataReader

    class Reader(base):
        def __init__(self) -> None:
            self.feeds = iter([{name: batch.numpy()} for batch in batches])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    return Reader()
