"""Independent work on a Ray cluster gives the results of one machine, also when a worker is killed."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from torch import nn

from pruning import PruningError, sensitivity
from pruning.training import TrainConfig
from pruning.utils.cluster import in_order


class Fatal(nn.Module):
    """Kills the first worker that runs it; in the process that made it, it does nothing."""

    def __init__(self, mark):
        super().__init__()
        self.mark, self.made_in = str(mark), os.getpid()

    def forward(self, x):
        if os.getpid() != self.made_in:
            try:
                os.close(os.open(self.mark, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return x
            os.kill(os.getpid(), signal.SIGKILL)
        return x


@pytest.mark.slow
def test_a_sensitivity_analysis_on_a_cluster_whose_worker_is_killed_is_that_of_one_machine(
    tmp_path, monkeypatch
):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    torch.manual_seed(0)
    layers = nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 8), Fatal(tmp_path / "killed")
    net = nn.Sequential(*layers, nn.ReLU(), nn.Linear(8, 3))
    batches = [(torch.randn(12, 6), torch.arange(12) % 3)]
    options = {"calibration": batches, "widths": 2, "finetune": TrainConfig(epochs=1, lr=0.1)}
    here = sensitivity(net, batches[0][0], batches, **options)
    assert not (tmp_path / "killed").exists()
    there = sensitivity(net, batches[0][0], batches, **options, cluster="local")
    assert (tmp_path / "killed").exists() and there.points == here.points


def test_a_cluster_without_ray_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PruningError, match="needs Ray"):
        list(in_order(abs, [1], "local"))
