"""Ctrl-C, at any moment."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

#: Exit code after Ctrl-C, as shells have it.
INTERRUPTED = 130


@contextlib.contextmanager
def noting_interrupts() -> Iterator[list[int]]:
    """Raise KeyboardInterrupt at the first Ctrl-C, ignore those that follow, and list the first."""
    interrupts: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if not interrupts:
            interrupts.append(number)
            raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread, which alone receives signals
        yield interrupts
        return
    try:
        yield interrupts
    finally:
        # While the process ends, another Ctrl-C would print a traceback.
        signal.signal(signal.SIGINT, signal.SIG_IGN if interrupts else before)
