"""Sites: the products with weights in a forward pass, and what directly follows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from pruning.surgery.linear_form import use_of
from pruning.utils.modules import call
from pruning.utils.tree import Inputs, fresh, storage_of, tensors_among

Function = Callable[..., object]
Arguments = tuple[object, ...]
Keywords = Mapping[str, object]

ADDITIONS = frozenset((torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__))
DROPOUTS = frozenset((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout))


@dataclass(frozen=True)
class Site:
    """A product with a weight in a forward pass, and what follows it.

    Attributes:
        layer: name of the layer that has the weight.
        norm: name of the BatchNorm that alone reads the product; None if there is none.
        added: whether another tensor is added to the result, by the only function that reads it.
        size: bytes that a pass holds where it pauses, at the end of the site.
    """

    layer: str
    norm: str | None = None
    added: bool = False
    size: int = field(default=0, compare=False, repr=False)


def find_sites(model: nn.Module, inputs: Inputs, weights: Mapping[Tensor, str]) -> list[Site]:
    """Return the sites of a forward pass, in its order.

    Args:
        model: in eval mode; it is run once.
        weights: the weights to look for, each with the name of its layer.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    >>> find_sites(net, torch.zeros(1, 3, 2, 2), {net[0].weight: "0", net[3].weight: "3"})
    [Site(layer='0', norm='1', added=False), Site(layer='3', norm=None, added=False)]
    """
    finder = _Finder(model, weights)
    with torch.no_grad(), finder:
        call(model, fresh(inputs))
    return [finder.site(i) for i in range(len(finder.layers))]


class _Finder(TorchFunctionMode):
    """Record which functions read the products with weights, directly or behind a norm or a dropout."""

    def __init__(self, model: nn.Module, weights: Mapping[Tensor, str]):
        super().__init__()
        self.weights = {id(weight): name for weight, name in weights.items()}
        self.norms = {
            id(buffer): name
            for name, module in model.named_modules()
            if (buffer := getattr(module, "running_mean", None)) is not None
        }
        self.layers = list[str]()
        #: For each product, the functions that read it or what is made of it: (kind, name of the norm).
        self.readers: list[list[tuple[str, str | None]]] = []
        #: For each product, the bytes in use after it, and after each of these functions.
        self.sizes: list[list[int]] = []
        self.made = WeakTensorKeyDictionary()
        self.memory = _Memory([*model.parameters(), *model.buffers()])

    def __torch_function__(
        self, func: Function, types: object, args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, (Tensor, tuple, list)):
            return result
        self.memory.note(result)
        number, kind, norm = None, "other", None
        for value in (*args, *(kwargs or {}).values()):
            if isinstance(value, Tensor) and value in self.made:
                number = self.made[value]
                kind, norm = self._kind(func, args, kwargs or {}, number)
                self.readers[number].append((kind, norm))
                self.sizes[number].append(self.memory.in_use())
        use = use_of(func, args, kwargs or {}, result)
        if use is not None and id(use.weight) in self.weights:
            self.layers.append(self.weights[id(use.weight)])
            self.sizes.append([self.memory.in_use()])
            self.readers.append([])
            self.made[use.output] = len(self.layers) - 1
        elif number is not None and kind in ("norm", "dropout") and isinstance(result, Tensor):
            self.made[result] = number
        return result

    def _kind(self, func: Function, args: Arguments, kwargs: Keywords, number: int) -> tuple[str, str | None]:
        """Return what kind of function reads a product; only before the next one is it part of its site."""
        if number != len(self.layers) - 1:
            return "late", None
        if func is F.batch_norm:
            mean = args[1] if len(args) > 1 else kwargs.get("running_mean")
            if id(mean) in self.norms and not kwargs.get("training"):
                return "norm", self.norms[id(mean)]
        if func in DROPOUTS:
            return "dropout", None
        if func in ADDITIONS and len(args) == 2 and not kwargs and _same_shape(args):
            return "add", None
        return "other", None

    def site(self, number: int) -> Site:
        kinds = [kind for kind, _ in self.readers[number]]
        norm = self.readers[number][0][1] if kinds[:1] == ["norm"] else None
        rest = [kind for kind in (kinds[1:] if norm else kinds) if kind != "dropout"]
        if norm is not None and "norm" in rest:
            norm = None
        added = rest == ["add"] and kinds.count("dropout") <= 1
        parts = len(kinds) if added else norm is not None
        return Site(self.layers[number], norm, added, max(self.sizes[number][: parts + 1]))


class _Memory:
    """Count the bytes of the tensors that functions returned and that are still in use.

    Args:
        known: tensors that do not count.
    """

    def __init__(self, known: Sequence[Tensor]):
        self.known = {storage_of(tensor) for tensor in known}
        self.tensors = WeakTensorKeyDictionary()

    def note(self, result: object) -> None:
        for tensor in tensors_among((result,)):
            self.tensors[tensor] = True

    def in_use(self) -> int:
        storages = dict(map(storage_of, self.tensors))
        return sum(size for start, size in storages.items() if (start, size) not in self.known)


def _same_shape(args: Sequence[object]) -> bool:
    one, other = args
    both = isinstance(one, Tensor) and isinstance(other, Tensor) and one is not other
    return both and one.shape == other.shape  # type: ignore[attr-defined]
