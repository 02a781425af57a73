"""Networks of 8 bits, out of exported ones."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pruning.deploy.runtimes import Exported, first_line, needed, quiet
from pruning.deploy.timing import Latency, time_forward
from pruning.errors import ExportError
from pruning.utils.files import replace_file


@dataclass(frozen=True)
class Quantized:
    """An int8 file that was written and checked.

    `agreement` is the share of the calibration inputs whose largest output is that of the
    float32 file, 0 to 1; `images` counts them. Sizes are in bytes; times are those of a pass
    over one example, on one thread, the two files in turns.
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
    calibration_batches: Iterable[Any],
    *,
    least_agreement: float = 0.9,
    reduce_range: bool = False,
    faster: bool = False,
) -> Quantized:
    """An ONNX file with weights and activations of 8 bits (post-training, static, QDQ).

    Args:
        onnx_path: a float32 classifier with a single input, as `export` writes it.
        output: replaced where it exists.
        calibration_batches: inputs (N, ...) or pairs (inputs, targets), of the training
            split; their activations set the ranges.
        least_agreement: share of them whose largest output must stay the largest.
        reduce_range: weights of 7 bits, for processors on which products of 8 bits overflow
            (x86 with AVX2 or AVX-512 but without VNNI).
        faster: refuse an int8 file that takes no less time than float32 on this machine.

    Raises `ExportError` for fewer than 2 calibration images, a file that is damaged, a
    package that is missing, and an int8 file that agrees less or, where asked for, is not
    faster; then nothing is written.
    """
    needed("onnx")
    whole = Exported(onnx_path, "onnxruntime")
    batches = [
        (batch if isinstance(batch, Tensor) else batch[0]).detach().cpu() for batch in calibration_batches
    ]
    count = sum(len(batch) for batch in batches)
    if count < 2:
        raise ExportError(
            f"{count} calibration image{'s' * (count != 1)}: the ranges of activations cannot be told from "
            "fewer than 2; give some hundreds of the training split"
        )
    try:
        with quiet(), tempfile.TemporaryDirectory() as folder:
            content = _quantized(Path(onnx_path), Path(folder), batches, reduce_range)
    except ExportError:
        raise
    except Exception as error:  # of ONNX Runtime's quantizer, which can fail in any way
        raise ExportError(f"{onnx_path} cannot be quantized: {first_line(error)}") from error

    agreement = 0.0
    times: dict[str, Latency] = {}

    def check(partial: Path) -> None:
        nonlocal agreement, times
        small = Exported(partial, "onnxruntime")
        try:
            same = [small(x).argmax(1) == whole(x).argmax(1) for x in batches]
        except Exception as error:  # of a runtime, which can fail in any way
            raise ExportError(f"{output}: it fails on the calibration images: {first_line(error)}") from error
        agreement = sum(int(each.sum()) for each in same) / sum(each.numel() for each in same)
        if agreement < least_agreement:
            raise ExportError(
                f"{output} was not written: int8 agrees with float32 on {agreement:.1%} of {count} "
                f"calibration images, {least_agreement:.1%} was asked. Calibrate on more images, "
                "train with quantization in mind, or try reduce_range=True"
            )
        times = time_forward({"float32": whole, "int8": small}, batches[0][:1], seconds=1.0)
        if faster and times["int8"].median >= times["float32"].median:
            raise ExportError(
                f"{output} was not written: it takes {times['int8'].median:.4f} ms an example here, float32 "
                f"{times['float32'].median:.4f} ms: it is not faster. Ship the float32 file"
            )

    replace_file(output, content, check)
    float_size = Path(onnx_path).stat().st_size
    return Quantized(
        Path(output), len(content), float_size, agreement, count, times["int8"], times["float32"]
    )


def _quantized(path: Path, folder: Path, batches: list[Tensor], reduce_range: bool) -> bytes:
    onnx, tools = needed("onnx"), needed("onnxruntime.quantization")
    preparing = needed("onnxruntime.quantization.shape_inference")
    (argument,) = onnx.load(path).graph.input
    prepared, result = folder / "prepared.onnx", folder / "int8.onnx"
    preparing.quant_pre_process(path, prepared, skip_symbolic_shape=True)
    tools.quantize_static(
        prepared,
        result,
        _reader(tools, argument.name, batches),
        quant_format=tools.QuantFormat.QDQ,
        activation_type=tools.QuantType.QUInt8,
        weight_type=tools.QuantType.QInt8,
        per_channel=True,
        reduce_range=reduce_range,
    )
    proto = onnx.load(result)
    facts = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    facts["quantization"] = json.dumps({"bits": 8, "images": sum(map(len, batches)), "format": "QDQ"})
    onnx.helper.set_model_props(proto, facts)
    return proto.SerializeToString()


def _reader(tools: Any, name: str, batches: list[Tensor]) -> Any:
    """The batches as ONNX Runtime's calibration asks for them."""

    class Reader(tools.CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = iter([{name: batch.numpy()} for batch in batches])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.feeds, None)

    return Reader()
