"""Common colors, style and file formats of all figures. The only file that imports matplotlib.

The colors are those of Okabe and Ito, which are distinguishable with any color vision. Markers and
line styles differ as well, so the figures can be read in black and white.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from pruning.errors import PruningError
from pruning.utils.files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    __all__ = ["Axes", "Figure", "Line2D"]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

MARKERS = ("o", "s", "^", "D", "v", "P", "X")

#: `Any`, because matplotlib types the keys as a Literal of all its settings.
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
    """Raise `PruningError` if matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise PruningError(f"plots need the package matplotlib: pip install matplotlib ({error})") from error


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, *, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """Create a figure in the common style, without changing matplotlib's global state.

    Args:
        width: width in inches.
        height: height in inches.
        rows: number of rows in the grid of plots.
        columns: number of columns in the grid of plots.
        sharey: use the same y scale in all plots.

    Returns:
        The figure and its axes, row by row.

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
    """Write a figure as PNG and SVG; equal figures give equal bytes.

    Args:
        figure: the figure.
        path: path of the files, with or without the suffix `.png` or `.svg`.

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


def png(image: ArrayLike) -> bytes:
    """Return an image as PNG.

    Args:
        image: (C, H, W) with one channel or three, and values from 0 to 255.
    """
    from matplotlib.image import imsave

    pixels = np.asarray(image, dtype=np.uint8)
    buffer = io.BytesIO()
    imsave(buffer, np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0), format="png")
    return buffer.getvalue()


def _rendered(figure: Figure, kind: str) -> bytes:
    import matplotlib

    metadata = {"svg": {"Date": None}, "png": {"Software": None}}[kind]
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format=kind, metadata=metadata, bbox_inches="tight")
    return buffer.getvalue()


def short(name: str) -> str:
    """Return the name of a layer; if it is long, only its end."""
    return name if len(name) <= MAX_NAME else f"…{name[1 - MAX_NAME :]}"
