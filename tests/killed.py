"""Runs that end as if their process were killed."""

from __future__ import annotations

from pruning.stages import Run


class Killed(Exception):
    """Raised by a run in the place of a signal."""


class MortalRun(Run):
    """A run that is killed after it has saved its state so many times."""

    def __init__(self, folder, settings, saves):
        super().__init__(folder, settings)
        self.left = saves

    def save(self, state):
        super().save(state)
        self.left -= 1
        if not self.left:
            self.note(stage="lost", epoch=0)  # an event after the last saved state
            raise Killed
