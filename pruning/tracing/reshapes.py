"""Reshapes that mix channels with positions: where channels end up depends on the size of the inputs.

`values.reshape(b, c, h, w)` of values (b, h·w, c), without a transposition, runs at every size, but puts each
channel at other places at another size. A plan that is right for one size would be wrong for all others, so
where a reshape may be one of these, further passes at other sizes decide. Mostly the shapes alone show that
nothing changes (`ReshapeShapes`), in a fraction of the time of a pass with labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from pruning.surgery.statistics import operator_name
from pruning.tracing.ties import compact, varying
from pruning.utils.meta import run_operation
from pruning.utils.tree import tensors_among

#: Operators that reshape, by name.
RESHAPES = ("view", "_unsafe_view", "reshape", "_reshape_alias")

#: By name of a module, the shapes of each tensor that its code reshapes, before and after.
Shapes = dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]]

#: By dimension on which labels depend, the number of distinct positions along it.
Form = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Reshape:
    """A reshape of a tensor with channels.

    Attributes:
        first: labels of the tensor. module: description of the module whose code ran.
        form: of the labels of the result, see `form_of`.
        shapes: of the tensor, before and after. doubtful: whether it may mix channels with positions.
    """

    first: Tensor
    module: str
    form: Form
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    doubtful: bool

    @property
    def reason(self) -> str:
        """Why its channels are not pruned if it mixes them with positions."""
        return (
            f"{self.module} reshapes it so that channels mix with positions, in another way for each size of "
            "the inputs; transpose it first, so that channels keep their own dimension, to let it be pruned"
        )

    def is_same_at(self, source: Sequence[int], target: Sequence[int]) -> bool:
        """Whether the reshape puts channels at the same places if the tensor has other shapes."""
        dims = varying(self.first)
        if len(source) != self.first.ndim or any(source[d] != self.first.shape[d] for d in dims):
            return False
        return form_of(compact(self.first.expand(*source).reshape(*target))) == self.form


@dataclass
class Reshapes:
    """The reshapes of tensors with channels in one pass, by module and number of the call.

    Attributes:
        made: the reshapes.
    """

    made: dict[tuple[str, int], Reshape] = field(default_factory=dict)
    _calls: Counter[str] = field(default_factory=Counter)

    def note(
        self, module: tuple[str, str], source: Tensor, output: Tensor, first: Tensor, found: Tensor
    ) -> None:
        """Record a reshape by the code of a module (name, description), and the labels before and after."""
        name, described = module
        doubtful = may_mix(source.shape, output.shape, varying(first), varying(found))
        shapes = tuple(source.shape), tuple(output.shape)
        self.made[name, self._calls[name]] = Reshape(first, described, form_of(found), shapes, doubtful)
        self._calls[name] += 1

    @property
    def doubtful(self) -> bool:
        """Whether one of them may mix channels with positions."""
        return any(reshape.doubtful for reshape in self.made.values())

    def are_same_at(self, own: Shapes, other: Shapes) -> bool:
        """Whether shapes alone show that channels end up at the same places in a pass at another size.

        Args:
            own: the shapes of all reshapes at this size. other: those at the other size.
        """
        for (module, _), reshape in self.made.items():
            if not reshape.doubtful:
                continue
            before, after = own.get(module, []), other.get(module, [])
            pairs = {there for here, there in zip(before, after, strict=False) if here == reshape.shapes}
            if len(before) != len(after) or not pairs or not all(reshape.is_same_at(*p) for p in pairs):
                return False
        return True

    def mixed(self, others: Sequence[Reshapes]) -> Iterator[tuple[np.ndarray, str]]:
        """Yield the labels of channels that end up elsewhere in passes at other sizes, with the reason."""
        for place, reshape in self.made.items():
            again = [other.made[place].form for other in others if place in other.made]
            if any(form != reshape.form for form in again):
                yield reshape.first.numpy().ravel(), reshape.reason


class ReshapeShapes(TorchDispatchMode):
    """Record the shapes of all tensors that a model reshapes in a pass.

    Attributes:
        found: the shapes, by the module whose code ran.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.found = model, Shapes()
        self.path, self.handles = [""], list[RemovableHandle]()

    def __enter__(self) -> ReshapeShapes:
        for name, module in self.model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                before, after = partial(self._enter, name), self._leave
                self.handles.append(module.register_forward_pre_hook(before, prepend=True))
                self.handles.append(module.register_forward_hook(after))
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def _enter(self, name: str, *_: object) -> None:
        self.path.append(name)

    def _leave(self, *_: object) -> None:
        self.path.pop()

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        output = run_operation(func, args, kwargs or {})
        if operator_name(func) in RESHAPES:
            source, target = tensors_among((args[0], output))
            self.found.setdefault(self.path[-1], []).append((tuple(source.shape), tuple(target.shape)))
        return output


def form_of(labels: Tensor) -> Form:
    """Return the number of distinct positions along each dimension on which labels depend.

    It does not depend on sizes along which there are no channels, nor on how often channels repeat.

    >>> import torch
    >>> heads = torch.arange(6).reshape(1, 2, 1, 3)
    >>> form_of(heads), form_of(heads.expand(1, 2, 5, 3).reshape(1, 10, 3))
    (((1, 2), (3, 3)), ((1, 2), (2, 3)))
    """
    return tuple(
        (dim, len({row.tobytes() for row in np.moveaxis(labels.numpy(), dim, 0)})) for dim in varying(labels)
    )


def may_mix(
    source: Sequence[int], target: Sequence[int], before: Sequence[int], after: Sequence[int]
) -> bool:
    """Whether the places of channels in a reshaped tensor may depend on sizes without channels.

    They do not where each dimension is divided alone (channels into heads), or merged as a whole.

    Args:
        source, target: the shapes. before, after: the dimensions on which labels depend in these.

    >>> may_mix((2, 9, 8), (2, 9, 2, 4), [2], [2, 3])
    False
    >>> may_mix((2, 4, 8), (2, 8, 2, 2), [2], [1, 2, 3])
    True
    """
    if 0 in source:
        return False
    parts = _parts(source, target)
    for several in parts:
        if len(several) < 2:
            continue
        if any(size != source[dim] for dim, size in several) and any(dim in before for dim, _ in several):
            return True
    if 0 in before and sum(several[0][0] == 0 for d, several in enumerate(parts) if d in after) > 1:
        return True  # channels that were merged with the batch, and with positions
    # Positions of which there is one may be several at another size.
    crossed = [d for d in after if 1 in target[d + 1 :]]
    ahead = [d for d in before if d == 0 or 1 in source[1:d]]
    behind = [d for d in before if 1 in source[d + 1 :]]
    led = [d for d in after if d == 0 or 1 in target[1:d]]
    return bool((crossed and ahead) or (behind and led))


def _parts(source: Sequence[int], target: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Return for each target dimension the parts of source dimensions in it, (dimension, size of the part).

    A part has size 0 where dimensions are divided at no common place.

    >>> _parts((4, 8), (8, 2, 2))
    [[(1, 2), (0, 4)], [(1, 2)], [(1, 2)]]
    """
    parts: list[list[tuple[int, int]]] = [[] for _ in target]
    d, left = len(source), 1
    for t in reversed(range(len(target))):
        wanted = target[t]
        while wanted > 1:
            while left == 1:
                d -= 1
                left = source[d]
            size = left if wanted % left == 0 else wanted
            if left % size:
                parts[t].append((d, 0))
                return [[*several, (d, 0), (d, 0)] for several in parts]
            parts[t].append((d, size))
            left, wanted = left // size, wanted // size
    return parts
