"""The report of a run as one HTML file: budget and result, figures, layers, steps, epochs, settings.

The file opens from disk without a network connection, can be printed, and follows the reader's light or
dark mode. This module collects plain data from the run's files; the template `report.html` lays it out.
"""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from pruning.checkpoint import read
from pruning.errors import PruningError, UserError
from pruning.planning.budget import LABELS
from pruning.planning.curves import Sensitivity
from pruning.report import plots
from pruning.report.figures import svg
from pruning.report.plots import Event
from pruning.report.prediction_tables import (
    Thumbnails,
    class_names,
    confusion_matrix,
    wrong_predictions,
)
from pruning.report.sensitivity_plots import lost_per_cost, sensitivity_curves, sensitivity_map
from pruning.utils.files import replace_file
from pruning.utils.html import render

if TYPE_CHECKING:
    from pruning.report.figures import Figure

#: Rows of a table; each cell is converted to text.
Rows: TypeAlias = list[list[object]]

#: Largest number of groups whose scales are plotted.
MAX_HISTOGRAMS = 16


class Picture(NamedTuple):
    """Figures of one kind embedded in the page side by side, as SVG in base64, and their caption."""

    svgs: list[str]
    caption: str


def report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a run.

    Every run has `config.json` and `history.jsonl`. If they exist, the report also shows `best.pth` (its
    provenance), `indicators.json` (the results of a test script), `mistakes.json` (see
    `pruning.report.predictions`) and `sensitivity.json`.

    Args:
        folder: the run's folder.
        output: the file to write, by default `report.html` in the run's folder.

    Returns:
        The path of the report.

    Raises:
        PruningError: If the folder holds no run, if the history of the run is empty, or if a file does
            not have the content that a run writes. Then nothing is written.
    """
    folder = Path(folder)
    settings, events = _read_run(folder)
    with _errors_name(folder / "history.jsonl"):
        content = _content(folder, settings, events)
    page = render(Path(__file__).with_name("report.html"), content)
    path = Path(output) if output is not None else folder / "report.html"
    replace_file(path, page.encode())
    return path


@contextlib.contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Convert errors caused by a file's content to a `PruningError` that names the file."""
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise PruningError(
            f"{path} does not have the content that a run writes ({type(error).__name__}: {error}); remove "
            "the file, or run again"
        ) from error


def _read_run(folder: Path) -> tuple[dict[str, object], list[Event]]:
    """Read the settings and the events of a run."""
    try:
        settings = json.loads((folder / "config.json").read_text())
        lines = (folder / "history.jsonl").read_text().splitlines()
        events = [json.loads(line) for line in lines]
    except FileNotFoundError as error:
        raise PruningError(
            f"{folder} holds no run: {Path(error.filename).name} is missing. Give the folder that a run "
            "wrote (its --output)"
        ) from error
    except (OSError, ValueError) as error:
        reason = "it is a file" if isinstance(error, NotADirectoryError) else error
        raise PruningError(
            f"{folder} holds no run that can be read: {reason}. Give the folder that a run wrote"
        ) from error
    if not (events and isinstance(settings, dict) and all(isinstance(event, dict) for event in events)
            and "stage" in events[0]):  # fmt: skip
        raise PruningError(
            f"{folder}: nothing has happened in this run yet, or another tool wrote its history.jsonl; "
            "start the run, or give another folder"
        )
    return settings, events


