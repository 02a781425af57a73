"""The four scripts, run as a user runs them."""

from __future__ import annotations

import json
import os
import signal
import sys

import pytest
import torch
from commands import ROOT, few_digits, refused, script
from killed import killed
from nets import same

from models import LeNet5, YourNet
from pruning import load, save
from pruning.checkpoint import read
from pruning.planning import count

#: Flags of a run that takes seconds.
SHORT = ["--data", "mnist5k", "--iterations", "2", "--sparsify-epochs", "1", "--recover-epochs", "1",
         "--finetune-epochs", "1", "--batch-size", "64", "--threads", "1",
         "--reference", str(ROOT / "checkpoints" / "LeNet5" / "epoch-6.pth")]  # fmt: skip


#: Without the search for whole layers, which takes most of a short run.
BRIEF = [*SHORT, "--no-layers"]


@pytest.fixture(scope="module", autouse=True)
def digits():
    """A fifth of the embedded digits."""
    with few_digits():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run that has finished."""
    folder = tmp_path_factory.mktemp("run") / "first"
    done = script("train_yournet.py", *SHORT, "--output", folder, cwd=folder.parent)
    return folder, done.stdout


@pytest.fixture(scope="module")
def brief(tmp_path_factory):
    """A short run without the search for whole layers."""
    folder = tmp_path_factory.mktemp("brief") / "first"
    script("train_yournet.py", *BRIEF, "--output", folder, cwd=folder.parent)
    return folder


def test_train_yournet_saves_a_smaller_network_and_its_provenance(run):
    folder, printed = run
    net = load(folder / "best.pth")
    assert type(net) is YourNet
    assert sum(p.numel() for p in net.parameters()) <= 2000
    assert printed.count("stage 2, iteration") == 2 and "asked ≤" in printed
    assert {path.name for path in folder.glob("[!.]*")} == {
        "config.json", "history.jsonl", "reference.pth", "best.pth", "state.pth", "mistakes.json",
    }  # fmt: skip
    facts = torch.load(folder / "best.pth", weights_only=True)["provenance"]
    events = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    trials = sum(event["stage"] == "stage 2, whole layers" for event in events)
    assert trials >= 3, "three trials: with both hidden layers, and without each one"
    assert facts["dataset"] == "mnist5k" and facts["seed"] == 0 and facts["epochs"] == 4 + trials
    assert facts["command"].startswith("python ") and 0 <= facts["validation_accuracy"] <= 1


def test_the_seed_determines_the_trained_network(brief, tmp_path):
    script("train_yournet.py", *BRIEF, "--output", tmp_path / "again", cwd=tmp_path)
    script("train_yournet.py", *BRIEF, "--output", tmp_path / "other", "--seed", 1, cwd=tmp_path)
    first, again, other = (
        load(path / "best.pth").state_dict() for path in (brief, tmp_path / "again", tmp_path / "other")
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(
        first[key].shape != other[key].shape or not torch.equal(first[key], other[key]) for key in first
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("killer", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_resumes_to_the_same_network(brief, tmp_path, killer):
    folder = tmp_path / "runs" / "1"
    process = killed("state.pth", killer, ROOT / "train_yournet.py", *BRIEF, cwd=tmp_path)
    assert process.returncode == (-9 if killer == signal.SIGKILL else 130)
    assert "Traceback" not in process.stderr
    torch.load(folder / "state.pth", weights_only=True)  # the last complete state still loads
    script("train_yournet.py", "--resume", cwd=tmp_path)
    one, other = load(brief / "best.pth").state_dict(), load(folder / "best.pth").state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_test_yournet_prints_the_table_and_writes_the_figures(run, tmp_path):
    folder, _ = run
    report = tmp_path / "figures.json"
    done = script(
        "test_yournet.py", "--best-checkpoint", folder / "best.pth", "--data", "mnist5k",
        "--batch-size", 32, "--json", report, cwd=tmp_path,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines[1] == "| Model Name | Accuracy | Infer Time(ms) | Params(M) | MACs(M) |"
    assert lines[3].startswith("|    LeNet-5 |") and lines[3].endswith("|     0.060 |   0.200 |")
    assert lines[5].startswith("|    YourNet |")
    assert all(len(line) == 64 for line in lines[:7])
    assert "NOTICE" in done.stdout and "NOTICE" in done.stderr
    figures = json.loads(report.read_text())
    for entry in (figures, figures["reference"]):
        assert entry.keys() >= {
            "model", "dataset", "split", "images", "accuracy", "infer_time_ms", "infer_time_ms_p90",
            "batch_size", "threads", "params", "macs",
        }  # fmt: skip
        assert (entry["dataset"], entry["split"], entry["images"]) == ("mnist5k", "test", 200)
        assert entry["batch_size"] == 32 and entry["threads"] == 1 and entry["infer_time_ms"] > 0
    assert figures["params"] == sum(p.numel() for p in load(folder / "best.pth").parameters())
    assert (figures["reference"]["params"], figures["reference"]["macs"]) == (60_074, 199_968)
    assert {"score", "score_uncapped"} <= figures.keys()


def test_the_committed_checkpoints_are_found_from_anywhere(tmp_path):
    done = script("test_yournet.py", "--data", "mnist5k", cwd=tmp_path)
    assert "YourNet" in done.stdout and "uncapped" in done.stdout
    assert "LeNet-5" in script("test_lenet5.py", "--data", "mnist5k", cwd=tmp_path).stdout


def test_train_lenet5_saves_each_epoch_and_continues_from_a_checkpoint(tmp_path):
    flags = ["--data", "mnist5k", "--checkpoint-dir", tmp_path / "net", "--threads", 1]
    script("train_lenet5.py", *flags, "--epoch-end", 3)
    names = [f"epoch-{number}.pth" for number in (1, 2, 3)]
    assert sorted(p.name for p in (tmp_path / "net").iterdir()) == names
    last = ["--last-checkpoint", tmp_path / "net" / "epoch-1.pth"]
    again = [*flags[:3], tmp_path / "again", *flags[4:], *last]
    done = script("train_lenet5.py", *again, "--epoch-start", 1, "--epoch-end", 3)
    whole, resumed = (load(tmp_path / folder / "epoch-3.pth") for folder in ("net", "again"))
    assert type(resumed) is LeNet5 and "epoch-3.pth" in done.stdout and "not" not in done.stdout
    assert same(whole, resumed)
    done = script("train_lenet5.py", *again, "--overwrite", "--epoch-end", 1)
    assert "epoch-1.pth is 1 epoch old, not 0" in done.stdout
    assert read(tmp_path / "again" / "epoch-1.pth")["provenance"]["epochs"] == 2
    message = refused("train_lenet5.py", *flags, "--epoch-end", 3)
    assert "would be replaced: add --overwrite" in message
    done = script(
        "test_lenet5.py", "--data", "mnist5k", "--best-checkpoint", tmp_path / "net" / "epoch-3.pth"
    )
    assert "|    LeNet-5 |" in done.stdout


@pytest.mark.parametrize("name", ["train_lenet5.py", "test_lenet5.py", "train_yournet.py", "test_yournet.py"])
def test_help_lists_the_flags_and_bad_usage_is_one_line(name, tmp_path):
    text = script(name, "--help").stdout
    assert "--device" in text and "(default: cpu)" in text
    assert "whole number from 1" in refused(name, "--batch-size", 0, cwd=tmp_path)
    assert "invalid choice: 'mnist6'" in refused(name, "--data", "mnist6", cwd=tmp_path)
    if not torch.cuda.is_available():
        assert "'cuda' cannot be used here" in refused(name, "--device", "cuda", cwd=tmp_path)
    assert "'toaster' cannot be used here" in refused(name, "--device", "toaster", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_budget_raises_with_the_least_costs_and_writes_nothing(tmp_path):
    message = refused(
        "train_yournet.py", *SHORT, "--max-params", 50, "--output", tmp_path / "run", cwd=tmp_path
    )
    assert "cannot be reached" in message and "features.conv1 1" in message and "params" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [["--max-params", "0"], ["--max-macs", "120%"], ["--max-params", "few"]])
def test_an_invalid_budget_is_refused(flags, tmp_path):
    assert "budget" in refused("train_yournet.py", *SHORT, *flags, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_or_incompatible_teacher_is_refused(tmp_path):
    assert "no such file" in refused(
        "train_yournet.py", *SHORT, "--teacher", "absent.pth", "--distill", 0.5, cwd=tmp_path
    )
    assert "--teacher is for --distill" in refused(
        "train_yournet.py", *SHORT, "--teacher", "absent.pth", cwd=tmp_path
    )
    assert list(tmp_path.iterdir()) == []
    save(tmp_path / "seven.pth", LeNet5(classes=7))
    assert "needs a teacher with the same classes" in refused(
        "train_yournet.py", *SHORT, "--teacher", "seven.pth", "--distill", 0.5, cwd=tmp_path
    )
    assert {path.name for path in tmp_path.iterdir()} == {"seven.pth"}


def test_distillation_changes_the_losses_of_stages_2_and_3(brief, tmp_path):
    teacher = ["--teacher", ROOT / "checkpoints" / "LeNet5" / "epoch-6.pth", "--distill", 0.5]
    flags = [*BRIEF, *teacher, "--temperature", 1, "--output", tmp_path / "taught"]
    script("train_yournet.py", *flags, cwd=tmp_path)
    losses = []
    for folder in (brief, tmp_path / "taught"):
        events = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
        losses.append([event["train_loss"] for event in events if "train_loss" in event])
    plain, taught = losses
    assert plain[0] == taught[0] and plain[1] != taught[1], "only stages 2 and 3 have a teacher"
    assert json.loads((tmp_path / "taught" / "config.json").read_text())["stages"]["temperature"] == 1
    assert "--temperature" in refused("train_yournet.py", *SHORT, "--temperature", 0, cwd=tmp_path)


def test_an_output_folder_inside_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refused("train_yournet.py", *SHORT, "--output", tmp_path / "file" / "run", cwd=tmp_path)
    assert (tmp_path / "file").read_text() == ""


def test_the_folder_of_another_run_is_not_overwritten(brief, tmp_path):
    folder = brief
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "already holds a run" in refused("train_yournet.py", *SHORT, "--output", folder, cwd=tmp_path)
    other = refused("train_yournet.py", "--resume", "--seed", 7, "--output", folder, cwd=tmp_path)
    assert "other settings (seed)" in other
    fewer = refused("train_yournet.py", "--resume", "--iterations", 1, "--output", folder, cwd=tmp_path)
    assert "other settings (iterations, stages)" in fewer
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_resuming_without_a_run_is_refused(tmp_path):
    assert "no run to resume" in refused("train_yournet.py", "--resume", cwd=tmp_path)


def test_a_checkpoint_of_another_class_is_refused(tmp_path):
    save(tmp_path / "lenet.pth", LeNet5())
    save(tmp_path / "yournet.pth", YourNet())
    assert "holds a LeNet5, a YourNet was expected" in refused(
        "test_yournet.py", "--best-checkpoint", tmp_path / "lenet.pth", "--data", "mnist5k"
    )
    assert "holds a YourNet, a LeNet5 was expected" in refused(
        "test_lenet5.py", "--best-checkpoint", tmp_path / "yournet.pth", "--data", "mnist5k"
    )
    assert "no such file" in refused("test_yournet.py", "--best-checkpoint", tmp_path / "absent.pth")


def test_a_data_folder_with_missing_files_is_refused(tmp_path, monkeypatch):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(b"not images")
    monkeypatch.delenv("MNIST_DIR", raising=False)
    message = refused("test_lenet5.py", "--data-dir", tmp_path, "--data", "mnist")
    assert "missing train-labels-idx1-ubyte" in message


def test_the_committed_networks_have_the_costs_stated_in_the_readme():
    net = load(ROOT / "checkpoints" / "YourNet" / "best.pth")
    cost = count(net, torch.zeros(1, 1, 28, 28))
    assert type(net) is YourNet and cost.params <= 2000 and cost.macs <= 50_000
    facts = read(ROOT / "checkpoints" / "YourNet" / "best.pth")["provenance"]
    assert facts.keys() >= {"command", "commit", "versions", "seed", "dataset", "validation_accuracy"}
    assert facts["dataset"] == "mnist"
    reference = load(ROOT / "checkpoints" / "LeNet5" / "epoch-6.pth")
    assert type(reference) is LeNet5 and count(reference, torch.zeros(1, 1, 28, 28)).params == 60_074


@pytest.mark.skipif("MNIST_DIR" not in os.environ, reason="MNIST_DIR does not name the full MNIST")
def test_the_committed_networks_have_the_accuracy_stated_in_the_readme(tmp_path):
    script("test_yournet.py", "--data", "mnist", "--json", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["dataset"], figures["split"], figures["images"]) == ("mnist", "test", 10_000)
    assert figures["accuracy"] >= 0.985 and figures["reference"]["accuracy"] >= 0.975
    assert figures["score_uncapped"] >= 140 and figures["score"] == 100


def test_a_latency_budget_replaces_the_limits_of_the_recipe(tmp_path):
    folder = tmp_path / "run"
    done = script("train_yournet.py", *BRIEF, "--max-latency", "0.8x", "--runtime-batch", 64,
                  "--output", folder, cwd=tmp_path)  # fmt: skip
    events = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    timed = [event["latency"] for event in events if "latency" in event]
    assert len(timed) == 1 and timed[0]["pruned"] <= 0.8 * timed[0]["dense"], "only the last step is timed"
    assert "asked ≤ 0.8x in eager, 1 thread, got" in done.stdout
    words = ("--max-latency", "0.8x", "--max-params", 2000)
    assert "--max-latency stands alone" in refused("train_yournet.py", *words)


def test_the_command_line_takes_precedence_over_the_recipe(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('start = "mlp"\nmax-params = "30%"\nlayers = false\nfinetune-epochs = 7\n')
    done = script("train_yournet.py", *SHORT, "--recipe", recipe, "--output", tmp_path / "run", cwd=tmp_path)
    assert "YourNet" in done.stdout
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["start"] == "mlp" and settings["layers"] is False
    assert settings["finetune_epochs"] == 1, "the value of SHORT"
    assert len(load(tmp_path / "run" / "best.pth").widths) == 2

    recipe.write_text("finetune-epoch = 7\n")
    said = refused("train_yournet.py", "--recipe", recipe, "--start", "nonsense")
    assert "nonsense" in said or "finetune-epoch" in said
    recipe.write_text("finetune-epochs = { a = 7 }\n")
    assert "a plain value was expected" in refused("train_yournet.py", "--recipe", recipe)
    recipe.write_text("finetune-epochs = \n")
    assert "cannot be read as a recipe" in refused("train_yournet.py", "--recipe", recipe)
    assert "cannot be read as a recipe" in refused("train_yournet.py", "--recipe", tmp_path / "none.toml")


def test_mnist5k_uses_its_own_recipe(run):
    folder, _ = run
    assert json.loads((folder / "config.json").read_text())["augment"] == 1.0
