"""The folder of a run: its settings, its history, and the state to resume from."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

from filelock import FileLock, Timeout
from torch import Tensor

from pruning import checkpoint
from pruning.errors import PruningError
from pruning.training.state import TrainingState
from pruning.utils import distributed


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
        given: fields of `Given`, the network that the pipeline was given; earlier versions did not have it.
        best: the best network so far that meets the budget: its score, its stage, and its description.
        skipped: number of pruning iterations that had nothing to do.
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
    given: dict[str, Any]
    best: dict[str, Any]
    skipped: int
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
