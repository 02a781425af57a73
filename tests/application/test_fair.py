"""The benchmark of methods under equal conditions, with a tiny network on a few digits."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import sys
from functools import partial

import pytest
import torch
from commands import few_digits, module
from killed import Killed, killed

import data
from benchmarks.fair import page
from benchmarks.fair.cells import VERSION, Cell, Results, locked
from benchmarks.fair.measure import times
from benchmarks.fair.methods import METHODS, distances, narrowed, summed_layers
from benchmarks.fair.recipes import NETWORKS, Recipe, network
from benchmarks.fair.training import Workshop
from pruning import PruningError, trace
from pruning.deploy import Exported, time_forward
from pruning.planning.cost import deployed_cost

TINY = """
from torch import nn

def tiny(image_shape, classes):
    return nn.Sequential(
        nn.Conv2d(image_shape[0], 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(4),
        nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
    )
"""
FLAGS = ("--networks", "tiny_fair:tiny", "--data", "mnist5k", "--epochs", 3, "--dense-epochs", 1)
FLAGS += ("--train", 150, "--batch-size", 50, "--seconds", 0.01, "--seeds", 0, "--budgets", "50%")


def where(folder):
    return ("--results", folder / "fair.json", "--runs", folder / "runs", "--page", folder / "fair.md")


@pytest.fixture(scope="module", autouse=True)
def digits():
    """A fifth of the embedded digits."""
    with few_digits():
        yield


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the module of a tiny network."""
    (tmp_path / "tiny_fair.py").write_text(TINY)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("tiny_fair", None)


@pytest.fixture
def tiny(folder, monkeypatch):
    """The folder; the network is timed briefly and as it is, because each export takes seconds.

    torch-pruning takes fewer and larger steps.
    """
    monkeypatch.setattr("benchmarks.fair.measure.exported", lambda models, *_, **__: models)
    monkeypatch.setattr("benchmarks.fair.measure.time_forward", partial(time_forward, warmup=0.01))
    monkeypatch.setattr("benchmarks.peers.STEPS", 20)
    return folder


def cells(folder):
    return {cell["method"]: cell for cell in json.loads((folder / "fair.json").read_text())["cells"]}


def times_of(cell):
    return {key: cell[key] for key in ("milliseconds", "time ratio", "time control")}


def test_cells_are_computed_once_and_shown(tiny):
    """Two methods and one that needs the result of the first."""
    methods = ("--methods", "slimming", "scratch", "dense")
    done = module("benchmarks.fair", *FLAGS, *methods, *where(tiny))
    found = cells(tiny)
    assert set(found) == {"slimming", "scratch", "dense"} and done.stdout.count("seed 0\n") == 3
    dense = found["dense"]
    assert dense["macs"] == dense["dense macs"] and dense["epochs"] == 1
    for name in ("slimming", "scratch"):
        assert found[name]["macs"] <= 0.5 * dense["macs"] and found[name]["epochs"] == 3
        assert 0 <= found[name]["accuracy"] <= 1 and found[name]["milliseconds"] > 0
    assert found["scratch"]["params"] == found["slimming"]["params"]
    text = (tiny / "fair.md").read_text()
    assert "| slimming's widths, from scratch | 50% |" in text and "| FPGM | 50% |  |" in text
    assert (tiny / "fair-tiny_fair-tiny.png").read_bytes().startswith(b"\x89PNG")

    before = (tiny / "fair.json").read_bytes()
    again = module("benchmarks.fair", *FLAGS, *methods, *where(tiny))
    assert "seed 0\n" not in again.stdout and (tiny / "fair.json").read_bytes() == before
    module("benchmarks.fair", *FLAGS, *methods, "--time", *where(tiny))
    timed = cells(tiny)
    assert timed["slimming"]["milliseconds"] != found["slimming"]["milliseconds"]
    assert {**timed["slimming"], **times_of(found["slimming"])} == found["slimming"]
    (tiny / "fair.json").write_bytes(before)
    drawn = module("benchmarks.fair", "--draw", *where(tiny))
    assert drawn.stdout == again.stdout and (tiny / "fair.json").read_bytes() == before
    with pytest.raises(PruningError, match="has the cell tiny_fair:tiny, dense, 100%, seed 0 already"):
        Results(tiny / "fair.json").add(Cell("tiny_fair:tiny", "dense", "100%", 0), {})

    other = module("benchmarks.fair", *FLAGS, "--rate", 0.3, *methods, *where(tiny), check=False)
    assert other.returncode == 2 and "other settings (rate 0.1, now 0.3)" in other.stderr
    assert (tiny / "fair.json").read_bytes() == before


@pytest.mark.slow
def test_every_method_meets_the_budget_in_the_same_epochs(tiny):
    module("benchmarks.fair", *FLAGS, *where(tiny))
    found = cells(tiny)
    assert set(found) == set(METHODS) and not any("refused" in cell for cell in found.values())
    dense = found.pop("dense")
    assert all(cell["macs"] <= 0.5 * dense["macs"] and cell["epochs"] == 3 for cell in found.values())
    assert all(cell["dense macs"] == dense["macs"] for cell in found.values())
    starts = sorted(path.parent.name.split("-100")[0] for path in (tiny / "runs").rglob("trained.pth"))
    assert starts == ["dense", "dense__regularized", "scratch-50pc-0", "uniform-50pc-0"]

    # With results of another machine, whose networks are not here, a cell gives the same.
    content = json.loads((tiny / "fair.json").read_text())
    content["cells"] = [cell for cell in content["cells"] if cell["method"] != "scratch"]
    (tiny / "fair.json").write_text(json.dumps(content))
    shutil.rmtree(tiny / "runs")
    module("benchmarks.fair", *FLAGS, "--methods", "scratch", *where(tiny))
    same = ("accuracy", "validation", "params", "macs")
    assert [cells(tiny)["scratch"][key] for key in same] == [found["scratch"][key] for key in same]


@pytest.mark.slow
def test_a_killed_cell_is_resumed_and_ends_as_if_it_had_not_been_killed(tiny, monkeypatch):
    """It is killed in the stages of slimming, then in the training of a cell from scratch."""
    flags = ("--methods", "uniform", "slimming", "--epochs", 4)
    words = (*FLAGS, *flags, *where(tiny))
    process = killed("state.pth", signal.SIGKILL, "benchmarks.fair", *words, cwd=tiny)
    assert process.returncode == -signal.SIGKILL and list((tiny / "runs").rglob("state.pth"))
    assert cells(tiny) == {}, "a cell that is not complete is not in the results"
    replace = os.replace

    def replace_and_die(source, target, **options):
        replace(source, target, **options)
        if os.path.basename(target) == "trained.state":
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", replace_and_die)
        module("benchmarks.fair", *words)
    assert cells(tiny).keys() == {"slimming"} and list((tiny / "runs").rglob("trained.state"))
    module("benchmarks.fair", *words)
    assert not list((tiny / "runs").rglob("*.state"))

    whole = tiny / "whole"
    whole.mkdir()
    module("benchmarks.fair", *FLAGS, *flags, *where(whole))
    same = ("accuracy", "validation", "params", "macs")
    for method, uninterrupted in cells(whole).items():
        resumed = cells(tiny)[method]
        assert [resumed[key] for key in same] == [uninterrupted[key] for key in same]


@pytest.mark.slow
def test_times_are_those_of_onnx_runtime(folder, monkeypatch):
    pytest.importorskip("onnxscript")
    timed = []

    def time_recorded(models, *args, **kwargs):
        timed.extend((name, type(model)) for name, model in models.items())
        return time_forward(models, *args, **kwargs)

    monkeypatch.setattr("benchmarks.fair.measure.time_forward", time_recorded)
    digits = data.load("mnist5k", quiet=True)
    workshop = Workshop("tiny_fair:tiny", Recipe(), digits, "digits", folder)
    small = narrowed(workshop.new(0), {"0": 2, "4": 2}, workshop.example)
    found = times(small, workshop, seconds=0.2)
    assert timed == [("dense", Exported), ("pruned", Exported), ("again", Exported)]
    for middle, low, high in (found["time ratio"], found["time control"]):
        assert 0 < low <= middle <= high
    assert found["milliseconds"] > 0


def test_a_locked_cell_is_left_to_the_process_that_computes_it(tmp_path):
    with locked(tmp_path / "cell", wait=False) as first, locked(tmp_path / "cell", wait=False) as second:
        assert first and not second
    with locked(tmp_path / "cell", wait=True) as third:
        assert third


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps({"format": "benchmarks.fair", "version": VERSION + 1}), f"has version {VERSION + 1}"),
        (json.dumps({"rows": []}), "holds no results of this benchmark"),
        (json.dumps([1]), "holds no results of this benchmark"),
        ('{"format": "benchmarks.fa', "cannot be read"),
    ],
)
def test_a_results_file_that_is_none_is_named_and_kept(tmp_path, content, message):
    path = tmp_path / "fair.json"
    path.write_text(content)
    done = module("benchmarks.fair", "--draw", *where(tmp_path), check=False)
    assert done.returncode == 2 and str(path) in done.stderr and message in done.stderr
    assert path.read_text() == content


