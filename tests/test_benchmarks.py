"""The benchmarks, run as a user runs them, on the embedded digits and recipes of seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pruning import load

ROOT = Path(__file__).resolve().parent.parent
RECIPE = """
start = "lenet5"
max-params = "20%"
iterations = 1
sparsify-epochs = 1
recover-epochs = 0
finetune-epochs = 4
"""


def benchmark(name, *flags, check=True):
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *map(str, flags)],
        capture_output=True, text=True, timeout=300, cwd=ROOT, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table with one row and two seeds."""
    folder = tmp_path_factory.mktemp("table")
    (folder / "tiny").mkdir()
    (folder / "tiny" / "recipe.toml").write_text(RECIPE)
    where = ["--checkpoints", folder, "--runs", folder / "runs", "--data", "mnist5k", "--threads", 1]
    done = benchmark("table", *where, "--seeds", 0, 1)
    return folder, where, done.stdout


def test_a_row_holds_every_seed_and_the_checkpoint_of_the_best(table):
    folder, _, printed = table
    (row,) = json.loads((folder / "results.json").read_text())["rows"]
    assert row["row"] == "tiny" and row["dataset"] == "mnist5k" and row["seeds"] == [0, 1]
    assert row["accuracy"] == [run["accuracy"] for run in row["runs"]]
    best = max(row["runs"], key=lambda run: (run["validation"], -run["seed"]))
    net = load(folder / "tiny" / "best.pth")
    assert list(net.widths) == row["widths"] == best["widths"]
    assert sum(p.numel() for p in net.parameters()) == row["params"] <= 0.2 * 60074
    assert row["command"].endswith(f"--seed {best['seed']} --threads 1")
    assert "| tiny |" in printed and " ± " in printed


def test_what_is_there_is_not_computed_again_unless_the_recipe_changes(table):
    folder, where, _ = table
    before = (folder / "results.json").read_bytes()
    runs = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("best.pth")}
    benchmark("table", *where, "--seeds", 0, 1)
    assert (folder / "results.json").read_bytes() == before
    assert runs == {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("best.pth")}


def test_controls_stand_beside_the_row(table):
    folder, where, _ = table
    printed = benchmark("control", *where, "--rows", "tiny", "--seeds", 0).stdout
    controls = {
        entry["kind"]: entry for entry in json.loads((folder / "results.json").read_text())["controls"]
    }
    assert set(controls) == {"half", "scratch", "uniform", "bn-scale", "magnitude", "taylor"}
    row = json.loads((folder / "results.json").read_text())["rows"][0]
    for kind, entry in controls.items():
        assert entry["params"] <= 0.2 * 60074, kind
        assert 0.1 <= entry["accuracy"] <= 1 and f"| tiny | {kind} |" in printed
    assert controls["scratch"]["widths"] == row["widths"]
    assert controls["scratch"]["epochs"] == max(run["epochs"] for run in row["runs"])
    assert controls["half"]["epochs"] < controls["scratch"]["epochs"]
    ratios = [w / dense for w, dense in zip(controls["uniform"]["widths"], (6, 16, 120, 84), strict=True)]
    assert max(ratios) - min(ratios) < 0.1, "uniform"


def test_a_control_needs_its_row(table):
    folder, where, _ = table
    (folder / "empty").mkdir()
    (folder / "empty" / "recipe.toml").write_text(RECIPE + "\n")
    done = benchmark("control", *where, "--rows", "empty", check=False)
    assert done.returncode == 2 and "benchmarks.table --rows empty comes first" in done.stderr
    done = benchmark("table", *where, "--rows", "nowhere", check=False)
    assert done.returncode == 2 and "has no recipe" in done.stderr


def test_a_search_draws_its_front(table):
    folder, _, _ = table
    where = ["--results", folder / "search.json", "--figures", folder, "--runs", folder / "runs"]
    where += ["--data", "mnist5k", "--recipe", folder / "tiny" / "recipe.toml", "--seeds", 0, "--threads", 1]
    printed = benchmark("search", *where, "--budgets", "5%:", ":30%").stdout
    runs = json.loads((folder / "search.json").read_text())["runs"]
    assert [run["budget"] for run in runs] == ["5%:", ":30%"]
    assert runs[0]["params"] <= 0.05 * 60074 and runs[1]["macs"] <= 0.3 * 199968
    assert "| accuracy % |" in printed
    for name in ("pareto-params", "pareto-macs"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "JoshWarn" in (folder / f"{name}.svg").read_text()
    done = benchmark("search", "--budgets", "many", check=False)
    assert done.returncode == 2 and "expected PARAMS:MACS" in done.stderr
