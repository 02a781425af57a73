"""int8 files: size, agreement with float32, and the errors where a file cannot be quantized."""

from __future__ import annotations

import pytest
import torch
from commands import ROOT, need_onnx

import data
from pruning import export, load
from pruning.deploy import Exported
from pruning.deploy.quantize import quantize
from pruning.deploy.timing import Latency
from pruning.errors import ExportError
from pruning.training import accuracy

COMMITTED = ROOT / "checkpoints" / "YourNet" / "best.pth"


def test_an_int8_file_is_smaller_and_agrees_with_float32(tmp_path):
    need_onnx()
    digits = data.load("mnist5k", quiet=True)
    reference = load(ROOT / "checkpoints" / "LeNet5" / "epoch-6.pth")
    export(
        reference,
        tmp_path / "net.onnx",
        torch.zeros(1, 1, 28, 28),
        "onnx",
        metadata={"provenance": {"seed": 1}},
    )
    training = [images for images, _ in digits.batches("train", 100)][:3]
    made = quantize(tmp_path / "net.onnx", tmp_path / "int8.onnx", training)
    assert made.images == 300 and made.agreement > 0.97
    assert made.size < 0.4 * (tmp_path / "net.onnx").stat().st_size
    small = Exported(tmp_path / "int8.onnx", "onnxruntime")
    assert abs(accuracy(small, digits.batches("test", 250)) - 0.979) < 0.01
    assert small.metadata["provenance"] == {"seed": 1} and small.metadata["quantization"]["bits"] == 8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["int8.onnx", "net.onnx"]


def test_invalid_quantization_is_refused(tmp_path, monkeypatch):
    need_onnx()
    export(load(COMMITTED), tmp_path / "net.onnx", torch.zeros(1, 1, 28, 28), "onnx")
    noise = torch.randn(20, 1, 28, 28)
    with pytest.raises(ExportError, match=r"1 calibration image: .* fewer than 2"):
        quantize(tmp_path / "net.onnx", tmp_path / "int8.onnx", [noise[:1]])
    with pytest.raises(ExportError, match="0 calibration images"):
        quantize(tmp_path / "net.onnx", tmp_path / "int8.onnx", [])
    with pytest.raises(ExportError, match=r"at least 200\.0% is required"):
        quantize(tmp_path / "net.onnx", tmp_path / "int8.onnx", [(noise, None)], least_agreement=2)
    # Fix the times, because which of the two is faster depends on the machine.
    slower = {"float32": Latency(1.0, 1, 1, 1, 9, 1, 1), "int8": Latency(2.0, 2, 2, 2, 9, 1, 1)}
    with (
        monkeypatch.context() as patch,
        pytest.raises(ExportError, match=r"2\.0000 ms .* not faster .* 1\.0000 ms"),
    ):
        patch.setattr("pruning.deploy.quantize.time_forward", lambda *_, **__: slower)
        quantize(tmp_path / "net.onnx", tmp_path / "int8.onnx", [noise], least_agreement=0, faster=True)
    with pytest.raises(ExportError, match="cannot be quantized"):
        quantize(tmp_path / "net.onnx", tmp_path / "int8.onnx", [noise[:, :, :9]])
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
