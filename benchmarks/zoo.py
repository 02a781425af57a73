"""Prune torchvision's classifiers to half of their MACs, and compare with torch-pruning: docs/zoo.md.

    python -m benchmarks.zoo                     # all models: about an hour on one core
    python -m benchmarks.zoo --models resnet18 swin_t
    python -m benchmarks.zoo --print             # existing results, as Markdown

Every network has random weights. Ours: one `prune` step (trace, score, plan, surgery, and
the check of equivalence) to 50 % of the MACs, the same share of every group; then a forward
and a backward pass, saving, and loading in a fresh process, which must give bit-identical
logits. torch-pruning: its dependency graph and one step of its magnitude pruner at a channel
ratio that halves the MACs of a uniform network. The time is that of the step with the check, which
torch-pruning does not have, and once more without it, after a warm-up step on another network: the
median of up to five steps on fresh networks, all of which begin within 5 seconds. Each side runs in
its own process, so that its peak memory at the first step can be measured; the two sides of a
network run one after the other. Each result is saved at once, and existing results are not measured
again.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import models

from benchmarks.process import peak_memory, result_or_error
from benchmarks.results import read_json, write_json
from eval.cli import ROOT
from pruning import Budget, PruningError, cli, load, prune, save, trace
from pruning.planning import count
from pruning.utils.files import replace_file

RESULTS = ROOT / "benchmarks" / "zoo.json"
TABLE = ROOT / "docs" / "zoo.md"
CLASSES = 1000
#: Pruned first by both sides, so that imports on first use are not timed.
WARM_UP = "squeezenet1_1"
#: Timeout for a side, in seconds.
PATIENCE = 300
#: Largest number of timed steps, and the seconds within which the last one begins.
STEPS, STEPS_WITHIN = 5, 5.0


def main() -> None:
    names = models.list_models(models)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=names, default=names, metavar="NAME", help="models to prune"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="results, as JSON")
    parser.add_argument("--table", type=Path, default=TABLE, help="the table, as Markdown")
    parser.add_argument("--threads", type=cli.whole_number(1), default=1, help="CPU threads")
    parser.add_argument(
        "--patience", type=cli.number(1), default=PATIENCE, help="timeout for a side, in seconds"
    )
    parser.add_argument("--print", action="store_true", help="only print existing results")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # of one network, in this process
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        torch.set_num_threads(args.threads)
        print(json.dumps(SIDES[args.side](args.models[0], args.folder)))
        return
    results = {name: r for name, r in read_json(args.results, {}).items() if is_timed_alike(r)}
    for name in () if args.print else args.models:
        if name in results:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = {side: in_process(name, side, folder, args) for side in ("ours", "peer")}
            if "error" not in found["ours"]:
                found["ours"].update(in_process(name, "reload", folder, args))
        results[name] = found
        write_json(args.results, results, sort_keys=True)
        replace_file(args.table, markdown(results).encode())
        print(line(name, found), flush=True)
    if args.print:
        print(markdown(results))


def is_timed_alike(result: dict[str, Any]) -> bool:
    """Whether a result is one of this version, and not of one that timed the check with other work."""
    return "error" in result["ours"] or "without_check" in result["ours"]


def in_process(name: str, side: str, folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one side of a network in its own process; return its figures, or the error."""
    flags = ["--models", name, "--side", side, "--folder", folder, "--threads", str(args.threads)]
    return result_or_error("zoo", flags, args.patience)


def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    """Return a classifier with random weights, and images for it."""
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = models.get_model(name, num_classes=CLASSES, **options).eval()
    size = 299 if name == "inception_v3" else 224
    return model, torch.randn(2, 3, size, size)


def ours(name: str, folder: Path) -> dict[str, Any]:
    def checked(model: nn.Module, images: torch.Tensor, check: bool = True) -> None:
        prune(model, images, Budget(macs="50%"), score="l1", ranking="group", check=check)

    checked(*network(WARM_UP))
    seconds, memory = measured(checked, name)
    unchecked, _ = measured(functools.partial(checked, check=False), name)
    model, images = network(name)
    step = prune(model, images, Budget(macs="50%"), score="l1", ranking="group")
    small = step.model
    small(images).square().mean().backward()
    missing = [key for key, p in small.named_parameters() if p.grad is None]
    aside = {key for key, _ in model.named_parameters() if "aux" in key.lower()}  # training-only heads
    if set(missing) - aside:
        raise PruningError(f"no gradient reaches {', '.join(missing)}")
    with torch.no_grad():
        torch.save({"images": images, "logits": small.eval()(images)}, folder / "logits.pth")
    save(folder / "small.pth", small)
    traced = trace(model, images)
    return {
        "groups": len(traced.groups),
        "skipped": len(traced.skipped),
        "narrowed": sum(step.plan.widths[g] < n for g, n in traced.widths.items()),
        "params": step.after.params / step.before.params,
        "macs": count(small, images).macs / count(model, images).macs,
        "difference": step.difference,
        "seconds": seconds,
        "without_check": unchecked,
        "memory": memory,
    }


