"""Parameters that code multiplies by, on the command line: listed, narrowed, and reloaded."""

from __future__ import annotations

import re

import torch

MODULE = """
import torch
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.last = nn.Linear(10, 8), nn.Linear(6, 3)
        self.a, self.b = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(4, 8))
        self.w = nn.Parameter(torch.randn(8, 6))

    def forward(self, x):
        x = torch.tanh(self.encode(x))
        x = torch.tanh(x + x @ self.a @ self.b)
        return self.last(torch.tanh(x @ self.w))
"""


def test_parameters_of_the_model_are_listed_narrowed_and_reloaded(run, tmp_path):
    (tmp_path / "holding.py").write_text(MODULE)
    net = ("--model", "holding:Net", "--input-shape", "10")
    code, out, err = run("doctor", *net)
    assert code == 0, err
    assert re.search(r"read by .*\bw\b", out) and "read by b" in out
    code, _, err = run("prune", *net, "--score", "l2", "--max-params", "50%", "--output", "small.pth")
    assert code == 0, err
    stored = torch.load(tmp_path / "small.pth", weights_only=True)["state_dict"]
    assert sum(value.numel() for value in stored.values()) <= (88 + 21 + 64 + 48) / 2
    assert len(stored["encode.weight"]) == stored["w"].shape[0] == stored["b"].shape[1]
    assert run("prune", *net, "--weights", "small.pth", "--score", "l2", "--max-params", "90%")[0] == 0
