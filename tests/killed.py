"""Runs as a killed process leaves them."""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import sys
from pathlib import Path

from commands import few_digits
from processes import ended

from pruning.stages import Run


class Killed(Exception):
    """Raised by a run in the place of a signal."""


class CopiedRun(Run):
    """A run that copies its folder after every saved state: what is left if the process is killed then."""

    def __init__(self, folder, settings, copies):
        super().__init__(folder, settings)
        self.copies, self.saves = copies, 0

    def save(self, state):
        super().save(state)
        self.saves += 1
        copy = shutil.copytree(self.folder, self.copies / str(self.saves))
        with open(copy / "history.jsonl", "a") as history:
            history.write('{"stage": "lost", "epoch": 0}\n')  # an event after the last saved state


def killed(file, number, target, *flags, cwd):
    """Run a script or a module of the project in a process of its own, on few digits; return how it ended.

    The process gets the signal of this number as soon as it has written a file of this name.
    """
    return ended(_run, file, int(number), str(target), list(map(str, flags)), cwd=cwd)


def _run(file, number, target, flags):
    replace = os.replace

    def replace_and_die(source, to, **options):
        replace(source, to, **options)
        if Path(to).name == file:
            os.replace = replace
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell disables it in the background
    os.replace, sys.argv = replace_and_die, [target, *flags]
    with few_digits():
        if target.endswith(".py"):
            runpy.run_path(target, run_name="__main__")
        else:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
