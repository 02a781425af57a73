"""`python -m pruning export`: write a network for another runtime: ONNX, torch.export, TorchScript."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from pruning.checkpoint import provenance
from pruning.cli import arguments, build
from pruning.deploy.export import SUFFIXES, export
from pruning.deploy.onnx_rewrite import optimize
from pruning.deploy.quantize import quantize
from pruning.deploy.runtimes import Exported
from pruning.errors import PruningError
from pruning.training.losses import accuracy
from pruning.utils.modules import thread_count

SUMMARY = "write a network for another runtime: ONNX, torch.export, TorchScript"

#: From such a loss of accuracy on, training with the rounding is worth its time.
WORTH_TRAINING = 0.002


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", choices=list(SUFFIXES), required=True, help="format of the file")
    parser.add_argument(
        "--output",
        type=arguments.new_file,
        metavar="FILE",
        help="default: the checkpoint's name with the format's ending",
    )
    arguments.checkpoint_flags(parser)
    parser.add_argument(
        "--optimize",
        action="store_true",
        help="bring an ONNX file into the form that ONNX Runtime runs quickest on this machine",
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="also write an int8 file beside an ONNX one, calibrated on the training batches of --data",
    )
    parser.add_argument(
        "--int8-faster",
        action="store_true",
        help="likewise, but refuse an int8 file that is not faster than float32 on this machine",
    )


def execute(args: argparse.Namespace) -> None:
    wanted = args.int8 or args.int8_faster
    if wanted and (args.to != "onnx" or args.data is None):
        raise PruningError("--int8 needs --to onnx and --data to calibrate on")
    if args.optimize and args.to != "onnx":
        raise PruningError("--optimize is for --to onnx")
    path: Path = args.checkpoint
    model, content = build.network_with(args, path), build.described(args, path)
    output = args.output or path.with_suffix(SUFFIXES[args.to])
    if output.exists() and output.samefile(path):
        raise PruningError(f"--output {output} is the checkpoint itself; give another name")
    metadata = {"model": content["class"], "provenance": content["provenance"], "exported": provenance()}
    scales = build.normalisation(args, content)
    if scales is not None:
        metadata["normalisation"] = scales
    examples = torch.zeros(2, *build.image_shape(args, content))
    data = build.data_of(args)  # should it be refused, nothing has been written
    with thread_count(1):
        print(export(model, output, examples, args.to, metadata=metadata))
        if args.optimize:
            print(optimize(output, output))
    if wanted and data is not None:
        small = output.with_suffix(".int8.onnx")
        batches = [inputs for inputs, _ in data.calibration(1024)]
        print(quantize(output, small, batches, faster=args.int8_faster))
        with thread_count(1):
            exact, rounded = (
                accuracy(Exported(path, "onnxruntime"), data.validation) for path in (output, small)
            )
        print(f"{small}: validation accuracy {rounded:.4f} (float32 {exact:.4f})")
        if exact - rounded > WORTH_TRAINING:
            print("python -m pruning finetune --int8 trains a network to bear the rounding")
