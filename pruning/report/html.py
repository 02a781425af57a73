"""One HTML file that shows a run: what was asked and got, figures, layers, steps, settings.

It needs no network and no build step, opens from disk, prints, and follows the reader's
light or dark setting.
"""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pruning.checkpoint import read
from pruning.errors import PruningError, UserError
from pruning.planning.budget import LABELS
from pruning.planning.curves import Sensitivity
from pruning.report import plots
from pruning.utils.files import replace_file
from pruning.utils.html import document
from pruning.utils.html import text as _text

Event = Mapping[str, Any]

_CSS = """
td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
figure { margin: 0; } figcaption { font-size: .9rem; margin-top: .3rem; }
figure img { width: 100%; background: #fff; border: 1px solid var(--line); border-radius: 6px;
  padding: .4rem; }
@media print { body { max-width: none; padding: 0; } figure, tr { break-inside: avoid; } }
"""


def report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a run, by default as `report.html` into its folder.

    Besides `config.json` and `history.jsonl`, which every run has, it shows what it finds:
    `best.pth` (how it was made), `indicators.json` (what a test script measured),
    `mistakes.json` (`pruning.mistakes`) and `sensitivity.json`.

    Raises `PruningError` for a folder that holds no run, or one in which nothing has
    happened yet.
    """
    folder = Path(folder)
    settings, events = _read_run(folder)
    with _understood(folder / "history.jsonl"):
        sections = [
            _heading(folder, settings),
            _asked_and_got(events),
            _before_and_after(folder, events),
            _figures(folder, events),
            _layers(events),
            _steps(events),
            _epochs(events),
            _provenance(folder, settings),
        ]
    body = "\n".join(section for section in sections if section)
    page = document(f"{folder.name}: pruning report", body, _CSS)
    path = Path(output) if output is not None else folder / "report.html"
    replace_file(path, page.encode())
    return path


@contextlib.contextmanager
def _understood(path: Path) -> Iterator[None]:
    """What is wrong with the content of a run's file is said of that file."""
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise PruningError(
            f"{path} is not what a run writes ({type(error).__name__}: {error}); take it away, or run again"
        ) from error


def _read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        settings = json.loads((folder / "config.json").read_text())
        lines = (folder / "history.jsonl").read_text().splitlines()
        events = [json.loads(line) for line in lines]
    except FileNotFoundError as error:
        raise PruningError(f"{folder} holds no run: {Path(error.filename).name} is not there") from error
    except (OSError, ValueError) as error:
        raise PruningError(f"{folder} holds no run that can be read: {error}") from error
    if not (events and isinstance(settings, dict) and all(isinstance(event, dict) for event in events)
            and "stage" in events[0]):  # fmt: skip
        raise PruningError(
            f"{folder}: nothing has happened in this run yet, or its history is another tool's"
        )
    return settings, events


def _heading(folder: Path, settings: Mapping[str, Any]) -> str:
    facts = [str(settings[key]) for key in ("start", "data") if key in settings]
    if "seed" in settings:
        facts.append(f"seed {settings['seed']}")
    return f"<h1>Run {_text(folder.name)}</h1><p>{_text(', '.join(facts))}</p>"


def _costs(events: Sequence[Event]) -> list[Event]:
    """The events that say what the network cost: dense, after stage 1, after every step."""
    return [event for event in events if "params" in event and "macs" in event]


def _steps_of(events: Sequence[Event]) -> list[Event]:
    return [event for event in events if "asked" in event and event["stage"] != "dense"]


def _best(events: Sequence[Event]) -> float | None:
    scores = [e["validation"] for e in events if "epoch" in e and e["validation"] is not None]
    last = next((e["stage"] for e in reversed(events) if "epoch" in e), None)
    final = [
        e["validation"] for e in events if "epoch" in e and e["stage"] == last and e["validation"] is not None
    ]
    return max(final or scores, default=None)


