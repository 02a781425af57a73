"""Training on several processes started by `torchrun`: what the stages need besides DDP.

Each process takes its shard of every batch, DistributedDataParallel averages the gradients, and
BatchNorm normalizes over the whole batch, so the result is the same as that of a single process
with the same batches. The first process computes the plans and writes the files.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import sync_batch_norm
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pruning.errors import PruningError
from pruning.utils.modules import device_of
from pruning.utils.wording import number_of

T = TypeVar("T")


class Batches(Protocol):
    """A collection of batches with a length that can be iterated several times."""

    def __iter__(self) -> Iterator[object]: ...
    def __len__(self) -> int: ...


def rank() -> int:
    """Return the rank of this process; 0 if there is only one process."""
    return dist.get_rank() if _initialized() else 0


def size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if _initialized() else 1


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def process_group(device: str) -> Iterator[str]:
    """Join the process group if torchrun started several processes; yield the device of this process."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        yield device
        return
    on_cuda = device.startswith("cuda")
    if on_cuda:
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_cuda else "gloo")
    try:
        with lost_processes():
            yield device
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def lost_processes() -> Iterator[None]:
    """Report in one line that another process has ended, within the block.

    The processes wait for each other in every step, so none can go on alone.

    Raises:
        PruningError: if a collective operation fails because a process is gone.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        raise PruningError(
            f"process {rank()} of {size()} stops, because another process of this training has ended: its "
            "own message says why; then continue the run with --resume"
        ) from error


def _is_lost(error: RuntimeError) -> bool:
    """Return whether an error of torch.distributed is that of a connection to another process."""
    text = str(error)
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "pair closure")
    return isinstance(error, dist.DistError) or ("gloo" in text and any(sign in text for sign in signs))


def broadcast(value: T) -> T:
    """Return the first process's value, which must be plain data, on every process."""
    if size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast_weights(model: nn.Module) -> None:
    """Copy the parameters and buffers of the first process to every process, in place."""
    if size() > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)


def mean(value: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes."""
    if size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / size()


class Shards:
    """This process's shard of every batch: every size()-th example, the same number on each process.

    Raises:
        PruningError: for a batch with fewer examples than there are processes.
    """

    def __init__(self, batches: Batches):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[object]:
        for batch in self.batches:
            counts = [
                len(leaf) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim
            ]
            examples = min(counts, default=0)
            each = examples // size()
            if not each:
                raise PruningError(
                    f"a batch of {number_of(examples, 'example')} cannot be shared by {size()} processes: "
                    "give a larger batch size, or drop a smaller last batch (drop_last=True)"
                )
            take = slice(rank(), each * size(), size())
            yield pytree.tree_map(functools.partial(_sliced, take), batch)


def _sliced(take: slice, leaf: object) -> object:
    return leaf[take] if isinstance(leaf, Tensor) and leaf.ndim else leaf


def sharded(batches: Batches) -> Batches:
    """Return the batches that this process trains on."""
    return Shards(batches) if size() > 1 else batches


@contextlib.contextmanager
def data_parallel(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the module to call in training: gradients are averaged, BatchNorm uses whole batches.

    The model's layers are patched, not replaced: its classes and the keys of its state dict do not
    change.
    """
    if size() == 1:
        yield model
        return
    broadcast_weights(model)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        # A partial: in a copy of the model (a moving average) it then refers to the copied layer.
        norm.forward = functools.partial(_synchronized, norm)  # type: ignore[method-assign]
    device = device_of(model)
    try:
        yield nn.parallel.DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None
        )
    finally:
        for norm in norms:
            del norm.forward


def without_averaging(model: nn.Module, wanted: bool) -> contextlib.AbstractContextManager[None]:
    """Return a context in which backward passes leave each process its own gradients, if wanted.

    They are averaged with those of the next pass outside it.
    """
    inner = getattr(model, "_orig_mod", model)  # of a compiled module
    if wanted and isinstance(inner, nn.parallel.DistributedDataParallel):
        return inner.no_sync()
    return contextlib.nullcontext()


@contextlib.contextmanager
def unsynchronized(model: nn.Module) -> Iterator[None]:
    """Let BatchNorm use the batches of this process alone within the block, also in `data_parallel`."""
    patched = {
        module: vars(module).pop("forward")
        for module in model.modules()
        if getattr(vars(module).get("forward"), "func", None) is _synchronized
    }
    try:
        yield
    finally:
        for module, forward in patched.items():
            module.forward = forward


def _synchronized(norm: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Tensor:
    """Call a BatchNorm layer's own forward; in training mode use the statistics of all processes."""
    with _SyncBatchNorm() if norm.training else contextlib.nullcontext():
        return type(norm).forward(norm, x)


class _SyncBatchNorm(TorchFunctionMode):
    """Let `F.batch_norm` take the mean and variance over all processes.

    `nn.SyncBatchNorm.convert_sync_batchnorm` replaces layers, and so loses the code of subclasses
    (timm's apply an activation after the norm).
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: tuple[type, ...],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        over_all = func is F.batch_norm and kwargs.get("training")
        operation: Callable[..., object] = _sync_batch_norm if over_all else func
        return operation(*args, **kwargs)


class _AllReduce(torch.autograd.Function):
    """Sum a tensor over all processes, and its gradient as well.

    torch's differentiable all_reduce (torch.distributed.nn.functional) is deprecated.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def _sync_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Compute `F.batch_norm` in training mode over the batches of all processes."""
    if x.is_cuda:
        return sync_batch_norm.apply(
            x, weight, bias, running_mean, running_var, eps, momentum, dist.group.WORLD, size()
        )
    # nn.SyncBatchNorm rejects CPU tensors: its kernels (batch_norm_stats) exist for GPUs only.
    dtype, x = x.dtype, x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    dims = [d for d in range(x.ndim) if d != 1]
    count = x.numel() // x.shape[1] * size()
    sums = torch.stack([x.sum(dims), x.square().sum(dims)])
    average, square = _AllReduce.apply(sums) / count
    # The sums are in float32: a negative variance can only be a rounding error.
    variance = (square - average.square()).clamp(min=0)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(average, momentum)
            running_var.lerp_(variance * count / max(1, count - 1), momentum)
    shape = [1, -1, *[1] * (x.ndim - 2)]
    normalized = (x - average.view(shape)) * torch.rsqrt(variance + eps).view(shape)
    if weight is not None:
        normalized = normalized * weight.view(shape)
    return (normalized if bias is None else normalized + bias.view(shape)).to(dtype)
