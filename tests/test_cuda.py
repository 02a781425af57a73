"""Run the toolkit on a GPU; skipped where there is none."""

from __future__ import annotations

import copy

import pytest
import torch
from commands import script
from nets import NETS, ShuffledBatches, batches, images, make, snapshot
from test_cli import SHORT
from user import NET

from pruning import Budget, LatencyBudget, SlimConfig, finetune, load, prune, save, sensitivity, slim, trace
from pruning.deploy import time_forward
from pruning.stages.config import PruneConfig
from pruning.stages.run import Run
from pruning.surgery import fold_batchnorm
from pruning.training import TrainConfig, accuracy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
#: Tolerances: the CPU and the GPU round sums differently, and by default convolutions on a GPU
#: round their inputs to 10 bits.
NEAR = {"rtol": 1e-2, "atol": 1e-2}


def on_cuda(net):
    return copy.deepcopy(net).cuda()


def on_cpu(net):
    return copy.deepcopy(net).cpu().eval()


@pytest.mark.parametrize("name", NETS)
def test_a_model_on_the_gpu_is_pruned_on_the_gpu(name):
    net, x = make(name), images()
    before = snapshot(net)
    there = prune(on_cuda(net), x.cuda(), Budget(macs="60%"), score="l1")
    here = prune(net, x, Budget(macs="60%"), score="l1")
    assert {t.device.type for t in there.model.state_dict().values()} == {"cuda"}
    assert there.plan.widths == here.plan.widths and there.after == here.after
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    if there.plan == here.plan:
        with torch.no_grad():
            torch.testing.assert_close(there.model(x.cuda()).cpu(), here.model(x), **NEAR)


def test_scores_accept_batches_on_the_cpu():
    net, calibration = on_cuda(make("yournet")), batches()
    for score in ("taylor", "bn_scale", "l2", "random"):
        step = prune(net, images().cuda(), Budget(params="50%"), score=score, calibration=calibration)
        assert step.after.params <= step.asked.params


def test_batchnorm_is_folded_on_the_gpu():
    net, x = on_cuda(make("residual")), images().cuda()
    folded = fold_batchnorm(net, trace(net, x))
    with torch.no_grad():
        torch.testing.assert_close(folded(x), net(x), **NEAR)


def test_a_checkpoint_saved_from_the_gpu_loads_on_both_devices(tmp_path):
    step = prune(on_cuda(make("yournet")), images().cuda(), Budget(macs="50%"), score="l1")
    save(tmp_path / "small.pth", step.model)
    here, there = load(tmp_path / "small.pth"), load(tmp_path / "small.pth", device="cuda")
    assert {t.device.type for t in here.state_dict().values()} == {"cpu"}
    assert all(torch.equal(here.state_dict()[key], value.cpu()) for key, value in there.state_dict().items())
    x = images(5).cuda()
    with torch.no_grad():
        assert torch.equal(there.eval()(x), step.model(x))


@pytest.mark.parametrize("optimizer", ["sgd", "soap"])
def test_training_accepts_batches_on_the_cpu_and_a_teacher_on_the_gpu(optimizer):
    data, teacher = batches(), on_cuda(make("yournet"))
    net = finetune(
        on_cuda(make("yournet", 1)),
        data,
        TrainConfig(8, lr=0.05, optimizer=optimizer),
        teacher=teacher,
        distill=0.5,
        validate=lambda model: accuracy(model, data),
    )
    assert accuracy(net, data) > 0.5


class Interrupt(Exception):
    pass


def test_resumed_slimming_gives_the_result_of_uninterrupted_slimming(tmp_path):
    data = ShuffledBatches()
    brief = TrainConfig(2, lr=0.05)
    config = SlimConfig(Budget(macs="50%"), brief, PruneConfig(2, TrainConfig(1, lr=0.05)), brief)

    def run(folder, stop_after=None):
        lines = []

        def log(line):
            lines.append(line)
            if len(lines) == stop_after:
                raise Interrupt

        torch.manual_seed(0)
        net = on_cuda(make("yournet"))
        resume = (folder / "config.json").exists()
        return slim(
            net,
            data,
            images().cuda(),
            config,
            validate=lambda model: accuracy(model, data.batches),
            run=Run(folder, {}, resume=resume),
            log=log,
        ).model

    whole = run(tmp_path / "whole")
    with pytest.raises(Interrupt):
        run(tmp_path / "parts", stop_after=2)
    again = run(tmp_path / "parts")
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=1e-3, atol=1e-3)
    assert next(whole.parameters()).is_cuda


