"""A run's folder: what was asked for, what happened, and where it stands."""

from __future__ import annotations

import json
import os
import weakref
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pruning import checkpoint, parallel
from pruning.board import Board
from pruning.errors import PruningError


class Run:
    """A folder with what a run was asked for, what happened, and where it stands.

    config.json: the settings. history.jsonl: one line per epoch and per pruning step.
    state.pth: the stage under way with its weights, optimizer and random state, replaced
    after every epoch. Other checkpoints are the caller's. With `tensorboard` its folder receives
    the same for TensorBoard, scales as histograms and widths as figures. Of several processes (torchrun) the
    first alone writes.

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
        tensorboard: bool = False,
    ):
        self.folder = Path(folder)
        self.writes = parallel.rank() == 0
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
        self.board = Board(self.folder / "tensorboard") if tensorboard and self.writes else None

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
        if self.board is not None:
            self.board.add(self.lines, event)
        with open(self.history, "ab") as file:
            file.write((json.dumps(event) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())

    def save(self, state: dict[str, Any]) -> None:
        """Note where the run stands, whole or not at all."""
        self.state = {**state, "lines": self.lines}
        if self.writes:
            checkpoint.write(self.folder / "state.pth", self.state)
