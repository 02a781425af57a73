"""The folder of a run: its settings, its history, and the state to resume from."""

from __future__ import annotations

import copy
import json
import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict, cast

from filelock import FileLock, Timeout
from torch import Tensor, nn

from pruning import checkpoint
from pruning.errors import PruningError
from pruning.load_pruned import rebuild
from pruning.planning.budget import Budget
from pruning.planning.cost import Cost
from pruning.stages.prune import Step
from pruning.stages.scales import ChannelScales
from pruning.training.loop import Epoch, TrainingState
from pruning.utils import distributed
from pruning.utils.modules import copied, device_of


class RunState(TypedDict, total=False):
    """The content of state.pth, as plain data and tensors.

    Attributes:
        lines: number of lines of the history that were written before this state.
        stage: 0 (sparsify), 1 to n (pruning steps, each with its training), n + 1 (fine-tune).
        fit: state of the current training (see `Epoch.state`); None before its first epoch ends.
        layers: description of the network in training (`checkpoint.describe`), without its weights.
        target: limits of the budget, as counts.
        start: cost of the network without the channels whose scales are 0 after stage 1.
        dense: weights after stage 1.
        trial_epochs: number of epochs trained by the search for whole layers.
        line: log line of the current pruning step.
    """

    lines: int
    stage: int
    fit: TrainingState | None
    layers: dict[str, object]
    target: dict[str, int]
    start: dict[str, int]
    dense: dict[str, Tensor]
    trial_epochs: int
    line: str