def test_timing_and_latency_budgets_work_on_the_gpu():
    net, x = on_cuda(make("plain")), images(16).cuda()
    times = time_forward({"one": net, "other": net}, x, seconds=0.2, warmup=0.1)
    assert all(latency.median > 0 for latency in times.values())
    step = prune(net, x, LatencyBudget("10x", batch_size=16), score="l1")
    assert next(step.model.parameters()).is_cuda


def test_sensitivity_is_measured_on_the_gpu():
    net, data = make("yournet"), batches()
    there = sensitivity(on_cuda(net), images().cuda(), data)
    here = sensitivity(net, images(), data)
    assert there.channels == here.channels and len(there.points) == len(here.points)
    assert there.dense.accuracy == pytest.approx(here.dense.accuracy, abs=0.05)


def test_commands_work_on_the_gpu(run, tmp_path):
    cuda = ("--device", "cuda")
    brief = ("--sparsify-epochs", 1, "--recover-epochs", 1, "--finetune-epochs", 2, "--iterations", 2)
    for words in (
        ("doctor", *NET, *cuda),
        ("prune", *NET, *cuda, "--max-macs", "50%", "--standalone", "--output", "small.pth"),
        ("slim", *NET, *cuda, "--max-macs", "50%", *brief, "--output", "run"),
        ("slim", *NET, *cuda, "--resume", "--output", "run"),
        ("finetune", *NET, *cuda, "--weights", "small.pth", "--epochs", 1, "--output", "tuned"),
        ("sensitivity", *NET, *cuda, "--weights", "small.pth", "--output", "curves"),
        ("test", *NET, *cuda, "--weights", "small.pth", "--against", "run/best.pth"),
        ("export", "small.pth", "--model", "mine:Net", "--to", "torchscript", "--input-shape", "1x10x10"),
        ("report", "run"),
    ):
        code, out, err = run(*words)
        assert code == 0, (words, out, err)
    assert next(iter(torch.load("small.pth", weights_only=True)["state_dict"].values())).device.type == "cpu"


def test_scripts_run_on_the_gpu_and_their_networks_on_both_devices(tmp_path):
    cuda = ("--device", "cuda")
    script("train_yournet.py", *SHORT, *cuda, "--output", tmp_path / "run", cwd=tmp_path)
    for device in ("cuda", "cpu"):
        done = script(
            "test_yournet.py", "--data", "mnist5k", "--best-checkpoint", tmp_path / "run" / "best.pth",
            "--device", device, cwd=tmp_path,
        )  # fmt: skip
        assert "YourNet" in done.stdout
    folder = tmp_path / "reference"
    words = ("--data", "mnist5k", "--epoch-end", 1, "--checkpoint-dir", folder, *cuda)
    script("train_lenet5.py", *words, cwd=tmp_path)
    script("test_lenet5.py", "--data", "mnist5k", "--best-checkpoint", folder / "epoch-1.pth", *cuda)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_network_trains_in_lower_precision_and_resumes(precision):
    config = TrainConfig(6, 3e-3, "adamw", precision=precision, clip_norm=1.0)

    def train(resume=None):
        net, states = on_cuda(make("lenet")), []
        torch.manual_seed(1)
        finetune(net, ShuffledBatches(), config, resume=resume,
                 on_epoch=lambda epoch: states.append(copy.deepcopy(epoch.state())))  # fmt: skip
        return net, states

    whole, states = train()
    resumed, _ = train(states[2])
    assert accuracy(whole, batches()) > 0.5
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, **NEAR)
