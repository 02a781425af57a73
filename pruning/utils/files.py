"""Write files atomically, and read plain data without executing code."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pruning.errors import CheckpointError


def read_plain(path: str | Path) -> Any:
    """Read tensors and plain data from a file of `torch.save`, without executing code from it.

    Raises:
        CheckpointError: if the file is missing or damaged, or holds other objects.
    """
    import torch  # not for writing a file, nor for one that is missing

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file; check the path") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} was refused: it is damaged, or holds objects other than tensors and plain data. Instead "
            "of a pickled model, save model.state_dict()"
        ) from error
    except Exception as error:  # reading a damaged file can fail in any way
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise CheckpointError(f"{path} is damaged or not a checkpoint: {reason}") from error


def replace_file(path: str | Path, content: bytes, check: Callable[[Path], None] | None = None) -> None:
    """Replace the content of a file atomically: after an error or a crash, the old file remains.

    Args:
        path: of the file; missing folders are created.
        content: the new content.
        check: called with the path of the temporary file before it replaces the old one; if it
            raises an error, the old file remains.

    Raises:
        CheckpointError: if the file cannot be written.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "new" / "file.txt"
    >>> replace_file(path, b"content")
    >>> path.read_bytes()
    b'content'
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} cannot be written: it is a folder; give the path of a file")
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} cannot be written: it is a device or a pipe; give the path of a file")
    path = path.resolve() if path.is_symlink() else path  # replace the file it points to
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
        with contextlib.suppress(OSError):  # it has been renamed, or was never created
            partial.unlink()
