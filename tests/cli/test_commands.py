"""`python -m pruning` with any model and any data."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import launched
from processes import toolkit as in_processes
from user import MODULE, NET, image_folder

from pruning import save
from pruning.stages import Run
from pruning.utils.modules import thread_count

SHORT = ("--sparsify-epochs", 1, "--recover-epochs", 1, "--finetune-epochs", 2, "--iterations", 2)
BUDGET = ("--max-macs", "50%")


def test_doctor_lists_groups_and_skipped_layers(run, tmp_path):
    code, out, _ = run("doctor", *NET, "--model-arg", "width=6", "--json", "found.json")
    assert code == 0 and "features.0" in out and "6 channels" in out
    assert "head: its channels are the model's output" in out and "trial passed" in out
    found = json.loads((tmp_path / "found.json").read_text())
    assert [group["name"] for group in found["groups"]] == ["features.0", "features.4"]
    assert found["groups"][0]["scales"] == ["features.1"] and found["trial"] == ""


def test_values_of_repeated_flags_are_combined(run, tmp_path):
    words = ("doctor", *NET, "--model-arg", "width=6", "--model-arg", "bias=False", "--json", "found.json")
    assert run(*words, "--ignore", "features.0", "--ignore", "features.4")[0] == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["groups"] == [] and {"features.0", "features.4"} <= found["skipped"].keys()
    assert run(*words)[0] == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["groups"][0]["channels"] == 6


def test_outputs_that_do_not_count_may_change_their_size(run, tmp_path):
    features = ("--model", "mine:Features", "--input-shape", "1x10x10")
    code, out, _ = run("doctor", *features)
    assert code == 0 and "features.4: its channels are the model's output 'maps'" in out
    code, out, _ = run("doctor", *features, "--outputs", "logits", "--json", "found.json")
    assert code == 0 and "trial passed" in out
    assert len(json.loads((tmp_path / "found.json").read_text())["groups"]) == 2
    words = ("prune", *features, "--outputs", "logits", "--score", "l2", "--max-channels", 4)
    assert run(*words)[0] == 0
    assert run("doctor", *features, "--weights", "small.pth", "--outputs", "logits")[0] == 0


def test_attributes_that_may_be_widths_are_listed(run):
    held = ("--model", "mine:Held", "--input-shape", "1x10x10")
    listed = "width = 8 was the width of features.0 and is not read in the traced passes"
    code, out, _ = run("doctor", *held)
    assert code == 0 and f"attributes that equal a width, and that pruning leaves: 1\n  {listed}" in out
    code, out, _ = run("prune", *held, "--score", "l2", *BUDGET)
    assert code == 0 and f"not changed: {listed}" in out


def test_a_group_whose_width_is_a_number_in_the_code_is_named_and_left_out(run):
    net = ("--model", "mine:Divides", "--input-shape", "1x10x10")
    code, out, _ = run("prune", *net, "--score", "l2", "--max-channels", 12)
    assert code == 0 and "left out: features.0: with fewer channels, the model does not compute" in out
    code, out, _ = run("doctor", *net)
    assert code == 0 and "features.0: with fewer channels" in out and "trial passed" in out


def test_a_wrapped_network_is_pruned_and_loads_without_the_wrapper(run):
    shape = ("--input-shape", "1x10x10")
    assert run("prune", "--model", "mine:wrapped", *shape, "--score", "l2", *BUDGET)[0] == 0
    for model in ("mine:Net", "mine:wrapped"):
        code, out, _ = run("doctor", "--model", model, *shape, "--weights", "small.pth")
        assert code == 0 and "  features.0  " in out


def test_doctor_of_a_torchvision_network_needs_no_data(run):
    code, out, _ = run("doctor", "--model", "squeezenet1_1", "--input-shape", "3x64x64")
    assert code == 0 and "25 groups" in out and "have no BatchNorm scale" in out


def test_a_pruned_network_loads_without_the_toolkit(run, tmp_path):
    code, out, _ = run("prune", *NET, "--max-macs", "40%", "--standalone", "--output", "out/small.pth")
    assert code == 0 and "asked" in out and "validation accuracy" in out
    code = """