def _asked_and_got(events: Sequence[Event]) -> str:
    steps = _steps_of(events)
    if not steps:
        return "<h2>Asked and got</h2><p>No pruning step has been made yet.</p>"
    last = steps[-1]
    rows = [
        [LABELS[what], f"≤ {limit:,}", f"{last[what]:,}", "met" if last[what] <= limit else "not yet met"]
        for what, limit in (events[0].get("asked") or last["asked"]).items()
    ]
    if timed := last.get("latency"):
        rows.append(["time of a pass, of one example", timed["asked"],
                     f"{timed['pruned']:.4f} ms, dense {timed['dense']:.4f} ms", "met"])  # fmt: skip
    return "<h2>Asked and got</h2>" + _table(["limit", "asked", "got", ""], rows)


def _before_and_after(folder: Path, events: Sequence[Event]) -> str:
    costs = _costs(events)
    if not costs:
        return ""
    first, last = costs[0], costs[-1]
    cards = [
        (f"÷ {first[what] / max(1, last[what]):.1f}", f"{LABELS[what]}: {first[what]:,} → {last[what]:,}")
        for what in ("params", "macs", "channels")
        if first.get(what)
    ]
    best = _best(events)
    if best is not None:
        cards.append((f"{100 * best:.2f} %", "best validation of the last stage"))
    measured = folder / "indicators.json"
    if measured.exists():
        with _understood(measured):
            found = json.loads(measured.read_text())
            cards += [
                (f"{100 * found['accuracy']:.2f} %", f"accuracy on {found['dataset']}/{found['split']}"),
                (f"{found['infer_time_ms']:.4f} ms", f"per image at batch {found['batch_size']}"),
            ]
    inner = "".join(
        f'<div class="card"><b>{_text(big)}</b><span>{_text(small)}</span></div>' for big, small in cards
    )
    return f'<h2>Before and after</h2><div class="cards">{inner}</div>'


def _figures(folder: Path, events: Sequence[Event]) -> str:
    figures: list[tuple[Any, str]] = []
    if any("epoch" in event for event in events):
        figures.append(
            (plots.history(events), "Validation over all epochs, and costs after every pruning step.")
        )
    widths = _widths(events)
    if widths:
        figures.append(
            (plots.widths(*widths), "Channels of every group in the dense network and in the result.")
        )
    scales = next((e["scales"] for e in events if e["stage"] == "sparsify" and e.get("scales")), None)
    if scales:
        start: dict[str, list[float]] = next(
            (e["scales"] for e in events if e["stage"] == "dense" and e.get("scales")), {}
        )
        before = {name: start.get(name, [1.0] * len(values)) for name, values in scales.items()}
        shown = dict(list(scales.items())[:16])
        note = "" if len(shown) == len(scales) else f" The first 16 of {len(scales)} groups."
        figures.append(
            (plots.scale_histograms({n: before[n] for n in shown}, shown),
             f"Scales γ of BatchNorm before and after stage 1; the largest of each channel.{note}")
        )  # fmt: skip
    analysis = folder / "sensitivity.json"
    if analysis.exists():
        with _understood(analysis):
            found = Sensitivity.from_json(json.loads(analysis.read_text())["sensitivity"])
            figures += [
                (plots.sensitivity_curves(found), "Sensitivity: accuracy as one group alone is narrowed."),
                (plots.sensitivity_map(found), "The same at a glance."),
                (plots.lost_per_cost(found), "What the MACs cost that each group can give."),
            ]
    compared = folder / "mistakes.json"
    if compared.exists():
        with _understood(compared):
            figures += _mistakes(json.loads(compared.read_text()))
    inner = "".join(
        f'<figure><img alt="{_text(caption)}" src="{_embedded(figure)}">'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
        for figure, caption in figures
    )
    return f'<h2>Figures</h2><div class="figures">{inner}</div>' if inner else ""


