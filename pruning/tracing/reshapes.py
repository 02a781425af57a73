"""Reshapes that mix channels with positions: where channels end up depends on the size of the inputs.

`values.reshape(b, c, h, w)` of values (b, h·w, c), without a transposition, runs at every size, but puts each
channel at other places at another size. A plan that is right for one size would be wrong for all others, so
where a reshape may be one of these, further passes at other sizes decide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from pruning.tracing.ties import varying

#: By dimension on which labels depend, the number of distinct positions along it.
Form = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Reshape:
    """A reshape of a tensor with channels.

    Attributes:
        labels: of its channels. module: description of the module whose code ran.
        form: of the labels of the result, see `form_of`.
    """

    labels: np.ndarray
    module: str
    form: Form

    @property
    def reason(self) -> str:
        """Why its channels are not pruned if it mixes them with positions."""
        return (
            f"{self.module} reshapes it so that channels mix with positions, in another way for each size of "
            "the inputs; transpose it first, so that channels keep their own dimension, to let it be pruned"
        )


@dataclass
class Reshapes:
    """The reshapes of tensors with channels in one pass, by module and number of the call.

    Attributes:
        made: the reshapes. doubtful: whether one of them may mix channels with positions.
    """

    made: dict[tuple[str, int], Reshape] = field(default_factory=dict)
    doubtful: bool = False
    _calls: Counter[str] = field(default_factory=Counter)

    def note(
        self, module: tuple[str, str], source: Tensor, output: Tensor, first: Tensor, found: Tensor
    ) -> None:
        """Record a reshape by the code of a module (name, description), and the labels before and after."""
        name, described = module
        self.made[name, self._calls[name]] = Reshape(first.numpy().ravel(), described, form_of(found))
        self._calls[name] += 1
        self.doubtful |= may_mix(source.shape, output.shape, varying(first), varying(found))

    def mixed(self, others: Sequence[Reshapes]) -> Iterator[tuple[np.ndarray, str]]:
        """Yield the labels of channels that end up elsewhere in passes at other sizes, with the reason."""
        for place, reshape in self.made.items():
            again = [other.made[place].form for other in others if place in other.made]
            if any(form != reshape.form for form in again):
                yield reshape.labels, reshape.reason


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
