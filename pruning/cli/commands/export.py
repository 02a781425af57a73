"""`python -m pruning export`: write a network as ONNX, torch.export or TorchScript."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from pruning.checkpoint import provenance
from pruning.cli import build
from pruning.cli.arguments import read_flags
from pruning.cli.command_flags import ExportFlags
from pruning.cli.factories import require_runs
from pruning.deploy.export import export
from pruning.deploy.formats import SUFFIXES
from pruning.deploy.onnx_rewrite import optimize
from pruning.deploy.quantize import quantize
from pruning.deploy.runtimes import Exported
from pruning.errors import PruningError
from pruning.training.losses import accuracy
from pruning.utils.modules import thread_count

#: Loss of accuracy (a share) from which training with the rounding is recommended.
WORTH_TRAINING = 0.002


def execute(args: argparse.Namespace) -> None:
    flags = read_flags(ExportFlags, args)
    wanted = flags.int8 or flags.int8_faster
    if wanted and (flags.to != "onnx" or args.data is None):
        raise PruningError("--int8 needs --to onnx and --data to calibrate on")
    if flags.optimize and flags.to != "onnx":
        raise PruningError("--optimize is for --to onnx")
    path: Path = args.checkpoint
    model, content = build.network_with(args, path), build.described(args, path)
    output = flags.output or path.with_suffix(SUFFIXES[flags.to])
    if output.exists() and output.samefile(path):
        raise PruningError(f"--output {output} is the checkpoint itself; give another name")
    metadata = {"model": content["class"], "provenance": content["provenance"], "exported": provenance()}
    scales = build.normalization(args, content)
    if scales is not None:
        metadata["normalisation"] = scales
    shape = build.image_shape(args, content)
    examples = torch.zeros(2, *shape)
    require_runs(model, examples, f"on inputs of shape {shape}")
    data = build.data_of(args)  # should it be refused, nothing has been written
    with thread_count(1):
        print(export(model, output, examples, flags.to, metadata=metadata))
        if flags.optimize:
            print(optimize(output, output))
    if wanted and data is not None:
        small = output.with_suffix(".int8.onnx")
        batches = [inputs for inputs, _ in data.calibration(1024)]
        print(quantize(output, small, batches, faster=flags.int8_faster))
        with thread_count(1):
            exact, rounded = (
                accuracy(Exported(path, "onnxruntime"), data.validation) for path in (output, small)
            )
        print(f"{small}: validation accuracy {rounded:.4f} (float32 {exact:.4f})")
        if exact - rounded > WORTH_TRAINING:
            print("python -m pruning finetune --int8 trains a network for this rounding")
