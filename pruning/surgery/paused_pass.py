"""Forward passes that pause at the products with weights, so that a weight may change before it is used.

A *site* is a product with a weight, together with what directly follows it: a BatchNorm, and an addition of
another tensor, as at the end of a residual block. A pass pauses at the end of each site. If the weight, its
bias or the norm has changed when the pass goes on, the site is computed anew. Several passes may be paused
at the same site, so that the weights of one layer after the other can be chosen within one forward pass.

The code of the model runs in a thread for each pass, but torch's functions in the caller's. Threads have
memory pools of their own, and those of many passes hold several times the memory that is in use.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pruning.surgery.linear_form import WeightUse, use_of
from pruning.surgery.sites import ADDITIONS, DROPOUTS, Arguments, Function, Keywords, Site
from pruning.utils.modules import call
from pruning.utils.tree import Inputs, fresh


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
        elif func in DROPOUTS:
            self.output = result
        elif func in ADDITIONS and self.site.added:
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
    """Call `pause` at the end of each site; compute a site anew whose weights have changed then.

    Args:
        weights, sites: as in `PausedPass`. run: calls a function.
    """

    def __init__(
        self,
        weights: Mapping[Tensor, str],
        sites: Sequence[Site],
        pause: Callable[[Reached], None],
        run: Callable[[Callable[[], object]], object],
    ):
        super().__init__()
        self.weights = {id(weight): name for weight, name in weights.items()}
        self.sites, self.pause, self.run = iter(sites), pause, run
        self.pending: _Pending | None = None

    def __torch_function__(
        self, func: Function, types: object, args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        kwargs = kwargs or {}
        result = self.run(functools.partial(func, *args, **kwargs))
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
        return result if versions == pending.versions() else self.run(pending.again)


class PausedPass:
    """A forward pass that pauses at its sites, and runs only while it is asked to.

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
        self.mode = _Pauser(weights, sites, self._pause, self._elsewhere)
        self.reached: Reached | None = None
        self.error: BaseException | None = None
        #: A function that the caller's thread is to run, and its result, or its error.
        self.task: Callable[[], object] | None = None
        self.result: object = None
        self.failure: BaseException | None = None
        self.closing = self.ended = False
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
        if self.error is None and not self.ended:
            self._go_on()
            while self.task is not None:
                self._run_task()
                self._go_on()
        if self.error is not None:
            raise self.error
        return self.reached

    def __enter__(self) -> PausedPass:
        return self

    def __exit__(self, *_: object) -> None:
        """End the pass where it is."""
        self.closing, self.reached, self.result = True, None, None
        if self.thread is not None:
            self.go.release()
            self.thread.join()

    def _go_on(self) -> None:
        """Let the thread run until it pauses."""
        self.go.release()
        self.paused.acquire()

    def _run_task(self) -> None:
        assert self.task is not None
        task, self.task = self.task, None
        try:
            with torch.no_grad():
                self.result = task()
        except BaseException as error:
            self.failure = error

    def _elsewhere(self, task: Callable[[], object]) -> object:
        """Run a function in the caller's thread, except where the model's code sets a precision for it."""
        if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
            return task()
        self.task = task
        del task  # what it is given may be freed while the pass is paused
        self._wait()
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure
        result, self.result = self.result, None
        return result

    def _run(self) -> None:
        self.go.acquire()
        try:
            with torch.no_grad(), torch.device(self.device), self.mode:
                call(self.model, fresh(self.inputs))
        except _Finished:
            pass
        except BaseException as error:
            self.error = error
        self.ended = True
        self.paused.release()

    def _pause(self, reached: Reached) -> None:
        if self.closing:
            raise _Finished
        self.reached = reached
        del reached
        self._wait()

    def _wait(self) -> None:
        """Stop until the caller lets the pass go on."""
        self.paused.release()
        self.go.acquire()
        if self.closing:
            raise _Finished
