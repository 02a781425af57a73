"""What all figures share: colours, style, and files. The one file that imports matplotlib.

Colours are those of Okabe and Ito, which can be told apart with any colour vision. Markers and line
styles differ too, so that a black-and-white print can be read.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pruning.errors import PruningError
from pruning.utils.files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    __all__ = ["Axes", "Figure", "Line2D"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

MARKERS = ("o", "s", "^", "D", "v", "P", "X")

#: matplotlib types the keys as a literal of all its settings.
_STYLE: Any = {
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "font.size": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
    "svg.hashsalt": "pruning",
    "svg.fonttype": "none",
}


#: Longest name of a layer, in characters, that a figure shows in full.
MAX_NAME = 28


def require_matplotlib() -> None:
    """Raise `PruningError` where matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise PruningError(f"plots need the package matplotlib: pip install matplotlib ({error})") from error


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, *, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """Make a figure in the common style, without touching matplotlib's global state.

    Args:
        width, height: size in inches.
        rows, columns: of the grid of plots.
        sharey: whether all plots have one y scale.

    Returns:
        The figure, and its axes row by row.

    Raises:
        PruningError: If matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        grid = figure.subplots(rows, columns, sharey=sharey, squeeze=False)
        return figure, list(np.ravel(grid))


def save(figure: Figure, path: str | Path) -> list[Path]:
    """Write a figure as PNG and SVG; the same figure gives the same bytes.

    Args:
        figure: the figure.
        path: where to write; an ending `.png` or `.svg` is replaced by each of the two.

    Returns:
        The paths of both files.

    Raises:
        CheckpointError: If a file cannot be written.

    Example:
        >>> import tempfile
        >>> from pruning.report.figures import new_figure, save
        >>> figure, _ = new_figure(2, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [path.name for path in save(figure, f"{folder}/empty")]
        ['empty.png', 'empty.svg']
    """
    stem = Path(path)
    stem = stem.with_suffix("") if stem.suffix in (".png", ".svg") else stem
    written = []
    for kind in ("png", "svg"):
        target = stem.with_name(f"{stem.name}.{kind}")
        replace_file(target, _rendered(figure, kind))
        written.append(target)
    return written


def svg(figure: Figure) -> bytes:
    """Return a figure as SVG."""
    return _rendered(figure, "svg")


def _rendered(figure: Figure, kind: str) -> bytes:
    import matplotlib

    metadata = {"svg": {"Date": None}, "png": {"Software": None}}[kind]
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format=kind, metadata=metadata, bbox_inches="tight")
    return buffer.getvalue()


def short(name: str) -> str:
    """Return a layer's name, or its end where it is long."""
    return name if len(name) <= MAX_NAME else f"…{name[1 - MAX_NAME :]}"
