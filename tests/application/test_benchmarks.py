"""Run the benchmarks that train, on the embedded digits with recipes of a few seconds."""

from __future__ import annotations

import json
import sys
from functools import partial

import pytest
import torch
from commands import children_in_process, few_digits, module
from PIL import Image

import models
from benchmarks import libraries, pretrained, pretrained_networks, trained_networks
from benchmarks.table import side_by_side
from pruning import PruningError, load

RECIPE = """
start = "lenet5"
max-params = "60%"
iterations = 1
sparsify-epochs = 1
recover-epochs = 0
finetune-epochs = 2
batch-size = 64
augment = 0
"""


@pytest.fixture(scope="module", autouse=True)
def digits():
    """A fifth of the embedded digits."""
    with few_digits():
        yield


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table with one row and two seeds."""
    folder = tmp_path_factory.mktemp("table")
    (folder / "tiny").mkdir()
    (folder / "tiny" / "recipe.toml").write_text(RECIPE)
    where = ["--checkpoints", folder, "--runs", folder / "runs", "--data", "mnist5k", "--threads", 1]
    with children_in_process():
        done = module("benchmarks.table", *where, "--seeds", 0, 1)
    return folder, where, done.stdout


def test_a_row_contains_every_seed_and_the_checkpoint_of_the_best(table):
    folder, _, printed = table
    (row,) = json.loads((folder / "results.json").read_text())["rows"]
    assert row["row"] == "tiny" and row["dataset"] == "mnist5k" and row["seeds"] == [0, 1]
    assert row["accuracy"] == [run["accuracy"] for run in row["runs"]]
    best = max(row["runs"], key=lambda run: (run["validation"], -run["seed"]))
    net = load(folder / "tiny" / "best.pth")
    assert list(net.widths) == row["widths"] == best["widths"]
    assert sum(p.numel() for p in net.parameters()) == row["params"] <= 0.6 * 60074
    assert row["command"].endswith(f"--seed {best['seed']} --threads 1")
    assert "| tiny |" in printed and " ± " in printed


def test_existing_results_are_not_computed_again_unless_the_recipe_changes(table):
    folder, where, _ = table
    before = (folder / "results.json").read_bytes()
    runs = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("best.pth")}
    module("benchmarks.table", *where, "--seeds", 0, 1)
    assert (folder / "results.json").read_bytes() == before
    assert runs == {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("best.pth")}


def test_controls_are_listed_with_their_row(table):
    folder, where, _ = table
    with children_in_process():
        printed = module("benchmarks.control", *where, "--rows", "tiny", "--seeds", 0).stdout
    controls = {
        entry["kind"]: entry for entry in json.loads((folder / "results.json").read_text())["controls"]
    }
    assert set(controls) == {"half", "scratch", "uniform", "bn-scale", "magnitude", "taylor"}
    row = json.loads((folder / "results.json").read_text())["rows"][0]
    for kind, entry in controls.items():
        assert entry["params"] <= 0.6 * 60074, kind
        assert 0.1 <= entry["accuracy"] <= 1 and f"| tiny | {kind} |" in printed
    assert controls["scratch"]["widths"] == row["widths"]
    assert controls["scratch"]["epochs"] == max(run["epochs"] for run in row["runs"])
    assert controls["half"]["epochs"] < controls["scratch"]["epochs"]
    ratios = [w / dense for w, dense in zip(controls["uniform"]["widths"], (6, 16, 120, 84), strict=True)]
    assert max(ratios) - min(ratios) < 0.1, "every width is scaled by the same factor"


def test_a_control_requires_the_results_of_its_row(table):
    folder, where, _ = table
    (folder / "empty").mkdir()
    (folder / "empty" / "recipe.toml").write_text(RECIPE + "\n")
    done = module("benchmarks.control", *where, "--rows", "empty", check=False)
    assert done.returncode == 2 and "run python -m benchmarks.table --rows empty first" in done.stderr
    done = module("benchmarks.table", *where, "--rows", "nowhere", check=False)
    assert done.returncode == 2 and "has no recipe" in done.stderr


def test_a_search_draws_its_pareto_front(table):
    folder, _, _ = table
    where = ["--results", folder / "search.json", "--figures", folder, "--runs", folder / "runs"]
    where += ["--data", "mnist5k", "--recipe", folder / "tiny" / "recipe.toml", "--seeds", 0, "--threads", 1]
    with children_in_process():
        printed = module("benchmarks.search", *where, "--budgets", "5%:", ":30%").stdout
    runs = json.loads((folder / "search.json").read_text())["runs"]
    narrow, light = sorted(runs, key=lambda run: run["params"])
    assert (narrow["budget"], light["budget"]) == ("5%:", ":30%")
    assert narrow["params"] <= 0.05 * 60074 and light["macs"] <= 0.3 * 199968
    assert "| accuracy % |" in printed
    for name in ("pareto-params", "pareto-macs"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "JoshWarn" in (folder / f"{name}.svg").read_text()
    done = module("benchmarks.search", "--budgets", "many", check=False)
    assert done.returncode == 2 and "expected PARAMS:MACS" in done.stderr


def test_several_jobs_run_in_processes_of_their_own_and_pass_errors_on():
    side_by_side(2, int, [("1",), ("2",), ("3",)])
    with pytest.raises(ValueError, match="two"):
        side_by_side(2, int, [("1",), ("two",)])


def test_networks_of_the_paper_are_slimmed_once_and_listed(tmp_path, monkeypatch):
    monkeypatch.setattr("models.resnet20", partial(models.PreResNet, 8))
    where = ["--runs", tmp_path, "--results", tmp_path / "out.json", "--table", tmp_path / "out.md"]
    flags = ["--models", "resnet20", "--data", "mnist5k", "--train", 64, "--validation", 32, "--threads", 1]
    with children_in_process():
        module("benchmarks.paper", *flags, *where)
    found = json.loads((tmp_path / "out.json").read_text())["resnet20"]
    assert found["slim"]["macs"] <= 0.5 * found["dense"]["macs"] and 0 <= found["slim"]["accuracy"] <= 1
    params = sum(p.numel() for p in models.resnet20(image_shape=(1, 32, 32)).parameters())
    assert f"| resnet20 | 64 of mnist5k | {params:,} |" in (tmp_path / "out.md").read_text()
    before = (tmp_path / "resnet20" / "best.pth").stat().st_mtime_ns
    module("benchmarks.paper", *flags, *where)
    assert (tmp_path / "resnet20" / "best.pth").stat().st_mtime_ns == before, "nothing was run again"


def test_trained_networks_are_slimmed_once_by_each_rate_and_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(trained_networks, "PICTURES", {"train": 36, "val": 12, "test": 12})
    where = ["--runs", tmp_path, "--results", tmp_path / "out.json", "--table", tmp_path / "out.md"]
    brief = ["sparsify-epochs=1", "iterations=1", "recover-epochs=0", "finetune-epochs=1"]
    words = [*where, "--networks", "plain", "--seeds", 0, "--rates", 0.01, "--epochs", 2, "--flags", *brief]
    with children_in_process():
        module("benchmarks.trained", *words)
    found = json.loads((tmp_path / "out.json").read_text())
    assert list(found) == ["plain seed 0 rate found", "plain seed 0 rate 0.01"]
    for cell in found.values():
        dense, small = cell["macs"]
        assert small <= 0.4 * dense and cell["lines"][0].startswith("given network: validation")
        assert all(0 <= cell[net]["test"] <= 1 for net in ("given", "slim"))
    assert found["plain seed 0 rate found"]["given"] == found["plain seed 0 rate 0.01"]["given"]
    assert "| plain CNN, image folder | 1 |" in (tmp_path / "out.md").read_text()
    before = (tmp_path / "out.json").read_bytes()
    module("benchmarks.trained", *words)
    assert (tmp_path / "out.json").read_bytes() == before, "nothing was run again"


def test_networks_of_other_libraries_are_tested_and_listed():
    listed = dict(libraries.listed())
    assert len(listed) > 100 and {library for library, _ in listed} >= {"timm", "monai"}
    assert listed["timm", "mixnet_s"]["arguments"] == {"num_classes": 10, "model_name": "mixnet_s"}
    small = {"factory": "torchvision.models:squeezenet1_1", "arguments": {"num_classes": 5}}
    found = libraries.tried({**small, "shape": [3, 48, 48]})
    assert found["macs"] <= 0.5 and found["groups"] > 20 and found["sizes"] == []
    lone = {"factory": "torch.nn:Linear", "arguments": {"in_features": 4, "out_features": 2}, "shape": [4]}
    with pytest.raises(PruningError, match="no prunable group"):
        libraries.tried(lone)
    networks = {"good": found, "bad": {"error": "it | fails"}}
    text = libraries.markdown({"some": {"version": "1.0", "networks": networks}})
    assert "1 of 2 pruned" in text and "| bad | refused: it / fails |" in text


def test_pretrained_networks_are_measured_once_and_absent_ones_skipped(tmp_path, monkeypatch, capsys):
    def load():
        torch.manual_seed(0)
        head = (torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(64, 5))
        return torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), *head).eval()

    make = pretrained_networks.classifier(load, 8, 127, 128)
    tiny = pretrained_networks.Network(("torch",), "agreement", make, needs_images=True)
    absent = pretrained_networks.Network(("no_such_package_here",), "agreement", make)
    monkeypatch.setattr(pretrained, "NETWORKS", {"tiny": tiny, "absent": absent})
    (tmp_path / "images").mkdir()
    for i in range(40):
        pixels = torch.randint(256, (9, 12, 3), generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.byte().numpy()).save(tmp_path / "images" / f"{i:02}.png")
    words = ["--images", tmp_path / "images", "--calibration", 24, "--budgets", "80%", "50%", "--epochs", 2]
    files = ["--output", tmp_path / "found.json", "--page", tmp_path / "found.md"]
    methods = ["--methods", "l2", "reconstruction+refit+few-shot"]
    monkeypatch.setattr(sys, "argv", ["pretrained", *map(str, [*words, *files, *methods])])
    pretrained.main()
    first = (tmp_path / "found.json").read_text()
    cells = json.loads(first)["cells"]
    assert [(cell["method"], cell["budget"], cell["examples"]) for cell in cells] == [
        (method, budget, 16) for method in methods[1:] for budget in ("80%", "50%")
    ]
    assert cells[2]["divergence"] <= cells[3]["divergence"] < cells[1]["divergence"]
    assert cells[2]["macs"] > cells[3]["macs"] and cells[0]["macs"] <= 0.8
    assert "absent is skipped: no_such_package_here is not installed" in capsys.readouterr().out
    pretrained.main()
    assert (tmp_path / "found.json").read_text() == first
    written = (tmp_path / "found.md").read_text()
    assert "| l2 |" in written and "| reconstruction+refit+few-shot, 2 epochs |" in written


def test_tones_have_the_frequencies_that_are_stated():
    sound, pitch = pretrained_networks.tones(6, 0.5, 8000, 0)
    spectrum = torch.fft.rfft(sound * torch.hann_window(sound.shape[1])).abs()
    for row, frequency in zip(spectrum, pitch.tolist(), strict=True):
        assert row[max(0, round(frequency / 2) - 2) :][:5].amax() > 10 * row.median()
    assert pretrained_networks.within_50_cents(pitch * 2 ** (0.4 / 12), pitch)["figure"] == 1
    assert pretrained_networks.within_50_cents(pitch * 2 ** (0.6 / 12), pitch)["figure"] == 0


def test_forecasts_of_a_frontier_are_compared_with_what_is_measured(tmp_path):
    brief = ("--networks", "perceptron", "--epochs", 1, "--points", 3, "--widths", 2, "--threads", 1)
    module("benchmarks.forecasts", *brief, "--output", tmp_path / "f.json")
    before = (tmp_path / "f.json").read_bytes()
    rows = json.loads(before)["rows"]
    assert [row["budget"] for row in rows] == ["85%", "70%", "55%", "40%", "25%"]
    losses = [row["loss"] for row in rows]
    held = [each["forecast"][1] <= each["measured"][0] <= each["forecast"][2] for each in losses]
    assert f"the interval holds the loss in {sum(held)} and" in (tmp_path / "f.md").read_text()
    module("benchmarks.forecasts", *brief, "--output", tmp_path / "f.json")
    assert (tmp_path / "f.json").read_bytes() == before
