"""What a user gets: LeNet-5 and YourNet in the runtimes that will run them.

    python -m benchmarks.runtimes
    MNIST_DIR=... python -m benchmarks.runtimes --data mnist

Each network is exported for each runtime, and quantized to int8 (calibrated on training
images). All of them take turns on the same batch; "again" is the same network a second time,
whose ratio to the first is the A/A control: how far it is from 1 is the error of the others.
Writes benchmarks/runtimes.json and benchmarks/runtimes.md, and prints the latter.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import data
from eval.cli import COMMITTED, ROOT
from pruning import Exported, accuracy, cli, export, load, provenance, quantize, time_forward
from pruning.checkpoint import replace_file

REFERENCE, YOURS, AGAIN = "LeNet-5", "YourNet", "YourNet again"
RUNTIMES = ("eager", "torchscript", "onnxruntime float32", "onnxruntime int8")
#: A control further from 1 than this spoils the ratios beside it.
CONTROL = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("--data", choices=data.NAMES, default="mnist5k", help="data set")
    parser.add_argument("--yournet", type=Path, default=COMMITTED["YourNet"], metavar="PATH", help="network")
    parser.add_argument(
        "--batch-sizes", type=cli.whole_number(1), nargs="+", default=[1, 64], metavar="IMAGES", help="timed"
    )
    parser.add_argument(
        "--seconds", type=cli.number(0.01), default=20.0, help="how long to time at each batch size"
    )
    parser.add_argument(
        "--calibration", type=cli.whole_number(2), default=1000, metavar="IMAGES", help="for int8"
    )
    parser.add_argument("--threads", type=cli.whole_number(1), default=1, metavar="N", help="CPU threads")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "runtimes.json", help="results; .md beside it"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dataset = data.load(args.data, ROOT / "data")
    with tempfile.TemporaryDirectory() as folder:
        result = measured(args, dataset, Path(folder))
    text = markdown(result)
    replace_file(args.output, (json.dumps(result, indent=1) + "\n").encode())
    replace_file(args.output.with_suffix(".md"), text.encode())
    print(text, end="")


def measured(args: argparse.Namespace, dataset: data.Dataset, folder: Path) -> dict[str, Any]:
    """The figures of every network in every runtime: a row each."""
    paths = {REFERENCE: COMMITTED["LeNet5"], YOURS: args.yournet}
    networks = {name: load(path) for name, path in paths.items()}
    batches = itertools.islice(dataset.batches("train", 100), -(-args.calibration // 100))
    calibration = list(torch.cat([images for images, _ in batches])[: args.calibration].split(100))
    rows, running = [], {}
    for name, network in networks.items():
        opened, sizes, agreement = exported(name, network, calibration, folder, args.threads)
        opened["eager"], sizes["eager"] = network, paths[name].stat().st_size
        for runtime in RUNTIMES:
            running[runtime, name] = opened[runtime]
            right = accuracy(opened[runtime], dataset.batches("test", 1000))
            rows.append({"runtime": runtime, "network": name, "bytes": sizes[runtime], "accuracy": right})
        rows[-1]["agreement with float32 on the calibration images"] = agreement
    for runtime in RUNTIMES:
        path = running[runtime, YOURS]
        again = Exported(path.path, path.runtime, args.threads) if isinstance(path, Exported) else path
        running[runtime, AGAIN] = again if again is not path else copy.deepcopy(path)

    images = dataset.test.images
    sizes_timed = [size for size in args.batch_sizes if size <= len(images)]
    models = {f"{runtime}|{name}": model for (runtime, name), model in running.items()}
    ratios: dict[str, Any] = {}
    for size in sizes_timed:
        batch = next(iter(dataset.batches("test", size)))[0]
        times = time_forward(models, batch, seconds=args.seconds, threads=args.threads)
        for row in rows:
            time = times[f"{row['runtime']}|{row['network']}"]
            row[f"batch {size}"] = {"median ms": round(time.median, 5), "p90 ms": round(time.p90, 5)}
        ratios[f"batch {size}"] = {
            runtime: _ratios({name: times[f"{runtime}|{name}"].median for name in (REFERENCE, YOURS, AGAIN)},
                             times[f"eager|{REFERENCE}"].median)
            for runtime in RUNTIMES
        }  # fmt: skip
    return {
        "dataset": dataset.name,
        "test images": len(images),
        "calibration images": sum(map(len, calibration)),
        "threads": args.threads,
        "rows": rows,
        "ratios": ratios,
        "slower in int8": slower(rows, sizes_timed),
        "provenance": provenance(),
    }


def _ratios(medians: dict[str, float], eager: float) -> dict[str, float]:
    yours = medians[YOURS]
    return {
        "YourNet / LeNet-5": round(yours / medians[REFERENCE], 3),
        "YourNet / LeNet-5 in eager": round(yours / eager, 3),
        "A/A control": round(medians[AGAIN] / yours, 3),
    }


def exported(
    name: str, network: nn.Module, calibration: list[torch.Tensor], folder: Path, threads: int
) -> tuple[dict[str, nn.Module], dict[str, int], float]:
    """A network in every runtime but eager, the bytes of its files, and how far int8 agrees."""
    script, whole, small = (folder / f"{name}.{end}" for end in ("torchscript", "onnx", "int8.onnx"))
    sizes = {
        "torchscript": export(network, script, calibration[0], "torchscript").size,
        "onnxruntime float32": export(network, whole, calibration[0], "onnx").size,
    }
    # Agreement is reported, whatever it is.
    quantized = quantize(whole, small, calibration, least_agreement=0.0)
    sizes["onnxruntime int8"] = quantized.size
    opened: dict[str, nn.Module] = {
        "torchscript": Exported(script, "torchscript"),
        "onnxruntime float32": Exported(whole, "onnxruntime", threads),
        "onnxruntime int8": Exported(small, "onnxruntime", threads),
    }
    return opened, sizes, quantized.agreement


def slower(rows: list[dict[str, Any]], batch_sizes: list[int]) -> list[str]:
    """Where int8 takes longer than float32 in the same runtime, in words."""
    found = {(row["runtime"], row["network"]): row for row in rows}
    said = []
    for network in (REFERENCE, YOURS):
        whole, small = (found[f"onnxruntime {kind}", network] for kind in ("float32", "int8"))
        for size in batch_sizes:
            ratio = small[f"batch {size}"]["median ms"] / whole[f"batch {size}"]["median ms"]
            if ratio > 1:
                said.append(f"{network} at batch {size}: int8 takes {ratio:.2f} of float32's time")
    return said


def markdown(result: dict[str, Any]) -> str:
    """The same as tables."""
    timed, many = list(result["ratios"]), "s" * (result["threads"] > 1)
    heads = ["runtime", "network", "bytes", "accuracy %", *(f"{b}, ms per image (p90)" for b in timed)]
    lines = [
        f"{result['test images']:,} test images of {result['dataset']}, {result['threads']} thread{many}; "
        f"int8 calibrated on {result['calibration images']:,} training images.",
        "",
        *_head(heads),
    ]
    for row in result["rows"]:
        times = [f"{row[b]['median ms']:.4f} ({row[b]['p90 ms']:.4f})" for b in timed]
        cells = [row["runtime"], row["network"], f"{row['bytes']:,}", f"{100 * row['accuracy']:.2f}", *times]
        lines.append(f"| {' | '.join(cells)} |")
    names = list(result["ratios"][timed[0]][RUNTIMES[0]]) if timed else []
    lines += ["", *_head(["runtime", "batch", *names])]
    for batch, by_runtime in result["ratios"].items():
        for runtime, ratios in by_runtime.items():
            figures = [f"{ratios[name]:.3f}" for name in names]
            lines.append(f"| {runtime} | {batch.removeprefix('batch ')} | {' | '.join(figures)} |")
    lines.append("")
    spoiled = [
        f"{runtime} at {batch}"
        for batch, by_runtime in result["ratios"].items()
        for runtime, ratios in by_runtime.items()
        if abs(ratios["A/A control"] - 1) > CONTROL
    ]
    if spoiled:
        lines += [
            f"The control is not within {CONTROL} of 1, the machine was not quiet: {'; '.join(spoiled)}.",
            "",
        ]
    if result["slower in int8"]:
        lines += [f"Int8 is slower here. {'; '.join(result['slower in int8'])}."]
    else:
        lines += ["Int8 is not slower here."]
    return "\n".join(lines) + "\n"


def _head(names: list[str]) -> list[str]:
    return [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]


if __name__ == "__main__":
    cli.run(main)
