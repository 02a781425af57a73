"""Write result.txt from the output of the test scripts: `python -m eval.result`."""

from __future__ import annotations

import subprocess
import sys

from eval.cli import ROOT
from pruning import cli
from pruning.checkpoint import read
from pruning.utils.files import replace_file

TEMPLATE = """\
Installation
============
Linux, macOS: make yournet (or the two lines below, with .venv/bin/activate instead)
Windows:
    python -m venv .venv && .venv\\Scripts\\activate
    python -m pip install -r requirements.txt

The accuracy, infer time, MACs and params of reference model (LeNet-5)
======================================================================
$ python test_lenet5.py
{lenet5}

The accuracy, infer time, MACs and params of your model (YourNet)
=================================================================
$ python test_yournet.py
{yournet}

The command to run "./train_yournet.py"
=======================================
python train_yournet.py

The committed checkpoints/YourNet/best.pth was made by
    {command}
on {dataset}, with seed {seed}.

The command to run "./test_yournet.py"
======================================
python test_yournet.py --best-checkpoint checkpoints/YourNet/best.pth

Others
======
- Method: Network Slimming in three stages (README.md). YourNet is LeNet-5 with fewer channels,
  BatchNorm folded into its layers, and pooling before ReLU.
- Params and MACs stand under their right names; the assignment's table has them exchanged.
  MACs are those of convolutions and linear layers, by thop; those with biases stand beside them.
- Times differ between machines and runs: compare the two networks of one run. Both are timed
  in turns, forward pass only, on one thread (`--threads`).
- This file is written by: python -m eval.result
"""


def main() -> None:
    made = read(ROOT / "checkpoints" / "YourNet" / "best.pth")["provenance"]
    content = TEMPLATE.format(
        lenet5=output_of("test_lenet5.py"),
        yournet=output_of("test_yournet.py"),
        command=made["command"],
        dataset=made["dataset"],
        seed=made["seed"],
    )
    replace_file(ROOT / "result.txt", content.encode())
    print(content)


def output_of(script: str) -> str:
    """Run a script on MNIST and return its output; if it fails, exit with its exit code."""
    run = subprocess.run(
        [sys.executable, script, "--data", "mnist"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    if run.returncode:
        sys.exit(run.returncode)
    return run.stdout.rstrip()


if __name__ == "__main__":
    cli.run(main)
