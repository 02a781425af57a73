"""Models of ultralytics: pruned in place, trained by its trainers, and loaded by the library alone."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

os.environ |= {"YOLO_OFFLINE": "1", "YOLO_AUTOINSTALL": "0", "YOLO_CONFIG_DIR": tempfile.mkdtemp()}
ultralytics = pytest.importorskip("ultralytics")

import torch  # noqa: E402
from drawn import drawn_data  # noqa: E402
from torch import nn  # noqa: E402

from pruning import Budget, PruningError  # noqa: E402
from pruning.integrations.ultralytics import (  # noqa: E402
    calibration_batches,
    library,
    load,
    model_loss,
    prune,
    save,
    train,
    trainer,
)

pytestmark = pytest.mark.slow

TINY = """
nc: 2
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, C2f, [16, True]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, SPPF, [32, 5]]
  - [-1, 1, Conv, [32, 3, 2]]
head:
  - [-1, 1, nn.Upsample, [None, 2, nearest]]
  - [[-1, 4], 1, Concat, [1]]
  - [-1, 1, C2f, [32]]
  - [[8, 5], 1, HEAD]
"""
HEADS = {"detect": "Detect, [nc]", "segment": "Segment, [nc, 8, 16]"}

#: Loads a model without the toolkit, and prints its outputs; then trains it without the toolkit.
ALONE = """
import sys, torch
from ultralytics import YOLO
yolo = YOLO(sys.argv[1])
torch.save(yolo.model.eval()(torch.load(sys.argv[2]))[0], sys.argv[3])
assert "pruning" not in sys.modules
try:
    yolo.train(data=sys.argv[4], epochs=1, imgsz=64, plots=False, project=sys.argv[5])
except KeyError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return drawn_data(tmp_path_factory.mktemp("boxes"), {"train": 8, "val": 4})


def tiny(folder, task="detect"):
    path = folder / f"tiny-{task}.yaml"
    path.write_text(TINY.replace("HEAD", HEADS[task]))
    torch.manual_seed(0)
    yolo = load(path, task=task)
    for module in yolo.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return yolo


def arguments(data, folder, **more):
    return {
        "data": str(data), "imgsz": 64, "batch": 4, "nbs": 4, "workers": 0, "plots": False, "device": "cpu",
        "verbose": False, "project": str(folder), "name": "run", "exist_ok": True, **more,
    }  # fmt: skip


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("task", HEADS)
def test_pruning_meets_the_budget_and_keeps_what_other_code_reads(task, tmp_path):
    yolo = tiny(tmp_path, task)
    images, dense = torch.rand(2, 3, 64, 64), yolo.model
    before = shapes(dense)
    step = prune(yolo, Budget(macs="50%"), imgsz=64)
    assert step.after.macs <= 0.5 * step.before.macs and step.difference < 1e-4 and not step.stale
    assert yolo.model is step.model and shapes(dense) == before and not library.is_pruned(dense)
    expected = yolo.model.eval()(images)[0]
    for module in yolo.model.modules():
        if isinstance(module, ultralytics.nn.modules.C2f):
            assert module.c == module.cv1.conv.out_channels // 2
            module.forward = module.forward_split  # as exports of the library do
    found = yolo.model(images)[0]
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in pairs)


def test_a_saved_model_loads_without_the_toolkit_and_says_that_it_is_pruned(data, tmp_path):
    yolo = tiny(tmp_path)
    prune(yolo, Budget(macs="50%"), imgsz=64)
    images = torch.rand(1, 3, 64, 64)
    torch.save(images, tmp_path / "images.pth")
    save(yolo, tmp_path / "pruned.pt", half=False)
    files = [tmp_path / name for name in ("pruned.pt", "images.pth", "outputs.pth")]
    words = [sys.executable, "-c", ALONE, *files, data, tmp_path]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert torch.equal(torch.load(files[2]), yolo.model.eval()(images)[0])
    assert library.NOTE in done.stdout


