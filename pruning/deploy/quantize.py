"""Quantize exported networks to 8 bits after training."""

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
from pruning.utils.wording import number_of

if TYPE_CHECKING:
    from onnxruntime.quantization import CalibrationDataReader


@dataclass(frozen=True)
class Quantized:
    """An int8 file that was written and checked.

    Attributes:
        path: path of the int8 file.
        size: size of the int8 file in bytes.
        float_size: size of the float32 file in bytes.
        agreement: share of the calibration images for which both files predict the same class, 0 to 1.
        images: number of calibration images.
        time: time of the int8 file for one example, on one thread.
        float_time: time of the float32 file for one example, measured in turns with the int8 file.
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
    """Quantize an ONNX file to 8-bit weights and activations (post-training, static, QDQ format).

    Args:
        onnx_path: a float32 classifier with a single input, as `export` writes it.
        output: path of the int8 file; an existing file is replaced.
        calibration_batches: inputs (N, ...) or pairs (inputs, targets) of the training split; the
            ranges of the activations are measured on them.
        least_agreement: least share of calibration images for which both files must predict the same
            class, 0 to 1.
        reduce_range: use 7-bit weights, for processors on which sums of 8-bit products overflow
            (x86 with AVX2 or AVX-512 but without VNNI).
        faster: raise an error if the int8 file is not faster than float32 on this machine.

    Returns:
        The int8 file, with its agreement and its time.

    Raises:
        ExportError: if there are fewer than 2 calibration images, if the file is damaged, if a package
            is not installed, if the agreement is too low, or, with `faster`, if int8 is not faster.
            Then nothing is written.
    """
    require_package("onnx")
    original = Exported(onnx_path, "onnxruntime")
    batches = _calibration(calibration_batches)
    try:
        with quiet(), tempfile.TemporaryDirectory() as folder:
            content = _quantized(Path(onnx_path), Path(folder), batches, reduce_range)
    except ExportError:
        raise
    except Exception as error:  # ONNX Runtime's quantizer can fail in any way
        raise ExportError(
            f"{onnx_path} cannot be quantized: {first_line(error)}; ship the float32 file"
        ) from error

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
            f"{number_of(count, 'calibration image')}: the ranges of activations cannot be measured on "
            "fewer than 2; give some hundreds of the training split"
        )
    return batches


def _checked_agreement(
    output: str | Path, original: Exported, int8: Exported, batches: list[Tensor], least: float
) -> float:
    """Return the share of images for which both files predict the same class; raise if it is too low."""
    try:
        same = [int8(x).argmax(1) == original(x).argmax(1) for x in batches]
    except Exception as error:  # a runtime can fail in any way
        raise ExportError(
            f"{output} was not written: it fails on the calibration images: {first_line(error)}; give "
            "images of the shape that the file takes"
        ) from error
    agreement = sum(int(each.sum()) for each in same) / sum(each.numel() for each in same)
    if agreement < least:
        raise ExportError(
            f"{output} was not written: int8 agrees with float32 on {agreement:.1%} of "
            f"{sum(map(len, batches))} calibration images; at least {least:.1%} is required. Calibrate on "
            "more images, fine-tune with int8=True, or try reduce_range=True"
        )
    return agreement


def _checked_times(
    output: str | Path, original: Exported, int8: Exported, example: Tensor, faster: bool
) -> tuple[Latency, Latency]:
    """Return the times of the int8 and the float32 file; raise if int8 must be faster and is not."""
    times = time_forward({"float32": original, "int8": int8}, example, seconds=1.0)
    if faster and times["int8"].median >= times["float32"].median:
        raise ExportError(
            f"{output} was not written: with {times['int8'].median:.4f} ms per example on this machine it is "
            f"not faster than float32 with {times['float32'].median:.4f} ms. Use the float32 file"
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
    """Return the batches as a reader for ONNX Runtime's calibration."""

    base: Any = quantization.CalibrationDataReader

    class Reader(base):
        def __init__(self) -> None:
            self.feeds = iter([{name: batch.numpy()} for batch in batches])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    return Reader()
