"""A run's history as TensorBoard shows it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pruning.errors import PruningError


class Board:
    """Writes the events of a run (`Run.note`) for TensorBoard.

    Scalars: loss, validation figure and learning rate of every epoch; params, MACs and
    channels after every step. Histograms: the scales of every group before and after stage 1.
    Figures: widths after every step. The step of each is the line of the history.

    Raises `PruningError` where TensorBoard is not installed.
    """

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise PruningError(
                f"--tensorboard needs the package tensorboard: pip install tensorboard ({error})"
            ) from error
        self.writer: Any = SummaryWriter(str(folder))
        self.dense: Mapping[str, int] = {}

    def add(self, step: int, event: Mapping[str, Any]) -> None:
        """Write one event."""
        import torch

        for name in ("train_loss", "validation", "lr", "params", "macs", "channels"):
            value = event.get(name)
            if isinstance(value, int | float) and abs(value) < float("inf"):
                self.writer.add_scalar(name, value, step)
        for group, values in (event.get("scales") or {}).items():
            self.writer.add_histogram(f"scales/{group}", torch.tensor(values), step)
        widths = event.get("widths")
        if widths:
            self.dense = self.dense or widths
            self._draw(step, {group: widths[group] for group in self.dense if group in widths})
        self.writer.flush()

    def _draw(self, step: int, widths: Mapping[str, int]) -> None:
        try:
            from pruning.report import plots
        except ImportError:  # matplotlib is optional
            return
        shown = {group: self.dense[group] for group in widths}
        self.writer.add_figure("widths", plots.widths(shown, widths), step)
