"""Law 4: a checkpoint reloads anywhere, bit for bit; nothing in a file is executed."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import nets
import pytest
import torch
from torch import nn

from models import LeNet5, YourNet
from pruning import Budget, CheckpointError, fold_batchnorm, load, prune, save, trace

ROOT = Path(__file__).resolve().parent.parent


def pruned(name):
    """A network after surgery, with BatchNorm folded where it can be."""
    step = prune(nets.make(name), nets.images(), Budget(params="60%"), score="l2")
    return fold_batchnorm(step.model, trace(step.model, nets.images()))


@pytest.mark.parametrize("name", nets.NETS)
@pytest.mark.parametrize("folded", [True, False])
def test_a_pruned_network_reloads_from_its_factory_bit_for_bit(name, folded, tmp_path):
    net = (
        pruned(name)
        if folded
        else prune(nets.make(name), nets.images(), Budget(params="60%"), score="l2").model
    )
    save(tmp_path / "net.pth", net, arguments={})
    loaded = load(tmp_path / "net.pth", nets.NETS[name])
    images = nets.images(5)
    assert not loaded.training
    assert torch.equal(loaded(images), net.eval()(images))
    assert load(tmp_path / "net.pth", nets.NETS[name]).state_dict().keys() == net.state_dict().keys()


def test_a_loaded_network_can_be_pruned_and_saved_again(tmp_path):
    net = pruned("residual")
    save(tmp_path / "once.pth", net)
    again = prune(load(tmp_path / "once.pth"), nets.images(), Budget(params="60%"), score="l2").model
    save(tmp_path / "twice.pth", again)
    images = nets.images()
    assert torch.equal(load(tmp_path / "twice.pth")(images), again.eval()(images))


def test_yournet_reloads_in_a_fresh_process_without_torch_pruning(tmp_path):
    dense = YourNet(batch_norm=True)
    images = torch.randn(4, 1, 28, 28)
    step = prune(dense, images, Budget(params=2000), score="l2")
    net = YourNet.like(fold_batchnorm(step.model, trace(step.model, images)))
    save(tmp_path / "net.pth", net)
    torch.save({"images": images, "logits": net.eval()(images).detach()}, tmp_path / "expected.pth")
    code = """
import sys
sys.modules["torch_pruning"] = None  # importing it now fails
import torch
from pruning.checkpoint import load
expected = torch.load(sys.argv[2], weights_only=True)
assert torch.equal(load(sys.argv[1])(expected["images"]), expected["logits"])
"""
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "net.pth", tmp_path / "expected.pth"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True,
    )  # fmt: skip


def test_the_narrow_class_is_rebuilt_from_its_arguments_alone(tmp_path):
    net = YourNet((3, 7), (8,))
    save(tmp_path / "net.pth", net)
    content = torch.load(tmp_path / "net.pth", weights_only=True)
    assert content["class"] == "models.YourNet:YourNet" and content["arguments"]["conv"] == [3, 7]
    rebuilt = YourNet(**content["arguments"])
    rebuilt.load_state_dict(content["state_dict"])
    assert type(load(tmp_path / "net.pth")) is YourNet and rebuilt.widths == (3, 7, 8)


def written(tmp_path, **changes):
    path = tmp_path / "net.pth"
    save(path, LeNet5())
    torch.save({**torch.load(path, weights_only=True), **changes}, path)
    return path


def test_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        load(tmp_path / "absent.pth")


@pytest.mark.parametrize("size", [0, 1, 100, 5000])
def test_a_truncated_file(tmp_path, size):
    path = written(tmp_path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"net\.pth"):
        load(path)


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], torch.ones(3)])
def test_a_foreign_file(tmp_path, content):
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match="not a checkpoint of this toolkit"):
        load(tmp_path / "net.pth")


def test_text_instead_of_a_checkpoint(tmp_path):
    (tmp_path / "net.pth").write_text("these are not the weights you are looking for")
    with pytest.raises(CheckpointError):
        load(tmp_path / "net.pth")


def test_a_newer_format(tmp_path):
    with pytest.raises(CheckpointError, match=r"format 99.*update"):
        load(written(tmp_path, format=99))


def test_a_checkpoint_of_another_shape(tmp_path):
    other = LeNet5((2,), (5,)).state_dict()
    with pytest.raises(CheckpointError, match="does not fit LeNet5"):
        load(written(tmp_path, state_dict=other))


@pytest.mark.parametrize(
    "name",
    ["os:system", "models.LeNet5:nothing", "no.such.module:Net", "builtins:dict", "torch.nn:functional", ""],
)
def test_a_class_that_is_no_network_is_refused(tmp_path, name):
    with pytest.raises(CheckpointError):
        load(written(tmp_path, **{"class": name}))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch, of a file that torch did not write
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"format": 1, "class": Malicious()}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match="refused"):
        load(tmp_path / "net.pth")
    (tmp_path / "net.pth").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(CheckpointError):
        load(tmp_path / "net.pth")
    assert not (tmp_path / "executed").exists()


def test_arguments_that_are_no_plain_data_are_not_written(tmp_path):
    with pytest.raises(CheckpointError, match="plain data"):
        save(tmp_path / "net.pth", LeNet5(), arguments={"conv": nn.Linear(1, 1)})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = written(tmp_path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save(path, YourNet())
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(tmp_path / "file" / "net.pth", LeNet5())
