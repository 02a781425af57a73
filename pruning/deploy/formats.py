"""Formats of exported files, and the runtimes that open them."""

from pathlib import Path

from pruning.errors import ExportError

#: The file name extension of each format.
SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "torchscript": ".torchscript"}

#: The runtime of each format; pt2 and TorchScript run in torch itself.
RUNTIMES = {"onnx": "onnxruntime", "pt2": "pt2", "torchscript": "torchscript"}

#: Other extensions that are usual for a format.
_ALSO = {".pt": "torchscript", ".ts": "torchscript", ".pth": "torchscript"}


def require_suffix(path: Path, form: str) -> None:
    """Raise `ExportError` if the extension of a file is that of another format.

    >>> require_suffix(Path("net.pt"), "torchscript")
    """
    formats = {suffix: each for each, suffix in SUFFIXES.items()} | _ALSO
    meant = formats.get(path.suffix.lower(), form)
    if meant != form:
        raise ExportError(
            f"{path}: the extension {path.suffix} is that of {meant}, and the file would be {form}; name it "
            f"{path.with_suffix(SUFFIXES.get(form, f'.{form}')).name}, or export to {meant} (--to {meant})"
        )
