"""The library: its version, its messages, and how its models mark that they are pruned."""

from __future__ import annotations

import contextlib
import copy
import logging
import random
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import ultralytics
from torch import nn
from ultralytics import YOLO
from ultralytics.utils import LOGGER

from pruning.errors import PruningError
from pruning.utils.compare import cuda_devices

#: Versions with which the tests were run: from the first, below the second.
TESTED = ((8, 4), (8, 5))

#: The entry of a model's description that says that it is pruned.
MARK = "pruned"

#: The name of a layer that stands first in the description of a pruned model. The library's parser looks it
#: up, so whoever builds a model of the description reads it.
NOTE = "a pruned model cannot be built from its description: train by pruning.integrations.ultralytics.train"


def require_tested() -> None:
    """Raise `PruningError` if the version of the library is none of the tested ones."""
    found = tuple(int(part) for part in re.findall(r"\d+", ultralytics.__version__)[:2])
    if not TESTED[0] <= found < TESTED[1]:
        least, below = (".".join(map(str, version)) for version in TESTED)
        raise PruningError(
            f"ultralytics {ultralytics.__version__} is untested: versions from {least} and below {below} are "
            f"supported; pip install 'ultralytics>={least},<{below}'"
        )


def network(yolo: YOLO) -> nn.Module:
    """Return the network of a `YOLO` object.

    Raises:
        PruningError: if it holds none, like an exported file, or one that was fused for inference.
    """
    require_tested()
    model = getattr(yolo, "model", None)
    if not isinstance(model, nn.Module):
        raise PruningError(f"{type(yolo).__name__} holds no network but {model!r}: load a .pt or .yaml file")
    fused = getattr(model, "is_fused", None)
    if callable(fused) and fused():
        raise PruningError(
            "the model is fused for inference: its BatchNorm is gone, so it cannot be trained; load it anew"
        )
    return model


def is_pruned(model: object) -> bool:
    """Whether a model, or the description of one, is of `prune`.

    >>> is_pruned({"pruned": True}), is_pruned({})
    (True, False)
    """
    description = getattr(model, "yaml", model)
    return isinstance(description, dict) and bool(description.get(MARK))


def mark(model: Any) -> None:
    """Let the description of a pruned model say so, in place."""
    if is_pruned(model) or not isinstance(getattr(model, "yaml", None), dict):
        return
    description = copy.deepcopy(model.yaml)
    description[MARK] = True
    description["backbone"] = [[-1, 1, NOTE, []], *description["backbone"]]
    model.yaml = description


#: Most characters of a message of the library, which may print its whole help.
LONGEST = 300


@contextlib.contextmanager
def user_input(what: str) -> Iterator[None]:
    """Turn an error of the library about what the user gave into one line.

    The block calls the library alone.
    """
    try:
        yield
    except PruningError:
        raise
    except Exception as error:  # of any kind: the library raises several
        raise PruningError(f"{what}: {plain(error)}") from error


def plain(error: BaseException) -> str:
    """Return the message of an error of the library in one line, without colours and emojis.

    >>> plain(FileNotFoundError("\\033[31mno such\\033[0m file \\u274c\\n here"))
    'no such file here'
    """
    said = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).encode("ascii", "ignore").decode()
    return " ".join(said.split())[:LONGEST] or type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let the library print warnings only."""
    level = LOGGER.level
    LOGGER.setLevel(logging.WARNING)
    try:
        yield
    finally:
        LOGGER.setLevel(level)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the random state back after the block: the library seeds all generators."""
    states = random.getstate(), np.random.get_state()
    deterministic = torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(cuda_devices()):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.use_deterministic_algorithms(deterministic)
