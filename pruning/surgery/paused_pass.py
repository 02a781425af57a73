"""Forward passes that pause at the products with weights, so that a weight may change before it is used.

A *site* is a product with a weight, together with what directly follows it: a BatchNorm, and an addition of
another tensor, as at the end of a residual block. A pass pauses at the end of each site. If the weight, its
bias or the norm has changed when the pass goes on, the site is computed anew. Several passes may be paused
at the same site, so that the weights of one layer after the other can be chosen within one forward pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from pruning.surgery.linear_form import WeightUse, use_of
from pruning.utils.modules import call
from pruning.utils.tree import Inputs, fresh

Function = Callable[..., object]
Arguments = tuple[object, ...]
Keywords = Mapping[str, object]

_ADDITIONS = frozenset((torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__))
_DROPOUTS = frozenset((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout))


@dataclass(frozen=True)
class Site:
    """A product with a weight in a forward pass, and what follows it.

    Attributes:
        layer: name of the layer that has the weight.
        norm: name of the BatchNorm that alone reads the product; None if there is none.
        added: whether another tensor is added to the result, by the only function that reads it.
        size: bytes of the input that is multiplied.
    """

    layer: str
    norm: str | None = None
    added: bool = False
    size: int = field(default=0, compare=False, repr=False)


@dataclass
class Reached:
    """A site that a pass has reached: the product, and the output of the site.

    Attributes:
        use: the product with the weight.
        output: what the site puts out: the product, or what the norm or the addition makes of it.
    """

    use: WeightUse
    output: Tensor


class PassDiffers(Exception):
    """A forward pass has other sites than expected."""


class _Finished(BaseException):
    """Ends a forward pass that nobody continues."""


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
        self.layers, self.sizes = list[str](), list[int]()
        #: For each product, the functions that read it or what is made of it: (kind, name of the norm).
        self.readers: list[list[tuple[str, str | None]]] = []
        self.made = WeakTensorKeyDictionary()

    def __torch_function__(
        self, func: Function, types: object, args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, (Tensor, tuple, list)):
            return result
        number, kind, norm = None, "other", None
        for value in (*args, *(kwargs or {}).values()):
            if isinstance(value, Tensor) and value in self.made:
                number = self.made[value]
                kind, norm = self._kind(func, args, kwargs or {}, number)
                self.readers[number].append((kind, norm))
        use = use_of(func, args, kwargs or {}, result)
        if use is not None and id(use.weight) in self.weights:
            self.layers.append(self.weights[id(use.weight)])
            self.sizes.append(use.input.numel() * use.input.element_size())
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
        if func in _DROPOUTS:
            return "dropout", None
        if func in _ADDITIONS and len(args) == 2 and not kwargs and _same_shape(args):
            return "add", None
        return "other", None

    def site(self, number: int) -> Site:
        kinds = [kind for kind, _ in self.readers[number]]
        norm = self.readers[number][0][1] if kinds[:1] == ["norm"] else None
        rest = [kind for kind in (kinds[1:] if norm else kinds) if kind != "dropout"]
        if norm is not None and "norm" in rest:
            norm = None
        added = rest == ["add"] and kinds.count("dropout") <= 1
        return Site(self.layers[number], norm, added, self.sizes[number])


def _same_shape(args: Sequence[object]) -> bool:
    one, other = args
    both = isinstance(one, Tensor) and isinstance(other, Tensor) and one is not other
    return both and one.shape == other.shape  # type: ignore[attr-defined]


@dataclass
class _Pending:
    """A site in progress: the call that multiplies, the call of the norm, and the latest output."""

    site: Site
    use: WeightUse
    product: tuple[Function, Arguments, Keywords]
    output: Tensor
    norm: tuple[Arguments, Keywords] | None = None
    term: Tensor | None = None

    def follow(self, func: Function, args: Arguments, kwargs: Keywords, result: object) -> None:
        """Add a call to the site if it is a part of it."""
        if not isinstance(result, Tensor) or not any(value is self.output for value in args):
            return
        if func is F.batch_norm and self.site.norm is not None and self.norm is None:
            self.norm, self.output = (args, kwargs), result
        elif func in _DROPOUTS:
            self.output = result
        elif func in _ADDITIONS and self.site.added:
            self.term, self.output = self.output, result

    @property
    def complete(self) -> bool:
        return (self.norm is not None or self.site.norm is None) and (
            self.term is not None or not self.site.added
        )

    def versions(self) -> list[int]:
        """Return numbers that change when the weight, its bias or the norm's mean do."""
        tensors = [self.use.weight, self.use.bias, self.norm[0][1] if self.norm else None]
        return [tensor._version for tensor in tensors if isinstance(tensor, Tensor)]

    def again(self) -> Tensor:
        """Compute the output anew."""
        func, args, kwargs = self.product
        value = func(*args, **kwargs)
        if self.norm is not None:
            value = F.batch_norm(value, *self.norm[0][1:], **self.norm[1])  # type: ignore[arg-type]
        assert isinstance(value, Tensor)
        return value if self.term is None else self.output.add_(value - self.term)


