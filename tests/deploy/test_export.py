"""Exported files: what they compute, what they store, and the errors where a model cannot be exported."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import nets
import pytest
import torch
from commands import ROOT, module, need_onnx, script
from torch import nn

import data
from models import YourNet
from pruning import Budget, PruningError, export, load, prune, save
from pruning.checkpoint import read
from pruning.deploy import Exported, time_forward
from pruning.deploy.export import TOLERANCE
from pruning.deploy.formats import RUNTIMES, SUFFIXES
from pruning.deploy.quantize import quantize
from pruning.deploy.runtimes import relative_difference
from pruning.errors import ExportError
from pruning.training import accuracy

COMMITTED = ROOT / "checkpoints" / "YourNet" / "best.pth"


@pytest.fixture(params=list(SUFFIXES))
def format(request):
    if request.param == "onnx":
        need_onnx()
    return request.param


def pruned_resnet():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    dense = torchvision.models.ResNet(
        torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10
    ).eval()
    return prune(dense, torch.randn(2, 3, 64, 64), Budget(macs="50%"), score="l2").model


def exported(*words, fresh=False):
    """Run `python -m pruning export …`, which must succeed, in this process or in a fresh one."""
    if not fresh:
        return module("pruning", "export", *words, cwd=ROOT)
    done = subprocess.run(
        [sys.executable, "-m", "pruning", "export", *map(str, words)],
        capture_output=True, text=True, timeout=120, cwd=ROOT, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def refused(toolkit):
    """Run `python -m pruning export …` in this process, expect it to fail, and return its message."""

    def run(*words):
        code, _, err = toolkit("export", *words)
        assert code == 2, err
        return err.strip().splitlines()[-1]

    return run


@functools.cache
def content(format):
    """Return the content of an exported file of the committed network, which several tests read."""
    with tempfile.TemporaryDirectory() as folder:
        made = export(load(COMMITTED), Path(folder) / "net", torch.zeros(1, 1, 28, 28), format)
        return made.path.read_bytes()


NETS = {
    "YourNet": (lambda: load(COMMITTED), (1, 28, 28)),
    "norms": (lambda: nets.make("residual"), (3, 14, 14)),
    "shuffle": (lambda: nets.make("shuffled"), (3, 14, 14)),
    "resnet10 at half": (pruned_resnet, (3, 64, 64)),
}


@pytest.mark.parametrize("name", NETS)
def test_an_exported_file_computes_what_the_model_computes_at_any_batch_size(name, format, tmp_path):
    make, shape = NETS[name]
    model, path = make(), tmp_path / "net.file"
    before = nets.snapshot(model)
    model.train()
    made = export(model, path, torch.zeros(1, *shape), format)
    assert [p.name for p in tmp_path.iterdir()] == ["net.file"]
    assert made.size == path.stat().st_size and made.difference <= TOLERANCE
    assert all(module.training for module in model.modules()), "the model is not changed"
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    exported = Exported(path, RUNTIMES[format])
    model.eval()
    for size in (1, 2, 5):
        images = torch.randn(size, *shape)
        with torch.no_grad():
            outputs = model(images)
        assert relative_difference(outputs, exported(images)) <= 1e-5
    assert str(ROOT).encode() not in path.read_bytes(), "the file contains a path of the machine"


def test_onnx_files_have_batchnorm_folded_and_activations_before_poolings(tmp_path):
    need_onnx()
    import onnx

    export(nets.make("residual"), tmp_path / "residual.onnx", nets.images(), "onnx")
    assert "BatchNormalization" not in {n.op_type for n in onnx.load(tmp_path / "residual.onnx").graph.node}
    (tmp_path / "yournet.onnx").write_bytes(content("onnx"))
    found = onnx.load(tmp_path / "yournet.onnx")
    assert [n.op_type for n in found.graph.node] == ["Conv", "Relu", "MaxPool"] * 2 + ["Reshape", "Gemm"]
    assert found.graph.input[0].type.tensor_type.shape.dim[0].dim_param, "the batch size is dynamic"
    onnx.checker.check_model(found, full_check=True)


@pytest.mark.parametrize("reader", ["pooled", "twice"])
def test_a_pooling_with_several_readers_stays_in_place(reader, tmp_path):
    need_onnx()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)

        def forward(self, x):
            x = self.conv(x)
            pooled = self.pool(x)
            active = torch.relu(pooled)
            return (active, pooled) if reader == "pooled" else active + self.pool(-x)

    torch.manual_seed(0)
    assert export(Net(), tmp_path / "net.onnx", nets.images(), "onnx").difference <= TOLERANCE


def test_metadata_can_be_read_back(format, tmp_path):
    facts = {"normalisation": {"mean": [0.5], "std": [0.25]}, "provenance": {"command": "python γ.py"}}
    export(nets.yournet(), tmp_path / "net", nets.images(), format, metadata=facts)
    stored = Exported(tmp_path / "net", RUNTIMES[format]).metadata
    assert {key: stored[key] for key in facts} == facts
    assert stored["input_shape"] == [3, 14, 14] and stored["classes"] == 4
    with pytest.raises(ExportError, match="cannot be stored as JSON"):
        export(nets.yournet(), tmp_path / "other", nets.images(), format, metadata={"net": nets.yournet()})


def test_models_with_several_inputs_and_outputs_are_exported(format, tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(3, 4), nn.Linear(2, 4)

        def forward(self, x, y):
            both = self.one(x) + self.other(y)
            return both, both.argmax(1)

    inputs = [torch.randn(6, 3), torch.randn(6, 2)]
    net = Two()
    export(net, tmp_path / "two", inputs, format)
    values, chosen = Exported(tmp_path / "two", RUNTIMES[format])(*inputs)
    assert relative_difference(net(*inputs)[0], values) <= 1e-5 and chosen.shape == (6,)


def test_accuracy_and_time_of_an_exported_file_can_be_measured(format, tmp_path):
    net, digits = load(COMMITTED), data.load("mnist5k", quiet=True)
    (tmp_path / "net").write_bytes(content(format))
    exported = Exported(tmp_path / "net", RUNTIMES[format])
    batches = list(digits.batches("test", 250))
    assert accuracy(exported, batches) == accuracy(net, batches) > 0.95
    times = time_forward({"net": net, "file": exported}, batches[0][0], seconds=0.1)
    assert times["file"].median > 0


def test_a_prepared_pass_computes_the_outputs_of_a_call(tmp_path):
    need_onnx()
    images = torch.randn(3, 1, 28, 28)
    (tmp_path / "net.onnx").write_bytes(content("onnx"))
    exported = Exported(tmp_path / "net.onnx", "onnxruntime")
    once = exported.prepared(images)
    for _ in range(2):
        once()
        found = once.args[0].copy_outputs_to_cpu()
        torch.testing.assert_close(torch.from_numpy(found[0]), exported(images))


class Fails(nn.Module):
    """A network that cannot be exported for a given reason."""

    def __init__(self, how):
        super().__init__()
        self.how, self.layer = how, nn.Linear(4, 4)

    def forward(self, x):
        x = self.layer(x)
        if self.how == "random":
            return x + torch.rand_like(x)
        if self.how == "by data":
            return x + 1 if x.sum() > 0 else x - 1
        if self.how == "fixed batch":
            return x.reshape(3, -1) if x.shape[0] == 3 else x
        if self.how == "no number":
            return x / 0
        return torch.special.bessel_j0(x)


FAILURES = {
    "random": "outputs differ from the model's",
    "by data": "data-dependent",
    "fixed batch": "fixes the batch size",
    "no number": "outputs differ from the model's by inf",
}


@pytest.mark.parametrize("how", FAILURES)
def test_a_failed_export_gives_the_reason_and_leaves_no_file(how, format, tmp_path, capfd):
    (tmp_path / "old").write_text("as it was")
    for name in ("new", "old"):
        with pytest.raises(ExportError, match=FAILURES[how]):
            export(Fails(how), tmp_path / name, torch.randn(2, 4), format)
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "as it was"
    assert capfd.readouterr().out == "", "the error says it"


def test_an_operation_without_an_export_is_named(tmp_path):
    need_onnx()
    with pytest.raises(ExportError, match=r"does not support the operation \w+\.bessel_j0"):
        export(Fails("operation"), tmp_path / "net.onnx", torch.randn(2, 4), "onnx")
    assert list(tmp_path.iterdir()) == []


def test_invalid_arguments_are_refused(tmp_path):
    net = nets.yournet()
    with pytest.raises(ExportError, match=r"format 'tflite' is unknown; there are: onnx, pt2, torchscript"):
        export(net, tmp_path / "net", nets.images(), "tflite")
    with pytest.raises(ExportError, match=r"does not run on inputs of shape \(3, 9, 14\)"):
        export(net, tmp_path / "net", torch.zeros(1, 3, 9, 14), "pt2")
    with pytest.raises(ExportError, match="with a batch dimension"):
        export(net, tmp_path / "net", [], "pt2")
    with pytest.raises(ExportError, match="runtime 'tensorrt' is unknown"):
        Exported(tmp_path / "net", "tensorrt")
    with pytest.raises(PruningError, match="cannot be read: No such file"):
        Exported(tmp_path / "net", "pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_refused(format, tmp_path):
    path = tmp_path / "net"
    whole = content(format)
    for damaged in (whole[: len(whole) // 2], b"", b"not a network"):
        path.write_bytes(damaged)
        with pytest.raises(PruningError, match="damaged or not a file that"):
            Exported(path, RUNTIMES[format])
    if format == "onnx":
        with pytest.raises(PruningError, match="damaged or not a file that"):
            quantize(path, tmp_path / "int8.onnx", [torch.zeros(2, 1, 28, 28)])
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_the_error_for_a_missing_package_says_how_to_install_it(package, tmp_path, monkeypatch):
    if package != "onnx":
        pytest.importorskip("onnx")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=rf"'{package}'.*python -m pip install onnx onnxruntime onnxscript"):
        export(nets.yournet(), tmp_path / "net.onnx", nets.images(), "onnx")
    assert list(tmp_path.iterdir()) == []


def test_the_command_exports_a_checkpoint(format, tmp_path):
    path = tmp_path / "net.pth"
    path.write_bytes(COMMITTED.read_bytes())
    done = exported(path, "--to", format, "--mean", 0.1307, "--std", 0.3081, fresh=format == "onnx")
    written = path.with_suffix(SUFFIXES[format])
    assert done.stdout.startswith(f"{written}: {format}, ") and "tolerance 1e-05" in done.stdout
    assert done.stderr == "" and len(done.stdout.splitlines()) == 1
    stored = Exported(written, RUNTIMES[format]).metadata
    assert stored["classes"] == 10 and stored["model"] == "models.YourNet:YourNet"
    assert stored["provenance"] == read(path)["provenance"] and "export" in stored["exported"]["command"]
    assert stored["normalisation"] == {"mean": [0.1307], "std": [0.3081]}


def test_the_command_needs_an_input_shape_where_the_checkpoint_has_none(tmp_path, refused):
    save(tmp_path / "net.pth", nets.make("residual"))
    words = [tmp_path / "net.pth", "--to", "torchscript"]
    assert "give --input-shape, such as" in refused(*words)
    assert "expected sizes such as 1x28x28" in refused(*words, "--input-shape", "3,14")
    assert "does not run on inputs of shape (3, 14)" in refused(*words, "--input-shape", "3x14")
    assert [p.name for p in tmp_path.iterdir()] == ["net.pth"]
    words += ["--input-shape", "3x14x14", "--output", tmp_path / "out" / "net.pt"]
    exported(*words)
    assert Exported(tmp_path / "out" / "net.pt", "torchscript")(nets.images(4)).shape == (4, 4)


def test_the_command_refuses_invalid_arguments(tmp_path, refused, monkeypatch):
    net = tmp_path / "net.pth"
    assert "no such file" in refused(net, "--to", "pt2")
    (tmp_path / "broken.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch")
    assert "it is an ONNX file" in refused(tmp_path / "broken.onnx", "--to", "onnx")
    save(net, YourNet())
    assert "invalid choice: 'tflite'" in refused(net, "--to", "tflite")
    assert "takes 1x28x28" in refused(net, "--to", "pt2", "--input-shape", "3x28x28")
    assert "the checkpoint itself" in refused(net, "--to", "pt2", "--output", net)
    assert "go together" in refused(net, "--to", "pt2", "--mean", 1)
    named = refused(net, "--to", "onnx", "--output", tmp_path / "m2.pt")
    assert "the extension .pt is that of torchscript" in named and "name it m2.onnx" in named
    assert "name it m.torchscript" in refused(net, "--to", "torchscript", "--output", tmp_path / "m.PT2")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(net, "--to", "pt2", "--output", tmp_path / "file" / "net.pt2")
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "python -m pip install onnx onnxruntime onnxscript" in refused(net, "--to", "onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.onnx", "file", "net.pth"]


def test_test_yournet_measures_exported_networks(tmp_path):
    need_onnx()
    runtime = "onnxruntime"
    figures = tmp_path / "figures.json"
    done = script("test_yournet.py", "--data", "mnist5k", "--runtime", runtime, "--json", figures)
    assert f"those of the exported networks in {runtime}" in done.stdout
    found = json.loads(figures.read_text())
    assert found["runtime"] == runtime and found["params"] == 1485 and found["macs"] == 47366
    assert found["accuracy"] > 0.95 and found["reference"]["params"] == 60_074
    assert 0 < found["infer_time_ms"] < found["reference"]["infer_time_ms"] * 1.5


class Detector(nn.Module):
    """Stores a tensor that depends on the shape of the last input, as the heads of YOLO store anchors."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.seen = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), None

    def forward(self, x):
        y = self.norm(self.conv(x))
        if self.seen != y.shape:
            self.places, self.seen = torch.arange(y.shape[2] * y.shape[3]), y.shape
        return y.flatten(2) + self.places


def test_tensors_stored_in_the_last_pass_are_not_exported_as_constants(format, tmp_path):
    net, images = Detector().eval(), torch.randn(2, 3, 8, 8)
    path = tmp_path / f"net{SUFFIXES[format]}"
    export(net, path, images, format)
    more = torch.randn(5, 3, 8, 8)
    assert relative_difference(net(more), Exported(path, RUNTIMES[format])(more)) <= TOLERANCE
