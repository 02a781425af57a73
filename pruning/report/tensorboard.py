"""Write the history of a run for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from pruning.errors import PruningError
from pruning.report import plots
from pruning.report.figures import require_matplotlib
from pruning.report.plots import Event


class TensorBoardWriter:
    """Write the events of a run for TensorBoard.

    Scalars: loss, validation score and learning rate of every epoch; params, MACs and channels after
    every pruning step. Histograms: the scales of every group before and after stage 1. Figures, if
    matplotlib is installed: the widths after every pruning step. TensorBoard's step is the number of the
    event's line in the history.

    Args:
        folder: folder for TensorBoard's event files.

    Raises:
        PruningError: If TensorBoard is not installed.

    Example:
        Let a run write its history for TensorBoard too::

            run = Run("runs/first", settings)
            run.observe = TensorBoardWriter(run.folder / "tensorboard").add
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise PruningError(
                f"--tensorboard needs the package tensorboard: pip install tensorboard ({error})"
            ) from error
        self._writer = SummaryWriter(str(folder))
        self._dense: Mapping[str, int] = {}
        try:
            require_matplotlib()
            self._has_matplotlib = True
        except PruningError:
            self._has_matplotlib = False

    def add(self, step: int, event: Event) -> None:
        """Write one event.

        Args:
            step: number of the event's line in the history.
            event: the event.
        """
        for name in ("train_loss", "validation", "lr", "params", "macs", "channels"):
            value = event.get(name)
            if isinstance(value, int | float) and abs(value) < float("inf"):
                self._writer.add_scalar(name, value, step)
        for group, values in (event.get("scales") or {}).items():
            self._writer.add_histogram(f"scales/{group}", torch.tensor(values), step)
        widths = event.get("widths")
        if widths:
            self._dense = self._dense or widths
            if self._has_matplotlib:
                shown = {group: full for group, full in self._dense.items() if group in widths}
                kept = {group: widths[group] for group in shown}
                self._writer.add_figure("widths", plots.widths(shown, kept), step)
        self._writer.flush()
