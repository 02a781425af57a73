"""A run's folder: what was asked for, what happened, and where it stands."""

from __future__ import annotations

import copy
import json
import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import nn

from pruning import checkpoint
from pruning.errors import PruningError
from pruning.graph.groups import Trace
from pruning.load_pruned import rebuild
from pruning.planning.budget import Budget
from pruning.planning.cost import Cost, CostModel
from pruning.stages.prune import Step
from pruning.stages.sparsify import ScalePull
from pruning.training.loop import Epoch
from pruning.utils import distributed
from pruning.utils.modules import copied, device_of


class Run:
    """A folder with what a run was asked for, what happened, and where it stands.

    config.json: the settings. history.jsonl: one line per epoch and per pruning step.
    state.pth: the stage under way with its weights, optimizer and random state, replaced
    after every epoch. Other checkpoints are the caller's. Of several processes
    (torchrun) the first alone writes.

    Raises `PruningError` when the folder holds another run (resume it or choose another
    folder), when there is none to resume, when another process is at work on it, or when it
    cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: dict[str, Any],
        *,
        resume: bool = False,
    ):
        self.folder = Path(folder)
        self.writes = distributed.rank() == 0
        self.history = self.folder / "history.jsonl"
        settings = json.loads(json.dumps(settings))
        config = self.folder / "config.json"
        if resume:
            self._check_same(config, settings)
            self._claim()
        elif self.writes and config.exists():
            raise PruningError(f"{self.folder} holds a run already: add --resume, or choose another folder")
        elif self.writes:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise PruningError(f"{self.folder} cannot be made: {error.strerror}") from error
            self._claim()
            checkpoint.replace_file(config, (json.dumps(settings, indent=2) + "\n").encode())
        state = self.folder / "state.pth"
        self.state: dict[str, Any] | None = None
        if resume and state.exists():
            self.state = checkpoint.read_plain(state)
            if not isinstance(self.state, dict) or not isinstance(self.state.get("lines"), int):
                raise PruningError(
                    f"{state} is not the state of a run: delete it to begin anew, or choose another folder"
                )
        self.lines = self.state["lines"] if self.state is not None else 0
        if resume and self.writes:
            self._cut_history(self.lines)
        #: Called with the number and the content of every line of the history.
        self.observe: Callable[[int, Mapping[str, Any]], None] | None = None

    def _claim(self) -> None:
        """Keep other processes from writing to the folder for as long as this object lives."""
        if not self.writes:
            return
        lock = FileLock(self.folder / ".lock", timeout=0, is_singleton=True)
        try:
            lock.acquire()
        except Timeout:
            raise PruningError(
                f"{self.folder}: another process is at work on this run; wait for it, or stop it"
            ) from None
        except NotImplementedError:  # of a file system without locks
            return
        weakref.finalize(self, lock.release)

    def _check_same(self, config: Path, settings: dict[str, Any]) -> None:
        try:
            before = json.loads(config.read_text())
        except FileNotFoundError:
            raise PruningError(f"{self.folder} holds no run to resume") from None
        except (OSError, ValueError) as error:
            raise PruningError(f"{config} cannot be read: {error}") from error
        if not isinstance(before, dict):
            raise PruningError(
                f"{config} holds a {type(before).__name__}, the settings of a run were expected: choose "
                "another folder"
            )
        changed = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
        if changed:
            raise PruningError(
                f"{self.folder} was started with other settings ({', '.join(sorted(changed))}): "
                "resume with the same, or choose another folder"
            )

    def _cut_history(self, lines: int) -> None:
        """Forget what happened after the state was saved; it will happen again."""
        if self.history.exists():
            kept = self.history.read_bytes().splitlines(keepends=True)[:lines]
            checkpoint.replace_file(self.history, b"".join(kept))

    def note(self, **event: Any) -> None:
        """Append one line to the history."""
        self.lines += 1
        if not self.writes:
            return
        if self.observe is not None:
            self.observe(self.lines, event)
        with open(self.history, "ab") as file:
            file.write((json.dumps(event) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())

    def save(self, state: dict[str, Any]) -> None:
        """Note where the run stands, whole or not at all."""
        self.state = {**state, "lines": self.lines}
        if self.writes:
            checkpoint.write(self.folder / "state.pth", self.state)


class Progress:
    """Where a pipeline stands, kept in its run (where it has one) after every epoch.

    Stages count 0 (sparsify), 1 to n (pruning steps, each with its training), n + 1 (fine-tune).
    """

    def __init__(self, run: Run | None, model: nn.Module):
        self.run = run
        self.state: dict[str, Any] = (run.state if run else None) or {"stage": 0, "fit": None}
        self.network, self.dense = copied(model), copied(model)
        if self.state["fit"] is not None:
            weights = self.state["fit"]["model"]
            rebuild(self.network.cpu(), {**self.state["layers"], "state_dict": weights})
            self.network.to(device_of(model))
        if "dense" in self.state:
            self.dense.load_state_dict(self.state["dense"])
        self.dense.eval()

    @property
    def at(self) -> int:
        """The stage under way."""
        return self.state["stage"]

    @property
    def start(self) -> Cost:
        """What the network costs without the channels that stage 1 has turned off."""
        return Cost(**self.state["start"])

    def resume(self, stage: int) -> dict[str, Any] | None:
        """What `fit` goes on from; None for a stage that starts anew."""
        return self.state["fit"] if stage == self.at else None

    def options(self, stage: int, label: str, model: nn.Module) -> dict[str, Any]:
        """The arguments of `fit` that make a stage resume and record its epochs."""

        def on_epoch(epoch: Epoch) -> None:
            if self.run is None:
                return
            self.run.note(
                stage=label,
                epoch=epoch.number,
                train_loss=epoch.train_loss,
                validation=epoch.score,
                lr=epoch.lr,
            )
            layers = checkpoint.describe(model)
            del layers["state_dict"]  # the state of `fit` has it
            self.state = {**self.state, "stage": stage, "layers": layers, "fit": epoch.state()}
            self.run.save(self.state)

        return {"label": label, "on_epoch": on_epoch, "resume": self.resume(stage)}

    def note(self, **event: Any) -> None:
        if self.run is not None:
            self.run.note(**event)

    def begin(self, traced: Trace, asked: Budget) -> None:
        """Record what is asked of the dense network."""
        cost_model = CostModel(self.network, traced)
        dense = cost_model(cost_model.full)
        limits, skipped = asked.limits(), dict(traced.skipped)
        self.note(
            stage="dense",
            widths=traced.widths,
            asked=limits,
            skipped=skipped,
            scales=_rounded(ScalePull(self.network, traced, 0.0)),
            **asdict(dense),
        )

    def end_sparsify(self, small: nn.Module, pull: ScalePull, validation: float) -> str:
        """Keep the dense weights and the channels left; returns the line to log."""
        alive, start = pull.alive(), pull.left()
        scales = _rounded(pull)
        self.dense.load_state_dict(small.state_dict())
        self.state = {**self.state, "start": asdict(start), "dense": copy.deepcopy(small.state_dict())}
        self.note(stage="sparsify", alive=alive, scales=scales, **asdict(start), validation=validation)
        return f"γ ≠ 0 in {_widths(alive)}: {start}; validation {validation:.4f}"

    def note_step(self, label: str, step: Step, validation: float) -> str:
        """Record a pruning step before the training after it; returns the line to log."""
        self.note(
            stage=label,
            widths=step.plan.widths,
            removed=step.plan.removed,
            asked=step.asked.limits() if isinstance(step.asked, Budget) else {},
            **asdict(step.after),
            **({"latency": {"asked": str(step.asked), **asdict(step.latency)}} if step.latency else {}),
            validation=validation,
        )
        without = f" without {', '.join(step.plan.removed)}" if step.plan.removed else ""
        line = (
            f"{_widths(step.plan.widths)}{without}: {step.after} (asked {step.asked}"
            f"{f', got {step.latency}' if step.latency else ''}); "
            f"validation {validation:.4f}"
        )
        self.state = {**self.state, "line": line}
        return line

    @property
    def line(self) -> str:
        """The line of the pruning step under way."""
        return self.state.get("line", "")


def _rounded(pull: ScalePull) -> dict[str, list[float]]:
    """The largest scale of every channel, by group, for the history."""
    return {group: [round(x, 5) for x in sizes.tolist()] for group, sizes in pull.magnitudes().items()}


def _widths(widths: dict[str, int]) -> str:
    """Widths in the order of the groups: `3-7-8-12`; of many, how many channels in all."""
    if len(widths) <= 12:
        return "-".join(str(w) for w in widths.values())
    return f"{sum(widths.values()):,} channels in {len(widths)} groups"
