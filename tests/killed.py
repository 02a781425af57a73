"""Runs as a killed process leaves them.

    python tests/killed.py FILE SIGNAL TARGET FLAGS...

runs a script or a module of the project on few digits, and sends its process the signal as soon as it
has written a file of that name.
"""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from commands import ROOT, few_digits

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
    """Run this file in a process of its own; return how it ended."""
    words = map(str, [sys.executable, __file__, file, int(number), target, *flags])
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{cwd}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        list(words), cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


def main(file, number, target, *flags):
    replace = os.replace

    def replace_and_die(source, to, **options):
        replace(source, to, **options)
        if Path(to).name == file:
            os.replace = replace
            os.kill(os.getpid(), int(number))

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell disables it in the background
    os.replace, sys.argv = replace_and_die, [target, *flags]
    with few_digits():
        if target.endswith(".py"):
            runpy.run_path(target, run_name="__main__")
        else:
            runpy.run_module(target, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