def _content(folder: Path, settings: Mapping[str, object], events: Sequence[Event]) -> dict[str, object]:
    """Return the values of the template."""
    facts = [str(settings[key]) for key in ("start", "data") if key in settings]
    if "seed" in settings:
        facts.append(f"seed {settings['seed']}")
    widths = _widths(events)
    skipped: Mapping[str, str] = {}
    if widths is not None:
        skipped = next((event["skipped"] for event in events if event["stage"] == "dense"), {})
    best = folder / "best.pth"
    made = read(best)["provenance"] if best.exists() else None
    predictions = folder / "mistakes.json"
    thumbnails, confusion = list[Thumbnails](), None
    if predictions.exists():
        with _errors_name(predictions):
            found = json.loads(predictions.read_text())
            names = class_names(made or {}, len(found["confusion"]["small"]))
            compared = "given" if any(event.get("trained") for event in events) else "dense"
            thumbnails, confusion = wrong_predictions(found, names, compared), confusion_matrix(found, names)
    return {
        "title": f"{folder.name}: pruning report",
        "name": folder.name,
        "facts": ", ".join(facts),
        "limits": _limits(events),
        "cards": _cards(folder, events),
        "figures": _pictures(folder, events),
        "thumbnails": thumbnails,
        "confusion": confusion,
        "layers": None if widths is None else _layers(*widths),
        "skipped": list(skipped.items()),
        "steps": [_step(event, events) for event in _pruning_steps(events)],
        "trials": [
            [", ".join(event["removed"]) or "none", f"{event['validation']:.4f}"]
            for event in events
            if event["stage"].endswith("whole layers")
        ],
        "epochs": [
            [event["stage"], event["epoch"], f"{event['train_loss']:.4f}", _decimal(event["validation"])]
            for event in events
            if "epoch" in event
        ],
        "provenance": None if made is None else json.dumps(made, indent=2),
        "settings": json.dumps(settings, indent=2),
    }


