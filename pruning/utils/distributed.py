"""Training on several processes, as `torchrun` starts them: what the stages need besides DDP.

Each process takes its part of every batch, gradients are averaged by DistributedDataParallel,
and BatchNorm sees the whole batch, so that the networks are those of one process with the same
batches. Plans are made on the first process, which alone writes files.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pruning.errors import PruningError
from pruning.utils.modules import device_of

Plain = TypeVar("Plain")


def rank() -> int:
    """The number of this process; 0 where there is one alone."""
    return dist.get_rank() if _many() else 0


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _many() else 1


def _many() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def group(device: str) -> Iterator[str]:
    """Join the processes that torchrun has started, if it has; gives the device of this one."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        yield device
        return
    on_cuda = device.startswith("cuda")
    if on_cuda:
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_cuda else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def from_first(value: Plain) -> Plain:
    """What the first process has, on all of them; plain data."""
    if size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def weights_of_first(model: nn.Module) -> None:
    """Give every process the weights and statistics of the first, in place."""
    if size() > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)


def mean(value: Tensor) -> Tensor:
    """The mean of a number over all processes."""
    if size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / size()


class Shared:
    """The part of every batch that is this process's: every size-th example, the same count for all.

    Raises `PruningError` for a batch with fewer examples than there are processes.
    """

    def __init__(self, batches: Any):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            counts = {
                len(leaf) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim
            }
            each = min(counts, default=0) // size()
            if not each:
                raise PruningError(
                    f"a batch of {min(counts, default=0)} cannot be shared by {size()} processes"
                )
            part = slice(rank(), each * size(), size())
            yield pytree.tree_map(partial(_cut, part), batch)


def _cut(part: slice, leaf: Any) -> Any:
    return leaf[part] if isinstance(leaf, Tensor) and leaf.ndim else leaf


def shared(batches: Any) -> Any:
    """Batches as this process sees them."""
    return Shared(batches) if size() > 1 else batches


@contextlib.contextmanager
def together(model: nn.Module) -> Iterator[nn.Module]:
    """The model to call in training: its gradients are averaged, its BatchNorm sees whole batches."""
    if size() == 1:
        yield model
        return
    weights_of_first(model)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.forward = partial(_over_all, norm)  # type: ignore[method-assign]
    device = device_of(model)
    try:
        yield nn.parallel.DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None
        )
    finally:
        for norm in norms:
            del norm.forward


class _Sum(torch.autograd.Function):
    """The sum over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def _over_all(norm: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Tensor:
    """BatchNorm whose mean and variance in training are those of all processes' examples."""
    if not norm.training:
        return type(norm).forward(norm, x)
    dims = [d for d in range(x.ndim) if d != 1]
    count = x.numel() // x.shape[1] * size()
    total = _Sum.apply(torch.stack([x.sum(dims), x.square().sum(dims)]))
    average = total[0] / count
    # Of float32 sums; a variance below 0 can only be rounding.
    variance = (total[1] / count - average.square()).clamp(min=0)
    if norm.running_mean is not None and norm.running_var is not None:
        assert norm.num_batches_tracked is not None
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            momentum = norm.momentum
            if momentum is None:
                momentum = 1 / float(norm.num_batches_tracked)
            norm.running_mean.lerp_(average, momentum)
            norm.running_var.lerp_(variance * count / max(1, count - 1), momentum)
    shape = [1, -1, *[1] * (x.ndim - 2)]
    normed = (x - average.view(shape)) * torch.rsqrt(variance + norm.eps).view(shape)
    if norm.weight is None:
        return normed
    return normed * norm.weight.view(shape) + norm.bias.view(shape)
