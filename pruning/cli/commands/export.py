"""`python -m pruning export`: write a network as ONNX, torch.export or TorchScript."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pruning.checkpoint import provenance
from pruning.cli import build
from pruning.cli.arguments import read_flags
from pruning.cli.command_flags import ExportFlags
from pruning.cli.export_inputs import dynamic_of, example_inputs
from pruning.cli.sources import Data
from pruning.deploy.export import export
from pruning.deploy.formats import SUFFIXES, require_suffix
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
    if wanted and flags.to != "onnx":
        raise PruningError("--int8 needs --to onnx: add it")
    if flags.optimize and flags.to != "onnx":
        raise PruningError("--optimize is for --to onnx: add it, or leave out --optimize")
    path: Path = args.checkpoint
    output = flags.output or path.with_suffix(SUFFIXES[flags.to])
    is_checkpoint = output.exists() and output.samefile(path)
    if not is_checkpoint:
        require_suffix(output, flags.to)
    model, content = build.network_with(args, path), build.described(args, path)
    if is_checkpoint:
        raise PruningError(f"--output {output} is the checkpoint itself; give another name")
    metadata = {"model": content["class"], "provenance": content["provenance"], "exported": provenance()}
    # Should it be refused, nothing has been written.
    data = build.required_data(args) if wanted else build.data_of(args)
    metadata |= _facts(args, content, data)
    dynamic = dynamic_of(flags.dynamic)
    examples = example_inputs(args, model, flags.input, content, data)
    with thread_count(1):
        print(export(model, output, examples, flags.to, dynamic=dynamic, metadata=metadata))
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


def _facts(args: argparse.Namespace, content: Mapping[str, Any], data: Data | None) -> dict[str, object]:
    """What the exported file remembers of the images, the classes and the accuracy, as plain data."""
    stored = content["provenance"]
    classes = stored.get("classes") or (list(data.classes) if data is not None else None)
    found = {
        "normalisation": build.normalization(args, content),
        "preprocessing": stored.get("preprocessing"),
        "class_names": classes,
        "validation_accuracy": stored.get("validation_accuracy"),
        "given_accuracy": stored.get("given_accuracy"),
    }
    return {key: value for key, value in found.items() if value is not None}
