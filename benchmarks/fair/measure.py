"""Compute a cell and measure its network."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import timing
from benchmarks.fair.cells import Cell
from benchmarks.fair.methods import RESULT, compute
from benchmarks.fair.training import Workshop
from eval.metrics import EVALUATION_BATCH, exported
from pruning import PruningError, save
from pruning.checkpoint import provenance
from pruning.deploy import time_forward
from pruning.errors import TrainingDiverged
from pruning.training import accuracy
from pruning.utils.modules import copied

#: Images of the first part of the test split, of which the accuracy is given, too.
FIRST = 1000


def result(cell: Cell, workshop: Workshop, folder: Path, threads: int, seconds: float) -> dict[str, Any]:
    """Compute a cell: its network, and what is measured of it.

    Args:
        folder: of the cell's training; the network is saved there.
        threads: CPU threads of the training. seconds: duration of the timing.

    Returns:
        Plain data; where the method fails, `refused` with the reason instead of figures.
    """
    facts = {"commit": provenance()["commit"], "torch": torch.__version__, "threads": threads}
    started = time.perf_counter()
    try:
        model = compute(cell.method, workshop, cell.budget, cell.seed)
    except (PruningError, TrainingDiverged) as error:
        return {"refused": str(error), **facts}
    taken = time.perf_counter() - started
    save(folder / RESULT, model)
    cost, dense = workshop.cost(model), workshop.cost(workshop.new(cell.seed))
    recipe, test = workshop.recipe, workshop.source.test
    first = replace(workshop.source, test=test.first(min(FIRST, len(test.labels))))
    return {
        "accuracy": accuracy(model, workshop.source.batches("test", EVALUATION_BATCH)),
        "accuracy of the first 1,000": accuracy(model, first.batches("test", EVALUATION_BATCH)),
        "validation": workshop.validate(model),
        "params": cost.params,
        "macs": cost.macs,
        "dense params": dense.params,
        "dense macs": dense.macs,
        "epochs": recipe.dense_epochs if cell.method == "dense" else recipe.epochs,
        **times(model, workshop, seconds),
        "seconds": round(taken, 1),
        **facts,
    }


def times(model: nn.Module, workshop: Workshop, seconds: float) -> dict[str, Any]:
    """Time a network in ONNX Runtime on one thread, batch 1, in turns with the dense one.

    The control is the ratio of the dense network to a copy of itself in the same measurement.
    """
    example = workshop.example.cpu()
    nets = {"dense": workshop.new(0), "pruned": model}
    nets["again"] = nets["dense"]
    with tempfile.TemporaryDirectory() as folder:
        on_cpu = {name: copied(net).cpu().eval() for name, net in nets.items()}
        opened = exported(on_cpu, "onnxruntime", example, Path(folder))
        taken = time_forward(opened, example[:1].clone(), seconds=seconds, threads=1)
    return {
        "milliseconds": round(taken["pruned"].median, 5),
        "time ratio": timing.ratio(taken["pruned"], to=taken["dense"]),
        "time control": timing.ratio(taken["again"], to=taken["dense"]),
    }