def reload(name: str, folder: Path) -> dict[str, Any]:
    """Check in a fresh process that the checkpoint gives the same logits."""
    small = load(folder / "small.pth", lambda: network(name)[0])
    before = torch.load(folder / "logits.pth", weights_only=True)
    with torch.no_grad():
        same = torch.equal(small(before["images"]), before["logits"])
    if not same:
        raise PruningError("the reloaded network gives other logits")
    return {"reloads": True}


def peer(name: str, folder: Path) -> dict[str, Any]:
    import torch_pruning as tp

    def step(model: nn.Module, images: torch.Tensor) -> None:
        tp.pruner.MagnitudePruner(
            model,
            images,
            importance=tp.importance.MagnitudeImportance(p=1),
            pruning_ratio=1 - math.sqrt(0.5),
            ignored_layers=[m for m in model.modules() if getattr(m, "out_features", 0) == CLASSES],
        ).step()

    step(*network(WARM_UP))
    seconds, memory = measured(step, name)
    model, images = network(name)
    before = count(model, images)
    step(model, images)
    with torch.no_grad():
        logits = model.eval()(images)
    if logits.shape != (len(images), CLASSES):
        raise PruningError(f"its outputs have shape {tuple(logits.shape)}")
    after = count(model, images)
    return {
        "params": after.params / before.params,
        "macs": after.macs / before.macs,
        "seconds": seconds,
        "memory": memory,
    }


def measured(step: Callable[[nn.Module, torch.Tensor], None], name: str) -> tuple[float, float]:
    """Measure a step on a network: median seconds, and peak memory in MB after the first step."""
    seconds: list[float] = []
    memory = 0.0
    while not seconds or (len(seconds) < STEPS and sum(seconds) < STEPS_WITHIN):
        model, images = network(name)
        started = time.perf_counter()
        step(model, images)
        seconds.append(time.perf_counter() - started)
        memory = memory or peak_memory()
    return statistics.median(seconds), memory


SIDES = {"ours": ours, "peer": peer, "reload": reload}


def markdown(results: dict[str, Any]) -> str:
    """Format the table, after its summary."""
    both = [r for r in results.values() if "error" not in r["ours"] and "error" not in r["peer"]]
    passed = [r["ours"] for r in results.values() if r["ours"].get("reloads")]
    peers = [r["peer"] for r in results.values() if "error" not in r["peer"]]
    changed = [r for r in peers if r["macs"] < 1]
    ratios = [r["ours"]["seconds"] / r["peer"]["seconds"] for r in both]
    unchecked = [r["ours"]["without_check"] / r["peer"]["seconds"] for r in both]
    memory = [r["ours"]["memory"] / r["peer"]["memory"] for r in both if r["peer"]["memory"]]
    lines = [
        "# The zoo",
        "",
        f"{measured_of(results)} with random weights, one step to 50 % of their MACs, made by "
        "`python -m benchmarks.zoo`, which says what is measured. Below, params and MACs are what is left.",
        "",
        f"- Ours: {len(passed)} of {len(results)} pruned; each passes the check of equivalence, forward and "
        "backward, and reloads in a fresh process with the same logits bit for bit.",
        f"- torch-pruning: {len(changed)} of {len(results)} made smaller and still running.",
    ]
    if ratios:
        lines.append(
            f"- Time with the check of equivalence, ours ÷ torch-pruning's, where both work: geometric mean "
            f"{statistics.geometric_mean(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}; without "
            f"the check {statistics.geometric_mean(unchecked):.2f}, from {min(unchecked):.2f} to "
            f"{max(unchecked):.2f}. Ours took {max(r['seconds'] for r in passed):.0f} s at most, "
            f"{max(r['without_check'] for r in passed):.0f} s without the check."
        )
    if memory:
        lines.append(
            "- Peak memory of the process, likewise: geometric mean "
            f"{statistics.geometric_mean(memory):.2f}, at most {max(memory):.2f}."
        )
    lines += [
        "",
        "| model | groups narrowed | layers kept whole | params | MACs | s | s without check | MB | "
        "torch-pruning: MACs | s | MB |",
        "|" + "---|" * 11,
    ]
    return "\n".join([*lines, *(line(name, results[name]) for name in sorted(results))]) + "\n"


def measured_of(results: dict[str, Any]) -> str:
    """Say which networks were measured."""
    names = models.list_models(models)
    if len(results) == len(names):
        return "torchvision's classification models"
    return f"{len(results)} of torchvision's {len(names)} classification models (the others later)"


def line(name: str, found: dict[str, Any]) -> str:
    mine, other = found["ours"], found["peer"]
    if "error" in mine:
        cells = [f"refused: {mine['error']}", *[""] * 6]
    else:
        cells = [
            f"{mine['narrowed']} of {mine['groups']}",
            f"{mine['skipped']}",
            f"{mine['params']:.0%}",
            f"{mine['macs']:.1%}",
            f"{mine['seconds']:.1f}",
            f"{mine['without_check']:.1f}",
            f"{mine['memory']:,.0f}",
        ]
    if "error" in other:
        cells += [f"fails: {other['error'][:90]}", "", ""]
    else:
        cells += [f"{other['macs']:.1%}", f"{other['seconds']:.1f}", f"{other['memory']:,.0f}"]
    return "| " + " | ".join([name, *(cell.replace("|", "/") for cell in cells)]) + " |"


if __name__ == "__main__":
    cli.run(main)