def _decimal(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _pruning_steps(events: Sequence[Event]) -> list[Event]:
    return [event for event in events if "asked" in event and event["stage"] != "dense"]


def _widths(events: Sequence[Event]) -> tuple[dict[str, int], dict[str, int]] | None:
    """Return the widths of the dense network, and those after the last pruning step."""
    dense = next((event["widths"] for event in events if event["stage"] == "dense"), None)
    steps = _pruning_steps(events)
    if not steps:
        return None
    return dict(dense or steps[0]["widths"]), dict(steps[-1]["widths"])


def _limits(events: Sequence[Event]) -> Rows:
    """Return one row per limit of the budget, with the cost that the last pruning step reached."""
    steps = _pruning_steps(events)
    if not steps:
        return []
    last = steps[-1]
    rows: Rows = [
        [LABELS[key], f"≤ {limit:,}", f"{last[key]:,}", "met" if last[key] <= limit else "not yet met"]
        for key, limit in (events[0].get("asked") or last["asked"]).items()
    ]
    if timed := last.get("latency"):
        rows.append(["time of a forward pass of one example", timed["asked"],
                     f"{timed['pruned']:.4f} ms, dense {timed['dense']:.4f} ms", "met"])  # fmt: skip
    return rows


def _cards(folder: Path, events: Sequence[Event]) -> list[tuple[str, str]]:
    """Return the main results, each as a number and its description."""
    costs = [event for event in events if "params" in event and "macs" in event]
    if not costs:
        return []
    first, last = costs[0], costs[-1]
    cards = [
        (f"÷ {first[key] / max(1, last[key]):.1f}", f"{LABELS[key]}: {first[key]:,} → {last[key]:,}")
        for key in ("params", "macs", "channels")
        if first.get(key)
    ]
    cards += _validations(events)
    measured = folder / "indicators.json"
    if measured.exists():
        with _errors_name(measured):
            found = json.loads(measured.read_text())
            cards += [
                (f"{100 * found['accuracy']:.2f} %", f"accuracy on {found['dataset']}/{found['split']}"),
                (f"{found['infer_time_ms']:.4f} ms", f"per image at batch {found['batch_size']}"),
            ]
    return cards


def _validations(events: Sequence[Event]) -> list[tuple[str, str]]:
    """Return the validation scores of the given network, if it was trained, of stage 1 and of the result."""
    found: list[tuple[float | None, str]] = [
        (event.get("validation"), text)
        for stage, text in (
            ("dense", "validation of the given network"),
            ("sparsify", "validation after stage 1"),
        )
        for event in events
        if event["stage"] == stage
    ]
    result = next((event for event in events if event["stage"] == "result"), None)
    if result is None:
        found.append((_best_validation(events), "best validation of the last stage"))
    else:
        found.append((result["validation"], f"validation of the result, made by {result['made_by']}"))
    return [(f"{100 * score:.2f} %", text) for score, text in found if score is not None]


def _best_validation(events: Sequence[Event]) -> float | None:
    """Return the best validation score of the last stage; of all stages, if the last was not validated."""
    validated = [event for event in events if "epoch" in event and event["validation"] is not None]
    last = next((event["stage"] for event in reversed(events) if "epoch" in event), None)
    final = [event["validation"] for event in validated if event["stage"] == last]
    return max(final or [event["validation"] for event in validated], default=None)


def _layers(before: Mapping[str, int], after: Mapping[str, int]) -> Rows:
    """Return one row per group: its width before pruning, its width after pruning, and their ratio."""
    return [
        [name, full, after.get(name, "layer removed"), f"{after[name] / full:.0%}" if name in after else ""]
        for name, full in before.items()
    ]


def _step(event: Event, events: Sequence[Event]) -> list[object]:
    """Return the row of a pruning step."""
    asked = ", ".join(f"≤ {limit:,} {LABELS[key]}" for key, limit in event["asked"].items())
    removed = ", ".join(event.get("removed", ())) or "–"
    trained = [e["validation"] for e in events if e["stage"] == event["stage"] and "epoch" in e]
    return [event["stage"], asked, f"{event['params']:,}", f"{event['macs']:,}", removed,
            f"{event['validation']:.4f}", _decimal(trained[-1] if trained else None)]  # fmt: skip


def _picture(caption: str, *figures: Figure) -> Picture:
    return Picture([base64.b64encode(svg(figure)).decode() for figure in figures], caption)


def _pictures(folder: Path, events: Sequence[Event]) -> list[Picture]:
    """Return all figures for which the folder has data."""
    pictures = []
    if any("epoch" in event for event in events):
        caption = "Validation over all epochs, and costs after every pruning step."
        pictures.append(_picture(caption, plots.history(events)))
    widths = _widths(events)
    if widths:
        caption = "Channels of every group in the dense network and in the result."
        pictures.append(_picture(caption, plots.widths(*widths)))
    pictures += _scales(events)
    analysis = folder / "sensitivity.json"
    if analysis.exists():
        with _errors_name(analysis):
            found = Sensitivity.from_json(json.loads(analysis.read_text())["sensitivity"])
            pictures += [
                _picture("Sensitivity: accuracy as one group alone is narrowed.",
                         sensitivity_curves(found, columns=2)),
                _picture("Sensitivity of all groups: accuracy lost by share kept.", sensitivity_map(found)),
                _picture("Accuracy lost against MACs freed, by group.", lost_per_cost(found)),
            ]  # fmt: skip
    return pictures


def _scales(events: Sequence[Event]) -> list[Picture]:
    """Return figures of the BatchNorm scales before and after stage 1; none for a run without stage 1."""
    after = next((e["scales"] for e in events if e["stage"] == "sparsify" and e.get("scales")), None)
    if not after:
        return []
    dense: Mapping[str, list[float]] = next(
        (e["scales"] for e in events if e["stage"] == "dense" and e.get("scales")), {}
    )
    shown = dict(list(after.items())[:MAX_HISTOGRAMS])
    note = "" if len(shown) == len(after) else f" The first {len(shown)} of {len(after)} groups."
    caption = f"BatchNorm scales γ before and after stage 1; the largest scale of each channel.{note}"
    figures = [
        plots.scale_histograms({name: dense.get(name, [1.0] * len(values))}, {name: values})
        for name, values in shown.items()
    ]
    return [_picture(caption, *figures)]