def test_settings_that_cannot_be_are_refused(tmp_path):
    for flags, message in (
        (("--epochs", 3, "--dense-epochs", 3), "leave at least 1 for training after pruning"),
        (("--budgets", "1k"), "expected a share"),
        (("--rate", 0), "TrainConfig.lr"),
        (("--device", "gpu"), "gpu"),
        (("--data", "cifar10", "--data-dir", tmp_path / "none", "--networks", "nothing"), "cifar10|CIFAR10"),
    ):
        done = module("benchmarks.fair", *flags, *where(tmp_path), check=False)
        assert done.returncode == 2 and any(word in done.stderr for word in message.split("|")), done.stderr
    with pytest.raises(PruningError, match="network 'nothing': expected one of resnet8"):
        network("nothing", (3, 32, 32), 10)


def test_the_networks_have_the_stated_costs():
    """Sums of inputs x outputs x kernel x positions."""
    plain = 9 * (1024 * (3 * 18 + 18 * 18) + 256 * (18 * 36 + 36 * 36) + 64 * (36 * 72 + 72 * 72)) + 720
    residual = 9 * (1024 * (3 * 16 + 2 * 16 * 16) + 256 * (16 * 32 + 32 * 32) + 64 * (32 * 64 + 64 * 64))
    residual += 256 * 16 * 32 + 64 * 32 * 64 + 640  # shortcuts and the head
    for name, macs in {"resnet8": residual, "plain": plain}.items():
        assert deployed_cost(network(name, (3, 32, 32), 10), torch.zeros(2, 3, 32, 32)).macs == macs
    assert {"resnet20", "resnet56", "resnet164", "vgg16", "vgg19", "densenet40"} <= set(NETWORKS)