import sys
sys.modules["pruning"] = sys.modules["torch_pruning"] = None
import torch
from load_pruned import load_pruned
from mine import Net
net = load_pruned("small.pth", Net)
assert net.features[0].out_channels < 8 and not net.training
print(net(torch.ones(1, 1, 10, 10)).tolist())
"""
    (tmp_path / "out" / "mine.py").write_text(MODULE)
    fresh = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "out", capture_output=True, text=True, check=False
    )
    assert fresh.returncode == 0, fresh.stderr
    from pruning import load

    with torch.no_grad():
        assert load("out/small.pth")(torch.ones(1, 1, 10, 10)).tolist() == eval(fresh.stdout)
    lines = Path(tmp_path / "out" / "load_pruned.py").read_text().splitlines()
    assert len(lines) < 190


def test_slim_resumes_and_repeats_from_its_config_and_other_commands_read_its_network(run, tmp_path):
    budget = ("--max-params", "50%", "--floor", 2, "--ignore", "nothing*")
    assert run("slim", *NET, *SHORT, *budget)[0] == 2  # the pattern matches nothing
    code, out, _ = run("slim", *NET, *SHORT, "--max-params", "50%", "--floor", 2, "--output", "first")
    assert code == 0 and "stage 3, fine-tune" in out
    written = {p.name for p in (tmp_path / "first").iterdir()}
    assert written >= {"config.toml", "history.jsonl", "given.pth", "sparsified.pth", "mistakes.json"}

    assert run("slim", "--config", "first/config.toml", "--output", "second")[0] == 0
    load = lambda name: torch.load(name, weights_only=True)["state_dict"]  # noqa: E731
    first, second = load("first/best.pth"), load("second/best.pth")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert run("slim", "--config", "first/config.toml", "--output", "first")[0] == 2  # the folder has a run
    (tmp_path / "first" / "best.pth").unlink()
    assert run("slim", "--config", "first/config.toml", "--output", "first", "--resume")[0] == 0
    again = load("first/best.pth")
    assert all(torch.equal(first[key], again[key]) for key in first)

    assert run("slim", "--config", "first/config.toml", "--restart", "--output", "anew")[0] == 0
    anew = load("anew/best.pth")
    assert all(anew[key].shape == first[key].shape for key in first), "the same widths"
    assert not any(torch.equal(anew[key], first[key]) for key in first if key.endswith("weight"))

    code, out, _ = run("finetune", *NET, "--weights", "first/best.pth", "--epochs", 2, "--output", "tuned")
    assert code == 0 and "validation" in out
    words = ("finetune", *NET, "--weights", "first/best.pth", "--epochs", 2)
    assert run(*words, "--int8", "--output", "rounded")[0] == 0  # other weights in the same layers
    tuned, rounded = load("tuned/best.pth"), load("rounded/best.pth")
    assert tuned.keys() == rounded.keys() and not all(torch.equal(tuned[key], rounded[key]) for key in tuned)
    code, out, _ = run("test", *NET, "--weights", "tuned/best.pth", "--against", "first/sparsified.pth",
                       "--seconds", 0.1, "--json", "figures.json")  # fmt: skip
    assert code == 0
    dense, small = json.loads((tmp_path / "figures.json").read_text())
    assert small["params"] * 2 <= dense["params"] + 1 and small["accuracy"] > 0.5
    code, out, _ = run("report", "first")
    assert code == 0 and (tmp_path / "first" / "report.html").exists()


def test_prune_refits_without_labels_being_needed(run):
    code, out, _ = run("prune", *NET, "--max-macs", "40%", "--refit")
    assert code == 0 and re.search(r"^refit: \d+ layers?; the largest relative error", out, re.MULTILINE)
    assert "warning" not in out  # a tenth of every group is kept
    code, _, err = run("prune", "--model", "mine:Net", "--input-shape", "1x10x10", "--score", "l2",
                       "--max-macs", "40%", "--refit")  # fmt: skip
    assert code == 2 and "--refit needs data" in err


def test_prune_warns_where_little_of_a_group_is_left(run):
    words = ("prune", *NET, "--model-arg", "width=24", "--score", "l2", "--max-macs")
    code, _, err = run(*words, "4%")
    assert code == 2 and "Raise the budget, or the share of a group that is dropped at most" in err
    code, out, _ = run(*words, "4%", "--most", 1)
    assert code == 0
    kept = {name: int(width) for name, width in re.findall(r"(features\.\d) 24→(\d+)", out)}
    few = [f"{name} {width} of 24" for name, width in kept.items() if width < 3]
    assert few and f"less than a tenth of their channels: {', '.join(few)};" in out
    code, out, _ = run(*words, "40%", "--most", 0.8)
    assert code == 0 and "warning" not in out


def test_doctor_states_the_least_cost_that_prune_reaches_by_default(run, tmp_path):
    net = (*NET, "--model-arg", "width=24")
    assert run("doctor", *net, "--json", "found.json")[0] == 0
    least = json.loads((tmp_path / "found.json").read_text())["least_step"]["macs"]
    code, out, _ = run("prune", *net, "--score", "l2", "--max-macs", least)
    assert code == 0 and out.count("24→3") == 2
    assert run("prune", *net, "--score", "l2", "--max-macs", least - 1)[0] == 2


def test_flags_override_a_config_and_an_unknown_key_is_named(run, tmp_path):
    (tmp_path / "run.toml").write_text('model = "mine:Net"\ndata = "mine:digits"\nmax-macs = "60%"\n')
    code, out, _ = run("prune", "--config", "run.toml", "--max-macs", "30%", "--score", "bn_scale")
    assert code == 0 and out.count("asked") == 1
    (tmp_path / "run.toml").write_text('max-mac = "60%"\n')
    code, _, err = run("prune", "--config", "run.toml")
    assert code == 2 and "'max-mac'" in err and "'max-macs'" in err
    (tmp_path / "run.toml").write_text("wdith = 6\n")
    code, _, err = run("prune", "--config", "run.toml")
    line = 'model-arg = ["wdith=6"]'
    assert code == 2 and f"there is no setting 'wdith'; if the network takes it, write {line}" in err
    (tmp_path / "run.toml").write_text(f'model = "mine:Net"\n{line}\n')
    code, _, err = run("prune", "--config", "run.toml", "--input-shape", "1x10x10", "--max-macs", "60%")
    assert code == 2 and "mine:Net takes no argument 'wdith' (did you mean width?)" in err
    (tmp_path / "run.toml").write_text("[model-arg]\nwidth = 6\n")
    code, _, err = run("prune", "--config", "run.toml")
    assert code == 2 and 'is a table, a plain value was expected: write model-arg = ["width=6"]' in err


def test_slim_gives_groups_that_are_alike_one_width_and_stores_the_patterns(run, tmp_path):
    words = ("slim", *NET, *SHORT, "--max-params", "50%", "--multiple", 2)
    code, _, err = run(*words, "--alike", "nothing.*", "--output", "none")
    assert code == 2 and "alike='nothing.*' matches no group" in err and "Traceback" not in err
    assert not (tmp_path / "none").exists()
    code, _, err = run(*words, "--alike", "features.*", "--output", "alike")
    assert code == 0, err
    assert 'alike = ["features.*"]' in (tmp_path / "alike" / "config.toml").read_text()
    stored = torch.load(tmp_path / "alike" / "best.pth", weights_only=True)["layers"]
    widths = {stored[name]["out_channels"] for name in ("features.0", "features.4")}
    assert len(widths) == 1 and widths.pop() % 2 == 0
    assert run("slim", "--config", "alike/config.toml", "--output", "alike", "--resume")[0] == 0


def test_a_model_without_batchnorm_is_pulled_by_its_weights(run):
    words = ("--model", "mine:plain", "--data", "mine:digits", *SHORT, "--max-macs", "60%")
    code, out, _ = run("slim", *words)
    assert code == 0 and "without a pull" not in out


def test_sensitivity_writes_figures_and_resumes(run, tmp_path):
    code, _, _ = run("sensitivity", *NET, "--widths", 3, "--output", "curves")
    names = {path.name for path in (tmp_path / "curves").iterdir()}
    assert code == 0 and names >= {"curves.json", "curves.csv", "curves.png", "map.svg", "cost.png"}
    points = json.loads((tmp_path / "curves" / "curves.json").read_text())
    assert run("sensitivity", *NET, "--widths", 3, "--output", "curves")[0] == 0
    assert json.loads((tmp_path / "curves" / "curves.json").read_text()) == points


def test_the_history_is_written_to_tensorboard(run, tmp_path, monkeypatch):
    words = ("slim", *NET, *SHORT, "--max-params", "60%", "--tensorboard")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    code, _, err = run(*words, "--output", "shown")
    assert code == 0, err
    seen = EventAccumulator(str(tmp_path / "shown" / "tensorboard"), size_guidance={"histograms": 0}).Reload()
    tags = seen.Tags()
    assert {"train_loss", "validation", "params", "macs"} <= set(tags["scalars"])
    assert tags["histograms"] and tags["images"] == ["widths"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    code, _, err = run(*words, "--output", "hidden")
    assert code == 2 and "pip install tensorboard" in err


def test_image_folders_are_read_and_validated(run, tmp_path):
    image_folder(tmp_path / "pictures", ["a", "bb", "cccc"])
    words = (
        "--model",
        "squeezenet1_1",
        "--model-arg",
        "num_classes=3",
        "--image-size",
        33,
        "--batch-size",
        8,
    )
    code, out, err = run("prune", *words, "--data", "pictures", "--max-params", "80%")
    assert code == 0, err
    assert "validation accuracy" in out
    image_folder(tmp_path / "split" / "train", ["a", "bb"])
    image_folder(tmp_path / "split" / "val", ["a"])
    code, _, err = run("prune", *words, "--data", "split", "--max-params", "80%")
    assert code == 2 and "classes of validation differ" in err
    image_folder(tmp_path / "lone", ["a"])
    code, _, err = run("prune", *words, "--data", "lone", "--max-params", "80%")
    assert code == 2 and "one class only" in err


def test_finetuning_never_lowers_the_validation_accuracy(run, tmp_path):
    words = ("--data", "mine:digits", "--epochs", 1)
    assert run("finetune", "--model", "mine:Net", *words[:2], "--epochs", 8, "--output", "good")[0] == 0
    code, out, err = run("finetune", "--model", "mine:Net", "--weights", "good/best.pth", *words, "--rate", 2,
                         "--output", "worse")  # fmt: skip
    assert code == 0, err
    after, before = out.rpartition("validation ")[2].replace(" before)", "").split(" (")
    assert float(after) >= float(before) > 0.9


def test_every_training_setting_changes_finetuning(run):
    assert run("finetune", *NET, "--epochs", 1, "--output", "teacher")[0] == 0
    words = ("finetune", *NET, "--weights", "teacher/best.pth", "--epochs", 1, "--rate", 0.05)
    taught = ("--teacher", "teacher/best.pth", "--distill", 0.9)
    settings = {
        "plain": (),
        "soap": ("--optimizer", "soap"),
        "taught": taught,
        "sharp": (*taught, "--temperature", 1),
        "averaged": ("--ema", 0.5),
    }
    heads = []
    for folder, flags in settings.items():
        code, _, err = run(*words, *flags, "--output", folder)
        assert code == 0, err
        heads.append(torch.load(f"{folder}/best.pth", weights_only=True)["state_dict"]["head.weight"])
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(heads, 2))


def test_soap_is_refused_for_large_networks_before_training(run, tmp_path):
    words = ("slim", *NET, *SHORT, "--model-arg", "width=128", "--optimizer", "soap", "--output", "large")
    code, out, err = run(*words, *BUDGET)
    assert code == 2 and "at most 4,096 parameters" in err and "use sgd" in err and "stage 1" not in out
    assert not (tmp_path / "large").exists()
    code, out, err = run(*words[:-1], "none", "--max-params", 2000, "--finetune-rate", 0)
    assert code == 2 and "--finetune-rate: '0': expected a number above 0" in err
    code, out, err = run(*words[:-1], "small", "--max-params", 2000)
    assert code == 0, err


def test_finetune_refuses_invalid_settings_before_creating_a_run(run, tmp_path):
    import mine

    for classes in (3, 7):
        save(tmp_path / f"{classes}.pth", mine.Net(classes=classes))
    words = ("finetune", "--data", "mine:digits", "--epochs", 1, "--output", "none")
    for flags, said in (
        (("--weights", "3.pth", "--rate", 0), "--rate: '0': expected a number above 0"),
        (("--weights", "3.pth", "--teacher", "7.pth", "--distill", 0.5), "7.pth does not fit Net"),
        (("--model", "mine:Net", "--model-arg", "width=128", "--optimizer", "soap"), "use sgd"),
    ):
        code, _, err = run(*words, *flags)
        assert code == 2 and said in err
    assert not (tmp_path / "none").exists()


def test_threads_are_capped_at_the_default_of_torch(run, monkeypatch):
    from pruning.cli.commands import test as command

    used = []
    timed = command.time_forward
    monkeypatch.setattr(
        command, "time_forward", lambda *args, **how: used.append(how["threads"]) or timed(*args, **how)
    )
    with thread_count(1):
        assert run("test", *NET, "--threads", 4, "--seconds", 0.1)[0] == 0
    assert set(used) == {1}


@pytest.mark.parametrize("data", ["digits", "regression"])
def test_networks_other_than_classifiers_are_pruned_and_timed_without_accuracy(run, tmp_path, data):
    words = ("--model", "mine:Says" if data == "digits" else "mine:Net", "--data", f"mine:{data}")
    code, out, err = run("prune", *words, *BUDGET, "--score", "l2")
    assert code == 0 and "validation accuracy was not taken: the" in out, err
    code, out, err = run("test", *words, "--weights", "small.pth", "--seconds", 0.1, "--json", "found.json")
    assert code == 0 and "accuracy was not taken: the" in out, err
    assert [row["accuracy"] for row in json.loads((tmp_path / "found.json").read_text())] == [None, None]


def test_two_processes_find_the_same_plan_as_one(run, tmp_path):
    """Uses DistributedDataParallel over gloo on the same global batches."""
    words = ("slim", *NET, *SHORT, "--max-params", "40%", "--batch-size", 32, "--threads", 1)
    assert run(*words, "--output", "alone")[0] == 0
    printed = launched(in_processes, *map(str, words), "--output", "both", folder=tmp_path / "logs")
    assert [text.count("stage 3, fine-tune") for text in printed] == [1, 0], "only the first process prints"

    def widths(folder):
        lines = [json.loads(line) for line in (tmp_path / folder / "history.jsonl").read_text().splitlines()]
        return [line["widths"] for line in lines if "widths" in line]

    assert widths("both") == widths("alone")
    alone, both = (
        torch.load(f"{name}/best.pth", weights_only=True)["state_dict"] for name in ("alone", "both")
    )
    for key, value in alone.items():
        torch.testing.assert_close(both[key], value, rtol=1e-3, atol=1e-3)


def test_a_few_examples_without_labels_recover_a_pruned_network(run, tmp_path, monkeypatch):
    assert run("finetune", *NET, "--epochs", 4, "--output", "dense")[0] == 0
    pruned = ("--weights", "dense/best.pth", *BUDGET, "--score", "l2", "--output", "small.pth")
    assert run("prune", *NET, *pruned)[0] == 0
    words = ("finetune", *NET, "--weights", "small.pth", "--few-shot", 64, "--epochs", 6, "--rate", 0.05)
    taught = ("--teacher", "dense/best.pth")
    code, out, err = run(*words, *taught, "--output", "few")
    assert code == 0, err
    before, after = re.search(r"on 16 examples held out: (\S+) before, (\S+) after", out).groups()
    assert float(after) < float(before)
    saved = Run.save

    def interrupted(self, state):
        saved(self, state)
        if state["fit"]["epoch"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", interrupted)
        assert run(*words, *taught, "--output", "cut")[0] == 130
    assert run(*words, *taught, "--output", "cut", "--resume")[0] == 0
    whole, resumed = (
        torch.load(f"{name}/best.pth", weights_only=True)["state_dict"] for name in ("few", "cut")
    )
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    for flags, said in (((), "give --teacher FILE"), ((*taught, "--int8"), "leave out --int8")):
        code, _, err = run(*words, *flags, "--output", "no")
        assert code == 2 and said in err and not (tmp_path / "no").exists()
