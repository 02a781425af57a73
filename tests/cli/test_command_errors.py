"""Errors of `python -m pruning`: one clear line, exit code 2, nothing overwritten."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from user import NET, image_folder

from pruning.cli.factories import load_weights
from pruning.cli.sources import make_data

BUDGET = ("--max-macs", "50%")
PICTURES = (
    "--data",
    "pictures",
    "--image-size",
    33,
    "--model",
    "squeezenet1_1",
    "--model-arg",
    "num_classes=2",
)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("doctor",), "a model is needed"),
        (("doctor", "--model", "mine:Nett", "--input-shape", "1x10x10"), "did you mean Net"),
        (("doctor", "--model", "nowhere:Net", "--input-shape", "1x10x10"), "cannot be imported"),
        (("doctor", "--model", "resnet81", "--input-shape", "1x10x10"), "did you mean resnet18"),
        (("doctor", "--model", "mine:broken", "--input-shape", "1x10x10"), "no such thing as a net"),
        (("doctor", "--model", "mine:number", "--input-shape", "1x10x10"), "an nn.Module was expected"),
        (("doctor", "--model", "mine:exported", "--input-shape", "1x10x10"), "a program of torch.export"),
        (
            ("doctor", "--model", "mine:Features", "--input-shape", "1x10x10", "--outputs", "logit"),
            "'logit' matches none; the model returns logits, maps",
        ),
        (("doctor", "--model", "mine:Net", "--model-arg", "depth=3", "--input-shape", "1x10x10"), "depth"),
        (("doctor", "--model", "mine:Net", "--model-arg", "depth", "--input-shape", "1x10x10"), "KEY=VALUE"),
        (("doctor", "--model", "mine:Net", "--input-shape", "1xtenx10"), "3x224x224"),
        (("doctor", "--model", "mine:Net", "--input-shape", "3x10x10"), "does not run on the example inputs"),
        (("doctor", "--model", "mine:Net"), "inputs are needed"),
        (
            ("prune", "--model", "mine:linear", "--input-shape", "1x10x10", "--score", "l1", *BUDGET),
            "no prunable",
        ),
        (("prune", "--model", "mine:Net", "--input-shape", "1x10x10", *BUDGET), "needs data"),
        (("prune", *NET, "--max-macs", "0%"), "above 0"),
        (("prune", *NET, "--max-macs", "120%"), "at most 100"),
        (("prune", *NET), "a budget is needed: --max-macs 50%, or --max-params"),
        (("prnue", *NET, *BUDGET), "there is no command 'prnue': did you mean prune?"),
        (("compress", *NET, *BUDGET), "expected one of doctor, prune, frontier"),
        (("slim", "--resume", "--output", "nowhere"), "nowhere holds no run to resume"),
        (
            ("prune", "--config", "absent.toml"),
            "absent.toml cannot be read as a recipe: there is no such file",
        ),
        (("prune", "--config", "."), "cannot be read as a recipe: Is a directory"),
        (("prune", "--config", "mine.py"), "because it is not TOML"),
        (("report", "mine.py"), "mine.py holds no run that can be read: it is a file"),
        (("prune", *NET, "--max-params", "3"), "cannot be reached"),
        (("prune", *NET, "--max-mac", "50%"), "did you mean --max-macs?"),
        (
            ("slim", *NET, "--epochs", "3"),
            "--epochs 3; did you mean --sparsify-epochs, --recover-epochs or --finetune-epochs?",
        ),
        (("prune", *NET, "--epochs", "3"), "--epochs is a flag of finetune and yolo (see"),
        (("prune", "net.pth", *BUDGET), "give a checkpoint as --weights net.pth"),
        (("prune", "--model", "mine:Net", "--data", "mine.pyy", *BUDGET), "did you mean mine.py?"),
        (("prune", "--model", "mine:Net", "--data", "mine.py", *BUDGET), "is a file, neither a folder"),
        (("prune", *NET, "--weights", "raise.py", *BUDGET), "no such file (did you mean raises.py?)"),
        (("prune", "--model", "mine:Net", "--data", "mine:nothing", *BUDGET), "batches were expected"),
        (("prune", "--model", "mine:Net", "--data", "mine:few", *BUDGET), "no validation batches"),
        (("prune", "--model", "mine:Net", "--data", "mine:lone", *BUDGET), "are all of class 0"),
        (("slim", "--model", "mine:Net", "--data", "mine:lone", *BUDGET), "are all of class 0"),
        (("prune", "--model", "mine:Net", "--data", "cifar11", *BUDGET), "did you mean cifar10"),
        (("prune", *NET, "--weights", "absent.pth", *BUDGET), "no such file"),
        (("slim", "--model", "mine:Net", *BUDGET), "data is needed"),
        (("prune", *NET, *BUDGET, "--max-latency", "0.5x"), "stands alone"),
        (("prune", *NET, "--max-latency", "quick"), "0.5x"),
        (("prune", *NET, "--max-latency", "1ms", "--ranking", "group"), "a latency budget expects 'global'"),
        (("slim", *NET, "--resume", *BUDGET), "--resume needs --output"),
        (("slim", *NET, "--resume", "--output", "nowhere", *BUDGET), "no run to resume"),
        (("test", "--data", "mine:digits"), "a model is needed"),
        (("doctor", "--model", ":Net"), "expected package.module:factory"),
        (("doctor", "--model", "mine:"), "expected package.module:factory"),
        (("doctor", "--model", "raises:Net"), "module 'raises' cannot be imported: ValueError: not today"),
        (("doctor", "--model", "unreadable:Net"), "module 'unreadable' cannot be imported: SyntaxError"),
        (("prune", "--model", "mine:Pair", "--data", "mine:digits", *BUDGET), "the network returns a tuple"),
        (
            ("slim", "--model", "mine:Says", "--data", "mine:digits", *BUDGET, "--output", "no"),
            "returns a dict",
        ),
        (("finetune", "--model", "mine:Says", "--data", "mine:digits", "--output", "no"), "returns a dict"),
        (
            ("sensitivity", "--model", "mine:Says", "--data", "mine:digits", "--output", "no"),
            "returns a dict",
        ),
        (
            ("slim", "--model", "mine:Net", "--data", "mine:beyond", *BUDGET, "--output", "no"),
            "go from 5 to 7",
        ),
        (
            (
                "prune",
                "--model",
                "mine:Net",
                "--data",
                "mine:beyond",
                *BUDGET,
                "--score",
                "l2",
                "--output",
                "no",
            ),
            "has 3 classes",
        ),
        (
            (
                "slim",
                *NET[:2],
                "--model-arg",
                "classes=1",
                "--data",
                "mine:regression",
                *BUDGET,
                "--output",
                "no",
            ),
            "outputs of shape (32, 1)",
        ),
        (("report", "nowhere"), "nowhere"),
        (("prune", *NET, *BUDGET, "--runtime", "onnxruntime"), "are for --max-latency"),
        (
            ("prune", "--model", "mine:Net", "--data", "mine:mistaken", *BUDGET),
            "KeyError: 'label' (",
        ),
        (
            (
                "finetune",
                "--model",
                "mine:Stumbles",
                "--data",
                "mine:digits",
                "--epochs",
                1,
                "--output",
                "run",
            ),
            "has no attribute 'missing' (",
        ),
    ],
)
def test_invalid_input_gives_a_one_line_error_and_exit_code_2(run, words, message, tmp_path):
    (tmp_path / "raises.py").write_text("raise ValueError('not today')")
    (tmp_path / "unreadable.py").write_text("def f(:")
    code, _, err = run(*words)
    assert not (tmp_path / "no").exists(), "no work starts"
    assert code == 2 and message in err and "Traceback" not in err, err
    assert len(err.strip().splitlines()) == 1


def test_loading_a_checkpoint_without_its_factory_names_the_factory(run):
    words = ("--model", "mine:sized", "--data", "mine:digits", "--model-arg", "width=6")
    assert run("prune", *words, *BUDGET)[0] == 0
    code, _, err = run("test", "--weights", "small.pth", "--data", "mine:digits")
    assert code == 2 and "give --model mine:sized --model-arg width=6" in err


def test_a_recipe_that_refers_to_another_recipe_is_refused(run, tmp_path):
    (tmp_path / "run.toml").write_text('config = "other.toml"\nmax-macs = "60%"\n')
    code, _, err = run("prune", *NET, "--config", "run.toml")
    assert code == 2 and "run.toml: a recipe cannot name another one" in err


def test_the_meta_device_is_refused(run):
    code, _, err = run("prune", *NET, *BUDGET, "--device", "meta")
    assert code == 2 and "'meta' holds no values to prune: expected cpu or cuda" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("prune", *NET, *BUDGET, "--output", "."), "'.' is a folder: expected the name of a file"),
        (("slim", *NET, *BUDGET, "--output", "mine.py/run"), "mine.py is a file"),
    ],
)
def test_an_unwritable_output_is_refused_before_any_work(run, words, message):
    code, _, err = run(*words)
    assert code == 2 and message in err and "Traceback" not in err


def test_demo_refuses_targets_that_are_not_classes(run):
    assert run("prune", *NET, *BUDGET)[0] == 0
    code, _, err = run("demo", "small.pth", *NET[:2], "--data", "mine:regression", "--mean", 0, "--std", 1)
    assert code == 2 and "one class an image" in err and "Traceback" not in err


@pytest.mark.parametrize("name", ["config.json", "state.pth"])
def test_a_run_with_invalid_files_is_not_resumed(run, tmp_path, name):
    words = ("finetune", *NET, "--epochs", 1, "--output", "run")
    assert run(*words)[0] == 0
    if name == "config.json":
        (tmp_path / "run" / name).write_text("[]")
    else:
        torch.save([], tmp_path / "run" / name)
    code, _, err = run(*words, "--resume")
    assert code == 2 and f"{name} " in err and "another folder" in err


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named(run, tmp_path, workers):
    image_folder(tmp_path / "pictures", ["a", "b"])
    (tmp_path / "pictures" / "b" / "damaged.png").write_text("no image")
    code, _, err = run("prune", "--model", "squeezenet1_1", "--model-arg", "num_classes=2", *BUDGET,
                       "--data", "pictures", "--image-size", 33, "--workers", workers)  # fmt: skip
    assert code == 2 and "damaged.png cannot be read" in err and "Traceback" not in err, err
    assert len(err.strip().splitlines()) == 1


def test_a_checkpoint_of_a_changed_class_is_refused(run, tmp_path):
    assert run("prune", *NET, *BUDGET, "--output", "small.pth")[0] == 0
    code, _, err = run("test", "--model", "mine:Changed", "--weights", "small.pth", "--data", "mine:digits")
    assert code == 2 and "small.pth does not fit Changed" in err


def test_export_with_invalid_data_writes_nothing(run, tmp_path):
    assert run("prune", *NET, *BUDGET, "--output", "small.pth")[0] == 0
    words = (
        "export",
        "small.pth",
        "--input-shape",
        "1x10x10",
        "--to",
        "onnx",
        "--int8",
        "--output",
        "net.onnx",
    )
    code, _, err = run(*words, "--data", "nowhere")
    assert code == 2 and "'nowhere'" in err and not list(tmp_path.glob("*.onnx"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes in folders")
def test_a_pipe_is_refused_as_output_and_a_link_is_followed(run, tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    code, _, err = run("prune", *NET, *BUDGET, "--output", "pipe.pth")
    assert code == 2 and "pipe.pth cannot be written: it is a device or a pipe" in err
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link.pth").symlink_to("elsewhere/small.pth")
    assert run("prune", *NET, *BUDGET, "--output", "link.pth")[0] == 0
    assert (tmp_path / "link.pth").is_symlink() and (tmp_path / "elsewhere" / "small.pth").is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="a reader that leaves is no error there")
def test_a_closed_pipe_ends_the_command_without_a_traceback():
    read, write = os.pipe()
    os.close(read)
    words = ("doctor", "--model", "models:LeNet5", "--input-shape", "1x28x28")
    ended = subprocess.run([sys.executable, "-m", "pruning", *words], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert ended.returncode == 1 and ended.stderr == b""


@pytest.mark.parametrize("names", [("Val",), ("val", "test")])
def test_split_folders_without_train_are_refused(run, tmp_path, names):
    for name in names:
        image_folder(tmp_path / "pictures" / name, ["a", "b"])
    words = (*PICTURES, *BUDGET)
    code, _, err = run("prune", *words)
    assert code == 2 and f"{' and '.join(names)}, which are splits, but no train beside them" in err, err
    image_folder(tmp_path / "pictures" / "TRAIN", ["a", "b"])
    assert run("prune", *words)[0] == 0


def test_16_bit_grey_images_keep_their_values(tmp_path):
    image_folder(tmp_path / "train", ["a", "b"])
    image_folder(tmp_path / "val", ["a", "b"])
    shades = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.fromarray(shades).save(tmp_path / "val" / "a" / "0.png")
    image = next(iter(make_data(str(tmp_path), image_size=14).validation))[0][0, 0]
    assert image.unique().numel() == 14 * 14, "the central pixels of 16 x 16"


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model."])
def test_prefixes_of_training_wrappers_are_removed_from_weights(tmp_path, prefix):
    net = nn.Sequential()
    net.add_module("module", nn.Linear(2, 3))  # its name is one of the prefixes of wrappers
    state = {prefix + name: value for name, value in net.state_dict().items()}
    torch.save({"model_state_dict": state, "epoch": 3}, tmp_path / "weights.pth")
    other = nn.Sequential()
    other.add_module("module", nn.Linear(2, 3))
    load_weights(other, tmp_path / "weights.pth")
    assert torch.equal(other.module.weight, net.module.weight)


def test_a_run_resumes_from_its_folder_without_other_flags(run):
    assert run("finetune", *NET, "--epochs", 1, "--output", "run")[0] == 0
    code, _, err = run("finetune", "--resume", "--output", "run")
    assert code == 0, err


def test_an_error_in_user_data_is_reported_with_its_location(run, tmp_path):
    for workers in (0, 1):
        code, _, err = run("prune", "--model", "mine:Net", "--data", "mine:mistaken", "--data-arg",
                           f"workers={workers}", *BUDGET)  # fmt: skip
        assert code == 2 and "KeyError: 'label'" in err and "mine.py" in err and "__getitem__" in err, err
        assert len(err.strip().splitlines()) == 1


def test_soft_targets_are_accepted(run):
    words = ("--model", "mine:Net", "--data", "mine:shares")
    epochs = [word for stage in ("sparsify", "recover", "finetune") for word in (f"--{stage}-epochs", 1)]
    code, _, err = run("slim", *words, *BUDGET, *epochs, "--iterations", 1, "--output", "run")
    assert code == 0, err
    assert run("test", "--weights", "run/best.pth", *words)[0] == 0


@pytest.mark.parametrize("seed", [2**64, -1, "x"])
def test_a_seed_outside_the_range_of_torch_is_refused(run, seed):
    code, _, err = run("prune", *NET, *BUDGET, "--seed", seed)
    assert code == 2 and "--seed" in err and "expected a whole number from 0 to" in err


def test_a_bare_state_dict_is_exported_with_model(run, tmp_path):
    import mine

    torch.save(mine.Net().state_dict(), tmp_path / "weights.pth")
    words = ("export", "weights.pth", "--to", "torchscript", "--input-shape", "1x10x10")
    code, _, err = run(*words)
    assert code == 2 and "weights.pth is not a checkpoint of this toolkit" in err and "(--model)" in err
    code, _, err = run(*words, "--model", "mine:Net")
    assert code == 0, err
    torch.save(mine.Net(), tmp_path / "whole.pth")
    code, _, err = run("test", "--weights", "whole.pth", *NET)
    assert code == 2 and "save model.state_dict()" in err


def test_hidden_folders_are_ignored_and_unbalanced_classes_accepted(run, tmp_path):
    image_folder(tmp_path / "pictures", ["a", "b"])
    (tmp_path / "pictures" / ".ipynb_checkpoints").mkdir()
    for i in range(12, 80):
        (tmp_path / "pictures" / "a" / f"{i}.png").write_bytes(
            (tmp_path / "pictures" / "a" / "0.png").read_bytes()
        )
    code, _, err = run("prune", *PICTURES, *BUDGET, "--calibration", 64)
    assert code == 0, err
