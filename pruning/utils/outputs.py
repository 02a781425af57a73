"""Choose which of a model's outputs count, by name or by a function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import Tensor
from torch.utils import _pytree as pytree

from pruning.errors import PruningError
from pruning.utils.tree import contents, tensors

#: Which outputs of a model count: their names or patterns (`logits`, `features.*`), or a function of what
#: the model returns. None means all.
Outputs: TypeAlias = Sequence[str] | Callable[[object], object] | None


def named_outputs(output: object) -> dict[str, Tensor]:
    """Return the tensors in a model's output by their names: keys, attributes and indices, joined by dots.

    >>> import torch
    >>> [*named_outputs({"logits": torch.zeros(2), "features": [torch.zeros(3), torch.zeros(4)]})]
    ['logits', 'features.0', 'features.1']
    """
    return dict(_named(output, "", set()))


def held(output: object, name: str) -> object:
    """Return what an output holds under a key or an attribute, as the outputs of transformers do; else None.

    >>> held({"logits": 1}, "logits"), held([1], "logits")
    (1, None)
    """
    if isinstance(output, Tensor):
        return None
    if isinstance(output, Mapping):
        return output.get(name)
    return getattr(output, name, None)


def logits_of(output: object) -> object:
    """Return the tensor `logits` that an output holds; any other output is returned as it is.

    >>> import torch
    >>> logits_of({"logits": torch.zeros(2, 3)}).shape, logits_of(torch.zeros(2, 4)).shape
    (torch.Size([2, 3]), torch.Size([2, 4]))
    """
    found = held(output, "logits")
    return found if isinstance(found, Tensor) else output


def counted(output: object, outputs: Outputs) -> list[Tensor]:
    """Return the tensors of a model's output that count.

    Args:
        output: what the model returned.
        outputs: which tensors count; a name also stands for all tensors inside it.

    Raises:
        PruningError: if a name matches no output, if the function fails or returns no tensor, and if
            `outputs` is neither.

    >>> import torch
    >>> [len(x) for x in counted({"logits": torch.zeros(2), "features": [torch.zeros(3)]}, ["logits"])]
    [2]
    """
    if outputs is None:
        return tensors(output)
    if callable(outputs):
        try:
            chosen = tensors(outputs(output))
        except Exception as error:  # of the user's function
            raise PruningError(
                f"outputs: the function fails on what the model returns, {_described(output)}: "
                f"{type(error).__name__}: {error}; give one that takes it"
            ) from error
        if not chosen:
            raise PruningError("outputs: the function returns no tensor; return the tensors that count")
        return chosen
    require_names(outputs)
    named = named_outputs(output)
    for name in outputs:
        if not any(_is_in(path, name) for path in named):
            raise PruningError(f"outputs: {name!r} matches none; the model returns {_described(output)}")
    return [tensor for path, tensor in named.items() if any(_is_in(path, name) for name in outputs)]


def require_names(outputs: object) -> None:
    """Raise `PruningError` unless this is a sequence of names."""
    if isinstance(outputs, str) or not isinstance(outputs, Sequence) or not outputs:
        raise PruningError(f"outputs {outputs!r}: expected a function, or a list of names such as ['logits']")
    for name in outputs:
        if not isinstance(name, str):
            raise PruningError(f"outputs: {name!r} is no name; expected text such as 'logits' or '0'")


def _is_in(path: str, name: str) -> bool:
    return fnmatchcase(path, name) or fnmatchcase(path, f"{name}.*")


def _described(output: object) -> str:
    return ", ".join(filter(None, named_outputs(output))) or f"a {type(output).__name__}"


def _named(value: object, name: str, visited: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
        return
    if id(value) in visited:  # objects may refer to each other
        return
    visited.add(id(value))
    for key, held in _parts(value):
        yield from _named(held, f"{name}.{key}".lstrip("."), visited)


def _parts(value: object) -> list[tuple[str, object]]:
    """Return the objects inside another with the names by which it holds them."""
    if isinstance(value, Mapping):
        return [(str(key), held) for key, held in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, list | tuple):
        return [(str(i), held) for i, held in enumerate(value)]
    leaves = pytree.tree_leaves(value)
    if not (len(leaves) == 1 and leaves[0] is value):  # a type that is registered with torch's pytree
        return [(str(i), held) for i, held in enumerate(leaves)]
    own = [(key, held) for key, held in getattr(value, "__dict__", {}).items()]
    known = {id(held) for _, held in own}
    return own + [(str(i), held) for i, held in enumerate(contents(value)) if id(held) not in known]


def kept_output(name: str, count: int) -> str:
    """Return the reason to fix the channels of one of several outputs."""
    if count < 2 or not name:
        return "its channels are the model's output, whose size is kept"
    return (
        f"its channels are the model's output {name!r}, whose size is kept; if other outputs count alone, "
        "name them by outputs= (--outputs)"
    )
