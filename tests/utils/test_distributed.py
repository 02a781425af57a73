"""Training on several processes: the examples of each one, and BatchNorm over all of them."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import together
from torch import nn

from pruning import PruningError
from pruning.training import TrainConfig, fit
from pruning.training.distillation import distillation
from pruning.utils import distributed

PROCESSES = 2


class ActivatedNorm(nn.BatchNorm2d):
    """A subclass with its own code, as timm's BatchNormAct2d."""

    def forward(self, x):
        return torch.relu(super().forward(x))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3),
        ActivatedNorm(4, momentum=None),
        nn.BatchNorm2d(4, affine=False, track_running_stats=False),
        nn.Flatten(),
        nn.Linear(4 * 16, 3),
    ).double()


def batches(device="cpu"):
    torch.manual_seed(1)
    return [
        (torch.randn(8, 1, 8, 8).double().to(device), torch.arange(8, device=device) % 3) for _ in range(3)
    ]


def train(model, called, data):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for inputs, targets in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(called(inputs), targets).backward()
        optimizer.step()
    return model


def one_process(rank, folder, device):
    """Train in one of the processes, and check its state there."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=PROCESSES)
    model, data = network().to(device), batches(device)
    with torch.no_grad():
        model[0].weight.add_(rank)  # all processes must take the weights of the first one
    with distributed.data_parallel(model) as called:
        train(model, called, distributed.sharded(data))
        averaged = copy.deepcopy(model).eval()
        assert torch.equal(averaged(data[0][0]), model.eval()(data[0][0]))
    assert [type(layer) for layer in model] == [type(layer) for layer in network()]
    assert not any("forward" in vars(layer) for layer in model)
    assert distributed.broadcast({"rank": rank}) == {"rank": 0}
    assert distributed.mean(torch.tensor(float(rank))).item() == 0.5
    with pytest.raises(PruningError, match="a batch of 1 example cannot be shared by 2 processes"):
        next(iter(distributed.sharded([(torch.zeros(1, 2), torch.zeros(1))])))
    torch.save(model.cpu().state_dict(), f"{folder}/{rank}.pth")
    dist.destroy_process_group()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_several_processes_train_the_same_network_as_one(device, tmp_path):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    together(one_process, str(tmp_path), device, count=PROCESSES)
    model = network()
    expected = train(model, model, batches()).state_dict()
    for rank in range(PROCESSES):
        got = torch.load(tmp_path / f"{rank}.pth", weights_only=True)
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, msg=lambda text, key=key: f"{key}: {text}")


#: Settings of `fit` on all processes; the network has double precision, and so do the comparisons.
FITS = (
    TrainConfig(2, 0.05, accumulate=2, clip_norm=0.5, ema=0.5),
    TrainConfig(2, 0.01, "adamw", label_smoothing=0.1, mixup=0.4, cutmix=1.0, schedule="cosine"),
)


def fitted(config):
    model, data = network(), batches()
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double()
    return fit(model, data, config, loss=distillation(teacher, 0.5))


def one_fit(rank, folder):
    """Train in one of the processes by `fit`; then the second process ends in an epoch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=PROCESSES)
    torch.save([fitted(config).state_dict() for config in FITS], f"{folder}/{rank}.pth")

    def end(lr):
        if rank == 1:
            os._exit(0)

    with pytest.raises(PruningError) as caught, distributed.lost_processes():
        fit(network(), batches(), TrainConfig(3), after_step=end)
    Path(folder, "message").write_text(str(caught.value))


def test_fit_gives_the_weights_of_one_process_and_ends_when_another_process_has_ended(tmp_path):
    together(one_fit, str(tmp_path), count=PROCESSES)
    for number, config in enumerate(FITS):
        expected = fitted(config).state_dict()
        for rank in range(PROCESSES):
            got = torch.load(tmp_path / f"{rank}.pth", weights_only=True)[number]
            for key, value in expected.items():
                torch.testing.assert_close(got[key], value, msg=lambda text, key=key: f"{key}: {text}")
    message = (tmp_path / "message").read_text()
    assert "process 0 of 2 stops, because another process of this training has ended" in message
    assert "--resume" in message and "\n" not in message


def test_other_errors_are_not_taken_for_a_lost_process():
    with pytest.raises(RuntimeError, match="shapes"), distributed.lost_processes():
        raise RuntimeError("shapes do not match")


def test_a_single_process_trains_the_given_model_directly():
    model, data = network(), batches()
    with distributed.data_parallel(model) as called:
        assert called is model
    assert distributed.sharded(data) is data and (distributed.rank(), distributed.size()) == (0, 1)
    assert distributed.broadcast(data) is data
