"""Attention on the command line: heads and widths are listed, narrowed, alike in all layers, and reload."""

from __future__ import annotations

import re

import torch

MODULE = """
import torch
from torch import nn

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = 4, 6
        self.norm, self.qkv, self.out = nn.LayerNorm(12), nn.Linear(12, 72), nn.Linear(24, 12)

    def forward(self, x):
        shape = *x.shape[:2], 3, self.num_heads, self.head_dim
        q, k, v = self.qkv(self.norm(x)).reshape(shape).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(1, 2).flatten(2))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Linear(5, 12), nn.Sequential(Attention(), Attention())
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean(1))
"""


def test_heads_and_widths_are_narrowed_alike_in_all_layers(run, tmp_path):
    (tmp_path / "attending.py").write_text(MODULE)
    net = ("--model", "attending:Net", "--input-shape", "7x5")
    code, out, _ = run("doctor", *net)
    assert code == 0 and "blocks.0.qkv/heads" in out and "blocks.1.qkv/width" in out
    code, out, err = run("prune", *net, "--score", "l2", "--max-macs", "50%", "--output", "small.pth",
                         "--alike", "*/heads", "*/width")  # fmt: skip
    assert code == 0, err
    widths = dict(re.findall(r"(\S+) \d+→(\d+)", re.search("^widths: (.*)", out, re.MULTILINE)[1]))
    heads, places = widths["blocks.0.qkv/heads"], widths["blocks.0.qkv/width"]
    assert widths["blocks.1.qkv/heads"] == heads and widths["blocks.1.qkv/width"] == places
    stored = torch.load(tmp_path / "small.pth", weights_only=True)["state_dict"]
    assert stored["blocks.0.qkv.weight"].shape[0] == 3 * int(heads) * int(places)
    assert run("prune", *net, "--weights", "small.pth", "--score", "l2", "--max-macs", "90%")[0] == 0
    code, _, err = run("prune", *net, "--score", "l2", "--max-macs", "50%", "--alike", "*/hands")
    assert code == 2 and "alike='*/hands' matches no group" in err and "Traceback" not in err
