"""Checkpoints reload bit for bit in any process, and nothing in a file is executed (law 4)."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nets
import pytest
import torch
from torch import nn

from models import LeNet5, YourNet
from pruning import Budget, load, prune, save, trace
from pruning.checkpoint import read
from pruning.errors import CheckpointError
from pruning.load_pruned import load_pruned
from pruning.surgery import fold_batchnorm

ROOT = Path(__file__).resolve().parent.parent


def pruned(name):
    """Return a network after surgery, with BatchNorm folded where possible."""
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


def test_the_narrow_class_is_rebuilt_from_its_arguments(tmp_path):
    net = YourNet((3, 7), (8,))
    save(tmp_path / "net.pth", net)
    content = torch.load(tmp_path / "net.pth", weights_only=True)
    assert content["class"] == "models.YourNet:YourNet" and content["arguments"]["conv"] == [3, 7]
    rebuilt = YourNet(**content["arguments"])
    rebuilt.load_state_dict(content["state_dict"])
    assert type(load(tmp_path / "net.pth")) is YourNet and rebuilt.widths == (3, 7, 8)


class Weighed(nn.Module):
    """Multiplies channels by a buffer that a state dict omits."""

    def __init__(self, kernel=3):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, kernel, padding=1), nn.Conv2d(8, 6, 1)
        self.register_buffer("scale", torch.arange(1.0, 9).view(1, 8, 1, 1), persistent=False)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)) * self.scale)).mean((2, 3)))


@pytest.mark.parametrize("loader", [load, load_pruned])
def test_buffers_that_a_state_dict_omits_reload_with_their_narrow_shapes(loader, tmp_path):
    small = prune(Weighed(), nets.images(), Budget(params="50%"), score="l2").model
    assert small.scale.shape[1] < 8 and "scale" not in small.state_dict()
    save(tmp_path / "net.pth", small)
    again = loader(tmp_path / "net.pth", Weighed)
    images = nets.images()
    assert torch.equal(again(images), small.eval()(images)) and "scale" not in again.state_dict()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(9, 4), nn.Linear(4, 9)
        self.out.weight = self.words.weight


@pytest.mark.parametrize("loader", [load, load_pruned])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tied_weights_stay_tied_unless_one_was_replaced(loader, dtype, tmp_path):
    net = Tied().to(dtype)
    save(tmp_path / "net.pth", net)
    again = loader(tmp_path / "net.pth", Tied)
    assert again.out.weight is again.words.weight and again.out.weight.dtype == dtype
    net.out.weight = nn.Parameter(net.out.weight + 1)
    save(tmp_path / "net.pth", net)
    again = loader(tmp_path / "net.pth", Tied)
    assert torch.equal(again.words.weight, net.words.weight)
    assert torch.equal(again.out.weight, net.out.weight)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "checkpoints").glob("*/*.pth")), ids=lambda path: path.parent.name
)
def test_committed_checkpoints_load_equally_with_and_without_the_toolkit(path):
    ours, alone = load(path), load_pruned(path)
    assert type(ours) is type(alone) and ours.state_dict().keys() == alone.state_dict().keys()
    assert all(torch.equal(value, alone.state_dict()[key]) for key, value in ours.state_dict().items())


@pytest.mark.parametrize(
    ("key", "name", "value", "said"),
    [
        ("layers", "first", {"out_channels": 99}, r"first.out_channels is stored as 99, the factory makes 8"),
        (
            "layers",
            "first",
            {"out_channels": 2},
            r"first.weight is stored as \(8, 3, 3, 3\), not \(2, 3, 3, 3\)",
        ),
        ("layers", "first", {"out_channels": 0}, "stored as 0"),
        ("layers", "first", {"groups": 3}, "stored as 3, the factory makes 1"),
        ("layers", "absent", {"out_channels": 1}, "absent"),
        ("state_dict", "first.weight", torch.ones(2, 3), r"first.weight is stored as \(2, 3\)"),
        ("state_dict", "second.bias", torch.ones(5), r"second.bias is stored as \(5,\), not \(6,\)"),
        ("state_dict", "absent.weight", torch.ones(5), "absent"),
        ("folded", None, None, "folded"),
        ("layers", None, [], "layers"),
    ],
)
def test_a_checkpoint_may_change_only_channel_counts(key, name, value, said, tmp_path):
    path = tmp_path / "net.pth"
    save(path, Weighed())
    content = read(path)
    if name is None:
        content[key] = value
    elif isinstance(value, dict):
        content[key].setdefault(name, {}).update(value)
    else:
        content[key][name] = value
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=said) as refused:
        load(path, Weighed)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match=said if name else "does not fit|object"):
        load_pruned(path, Weighed)


def test_a_kernel_size_other_than_that_of_the_factory_is_refused(tmp_path):
    save(tmp_path / "net.pth", prune(Weighed(5), nets.images(), Budget(params="80%"), score="l2").model)
    for loader in (load, load_pruned):
        assert loader(tmp_path / "net.pth", lambda: Weighed(5)).first.kernel_size == (5, 5)
        with pytest.raises(
            ValueError, match=r"first.weight is stored as .*5, 5\).* the factory makes .*3, 3\)"
        ):
            loader(tmp_path / "net.pth", Weighed)


class Stateful(Weighed):
    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state):
        self.version = state["version"]


def test_a_config_that_the_class_does_not_accept_is_not_stored(tmp_path):
    net = Weighed()
    for config in ({"lr": 0.1}, SimpleNamespace(kernel=5), {1: 2}, "text"):
        net.config = config
        save(tmp_path / "net.pth", net)
        assert read(tmp_path / "net.pth")["arguments"] == {}
        assert load(tmp_path / "net.pth").first.kernel_size == (3, 3)
    save(tmp_path / "net.pth", net, arguments={"lr": 0.1})  # older versions stored such a config
    for loader in (load, load_pruned):
        assert loader(tmp_path / "net.pth", lambda: Weighed()).first.kernel_size == (3, 3)


class Required(nn.Module):
    def __init__(self, made):
        super().__init__()
        self.layer = made()


def test_a_class_that_the_stored_arguments_do_not_make_needs_a_factory(tmp_path):
    def factory():
        return Required(lambda: nn.Linear(2, 2))

    save(tmp_path / "net.pth", factory())
    for loader in (load, load_pruned):
        with pytest.raises(ValueError, match="factory"):
            loader(tmp_path / "net.pth")
        assert loader(tmp_path / "net.pth", factory).layer.in_features == 2


def test_extra_state_is_stored_if_it_is_plain_data(tmp_path):
    save(tmp_path / "net.pth", Stateful())
    for loader in (load, load_pruned):
        assert loader(tmp_path / "net.pth", Stateful).version == 3
    net = Stateful()
    net.get_extra_state = lambda: {"made by": lambda: 3}
    with pytest.raises(CheckpointError, match="only tensors and plain data"):
        save(tmp_path / "net.pth", net)


def written(tmp_path, **changes):
    path = tmp_path / "net.pth"
    save(path, LeNet5())
    torch.save({**torch.load(path, weights_only=True), **changes}, path)
    return path


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        load(tmp_path / "absent.pth")


@pytest.mark.parametrize("size", [0, 1, 100, 5000])
def test_a_truncated_file_is_refused(tmp_path, size):
    path = written(tmp_path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"net\.pth"):
        load(path)


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], torch.ones(3)])
def test_a_file_of_another_program_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match="not a checkpoint of this toolkit"):
        load(tmp_path / "net.pth")


def test_a_text_file_is_refused(tmp_path):
    (tmp_path / "net.pth").write_text("these are not the weights you are looking for")
    with pytest.raises(CheckpointError):
        load(tmp_path / "net.pth")


def test_a_newer_format_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"format 99.*update"):
        load(written(tmp_path, format=99))


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    other = LeNet5((2,), (5,)).state_dict()
    with pytest.raises(CheckpointError, match="does not fit LeNet5"):
        load(written(tmp_path, state_dict=other))


@pytest.mark.parametrize(
    "name",
    ["os:system", "models.LeNet5:nothing", "no.such.module:Net", "builtins:dict", "torch.nn:functional", ""],
)
def test_a_class_that_is_not_a_module_is_refused(tmp_path, name):
    with pytest.raises(CheckpointError):
        load(written(tmp_path, **{"class": name}))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch warns about files of other writers
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


def test_arguments_that_are_not_plain_data_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="plain data"):
        save(tmp_path / "net.pth", LeNet5(), arguments={"conv": nn.Linear(1, 1)})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = written(tmp_path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save(path, YourNet())
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_path_inside_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(tmp_path / "file" / "net.pth", LeNet5())
