"""The page of the benchmark: what the results say, a table and a figure for each network."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.fair.cells import WHOLE
from benchmarks.fair.methods import METHODS
from benchmarks.results import deviation, percent, table
from pruning.report.figures import COLORS, MARKERS, new_figure, save
from pruning.utils.files import replace_file

Run = dict[str, Any]

#: Largest distance from 1 of the control of a time.
QUIET = 0.05


def draw(content: dict[str, Any], page: Path) -> str:
    """Write the page and its figures beside it, and return its text."""
    networks = [name for name in content["settings"] if any(complete(content, name))]
    figures = {}
    for name in networks:
        stem = f"{page.stem}-{name.replace(':', '-')}"
        save(figure(content, name), page.with_name(stem))
        figures[name] = f"{stem}.png"
    text = markdown(content, networks, figures)
    replace_file(page, text.encode())
    return text


def complete(content: dict[str, Any], network: str, method: str = "", budget: str = "") -> list[Run]:
    """Return the cells of a network, or of a method and a budget, that have an accuracy; by seed."""
    found = [
        cell
        for cell in content["cells"]
        if cell["network"] == network
        and method in ("", cell["method"])
        and budget in ("", cell["budget"])
        and "accuracy" in cell
    ]
    return sorted(found, key=lambda cell: cell["seed"])


def budgets(content: dict[str, Any], network: str) -> list[str]:
    """Return the budgets of a network, the largest first."""
    found = {cell["budget"] for cell in content["cells"] if cell["network"] == network} - {WHOLE}
    return sorted(found, key=lambda budget: -float(budget.rstrip("%")))


def best_of_ours(content: dict[str, Any], network: str, budget: str) -> str | None:
    """Return our method with the best mean on the validation split, of those with the most seeds."""
    runs = {name: complete(content, network, name, budget) for name, m in METHODS.items() if m.ours}
    found = {name: cells for name, cells in runs.items() if cells}
    if not found:
        return None
    return max(
        found, key=lambda name: (len(found[name]), statistics.mean(run["validation"] for run in found[name]))
    )


def lead(ours: Sequence[Run], others: Sequence[Run]) -> tuple[float, float | None, int] | None:
    """Return the mean difference of accuracies on the seeds that both have, in points, and its σ.

    σ is that of the mean: the standard deviation of the differences over √n; None for one seed. None
    where there is no seed in common.
    """
    theirs = {run["seed"]: run["accuracy"] for run in others}
    gaps = [100 * (run["accuracy"] - theirs[run["seed"]]) for run in ours if run["seed"] in theirs]
    if not gaps:
        return None
    sigma = deviation(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
    return statistics.mean(gaps), sigma, len(gaps)


def summary(content: dict[str, Any], networks: Sequence[str]) -> str:
    """Say where ours is behind, then where it is ahead, counted from the results."""
    behind, clear, compared, single = [], 0, 0, 0
    for network in networks:
        for budget in budgets(content, network):
            ours = best_of_ours(content, network, budget)
            for name, method in METHODS.items():
                if ours is None or method.ours or name == "dense":
                    continue
                found = lead(
                    complete(content, network, ours, budget), complete(content, network, name, budget)
                )
                if found is None:
                    continue
                compared += 1
                gap, sigma, seeds = found
                single += sigma is None
                if gap < 0:
                    spread = "one seed" if sigma is None else f"σ {sigma:.2f}, {seeds} seeds"
                    behind.append(
                        f"{network} at {budget}: {-gap:.2f} points behind {method.label} ({spread})"
                    )
                elif sigma is not None and gap > 2 * sigma:
                    clear += 1
    if not compared:
        return "No method of ours can be compared with another yet."
    start = (
        f"Ours is behind in {len(behind)} of {compared} comparisons: {'; '.join(behind)}."
        if behind
        else f"Ours is not behind in any of {compared} comparisons."
    )
    alone = f" {single} of them have one seed, and so no σ." if single else ""
    return (
        f"{start}{alone} It is ahead by more than 2σ of the difference in {clear}. Ours is the one of its "
        "two methods that is better on the validation split."
    )


def markdown(content: dict[str, Any], networks: Sequence[str], figures: dict[str, str]) -> str:
    """Format the page."""
    lines = [
        "# Methods compared under equal conditions",
        "",
        summary(content, networks),
        "",
        "Made by `python -m benchmarks.fair`. All methods train a network on the same images, batches and "
        "augmentation with the same optimizer and schedule, for the same total number of epochs, those of "
        "the dense network included. The epoch that is best on the validation split is kept; the test split "
        "was looked at once. Accuracies are in percent, mean ± standard deviation over seeds. Params and "
        "MACs are counted with BatchNorm folded, the same for all. Time is that of ONNX Runtime on one "
        "thread for one image, divided by the dense network's in the same measurement (mean over seeds); it "
        f"is left out where a copy of the dense network deviated from it by more than {QUIET:.0%}, because "
        "other load disturbed the measurement. An empty cell has not been computed; an interrupted one is "
        "not counted.",
        "",
        *table(
            ["method", "what it does", "pruning steps"],
            [[m.label, m.note, m.steps] for m in METHODS.values()],
        ),
    ]
    for network in networks:
        lines += _section(content, network, figures[network])
    return "\n".join(lines).rstrip() + "\n"


def _section(content: dict[str, Any], network: str, figure: str) -> list[str]:
    facts = content["settings"][network]
    images = "all training images" if facts["train"] is None else f"{facts['train']:,} training images"
    lines = [
        f"## {network}",
        "",
        f"{facts['data']}, {images}, {facts['epochs']} epochs, {facts['dense_epochs']} of them for the dense "
        f"network; SGD with Nesterov momentum, one cycle of the rate up to {facts['rate']} (up to "
        f"{facts['later_rate']} after pruning), weight decay {facts['weight_decay']}, batches of "
        f"{facts['batch_size']}; device {facts['device']}.",
        "",
        f"![accuracy by method]({figure})",
        "",
    ]
    rows = [_row(content, network, "dense", WHOLE, None)]
    for budget in budgets(content, network):
        ours = best_of_ours(content, network, budget)
        rows += [_row(content, network, name, budget, ours) for name in METHODS if name != "dense"]
    heads = [
        "method",
        "MACs asked",
        "accuracy",
        "ours ahead by",
        "first 1,000",
        "params",
        "MACs",
        "time",
        "seeds",
    ]
    return [*lines, *table(heads, rows), *_reproduction(content, network)]


def _row(content: dict[str, Any], network: str, name: str, budget: str, ours: str | None) -> list[str]:
    runs = complete(content, network, name, budget)
    label = METHODS[name].label
    if not runs:
        said = [
            c for c in content["cells"] if (c["network"], c["method"], c["budget"]) == (network, name, budget)
        ]
        return [label, budget, "not reached" if said else "", "", "", "", "", "", str(len(said) or "")]
    found = None
    if ours is not None and name != ours:
        found = lead(complete(content, network, ours, budget), runs)
    gap = "" if found is None else f"{found[0]:+.2f}" + ("" if found[1] is None else f" (σ {found[1]:.2f})")
    mean = {key: statistics.mean(run[key] for run in runs) for key in ("params", "macs")}
    return [
        f"**{label}**" if name == ours else label,
        budget,
        percent([run["accuracy"] for run in runs]),
        gap,
        percent([run["accuracy of the first 1,000"] for run in runs]),
        f"{mean['params']:,.0f} ({mean['params'] / runs[0]['dense params']:.0%})",
        f"{mean['macs'] / 1e6:.2f} M ({mean['macs'] / runs[0]['dense macs']:.1%})",
        _time(runs),
        str(len(runs)),
    ]


def _time(runs: Sequence[Run]) -> str:
    """The mean ratio of times, of the seeds whose measurement was not disturbed."""
    ratios = [run["time ratio"][0] for run in runs if abs(run["time control"][0] - 1) <= QUIET]
    return f"{statistics.mean(ratios):.2f}" if ratios else ""


def _reproduction(content: dict[str, Any], network: str) -> list[str]:
    """The command that computes one cell again, and what it gave."""
    cells = [cell for cell in complete(content, network) if cell["method"] != "dense"]
    if not cells:
        return []
    cell = min(
        cells, key=lambda c: (not METHODS[c["method"]].ours, c["seed"], -float(c["budget"].rstrip("%")))
    )
    return [
        f"One cell again: `python -m benchmarks.fair --networks {network} --methods {cell['method']} "
        f"--budgets {cell['budget']} --seeds {cell['seed']} --results again.json --page again.md`, which "
        f"gave {100 * cell['accuracy']:.2f} %.",
        "",
    ]


def figure(content: dict[str, Any], network: str) -> Any:
    """Draw the accuracy of each method at each budget, with the standard deviation over seeds."""
    shown = budgets(content, network)
    names = [name for name in METHODS if name != "dense"]
    drawing, all_axes = new_figure(3.2 + 2.6 * max(1, len(shown)), 4.2, 1, max(1, len(shown)), sharey=True)
    dense = complete(content, network, "dense", WHOLE)
    for axes, budget in zip(all_axes, shown or [WHOLE], strict=True):
        for place, name in enumerate(names):
            accuracies = [100 * run["accuracy"] for run in complete(content, network, name, budget)]
            if accuracies:
                axes.errorbar(
                    [statistics.mean(accuracies)],
                    [place],
                    xerr=[deviation(accuracies)],
                    fmt=MARKERS[0] if METHODS[name].ours else MARKERS[1],
                    color=COLORS[1] if METHODS[name].ours else COLORS[0],
                    capsize=3,
                    ms=5,
                )
        if dense:
            axes.axvline(
                statistics.mean(100 * run["accuracy"] for run in dense), color="#555555", ls="--", lw=1
            )
        axes.set_title(f"{budget} of MACs", fontsize=10)
        axes.set_xlabel("accuracy, % (dashed: dense)")
        axes.set_yticks(range(len(names)), [METHODS[name].label for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
    return drawing
