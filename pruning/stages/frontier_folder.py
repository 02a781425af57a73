"""The folder of a frontier: the settings, the scores, and the points as they come."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pruning.errors import PruningError
from pruning.stages.frontier_result import FrontierPoint
from pruning.utils.files import read_plain, replace_file

#: Files of the folder.
RESULTS, SCORES = "frontier.json", "scores.pth"


class FrontierFolder:
    """Stores points as they come, so that an interrupted frontier resumes; without a folder, in memory only.

    Args:
        folder: the folder; created if it does not exist.
        settings: what the points depend on, by the words in which a difference is reported.

    Attributes:
        points: the stored points.

    Raises:
        PruningError: if the folder holds points of other settings, or another run.
    """

    def __init__(self, folder: str | Path | None, settings: Mapping[str, object]):
        self.folder = None if folder is None else Path(folder)
        self.settings: dict[str, object] = json.loads(json.dumps(settings, default=str))
        self.points = self._stored() if self.folder is not None else []

    def _stored(self) -> list[FrontierPoint]:
        assert self.folder is not None
        path = self.folder / RESULTS
        if not path.exists():
            if (self.folder / "config.json").exists():
                raise PruningError(f"{self.folder} holds another run: choose another folder")
            return []
        try:
            content = json.loads(path.read_text())
            known = dict(content["settings"])
            points = [FrontierPoint.from_json(point) for point in content["frontier"]["points"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, PruningError) as error:
            raise PruningError(f"{path} holds no frontier: {error!r}; choose another folder") from error
        if differing := [key for key in self.settings if known.get(key) != self.settings[key]]:
            raise PruningError(
                f"{path} is the frontier of other settings: {_differences(differing, known, self.settings)}; "
                "give the same, or choose another folder"
            )
        return points

    def scores(self) -> dict[str, Tensor] | None:
        """Return the stored scores of the channels; None if there are none of these settings."""
        if self.folder is None or not (self.folder / SCORES).exists():
            return None
        content = read_plain(self.folder / SCORES)
        if not isinstance(content, dict) or content.get("settings") != json.dumps(self.settings):
            return None
        return content["scores"]

    def write_scores(self, scores: Mapping[str, Tensor]) -> None:
        """Store the scores of the channels."""
        if self.folder is not None:
            file = io.BytesIO()
            torch.save({"settings": json.dumps(self.settings), "scores": dict(scores)}, file)
            replace_file(self.folder / SCORES, file.getvalue())

    def write(self, frontier: Mapping[str, object]) -> None:
        """Store the points so far, in place of those before."""
        if self.folder is not None:
            content = {"settings": self.settings, "frontier": frontier}
            replace_file(self.folder / RESULTS, (json.dumps(content, allow_nan=False) + "\n").encode())


def _differences(keys: list[str], known: Mapping[str, object], asked: Mapping[str, object]) -> str:
    """Name the settings that differ; show values that are short."""
    shown = []
    for key in keys:
        before, now = (json.dumps(each.get(key)) for each in (known, asked))
        short = max(len(before), len(now)) <= 40
        shown.append(f"{key} {before}, now {now}" if short else f"another {key}")
    return ", ".join(shown)