def test_new_weights_of_a_narrowed_network_have_the_variance_of_their_inputs():
    torch.manual_seed(0)
    new = torch.nn.Sequential(torch.nn.Conv2d(3, 512, 3), torch.nn.ReLU(), torch.nn.Conv2d(512, 64, 3))
    torch.nn.init.kaiming_normal_(new[2].weight)
    example = torch.randn(2, 3, 8, 8)
    before = copy.deepcopy(new.state_dict())
    small = narrowed(new, {"0": 128}, example)
    assert small[2].weight.shape == (64, 128, 3, 3)
    assert small[2].weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    assert torch.equal(small[0].weight, before["0.weight"][:128])


def test_distances_are_sums_over_all_other_filters():
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 1, bias=False), torch.nn.ReLU(), torch.nn.Conv2d(3, 2, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([0.0, 1.0, 4.0]).view(3, 1, 1, 1))
    found = distances(net, trace(net, torch.randn(2, 1, 4, 4)))["0"]
    assert torch.allclose(found / found[0], torch.tensor([5.0, 4.0, 7.0]) / 5)


def test_layers_of_residual_sums_are_found():
    net = network("resnet8", (3, 32, 32), 10)
    found = summed_layers(net, trace(net, torch.zeros(2, 3, 32, 32)))
    assert "stem" in found and "stages.stage2.block1.shortcut" in found
    assert "stages.stage1.block1.residual.conv1" not in found
    plain = network("plain", (3, 32, 32), 10)
    assert summed_layers(plain, trace(plain, torch.zeros(2, 3, 32, 32))) == []


def entry(method, seed, accuracy, budget="50%", validation=0.5):
    costs = {"params": 5, "macs": 50, "dense params": 10, "dense macs": 100}
    return {
        "network": "resnet8", "method": method, "budget": budget, "seed": seed, "accuracy": accuracy,
        "accuracy of the first 1,000": accuracy, "validation": validation, "time ratio": [0.5, 0.4, 0.6],
        "time control": [1.01 + 0.1 * seed, 1, 1.2], **costs,
    }  # fmt: skip


