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


def test_blocks_are_removed_by_name_with_a_budget_or_alone(run, tmp_path):
    module = MODULE.replace(
        "nn.Sequential(Attention(), Attention())", "nn.ModuleList([Attention() for _ in range(3)])"
    )
    module = module.replace(
        "return self.head(self.blocks(self.stem(x)).mean(1))",
        """x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))""",
    )
    (tmp_path / "deep.py").write_text(module)
    net = ("--model", "deep:Net", "--input-shape", "7x5", "--score", "l2")
    code, out, err = run("prune", *net, "--remove", "blocks.1", "--output", "two.pth")
    assert code == 0, err
    assert "removed: blocks.1" in out and "widths:" not in out
    stored = torch.load(tmp_path / "two.pth", weights_only=True)["state_dict"]
    assert {name.split(".")[1] for name in stored if name.startswith("blocks")} == {"0", "2"}
    code, out, err = run(
        "prune", *net, "--remove", "blocks.0", "blocks.2", "--max-macs", "25%", "--output", "one.pth"
    )
    assert code == 0, err
    assert "removed: blocks.0, blocks.2" in out and "widths:" in out
    assert run("prune", *net, "--weights", "one.pth", "--max-macs", "90%")[0] == 0
    code, _, err = run("prune", *net, "--remove", "blocks.7")
    assert (
        code == 2 and "'blocks.7' cannot be removed" in err and "blocks.0" in err and "Traceback" not in err
    )
