"""The reference network of a run: the committed one on the data that it was trained on."""

from __future__ import annotations

from dataclasses import replace

import torch

import data
from eval import reference
from eval.cli import COMMITTED
from pruning.checkpoint import read


def test_the_reference_is_the_committed_one_on_mnist_and_trained_on_other_data(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(reference, "train_reference", lambda net, *_, **__: trained.append(net) or net)
    digits = data.load("mnist5k", quiet=True)
    for name, path in (("mnist", tmp_path / "a.pth"), (digits.name, tmp_path / "b.pth")):
        found = reference.reference_beside(path, None, replace(digits, name=name), "cpu", {"dataset": name})
        assert read(path)["provenance"]["dataset"] == name
        assert all(map(torch.equal, found.state_dict().values(), read(path)["state_dict"].values()))
    assert (tmp_path / "a.pth").read_bytes() == COMMITTED["LeNet5"].read_bytes()
    assert len(trained) == 1
