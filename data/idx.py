"""Read IDX files, the format of MNIST and similar data sets, with or without gzip compression."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from pruning.errors import UserError


class DataError(UserError):
    """A data file or folder is invalid; the message names it and the reason."""


def read_idx(path: str | Path, dims: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes with `dims` dimensions.

    The header is two zero bytes, a type code (0x08: unsigned byte), the number of
    dimensions, then each dimension as a big-endian 32-bit integer.

    Raises `DataError` for a file that is missing, truncated, longer than its header
    states, or of another type or rank.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error

    magic = bytes((0, 0, 0x08, dims))
    if content[:4] != magic:
        raise DataError(
            f"{path}: starts with {content[:4].hex() or 'nothing'}, expected {magic.hex()}: "
            f"not an IDX file of unsigned bytes with {dims} dimension(s)"
        )
    header = 4 + 4 * dims
    if len(content) < header:
        raise DataError(f"{path}: truncated inside its header ({len(content)} of {header} bytes)")
    shape = struct.unpack(f">{dims}I", content[4:header])
    expected = header + math.prod(shape)
    if len(content) != expected:
        state = "truncated" if len(content) < expected else "too long"
        raise DataError(f"{path}: {state}: {len(content)} bytes, its header {shape} requires {expected}")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def read_pair(images_path: Path, labels_path: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Read images (N, H, W) uint8 and their labels (N,) int64 from two IDX files.

    Raises `DataError` when the counts differ or a label is not below `classes`.
    """
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if len(images) == 0:
        raise DataError(f"{images_path}: holds no image")
    if len(images) != len(labels):
        raise DataError(
            f"{images_path} holds {len(images)} images, {labels_path} {len(labels)} labels: "
            "the counts must be equal"
        )
    if labels.max() >= classes:
        raise DataError(f"{labels_path}: label {labels.max()} is out of range 0 to {classes - 1}")
    return images, labels.astype(np.int64)