def test_the_first_paragraph_says_where_ours_is_behind(tmp_path):
    from dataclasses import asdict

    settings = {"resnet8": {"data": "cifar10-0", "device": "cpu", **asdict(Recipe())}}
    runs = [entry("dense", seed, 0.9, "100%") for seed in range(3)]
    # Chosen on the validation split, although the other is better on the test split.
    runs += [entry("slimming", seed, (0.80, 0.82, 0.84)[seed], validation=0.7) for seed in range(3)]
    runs += [entry("taylor-refit", seed, 0.99, validation=0.6) for seed in range(3)]
    runs += [entry("scratch", seed, (0.81, 0.84, 0.87)[seed]) for seed in range(3)]
    runs += [entry("fpgm", seed, (0.70, 0.71, 0.75)[seed]) for seed in range(3)]
    runs += [entry("uniform", 0, 0.79)]
    runs += [{key: runs[0][key] for key in ("network",)} | {
        "method": "l1-filters", "budget": "50%", "seed": 0, "refused": "too tight"}]  # fmt: skip
    content = {"settings": settings, "cells": runs}
    text = page.draw(content, tmp_path / "fair.md")
    first = text.split("\n\n")[1]
    assert first.startswith(
        "Ours is behind in 1 of 3 comparisons: resnet8 at 50%: 2.00 points behind slimming's widths, from "
        "scratch (σ 0.58, 3 seeds)."
    ), first
    assert "| 0.50 | 3 |" in text, "the time of the quiet seed"
    assert "ahead by more than 2σ of the difference in 1." in first
    assert (
        "| **slimming (ours)** | 50% | 82.00 ± 2.00 |" in text
        and "| L1 filters | 50% | not reached |" in text
    )
    assert "| FPGM | 50% | 72.00 ± 2.65 | +10.00 (σ 0.58) |" in text
    assert (tmp_path / "fair-resnet8.svg").exists()
    ahead = page.summary(
        {"settings": settings, "cells": [r for r in runs if r["method"] != "scratch"]}, ["resnet8"]
    )
    assert ahead.startswith(
        "Ours is not behind in any of 2 comparisons. 1 of them have one seed, and so no σ."
    )


def test_the_figures_of_the_paper_are_drawn_from_results_that_are_computed_once(tiny):
    where = ("--results", tiny / "paper.json", "--runs", tiny / "runs", "--figures", tiny)
    flags = ("--network", "tiny_fair:tiny", "--data", "mnist5k", "--epochs", 2, "--dense-epochs", 1)
    flags += ("--train", 300, "--batch-size", 50, "--strengths", 0, 0.1, "--shares", 30, 99, "--passes", 2)
    done = module("benchmarks.fair.paper", *flags, *where)
    entries = json.loads((tiny / "paper.json").read_text())["cells"]
    found = {(cell["method"], cell["budget"]): cell for cell in entries}
    assert len(found) == 2 + 4 + 2 and done.stdout.count("seed 0\n") == 8
    weak, strong = (found["scales", strength]["scales"] for strength in ("0", "0.1"))
    assert len(weak) == 14 and sum(strong) < sum(weak), "the L1 term makes scales smaller"
    assert "refused" in found["pruned", "0 99%"] and 0 < found["pruned", "0 30%"]["error before"] <= 1
    first, second = (found["pass", f"0.1 30% {number}"] for number in (1, 2))
    assert 0.4 < second["channels"] < first["channels"] <= 0.7
    for name in ("scales", "shares", "passes"):
        assert (tiny / f"fair-{name}.svg").read_text().startswith("<?xml")
    again = module("benchmarks.fair.paper", *flags, *where)
    assert "seed 0\n" not in again.stdout and "fair-scales.png" in again.stdout
    missing = module("benchmarks.fair.paper", "--draw", "--seed", 3, *where, check=False)
    assert missing.returncode == 2 and "nothing of resnet8, seed 3" in missing.stderr


def test_bf16_changes_the_loss_by_rounding_alone(tmp_path):
    digits = data.load("mnist5k", quiet=True)
    shops = [Workshop("plain", Recipe(bf16=bf16), digits, "digits", tmp_path) for bf16 in (False, True)]
    images, labels = shops[0].calibration[0]
    losses, types = [], []
    for shop in shops:
        model = shop.new(0).eval()
        convolution = next(layer for layer in model.modules() if isinstance(layer, torch.nn.Conv2d))
        convolution.register_forward_hook(lambda layer, args, output: types.append(output.dtype))
        losses.append(float(shop.loss(model, images, labels).detach()))
    assert types == [torch.float32, torch.bfloat16] and losses[1] == pytest.approx(losses[0], rel=0.02)