class Run:
    """The folder of a run: config.json, history.jsonl and state.pth.

    config.json holds the settings. history.jsonl has one line per epoch and per pruning step.
    state.pth holds the current stage with its weights, optimizer and random state; it is replaced
    after every epoch. Of several processes (torchrun) only the first writes.

    Args:
        folder: folder of the run; created if it does not exist.
        settings: plain data; a resumed run must have the same.
        resume: continue the run in the folder.

    Attributes:
        state: the state last saved; None for a new run.
        observe: function called with the number and the content of every line of the history.

    Raises:
        PruningError: if the folder holds another run, if it holds none to resume, if another process
            is writing to it, or if it cannot be created.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = Run(f"{folder}/run", {"seed": 0})
    ...     run.note(stage="dense", params=1485)
    ...     print(run.history.read_text(), end="")
    {"stage": "dense", "params": 1485}
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, object], *, resume: bool = False):
        self.folder = Path(folder)
        self.writes = distributed.rank() == 0
        self.history = self.folder / "history.jsonl"
        self.observe: Callable[[int, Mapping[str, object]], None] | None = None
        self.state: RunState | None = None
        settings = json.loads(json.dumps(settings))
        config = self.folder / "config.json"
        if resume:
            self._require_same_settings(config, settings)
            self._lock()
            self.state = self._read_state()
        elif self.writes and config.exists():
            raise PruningError(
                f"{self.folder} already holds a run: add --resume to continue it, or choose another folder"
            )
        elif self.writes:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise PruningError(
                    f"{self.folder} cannot be created ({error.strerror}): choose another folder"
                ) from error
            self._lock()
            checkpoint.replace_file(config, (json.dumps(settings, indent=2) + "\n").encode())
        self.lines = self.state["lines"] if self.state is not None else 0
        if resume and self.writes:
            self._truncate_history(self.lines)

    def note(self, **event: object) -> None:
        """Append one line to the history: the given keys and values, as JSON."""
        self.lines += 1
        if not self.writes:
            return
        if self.observe is not None:
            self.observe(self.lines, event)
        with open(self.history, "ab") as file:
            file.write((json.dumps(event) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())

    def save(self, state: RunState) -> None:
        """Replace state.pth atomically."""
        self.state = {**state, "lines": self.lines}
        if self.writes:
            checkpoint.write(self.folder / "state.pth", dict(self.state))

    def _lock(self) -> None:
        """Keep other processes from writing to the folder during the lifetime of this object."""
        if not self.writes:
            return
        lock = FileLock(self.folder / ".lock", timeout=0, is_singleton=True)
        try:
            lock.acquire()
        except Timeout:
            raise PruningError(
                f"{self.folder}: another process is writing to this run; wait until it ends, or stop it"
            ) from None
        except NotImplementedError:  # a file system without locks
            return
        weakref.finalize(self, lock.release)

    def _require_same_settings(self, config: Path, settings: Mapping[str, object]) -> None:
        try:
            before = json.loads(config.read_text())
        except FileNotFoundError:
            raise PruningError(
                f"{self.folder} holds no run to resume (config.json is missing): start a new run without "
                "--resume, or give the folder of a run"
            ) from None
        except (OSError, ValueError) as error:
            raise PruningError(f"{config} cannot be read ({error}): choose another folder") from error
        if not isinstance(before, dict):
            raise PruningError(
                f"{config} holds a {type(before).__name__}, but a JSON object with the settings of a run was "
                "expected: choose another folder"
            )
        changed = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
        if changed:
            raise PruningError(
                f"{self.folder} was started with other settings ({', '.join(sorted(changed))}): "
                "resume with the same settings, or choose another folder"
            )

    def _truncate_history(self, lines: int) -> None:
        """Delete the lines written after the state was saved; the resumed run writes them again."""
        if self.history.exists():
            kept = self.history.read_bytes().splitlines(keepends=True)[:lines]
            checkpoint.replace_file(self.history, b"".join(kept))

    def _read_state(self) -> RunState | None:
        path = self.folder / "state.pth"
        if not path.exists():
            return None
        state = checkpoint.read_plain(path)
        if not isinstance(state, dict) or not isinstance(state.get("lines"), int):
            raise PruningError(
                f"{path} does not hold the state of a run: delete it to start over, or choose another folder"
            )
        return cast(RunState, state)


class Progress:
    """The progress of a pipeline; if there is a run, it is saved to it after every epoch.

    Args:
        run: the run to save to; if it has a state, the progress continues from that state.
        model: the model that the pipeline was given; it is not changed.

    Attributes:
        network: the network in training.
        dense: the model after stage 1.
        state: see `RunState`.
    """

    def __init__(self, run: Run | None, model: nn.Module):
        self.run = run
        self.state: RunState = (run.state if run else None) or {"stage": 0, "fit": None}
        self.network, self.dense = copied(model), copied(model)
        if self.state["fit"] is not None:
            weights = self.state["fit"]["model"]
            rebuild(self.network.cpu(), {**self.state["layers"], "state_dict": weights})
            self.network.to(device_of(model))
        if "dense" in self.state:
            self.dense.load_state_dict(self.state["dense"])
        self.dense.eval()

    @property
    def stage(self) -> int:
        """Return the number of the current stage (see `RunState`)."""
        return self.state["stage"]

    @property
    def target(self) -> Budget | None:
        """Return the budget as counts; None before it is known."""
        return Budget(**self.state["target"]) if "target" in self.state else None

    @property
    def start(self) -> Cost:
        """Return the cost of the network without the channels whose scales are 0 after stage 1."""
        return Cost(**self.state["start"])

    @property
    def line(self) -> str:
        """Return the log line of the current pruning step."""
        return self.state.get("line", "")

    def resume(self, stage: int) -> TrainingState | None:
        """Return the state that `fit` resumes from; None if the stage starts from its beginning."""
        return self.state["fit"] if stage == self.stage else None

    def recorder(self, stage: int, label: str, model: nn.Module) -> Callable[[Epoch], None]:
        """Return a function for `fit(on_epoch=...)` that records each epoch and then saves the state."""

        def record(epoch: Epoch) -> None:
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
            del layers["state_dict"]  # the state of `fit` has the weights
            self.state = {**self.state, "stage": stage, "layers": layers, "fit": epoch.state()}
            self.run.save(self.state)

        return record

    def note(self, **event: object) -> None:
        """Append one line to the history of the run, if there is a run."""
        if self.run is not None:
            self.run.note(**event)

    def begin(self, scales: ChannelScales, asked: Budget) -> None:
        """Record the dense network and the budget."""
        self.note(
            stage="dense",
            widths=scales.trace.widths,
            asked=asked.limits(),
            skipped=dict(scales.trace.skipped),
            scales=_rounded(scales),
            **asdict(scales.dense),
        )

    def end_sparsify(self, model: nn.Module, scales: ChannelScales, validation: float) -> str:
        """Store the weights after stage 1, record the channels left alive, and return the log line."""
        alive, start = scales.alive(), scales.left()
        weights = model.state_dict()
        self.dense.load_state_dict(weights)
        self.state = {**self.state, "start": asdict(start), "dense": copy.deepcopy(weights)}
        self.note(
            stage="sparsify", alive=alive, scales=_rounded(scales), **asdict(start), validation=validation
        )
        return f"γ ≠ 0 in {_joined(alive)}: {start}; validation {validation:.4f}"

    def note_step(self, label: str, step: Step, validation: float) -> str:
        """Record a pruning step, before the training that follows it, and return the log line."""
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
        latency = f", got {step.latency}" if step.latency else ""
        line = (
            f"{_joined(step.plan.widths)}{without}: {step.after} (asked {step.asked}{latency}); "
            f"validation {validation:.4f}"
        )
        self.state = {**self.state, "line": line}
        return line


def _rounded(scales: ChannelScales) -> dict[str, list[float]]:
    """Return the largest |γ| of every channel, by group, rounded for the history."""
    return {group: [round(x, 5) for x in sizes.tolist()] for group, sizes in scales.magnitudes().items()}


def _joined(widths: Mapping[str, int]) -> str:
    """Return widths as text, `3-7-8-12` in the order of the groups; above 12 groups only their sum."""
    if len(widths) <= 12:
        return "-".join(str(w) for w in widths.values())
    return f"{sum(widths.values()):,} channels in {len(widths)} groups"
