"""Timing functions that benchmarks share: the machine, ratios and their controls, compiled networks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pruning import PruningError
from pruning.deploy import Latency, time_ratio
from pruning.deploy.runtimes import quiet, relative_difference

#: Largest distance from 1 of the time ratio of a network and its copy; beyond it, ratios are unreliable.
CONTROL = 0.02


def machine() -> dict[str, Any]:
    """Describe the processor and its load (None where the system does not report it)."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # Windows has none
    return {
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "load average": None if load is None else round(load, 2),
    }


def described(machine: dict[str, Any]) -> str:
    """Format the result of `machine` as text."""
    load = machine["load average"]
    return (
        f"{machine['instructions']}, {machine['cores']} cores, load average at the start "
        f"{'unknown' if load is None else load}"
    )


def pin(cores: int) -> None:
    """Pin this process to the last `cores` of its cores; the first ones also serve the system."""
    if not hasattr(os, "sched_setaffinity"):
        raise PruningError("--pin: this system does not let a process choose its cores")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])


def figures(latency: Latency) -> dict[str, Any]:
    """Return a time per image as it is written to a file."""
    return {"median ms": round(latency.median, 5), "p90 ms": round(latency.p90, 5), "turns": latency.samples}


def ratio(latency: Latency, to: Latency) -> list[float]:
    """Return the ratio of medians, and the bounds of its 95 % interval."""
    return [round(value, 4) for value in time_ratio(latency, to)]


def is_quiet(control: Sequence[float]) -> bool:
    """Whether a network and its copy took the same time, within `CONTROL`."""
    return round(abs(control[0] - 1), 4) <= CONTROL


def shown(ratio: Sequence[float]) -> str:
    """Format a ratio with its interval for a table."""
    return f"{ratio[0]:.3f} ({ratio[1]:.3f} to {ratio[2]:.3f})"


def shown_control(control: Sequence[float]) -> str:
    """Format a control for a table, with a mark where ratios are unreliable."""
    return shown(control) if is_quiet(control) else f"**✗ {shown(control)}**"


class Compiled(nn.Module):
    """A network written by `compile_ahead`, for inputs of one shape."""

    def __init__(self, path: Path):
        super().__init__()
        from torch._inductor import aoti_load_package

        with quiet():
            self._run = aoti_load_package(str(path))

    def forward(self, images: Tensor) -> Tensor:
        return self._run(images)


def compile_ahead(network: nn.Module, batch: Tensor, path: Path) -> Compiled:
    """Compile a network by AOTInductor for the shape of a batch, and compare the outputs on it.

    Raises any exception of the compiler, also where there is no C++ compiler.
    """
    from torch._inductor import aoti_compile_and_package

    with quiet(), torch.no_grad():
        program = torch.export.export(network, (batch.clone(),))
        aoti_compile_and_package(program, package_path=str(path))
        made = Compiled(path)
        apart = relative_difference(network(batch), made(batch))
    if not apart <= 1e-3:  # sums may be computed in another order
        raise PruningError(f"its outputs differ from the network's by {apart:.1e} of the largest")
    return made
