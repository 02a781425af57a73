"""Run the benchmarks that measure times, with networks and durations as small as they can be."""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
from functools import partial

import pytest
import torch
from commands import children_in_process, few_digits, module
from torch import nn

from benchmarks import equal_accuracy, pipeline, process, results, runtimes, timing
from pruning import PruningError
from pruning.deploy import time_forward
from pruning.errors import CheckpointError


@pytest.fixture(scope="module", autouse=True)
def digits():
    """A fifth of the embedded digits."""
    with few_digits():
        yield


def convolutions(name):
    """Return a network in the place of torchvision's, which take seconds to export."""
    layers = nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


@pytest.fixture(scope="module")
def in_runtimes(tmp_path_factory):
    """Run the benchmark of runtimes without the compiler; return its results and its output."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    output = tmp_path_factory.mktemp("runtimes") / "out.json"
    chosen = [name for name in runtimes.RUNTIMES if name != runtimes.COMPILED]
    flags = ["--seconds", 0.05, "--warmup", 0.05, "--calibration", 100, "--runtimes", *chosen]
    flags += ["--models", "squeezenet1_1", "--image-size", 32, "--output", output]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.models.get_model", convolutions)
        patch.setattr("pruning.deploy.onnx_rewrite.time_forward", partial(time_forward, warmup=0.01))
        printed = module("benchmarks.runtimes", *flags).stdout
    assert sorted(path.name for path in output.parent.iterdir()) == ["out.json", "out.md"]
    assert output.with_suffix(".md").read_text() == printed
    return json.loads(output.read_text()), printed


def test_every_network_is_timed_in_every_runtime(in_runtimes):
    result, _ = in_runtimes
    trained = {(row["runtime"], row["network"]): row["accuracy"] for row in result["accuracy"]}
    assert len(trained) == 10 and min(trained.values()) > 0.95, "untrained networks are excluded"
    found = {(row["batch"], row["runtime"], row["network"]): row for row in result["times"]}
    assert len(found) == len(result["times"]) == 2 * (5 + 4 * 4)
    for (batch, runtime, network), row in found.items():
        assert 0 < row["median ms"] <= row["p90 ms"] and row["turns"] >= 20
        for key, base in {"to LeNet-5": runtime, "to LeNet-5 in eager": runtimes.EAGER}.items():
            ratio, low, high = row[key]
            assert low <= ratio <= high
            reference = found[batch, base, runtimes.REFERENCE]["median ms"]
            assert math.isclose(ratio, row["median ms"] / reference, rel_tol=1e-2), "up to rounding"
        if network == runtimes.REFERENCE:
            assert row["to LeNet-5"] == [1, 1, 1]
    assert result["left out"] == {}


def test_the_speed_up_of_torchvision_networks_is_compared_with_their_macs(in_runtimes):
    rows = in_runtimes[0]["torchvision"]
    assert [row["runtime"] for row in rows] == [runtimes.EAGER, runtimes.FLOAT]
    for row in rows:
        macs, (_, low, high) = row["MACs"], row["to dense"]
        assert macs["pruned"] <= 0.5 * macs["dense"] and row["multiple"] == 16
        speed_up = row["dense"]["median ms"] / row["pruned"]["median ms"]
        realized = speed_up / (macs["dense"] / macs["pruned"])
        assert math.isclose(row["speed-up / reduction of MACs"], realized, rel_tol=2e-2)
        assert row["slower than dense"] == ("no" if high <= 1 else "yes" if low > 1 else "undecided")


@pytest.mark.parametrize("control", [0.97, 1.03])
def test_a_control_that_is_not_1_is_marked_and_reported(in_runtimes, control):
    result = copy.deepcopy(in_runtimes[0])
    for row in (*result["times"], *result["torchvision"]):
        row["control"] = [1.02, 0.9, 1.1]
    text = runtimes.markdown(result)
    assert "✗" not in text and "All controls are within 0.02 of 1." in text
    for row in result["times"]:
        if (row["runtime"], row["batch"]) == (runtimes.EAGER, 64):
            row["control"] = [control, control - 0.01, control + 0.01]
    text = runtimes.markdown(result)
    place = f"eager, batch 64: {control:.3f}"
    marked = [line for line in text.splitlines() if f"**✗ {control:.3f}" in line]
    assert len(marked) == 5 and all(line.startswith("| eager |") for line in marked)
    assert f"Not all controls are within 0.02 of 1; do not rely on the ratios beside these. {place}." in text


def test_a_runtime_whose_compiler_fails_is_omitted(tmp_path, monkeypatch):
    from torch._inductor import config

    flags = ["--seconds", 0.01, "--warmup", 0, "--runtimes", "compiled", "--models", "--batch-sizes", 1]
    flags += ["--output", tmp_path / "out.json"]
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        printed = module("benchmarks.runtimes", *flags).stdout
    result = json.loads((tmp_path / "out.json").read_text())
    assert {row["runtime"] for row in result["times"]} == {"eager"}
    assert list(result["left out"]) == ["compiled"] and "Left out: compiled. " in printed


def test_results_are_written_atomically(tmp_path, monkeypatch, capsys):
    results.write(tmp_path / "out.json", {"ratio": 1}, "one\n")
    assert json.loads((tmp_path / "out.json").read_text()) == {"ratio": 1}
    assert (tmp_path / "out.md").read_text() == "one\n" == capsys.readouterr().out

    def fail(*_):
        raise OSError(28, "no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(CheckpointError, match="no space left"):
        results.write(tmp_path / "out.json", {"ratio": 2}, "two\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.md"]
    assert json.loads((tmp_path / "out.json").read_text()) == {"ratio": 1}


def test_pinning_limits_the_process_to_the_given_number_of_cores():
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system has no affinity")
    before = os.sched_getaffinity(0)
    try:
        timing.pin(1)
        assert len(os.sched_getaffinity(0)) == 1 and os.sched_getaffinity(0) <= before
    finally:
        os.sched_setaffinity(0, before)


def test_costs_at_equal_accuracy_are_interpolated_between_budgets():
    def point(accuracy, cost):
        return {"budget": "", "accuracy": accuracy, **dict.fromkeys(equal_accuracy.COSTS, cost)}

    ours = [point([0.90, 0.92], 100), point([0.95], 400)]
    assert equal_accuracy.at_equal_accuracy(point([0.93], 400), ours)["MACs"] == 0.5  # √(100 · 400) / 400
    assert equal_accuracy.at_equal_accuracy(point([0.95], 800), ours)["params"] == 0.5
    assert equal_accuracy.at_equal_accuracy(point([0.96], 800), ours)["MACs"] is None
    assert equal_accuracy.at_equal_accuracy(point([0.90], 800), ours)["MACs"] is None


def test_networks_at_several_budgets_are_compared_with_torch_pruning(tmp_path):
    pytest.importorskip("torch_pruning")
    flags = [f"--{stage}-epochs=1" for stage in ("sparsify", "recover", "finetune")]
    flags += ["--repeats=1", "--threads=1", "--iterations=1", "--batch-size=32", "--seconds=0.1"]
    flags += ["--budgets", "15%", "40%", f"--output={tmp_path}/out.json"]
    with children_in_process():
        printed = module("benchmarks.equal_accuracy", *flags).stdout
    result = json.loads((tmp_path / "out.json").read_text())
    assert [point["budget"] for point in result["points"]["ours"]] == ["15%", "40%"]
    for points in result["points"].values():
        small, large = (point["MACs"] for point in points)
        assert small <= 0.15 * 199_968 and small < large <= 0.4 * 199_968
    assert all(run["milliseconds"]["64"] < run["milliseconds"]["1"] for run in result["runs"])
    assert (tmp_path / "out.md").read_text() == printed


def test_the_pipeline_is_compared_with_torch_pruning(tmp_path):
    pytest.importorskip("torch_pruning")
    flags = [f"--{stage}-epochs=1" for stage in ("sparsify", "recover", "finetune")]
    flags += ["--repeats=2", "--threads=1", "--iterations=1", "--batch-size=32"]
    flags += [f"--output={tmp_path}/out.json", "--sides", "ours", "loader 0"]
    with children_in_process():
        printed = module("benchmarks.pipeline", *flags).stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.md"]
    assert (tmp_path / "out.md").read_text() == printed
    result = json.loads((tmp_path / "out.json").read_text())
    order = [(run["side"], run["seed"]) for run in result["runs"]]
    assert order == [("ours", 0), ("loader 0", 0), ("loader 0", 1), ("ours", 1)]
    macs = [run["macs"] for run in result["runs"]]
    assert max(macs) <= 1.1 * min(macs), "all sides train networks of about the same size"
    for run in result["runs"]:
        assert run["macs"] <= 0.25 * 199_968 and 0.5 < run["accuracy"] <= 1 and run["memory"] > 100
        times = list(run["seconds until the end of"].values())
        assert len(times) == 3 and times == sorted(times) and times[-1] <= run["seconds"] + 0.01
    ours, loader = (
        [run["seconds"] for run in result["runs"] if run["side"] == side] for side in ("ours", "loader 0")
    )
    ratio, least, most = result["ratios"]["loader 0"]["seconds"]
    assert least <= ratio <= most
    assert math.isclose(least, min(a / b for a, b in zip(ours, loader, strict=True)), abs_tol=1e-3)
    assert (
        f"Ours takes {ratio:.2f} of the time of torch-pruning with the quicker loader (loader 0)." in printed
    )


def test_a_part_of_a_benchmark_runs_in_its_own_process():
    flags = [f"--{stage}-epochs=1" for stage in ("sparsify", "recover", "finetune")]
    flags += ["--threads=1", "--iterations=1", "--batch-size=512", "--side=ours"]
    found = process.run_module("pipeline", flags)
    assert found["memory"] > 100 and 0.1 < found["accuracy"] <= 1
    with children_in_process(), pytest.raises(PruningError, match="expected a whole number from 1"):
        process.run_module("pipeline", [*flags, "--threads=0"])


def test_data_loaders_and_tensors_in_memory_give_the_same_images():
    import data

    digits = data.load("mnist5k", quiet=True)
    flags = argparse.Namespace(side="loader 0", batch_size=32)
    _, loaded = pipeline.splits(digits, flags)
    _, ours = pipeline.splits(digits, argparse.Namespace(side="memory", batch_size=32))
    for (images, labels), (same, targets) in zip(loaded, ours, strict=True):
        assert torch.equal(labels, targets) and torch.allclose(images, same, atol=1e-6)
