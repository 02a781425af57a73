"""What benchmarks of time share: the machine, ratios and their controls, compiled networks."""

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

#: A network beside its own copy should take as long; further from 1 than this, ratios are spoiled.
CONTROL = 0.02


def machine() -> dict[str, Any]:
    """What a reader of times must know: the processor, and how busy it is (None where not told)."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # Windows has none
    return {
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "load average": None if load is None else round(load, 2),
    }


def described(machine: dict[str, Any]) -> str:
    """`machine` in words."""
    load = machine["load average"]
    return (
        f"{machine['instructions']}, {machine['cores']} cores, load average at the start "
        f"{'unknown' if load is None else load}"
    )


def pin(cores: int) -> None:
    """Keep this process on so many of the cores it may use: the last ones, as the first serve the system."""
    if not hasattr(os, "sched_setaffinity"):
        raise PruningError("--pin: this system does not let a process choose its cores")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])


def figures(latency: Latency) -> dict[str, Any]:
    """A time per image as it is written to a file."""
    return {"median ms": round(latency.median, 5), "p90 ms": round(latency.p90, 5), "turns": latency.samples}


def ratio(latency: Latency, to: Latency) -> list[float]:
    """The ratio of medians, and the bounds of its 95 % interval."""
    return [round(value, 4) for value in time_ratio(latency, to)]


def is_quiet(control: Sequence[float]) -> bool:
    """Whether a network and its copy took as long as each other, as far as can be asked."""
    return round(abs(control[0] - 1), 4) <= CONTROL


def shown(ratio: Sequence[float]) -> str:
    """A ratio with its interval, as a table has it."""
    return f"{ratio[0]:.3f} ({ratio[1]:.3f} to {ratio[2]:.3f})"


def shown_control(control: Sequence[float]) -> str:
    """A control, marked where it spoils the ratios beside it."""
    return shown(control) if is_quiet(control) else f"**✗ {shown(control)}**"


class Compiled(nn.Module):
    """A network that `compile_ahead` wrote, for inputs of the shape that it was given."""

    def __init__(self, path: Path):
        super().__init__()
        from torch._inductor import aoti_load_package

        with quiet():
            self._run = aoti_load_package(str(path))

    def forward(self, images: Tensor) -> Tensor:
        return self._run(images)


def compile_ahead(network: nn.Module, batch: Tensor, path: Path) -> Compiled:
    """A network compiled by AOTInductor for one batch, and seen to compute the same on it.

    Raises whatever the compiler does; a machine without a C++ compiler cannot.
    """
    from torch._inductor import aoti_compile_and_package

    with quiet(), torch.no_grad():
        program = torch.export.export(network, (batch.clone(),))
        aoti_compile_and_package(program, package_path=str(path))
        made = Compiled(path)
        apart = relative_difference(network(batch), made(batch))
    if not apart <= 1e-3:  # sums may be taken in another order
        raise PruningError(f"its outputs differ from the network's by {apart:.1e} of the largest")
    return made