def _mistakes(found: Mapping[str, Any]) -> list[tuple[Any, str]]:
    """Figures of `mistakes.json`, which the run wrote of its validation split."""
    figures: list[tuple[Any, str]] = []
    for kind, only, other in (("lost", "dense", "small"), ("won", "small", "dense")):
        kept = [example for example in found[kind] if example["image"]]
        if kept:
            captions = [f"{example['truth']}, not {example[other]}" for example in kept]
            caption = (
                f"Validation images that only the {only} network gets right: {found['count'][kind]}, "
                f"{len(kept)} of them here, with the truth and what the {other} one says."
            )
            figures.append((plots.examples([example["image"] for example in kept], captions), caption))
    counts = found["confusion"]["small"]
    if len(counts) <= 30:
        names = [str(i) for i in range(len(counts))]
        figures.append(
            (plots.confusion(counts, names), "Confusion of the small network on the validation split.")
        )
    return figures


def _widths(events: Sequence[Event]) -> tuple[dict[str, int], dict[str, int]] | None:
    """Widths of the dense network, and of the network after the last pruning step."""
    dense = next((e["widths"] for e in events if e["stage"] == "dense"), None)
    steps = _steps_of(events)
    if not steps:
        return None
    return dict(dense or steps[0]["widths"]), dict(steps[-1]["widths"])


def _layers(events: Sequence[Event]) -> str:
    widths = _widths(events)
    if widths is None:
        return ""
    before, after = widths
    rows = [
        [name, full, after.get(name, "layer removed"), f"{after[name] / full:.0%}" if name in after else ""]
        for name, full in before.items()
    ]
    table = _table(["group", "dense", "kept", "share"], rows)
    skipped: dict[str, str] = next((e["skipped"] for e in events if e["stage"] == "dense"), {})
    reasons = "".join(f"<li><b>{_text(layer)}</b>: {_text(why)}</li>" for layer, why in skipped.items())
    kept_whole = (
        f"<details><summary>Layers kept whole, and why: {len(skipped)}</summary><ul>{reasons}</ul></details>"
    )
    return f"<h2>Layers</h2>{table}{kept_whole if skipped else ''}"


def _steps(events: Sequence[Event]) -> str:
    rows = []
    for event in _steps_of(events):
        asked = ", ".join(f"≤ {limit:,} {LABELS[what]}" for what, limit in event["asked"].items())
        removed = ", ".join(event.get("removed", ())) or "–"
        after = [e["validation"] for e in events if e["stage"] == event["stage"] and "epoch" in e]
        rows.append(
            [event["stage"], asked, f"{event['params']:,}", f"{event['macs']:,}", removed,
             f"{event['validation']:.4f}", f"{after[-1]:.4f}" if after and after[-1] is not None else "–"]
        )  # fmt: skip
    trials = [[", ".join(e["removed"]) or "none", f"{e['validation']:.4f}"]
              for e in events if e["stage"].endswith("whole layers")]  # fmt: skip
    if not rows:
        return ""
    heads = ["step", "asked", "params", "MACs", "whole layers removed", "validation", "after training"]
    tried = "<p>Trials of whole layers, each pruned to the budget and trained a little:</p>" + _table(
        ["without", "validation"], trials
    )
    return f"<h2>Pruning steps</h2>{_table(heads, rows)}{tried if trials else ''}"


def _epochs(events: Sequence[Event]) -> str:
    rows = [
        [
            e["stage"],
            e["epoch"],
            f"{e['train_loss']:.4f}",
            "–" if e["validation"] is None else f"{e['validation']:.4f}",
        ]
        for e in events
        if "epoch" in e
    ]
    table = _table(["stage", "epoch", "training loss", "validation"], rows)
    return f"<h2>History</h2><details><summary>{len(rows)} epochs</summary>{table}</details>" if rows else ""


def _provenance(folder: Path, settings: Mapping[str, Any]) -> str:
    made = ""
    if (folder / "best.pth").exists():
        facts = read(folder / "best.pth").get("provenance", {})
        made = f"<p>How best.pth was made:</p><pre>{_text(json.dumps(facts, indent=2))}</pre>"
    return (
        f"<h2>Settings and provenance</h2>{made}<details><summary>config.json</summary>"
        f"<pre>{_text(json.dumps(settings, indent=2))}</pre></details>"
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _embedded(figure: Any) -> str:
    """A figure as a data address."""
    return f"data:image/svg+xml;base64,{base64.b64encode(plots.svg(figure)).decode()}"
