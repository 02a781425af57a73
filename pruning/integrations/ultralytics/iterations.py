"""Prune and train a model of the library in iterations, in a folder from which it resumes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from ultralytics import YOLO
from ultralytics.cfg import get_cfg

from pruning.errors import PruningError
from pruning.integrations.ultralytics.calibration import calibration_batches, classes_in
from pruning.integrations.ultralytics.config import YoloConfig
from pruning.integrations.ultralytics.files import load, save
from pruning.integrations.ultralytics.library import network, quiet, user_input
from pruning.integrations.ultralytics.steps import example_images, prune
from pruning.integrations.ultralytics.trainer import train
from pruning.planning.budget import Budget
from pruning.planning.cost import Cost, deployed_cost
from pruning.stages.run import Run
from pruning.utils.wording import number_of

#: What is noted of a stage, as JSON.
Notes: TypeAlias = dict[str, Any]

#: Arguments of the library's training that `slim` sets.
_SET = frozenset(("data", "model", "imgsz", "batch", "epochs", "device", "seed", "project", "name", "resume"))


@dataclass(frozen=True)
class Slimmed:
    """A model that was pruned and trained.

    Attributes:
        yolo: the model. path: its file.
        before, after: costs for one image, BatchNorm folded.
        metrics_before, metrics_after: of the library's validation.
    """

    yolo: YOLO
    path: Path
    before: Cost
    after: Cost
    metrics_before: dict[str, float]
    metrics_after: dict[str, float]


def slim(weights: str | Path, config: YoloConfig, run: Run, log: Callable[[str], None] = print) -> Slimmed:
    """Train, prune in steps with training after each, and validate before and after.

    All training is the library's, in folders of the run: `dense`, `recover1`, ..., `train`. The result is
    `pruned.pt` in the folder. A run that was interrupted resumes with the epoch after its last stored one.

    Args:
        weights: see `load`. run: the folder. log: gets one line for each stage.

    Raises:
        PruningError: for weights or data that cannot be read, and settings that cannot be met.

    Example:
        ```python
        config = YoloConfig(budget=Budget(macs="50%"), data="data.yaml", epochs=50)
        result = slim("yolov8n.pt", config, Run("runs/yolo", {}))
        ```
    """
    return _Iterations(weights, config, run, log).result()


def require_ready(weights: str | Path, config: YoloConfig) -> None:
    """Raise `PruningError` if a model or its data cannot be read, or do not fit each other."""
    yolo = load(weights)
    model: Any = network(yolo)
    example_images(model, config.imgsz)
    classes, own = classes_in(yolo, config.data, config.imgsz), model.yaml["nc"]
    with user_input("arguments"):
        get_cfg(overrides=dict(config.arguments))
    if taken := sorted(_SET & config.arguments.keys()):
        raise PruningError(f"arguments {', '.join(taken)}: they are settings of their own")
    if classes != own and not config.dense_epochs and str(weights).endswith(".pt"):
        raise PruningError(
            f"the data has {number_of(classes, 'class')} and the model {own}: its head must be trained "
            "before channels are scored; give --dense-epochs N (dense_epochs)"
        )


class _Iterations:
    """The stages of a run; the state of the run counts those that have ended."""

    def __init__(self, weights: str | Path, config: YoloConfig, run: Run, log: Callable[[str], None]):
        self.weights, self.config, self.run, self.log = str(weights), config, run, log
        self.ended = run.state["stage"] if run.state is not None else 0
        self.at = 0
        self.notes: dict[str, Notes] = {}
        if run.history.exists():
            events = (json.loads(line) for line in run.history.read_text().splitlines())
            self.notes = {event["stage"]: event for event in events}

    def result(self) -> Slimmed:
        config = self.config
        file = self._stage("given", self._given)
        if config.dense_epochs:
            file = self._stage("dense", partial(self._train, file, "dense", config.dense_epochs))
        self._stage("before", partial(self._validate, file))
        start = Cost(**self.notes["before"]["cost"])
        target = config.budget.resolve(start)
        for i in range(1, config.iterations + 1):
            share = target.share(start, i, config.iterations)
            file = self._stage(f"step{i}", partial(self._prune, file, f"step{i}", share))
            last = i == config.iterations
            name, epochs = ("train", config.epochs) if last else (f"recover{i}", config.recover_epochs)
            if epochs:
                file = self._stage(name, partial(self._train, file, name, epochs))
        self._stage("after", partial(self._validate, file))
        before, after = self.notes["before"], self.notes["after"]
        path = self.run.folder / "pruned.pt"
        yolo = load(file)
        save(yolo, path)
        costs = Cost(**before["cost"]), Cost(**after["cost"])
        return Slimmed(yolo, path, *costs, before["metrics"], after["metrics"])

    def _stage(self, name: str, act: Callable[[], Notes]) -> str:
        """Run a stage, unless it has ended; return the file of the network after it."""
        self.at += 1
        if self.at > self.ended:
            event = act()
            self.notes[name] = {"stage": name, **event}
            self.run.note(**self.notes[name])
            self.run.save({"stage": self.at})
        return str(self.notes[name].get("file", ""))

    def _given(self) -> Notes:
        """Store the given model, whose random weights a resumed run has to have again."""
        torch.manual_seed(self.config.seed)
        yolo = load(self.weights)
        return {"file": str(save(yolo, self.run.folder / "given.pt", half=False))}

    def _train(self, file: str, name: str, epochs: int) -> Notes:
        """Train a network, from the last stored epoch where there is one; return its file."""
        config, folder = self.config, self.run.folder.absolute() / name
        last = folder / "weights" / "last.pt"
        resumable = None
        if last.exists():
            resumable = load(last)
            if resumable.ckpt.get("optimizer") is None or resumable.ckpt["epoch"] + 1 >= epochs:
                return self._trained(folder)  # all epochs were trained, but this was not stored
        yolo = resumable or load(file)
        self.log(f"{name}: {'resumed' if resumable else number_of(epochs, 'epoch')}")
        arguments: Notes = {
            "plots": False, "exist_ok": True, **config.arguments,
            "data": config.data, "imgsz": config.imgsz, "batch": config.batch, "epochs": epochs,
            "device": config.device, "seed": config.seed, "project": str(folder.parent), "name": name,
        }  # fmt: skip
        train(yolo, **arguments, **({"resume": True} if resumable else {}))
        return self._trained(folder)

    def _trained(self, folder: Path) -> Notes:
        best = folder / "weights" / "best.pt"
        return {"file": str(best if best.exists() else folder / "weights" / "last.pt")}

    def _prune(self, file: str, name: str, budget: Budget) -> Notes:
        """Prune a network by one step, and store it."""
        config, yolo = self.config, load(file)
        batches = calibration_batches(
            yolo, config.data, config.calibration, imgsz=config.imgsz, batch=config.batch
        )
        step = prune(
            yolo, budget, imgsz=config.imgsz, calibration=batches, score=config.score, refit=config.refit
        )
        path = save(
            yolo, self.run.folder / f"step{sum('step' in name for name in self.notes) + 1}.pt", half=False
        )
        self.log(f"pruned: {step.before} → {step.after}, outputs agree to {step.difference:.1e}")
        return {"file": str(path), "cost": vars(step.after), "left_out": dict(step.left_out)}

    def _validate(self, file: str) -> Notes:
        """Return the cost of a network, and the metrics of the library's validation."""
        config, yolo = self.config, load(file)
        cost = deployed_cost(network(yolo), example_images(network(yolo), config.imgsz))
        with quiet():
            metrics = yolo.val(
                data=config.data, imgsz=config.imgsz, batch=config.batch, device=config.device, plots=False,
                workers=0, project=str(self.run.folder.absolute()), name="val", exist_ok=True, verbose=False,
            )  # fmt: skip
        return {"cost": vars(cost), "metrics": {k: float(v) for k, v in metrics.results_dict.items()}}
