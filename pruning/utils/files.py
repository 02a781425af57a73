"""Write files atomically, and read plain data without executing code."""

from __future__ import annotations

import contextlib
import os
import pickle
import warnings
import zipfile
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of files that it does not load, too
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file; check the path") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}; check the path") from error
    except Exception as error:  # reading a damaged file can fail in any way
        kind = _foreign_kind(Path(path))
        if kind is not None:
            raise CheckpointError(
                f"{path} is not a checkpoint: it is {kind}; expected a file that torch.save wrote"
            ) from error
        if isinstance(error, pickle.UnpicklingError):
            raise CheckpointError(
                f"{path} was refused: it is damaged, or holds objects other than tensors and plain data. "
                'Instead of a pickled model, save model.state_dict() (see "The checkpoint format" in the '
                "documentation)"
            ) from error
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise CheckpointError(f"{path} is damaged or not a checkpoint: {reason}; write it again") from error


#: Kinds of files by their first bytes.
_SIGNATURES = {
    b"\x89HDF": "an HDF5 file",
    b"GGUF": "a GGUF file",
    b"\x93NUMPY": "a NumPy array",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"\x1f\x8b": "a file compressed by gzip",
    b"%PDF": "a PDF document",
    b"ustar": "a tar archive",
}


def _foreign_kind(path: Path) -> str | None:
    """What a file is that torch.save has not written; None if that cannot be told."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        start = file.read(512)
        if not start:
            return "empty"
        if zipfile.is_zipfile(path):
            return _archive_kind(path)
        for signature, kind in _SIGNATURES.items():
            if start.startswith(signature):
                return kind
        if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
            return "a safetensors file (torch.save(safetensors.torch.load_file(FILE), NEW) converts it)"
        if start[:1] == b"\x08" and (b"pytorch" in start or b"onnx" in start or path.suffix == ".onnx"):
            return "an ONNX file, from which no network can be pruned"
        if start[:1] != b"\x80" and start.isascii():
            return "a text file"
    return None


def _archive_kind(path: Path) -> str | None:
    """What kind of zip archive it is; None for one that torch.save may have written."""
    with contextlib.suppress(zipfile.BadZipFile, OSError), zipfile.ZipFile(path) as archive:
        names = [name.rpartition("/")[2] for name in archive.namelist()]
        if "constants.pkl" in names:
            return "a TorchScript archive (torch.save(torch.jit.load(FILE).state_dict(), NEW) converts it)"
        if any(name.endswith((".npy", ".npz")) for name in names):
            return "an archive of NumPy arrays"
        if "data.pkl" not in names:
            return "a zip archive of something else (torch.export's, if it ends in .pt2)"
    return None


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
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror or error}; give another path"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # it has been renamed, or was never created
            partial.unlink()
