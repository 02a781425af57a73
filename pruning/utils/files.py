"""Files that appear whole or not at all, and plain data read from them."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pruning.errors import CheckpointError


def read_plain(path: str | Path) -> Any:
    """Tensors and plain data from a file that `write` wrote; nothing in it is executed."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} was refused: it is damaged, or holds objects beyond tensors and plain data. Of a whole "
            "model that was pickled, save model.state_dict()"
        ) from error
    except Exception as error:  # reading a damaged file can fail in any way
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise CheckpointError(f"{path} is damaged or not a checkpoint: {reason}") from error


def replace_file(path: str | Path, content: bytes, check: Callable[[Path], None] | None = None) -> None:
    """Give a file new content, whole or not at all. Raises `CheckpointError` where it cannot.

    `check` is given the written file before it takes its name; what it raises stops that.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} cannot be written: it is a folder, and a file is asked for")
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} cannot be written: it is a device or a pipe, and a file is asked for")
    path = path.resolve() if path.is_symlink() else path  # what it points to is replaced
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check(partial)
        os.replace(partial, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # it has taken the name, or was never made
            partial.unlink()
