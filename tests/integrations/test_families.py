"""The benchmark of families of transformers: figures of one model, and the page."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from benchmarks import transformer_families as families
from pruning import trace

pytestmark = pytest.mark.slow


def test_weights_of_layers_that_keep_their_channels_are_in_no_group():
    layers = [nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)]
    net = nn.Sequential(*layers)
    assert families.in_groups(net, trace(net, torch.randn(2, 3))) == 1
    found = trace(net, torch.randn(2, 3), ignored=["0"])
    assert families.in_groups(net, found) == pytest.approx(30 / 42)


def test_a_model_is_pruned_in_both_ways_and_listed(monkeypatch):
    read = []
    monkeypatch.setattr(families, "read_again", lambda net, *_: read.append(net) or {"difference": 0.0})
    row = families.tried("LlamaForCausalLM")
    assert row["in groups"] == 1 and row["share macs"] <= 0.5 and row["loadable macs"] <= 0.5
    assert row["least macs"] < 0.1 and row["params"] == sum(
        p.numel() for p in families.made("LlamaForCausalLM").parameters()
    )
    assert len(read) == 1 and sum(p.numel() for p in read[0].parameters()) < row["params"]
    failed = {"error": "over 300 s"}
    text = families.page(
        {"transformers": "1.0", "networks": {"LlamaForCausalLM": row, "OPTForCausalLM": failed}}
    )
    assert "2 models: 1 pruned to half of their MACs; 1 load again." in text
    assert "| LlamaForCausalLM | " in text and "- OPTForCausalLM: over 300 s" in text
