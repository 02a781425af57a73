"""Find the files of a data set in a folder, or download them."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import socket
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

from data.idx import DataError

#: The four IDX files of MNIST and Fashion-MNIST; each may also end in .gz.
FILES = {
    "train-images": "train-images-idx3-ubyte",
    "train-labels": "train-labels-idx1-ubyte",
    "test-images": "t10k-images-idx3-ubyte",
    "test-labels": "t10k-labels-idx1-ubyte",
}

#: Timeout in seconds for a response of a download server.
DOWNLOAD_TIMEOUT = 20


class DownloadError(DataError):
    """A data set is not in the folder and cannot be downloaded."""


def find_idx(folder: Path, torchvision_name: str) -> dict[str, Path] | None:
    """Find the four files below `folder`, in torchvision's layout, in `raw/` or in the folder itself.

    Returns None where none of the four exists. Raises `DataError` where only some do.
    """
    for place in (folder / torchvision_name / "raw", folder / "raw", folder):
        found = {
            key: path
            for key, name in FILES.items()
            for path in (place / name, place / f"{name}.gz")
            if path.is_file()
        }
        if len(found) == len(FILES):
            return found
        if found:
            missing = ", ".join(FILES[key] for key in FILES if key not in found)
            raise DataError(f"{place}: missing {missing}; complete the folder or empty it")
    return None


def download(folder: Path, torchvision_name: str) -> dict[str, Path]:
    """Download a data set by torchvision into `folder`; an incomplete download leaves no files.

    Raises `DownloadError` with the reason when the download fails.
    """
    from torchvision import datasets

    def prepare() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix=".download-", suffix=".partial", dir=folder)

    scratch = None
    try:
        scratch = prepare()
        print(f"{torchvision_name} is not in {folder}: downloading it", file=sys.stderr, flush=True)
        with _timeout(DOWNLOAD_TIMEOUT), contextlib.redirect_stdout(io.StringIO()):
            getattr(datasets, torchvision_name)(root=scratch, train=True, download=True)
        target = folder / torchvision_name / "raw"
        target.mkdir(parents=True, exist_ok=True)
        files = find_idx(Path(scratch), torchvision_name)
        if files is None:
            raise DataError("the download held none of the expected files")
        return {key: Path(shutil.move(str(path), target / path.name)) for key, path in files.items()}
    except (OSError, RuntimeError, DataError) as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" …") or type(error).__name__
        raise DownloadError(f"{torchvision_name} could not be downloaded into {folder}: {reason}") from error
    finally:
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """Set the default socket timeout: urllib, by which torchvision downloads, has none of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def environment_folder(variable: str) -> Path | None:
    """Return the folder that an environment variable names, or None when it is unset."""
    value = os.environ.get(variable)
    return Path(value).expanduser() if value else None
