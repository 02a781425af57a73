"""Register a runtime of the user's, with the format of its files."""

from __future__ import annotations

from pruning.deploy.formats import RUNTIMES, SUFFIXES
from pruning.deploy.runtimes import OPENERS, Opener
from pruning.deploy.writers import WRITERS, Writer
from pruning.errors import ExportError


class RegisteredRuntime:
    """A runtime that is registered: `remove`, or the end of a `with` block, removes it.

    Args:
        name: name of the runtime and of the format of its files.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def remove(self) -> None:
        """Remove the runtime and its format. A second call changes nothing."""
        SUFFIXES.pop(self.name, None)
        RUNTIMES.pop(self.name, None)
        WRITERS.pop(self.name, None)
        OPENERS.pop(self.name, None)

    def __enter__(self) -> RegisteredRuntime:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def register_runtime(name: str, writer: Writer, opener: Opener, *, suffix: str = "") -> RegisteredRuntime:
    """Register a runtime, so that networks are exported for it, checked and timed in it.

    `export` takes `name` as the format of a file, and checks each file that it writes in the new runtime.
    `Exported` and `LatencyBudget` take `name` as the runtime.

    Args:
        name: name of the runtime and of the format of its files, an identifier such as `tensorrt`.
        writer: a function `(model, program, batch, signature, facts)` that returns the content of a file
            as bytes: the model in eval mode with BatchNorm folded, the same as a program of
            `torch.export`, inputs as in a call of the model, names and dynamic sizes of the inputs, and
            plain data to store.
        opener: a function `(content, threads)` that returns a function from input tensors to the outputs of
            the model, and the stored data by name, each value as JSON.
        suffix: extension of the files that `LatencyBudget` writes; by default a dot and the name.

    Returns a handle: its method `remove`, or the end of a `with` block, removes the runtime.
    Raises `ExportError` for a name that is no identifier or is in use, and for a writer or an opener that is
    not callable.

    >>> import io, tempfile, torch
    >>> def write(model, program, batch, signature, facts):
    ...     content = io.BytesIO()
    ...     torch.export.save(program, content)
    ...     return content.getvalue()
    >>> def open_plain(content, threads):
    ...     return torch.export.load(io.BytesIO(content)).module(), {}
    >>> from pruning import export
    >>> with register_runtime("plain", write, open_plain):
    ...     made = export(torch.nn.Linear(4, 2), f"{tempfile.mkdtemp()}/a.plain", torch.rand(1, 4), "plain")
    >>> made.difference < 1e-5
    True
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ExportError(f"{name!r} is not a name of a runtime; give an identifier such as 'tensorrt'")
    if name == "eager" or name in (*RUNTIMES, *RUNTIMES.values()):
        raise ExportError(
            f"there is a runtime or a format {name!r} already; give another name, or remove the earlier one "
            "by its handle"
        )
    for role, given, takes in (
        ("writer", writer, "model, program, batch, signature, facts"),
        ("opener", opener, "content, threads"),
    ):
        if not callable(given):
            raise ExportError(f"the {role} of {name} is a {type(given).__name__}; give a function ({takes})")
    SUFFIXES[name], RUNTIMES[name] = suffix or f".{name}", name
    WRITERS[name], OPENERS[name] = writer, opener
    return RegisteredRuntime(name)