def test_training_keeps_the_widths_and_resumes(data, tmp_path):
    yolo = tiny(tmp_path)
    prune(yolo, Budget(macs="50%"), imgsz=64)
    small = shapes(yolo.model)

    def interrupt(trainer):
        raise KeyboardInterrupt

    yolo.add_callback("on_fit_epoch_end", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(yolo, **arguments(data, tmp_path, epochs=2))
    again = load(tmp_path / "run" / "weights" / "last.pt")
    assert again.ckpt["epoch"] == 0 and again.ckpt["updates"] == 2
    train(again, resume=True, data=str(data))
    assert again.trainer.epoch == 1 and again.trainer.ema.updates == 4
    assert shapes(again.model) == small and library.is_pruned(again.model)
    saved = save(again, tmp_path / "trained.pt")
    assert shapes(ultralytics.YOLO(saved).model) == small


def test_the_example_of_the_documents_runs_and_exports_what_the_model_computes(data, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    page = (Path(__file__).resolve().parents[2] / "docs" / "yolo.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    tiny(tmp_path)
    small = {"yolov8n.pt": "tiny-detect.yaml", "640": "64", "images=64": "images=4", "epochs=20": "epochs=1"}
    small['("75%", "67%")'] = '("60%",)'
    small |= {"data.yaml": str(data), "street.jpg": str(data.parent / "images/val/0.png")}
    for given, value in small.items():
        assert given in code
        code = code.replace(given, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ultralytics.utils.DEFAULT_CFG, "plots", False)
    names = {}
    exec(code, names)
    images = torch.rand(1, 3, 64, 64)
    session = onnxruntime.InferenceSession(tmp_path / "pruned.onnx")
    found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    assert torch.allclose(found, names["small"].model.eval()(images)[0], atol=1e-3)


def test_the_loss_for_scores_is_that_of_the_librarys_training(data, tmp_path):
    yolo = tiny(tmp_path)
    (images, labels), *others = calibration_batches(yolo, data, 8, imgsz=64, batch=4)
    assert images.shape == (4, 3, 64, 64) and len(others) == 1 and 0 <= images.min() < images.max() <= 1
    model = yolo.model.eval()
    loss = model_loss(yolo)(model(images), labels)
    model.args = ultralytics.cfg.get_cfg()
    assert loss.item() == pytest.approx(model.loss(labels)[0].sum().item() / 4, rel=1e-5)
    step = prune(yolo, Budget(macs="50%"), imgsz=64, calibration=[(images, labels)], refit=True)
    assert step.refits and step.after.macs <= 0.5 * step.before.macs


def test_another_number_of_classes_makes_the_last_layers_of_the_head_anew(data, tmp_path):
    yolo = tiny(tmp_path)
    prune(yolo, Budget(macs="50%"), imgsz=64)
    widths = [layers[-1].in_channels for layers in yolo.model.model[-1].cv3]
    trainer._set_classes(yolo.model, 5)
    head = yolo.model.model[-1]
    assert [layers[-1].in_channels for layers in head.cv3] == widths
    assert (
        yolo.model.eval()(torch.rand(1, 3, 64, 64))[0].shape[1] == 4 + 5 and head.no == 5 + 4 * head.reg_max
    )


def test_what_cannot_work_is_refused_in_one_line(data, tmp_path, monkeypatch):
    yolo = tiny(tmp_path)
    with pytest.raises(PruningError, match="imgsz 65: expected a multiple of the model's stride, 16"):
        prune(yolo, Budget(macs="50%"), imgsz=65)
    with pytest.raises(PruningError, match="there is no such file"):
        load(tmp_path / "absent.pt")
    with pytest.raises(PruningError, match=r"expected a \.pt file"):
        load("net.onnx")
    (tmp_path / "damaged.pt").write_bytes(b"no model")
    with pytest.raises(PruningError, match="damaged"):
        load(tmp_path / "damaged.pt")
    with pytest.raises(PruningError, match=r"absent\.yaml"):
        calibration_batches(yolo, tmp_path / "absent.yaml", imgsz=64)
    with pytest.raises(PruningError, match="save it first"):
        prune(yolo, Budget(macs="50%"), imgsz=64)
        train(yolo, **arguments(data, tmp_path, device="0,1"))
    with pytest.raises(PruningError, match="widths of a pruned model"):
        train(yolo, **arguments(data, tmp_path, pretrained=False))
    yolo.fuse(verbose=False)
    with pytest.raises(PruningError, match="fused"):
        prune(yolo, Budget(macs="50%"), imgsz=64)
    monkeypatch.setattr(ultralytics, "__version__", "9.1.0")
    with pytest.raises(PruningError, match=r"ultralytics 9.1.0 is untested: versions from 8.4 and below 8.5"):
        load("yolov8n.yaml")


def test_the_command_prunes_in_iterations_and_resumes(data, tmp_path, run, monkeypatch):
    tiny(tmp_path)
    words = [
        "yolo", "--weights", "tiny-detect.yaml", "--data", data, "--max-macs", "50%", "--imgsz", 64,
        "--batch", 4, "--dense-epochs", 1, "--iterations", 2, "--recover-epochs", 1, "--epochs", 1,
        "--calibration", 4, "--train-arg", "mosaic=0.0", "--output", tmp_path / "out",
    ]  # fmt: skip
    stop = ultralytics.models.yolo.detect.DetectionTrainer.final_eval

    def interrupt(trainer):
        if trainer.args.name == "recover1":
            raise KeyboardInterrupt
        stop(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(ultralytics.models.yolo.detect.DetectionTrainer, "final_eval", interrupt)
        code, _, errors = run(*words)
    assert code == 130 and "interrupted" in errors
    first = (tmp_path / "out" / "step1.pt").read_bytes()
    code, out, errors = run("yolo", "--resume", "--output", tmp_path / "out")
    assert code == 0, errors
    assert "mAP50-95(B): 0." in out and (tmp_path / "out" / "step1.pt").read_bytes() == first
    small = ultralytics.YOLO(tmp_path / "out" / "pruned.pt")
    assert library.is_pruned(small.model) and len(small.predict(torch.rand(1, 3, 64, 64), verbose=False)) == 1


def test_errors_of_the_command_are_one_line(data, tmp_path, run, monkeypatch):
    tiny(tmp_path)
    budget = ("--max-macs", "50%", "--imgsz", 64, "--output", tmp_path / "out")
    for words, said in (
        (("--weights", "absent.pt", "--data", data), "no such file"),
        (("--weights", "tiny-detect.yaml", "--data", "absent.yaml"), "absent.yaml"),
        (("--weights", "tiny-detect.yaml", "--data", data, "--train-arg", "lr0"), "KEY=VALUE"),
        (("--weights", "tiny-detect.yaml", "--data", data, "--train-arg", "lr=0.1"), "lr0"),
        (
            ("--weights", "tiny-detect.yaml", "--data", data, "--train-arg", "epochs=3"),
            "settings of their own",
        ),
    ):
        code, _, errors = run("yolo", *words, *budget)
        assert code == 2 and said in errors and len(errors.splitlines()) == 1, errors
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, errors = run("yolo", "--weights", "yolov8n.pt", "--data", data, *budget)
    assert code == 2 and "pip install ultralytics" in errors
    assert not (tmp_path / "out").exists()