class _Pauser(TorchFunctionMode):
    """Call `pause` at the end of each site; compute a site anew whose weights have changed then."""

    def __init__(
        self, weights: Mapping[Tensor, str], sites: Sequence[Site], pause: Callable[[Reached], None]
    ):
        super().__init__()
        self.weights = {id(weight): name for weight, name in weights.items()}
        self.sites, self.pause = iter(sites), pause
        self.pending: _Pending | None = None

    def __torch_function__(
        self, func: Function, types: object, args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        use = use_of(func, args, kwargs, result)
        if use is not None and id(use.weight) in self.weights:
            site = next(self.sites, None)
            if self.pending is not None or site is None or site.layer != self.weights[id(use.weight)]:
                raise PassDiffers
            self.pending = _Pending(site, use, (func, args, kwargs), use.output)
        elif self.pending is not None:
            self.pending.follow(func, args, kwargs, result)
        pending = self.pending
        if pending is None or not pending.complete:
            return result
        versions, self.pending = pending.versions(), None
        self.pause(Reached(pending.use, pending.output))
        return result if versions == pending.versions() else pending.again()


class PausedPass:
    """A forward pass that pauses at its sites. It runs in a thread of its own, but only while it is asked to.

    Args:
        model: in eval mode. inputs: one batch.
        weights: the weights to pause at, each with the name of its layer.
        sites: the sites of the pass, as `find_sites` returns them.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).eval()
    >>> weights = {net[0].weight: "0", net[1].weight: "1"}
    >>> with PausedPass(net, torch.ones(1, 2), weights, [Site("0"), Site("1")]) as paused, torch.no_grad():
    ...     _ = paused.proceed()
    ...     _ = net[0].weight.zero_(), net[0].bias.zero_()
    ...     paused.proceed().use.input
    tensor([[0., 0.]])
    """

    def __init__(
        self, model: nn.Module, inputs: Inputs, weights: Mapping[Tensor, str], sites: Sequence[Site]
    ):
        self.model, self.inputs = model, inputs
        self.mode = _Pauser(weights, sites, self._pause)
        self.reached: Reached | None = None
        self.error: BaseException | None = None
        self.closing = False
        self.go, self.paused = threading.Semaphore(0), threading.Semaphore(0)
        self.device = torch.get_default_device()
        self.thread: threading.Thread | None = None

    def proceed(self) -> Reached | None:
        """Run to the end of the next site and return it; None at the end of the pass.

        Raises:
            PassDiffers: if the pass has other sites than those that were given.
        """
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, daemon=True)
            self.thread.start()
        self.reached = None
        self.go.release()
        self.paused.acquire()
        if self.error is not None:
            raise self.error
        return self.reached

    def __enter__(self) -> PausedPass:
        return self

    def __exit__(self, *_: object) -> None:
        """End the pass where it is."""
        self.closing, self.reached = True, None
        if self.thread is not None:
            self.go.release()
            self.thread.join()

    def _run(self) -> None:
        self.go.acquire()
        try:
            with torch.no_grad(), torch.device(self.device), self.mode:
                call(self.model, fresh(self.inputs))
        except _Finished:
            pass
        except BaseException as error:
            self.error = error
        self.paused.release()

    def _pause(self, reached: Reached) -> None:
        if self.closing:
            raise _Finished
        self.reached = reached
        del reached
        self.paused.release()
        self.go.acquire()
        if self.closing:
            raise _Finished
