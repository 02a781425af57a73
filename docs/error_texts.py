"""The page of errors, made from the sources: every text that the toolkit raises for its user, by topic."""

from __future__ import annotations

import ast
import functools
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: What an error of the user is made of: exceptions, and the functions of parsers.
FOR_USERS = frozenset(
    ("PruningError", "ExportError", "CheckpointError", "TrainingDiverged", "ArgumentTypeError", "error")
)

#: Topics in the order of the page: title, files or folders in `pruning/`, what explains more.
TOPICS = (
    (
        "Models and inputs",
        ("tracing/passes.py", "tracing/trace.py", "tracing/tracer.py", "utils"),
        "A model is any `nn.Module` that runs on the example inputs; [your own model](../your-model.md) "
        "shows how to give both. What cannot be pruned is explained in [reading a refusal](../refusals.md).",
    ),
    (
        "Budgets, widths and constraints",
        (
            "planning/alike.py",
            "planning/budget.py",
            "planning/options.py",
            "planning/search.py",
            "graph/plan.py",
        ),
        "See [constraints](../constraints.md); a budget that cannot be reached is explained in [reading a "
        "refusal](../refusals.md).",
    ),
    (
        "Latency budgets",
        ("planning/latency.py", "deploy/timing.py"),
        "See [a budget of time](../latency.md).",
    ),
    (
        "Scores, calibration and sensitivity",
        ("planning", "surgery/refit.py"),
        "See the scores in [your own model](../your-model.md#in-python).",
    ),
    (
        "Pruning steps and checks",
        ("stages/prune.py", "stages/checked_cut.py", "surgery"),
        "See [reading a refusal](../refusals.md).",
    ),
    (
        "The stages and their runs",
        ("stages",),
        "See [the three stages](../three-stages.md) and [resume a run](../resume.md).",
    ),
    ("Training", ("training",), "See [your own model](../your-model.md#in-python)."),
    (
        "Checkpoints and files",
        ("checkpoint.py", "load_pruned.py", "utils/files.py"),
        "See [the checkpoint format](../checkpoint-format.md).",
    ),
    (
        "Export, int8 and runtimes",
        ("deploy",),
        "See [export and runtimes](../export.md) and [int8](../int8.md).",
    ),
    (
        "Other libraries",
        ("integrations",),
        "See [transformers](../hugging-face.md), [Lightning](../lightning.md) and [YOLO](../yolo.md).",
    ),
    (
        "Several processes",
        ("utils/distributed.py",),
        "See [several processes](../processes.md).",
    ),
    (
        "Layers and operators of your own",
        ("graph/layers.py", "tracing/operators.py", "tracing/registered.py"),
        "See [extend the toolkit](../extend.md).",
    ),
    ("The command line", ("cli",), "See [your own model](../your-model.md) and the [commands](commands.md)."),
    ("The report and the demo", ("report", "demo"), "See [the demo](../export.md)."),
)


@dataclass(frozen=True)
class Text:
    """The text of one error; values that it is filled with are `…`."""

    file: str
    line: int
    text: str

    def matches(self, message: str) -> bool:
        """Whether a message that was raised has this text."""
        pattern = ".*".join(re.escape(part) for part in self.text.split("…"))
        return re.fullmatch(pattern, message, re.DOTALL) is not None


@functools.cache
def texts() -> tuple[Text, ...]:
    """Return the text of each error that the sources raise for users."""
    found = []
    for path in sorted((ROOT / "pruning").rglob("*.py")):
        file = path.relative_to(ROOT / "pruning").as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.args and _is_for_users(node, file):
                text = re.sub("…+", "…", _text(node.args[0]))
                if re.search("[a-z]{3}", text):  # others pass on a text that stands elsewhere
                    found.append(Text(file, node.lineno, text))
    return tuple(found)


def topic(file: str) -> str:
    """Return the title of the topic to which a file of `pruning/` belongs: that of the longest path."""
    fits = [(len(place), title) for title, places, _ in TOPICS for place in places if _holds(place, file)]
    if not fits:
        raise ValueError(f"no topic of docs/error_texts.py holds pruning/{file}; add it to one")
    return max(fits)[1]


def page() -> str:
    """Return the page in Markdown."""
    parts = [
        "# Errors",
        "Every error says what was given, what was expected and what to do. This page is made from the "
        "sources; `…` stands for what you gave. On the command line an error is one line, and the exit "
        "code is 2. In Python, a `PruningError` (or `ExportError`, `CheckpointError`, "
        "`TrainingDiverged`) leaves models and files as they were. If a command ends with a traceback, "
        "the toolkit or a library that it calls is at fault: please report it.",
    ]
    every = texts()
    for title, _, more in TOPICS:
        lines = sorted({each.text for each in every if topic(each.file) == title}, key=str.casefold)
        parts += [f"## {title}", more, "\n".join(f"- {_code(line)}" for line in lines)]
    return "\n\n".join(parts) + "\n"


def _is_for_users(call: ast.Call, file: str) -> bool:
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name == "ValueError":  # load_pruned.py imports torch alone
        return file == "load_pruned.py"
    return name in FOR_USERS and (name != "error" or file.startswith("cli/"))


def _text(node: ast.expr) -> str:
    """Return the text that an expression makes, with … for what is not constant."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return "…"


def _holds(place: str, file: str) -> bool:
    return file == place or file.startswith(f"{place}/")


def _code(text: str) -> str:
    text = " ".join(text.split())
    return f"`` {text} ``" if "`" in text else f"`{text}`"
