"""Measure the assignment's four indicators and format its table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from data import Dataset
from data.datasets import SplitName
from pruning import export
from pruning.deploy import Exported, Latency, optimize, time_forward
from pruning.deploy.formats import RUNTIMES
from pruning.planning import count
from pruning.training import accuracy

#: Images per batch when accuracy is measured; affects only the time.
EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class Indicators:
    """The measurements of one network.

    Times are of the forward pass alone, per image, in milliseconds, at the requested batch size
    and at batch size 1.
    """

    model: str
    dataset: str
    split: str
    images: int
    accuracy: float
    latency: Latency
    latency_batch_1: Latency
    params: int
    macs: int
    macs_with_bias: int

    @property
    def infer_time_ms(self) -> float:
        return self.latency.median

    def to_json(self) -> dict[str, Any]:
        flat = {key: value for key, value in asdict(self).items() if not key.startswith("latency")}
        return {
            **flat,
            "infer_time_ms": self.latency.median,
            "infer_time_ms_p90": self.latency.p90,
            "infer_time_ms_batch_1": self.latency_batch_1.median,
            "batch_size": self.latency.batch_size,
            "threads": self.latency.threads,
        }


def measure(
    models: Mapping[str, nn.Module],
    dataset: Dataset,
    *,
    split: SplitName = "test",
    batch_size: int = 64,
    threads: int = 1,
    seconds: float = 3.0,
    runs: Mapping[str, nn.Module] | None = None,
) -> list[Indicators]:
    """Measure networks on one split, timing them alternately.

    Args:
        models: networks by the name to print, on the device of the data set.
        batch_size: batch size of the timed forward passes, in addition to batch size 1.
        seconds: duration of the timing at each batch size.
        runs: exported networks by the same names (see `exported`), of which accuracy and times are
            measured; params and MACs are those of `models`.
    """
    running = models if runs is None else runs
    images, labels = getattr(dataset, split)
    repeats = -(-batch_size // len(images))  # a batch larger than the split repeats it
    batch, _ = next(iter(dataset.batches(split, min(batch_size, len(images)))))
    batch = batch.repeat(repeats, 1, 1, 1)[:batch_size]
    at_batch = time_forward(running, batch, threads=threads, seconds=seconds)
    at_one = time_forward(running, batch[:1].clone(), threads=threads, seconds=seconds)
    results = []
    for name, model in models.items():
        cost = count(model, batch[:1])
        right = accuracy(running[name], dataset.batches(split, EVALUATION_BATCH))
        results.append(
            Indicators(
                name,
                dataset.name,
                split,
                len(labels),
                right,
                at_batch[name],
                at_one[name],
                cost.params,
                cost.macs,
                cost.macs_with_bias,
            )
        )
    return results


def exported(
    models: Mapping[str, nn.Module], runtime: str, inputs: Tensor, folder: Path, *, threads: int = 1
) -> dict[str, Exported]:
    """Export networks to a folder and open them in a runtime, by the same names.

    ONNX files are rewritten to the variant that runs fastest.

    Args:
        runtime: one of the values of `pruning.deploy.runtimes.RUNTIMES`.
        inputs: example inputs (N, C, H, W).
        threads: number of threads of ONNX Runtime.
    """
    (kind,) = (kind for kind, runs_in in RUNTIMES.items() if runs_in == runtime)
    opened = {}
    for name, model in models.items():
        path = folder / f"{name}.{kind}"
        export(model, path, inputs, kind)
        if kind == "onnx":
            optimize(path, path, threads=threads)
        opened[name] = Exported(path, runtime, threads)
    return opened


def table(rows: Iterable[Indicators]) -> str:
    """Return the assignment's table, with params and MACs in the correct columns."""
    rule = "-" * 64
    lines = [rule, "| Model Name | Accuracy | Infer Time(ms) | Params(M) | MACs(M) |", rule]
    for row in rows:
        lines += [
            f"| {row.model:>10} | {row.accuracy:8.3f} | {row.infer_time_ms:14.3f} "
            f"| {row.params / 1e6:9.3f} | {row.macs / 1e6:7.3f} |",
            rule,
        ]
    return "\n".join(lines)


def details(rows: Iterable[Indicators]) -> str:
    """Return the figures that the table rounds or omits."""
    lines = []
    for row in rows:
        lines.append(
            f"{row.model}: {row.params:,} params, {row.macs:,} MACs ({row.macs_with_bias:,} with biases), "
            f"accuracy {row.accuracy:.4f} on the {row.images:,} images of {row.dataset}/{row.split}"
        )
        lines.append(f"    time per image: {row.latency}")
        lines.append(f"    time per image: {row.latency_batch_1}")
    return "\n".join(lines)
