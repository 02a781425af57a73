"""Do independent pieces of work on the machines of a Ray cluster: the results are those of one machine.

Workers compute on one thread each, so results are equal to the last bit if this process does, too. The
machines of a cluster have to hold this toolkit and the modules of the model.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from pruning.errors import PruningError

T = TypeVar("T")
R = TypeVar("R")

#: The cluster that is started on this machine for one piece of work, and ends with it.
LOCAL = "local"

#: How often a piece of work is begun again whose worker was lost.
RETRIES = 3


def in_order(work: Callable[[T], R], items: Sequence[T], cluster: str | None = None) -> Iterator[R]:
    """Yield the result of each piece of work, in the order of the items.

    A piece whose worker is lost is done again elsewhere. An error of the work is raised as on one machine.

    Args:
        work: what Ray can send to other processes. It may not depend on the order of the items.
        items: what each piece gets.
        cluster: address of a Ray cluster (`auto`, `ray://host:10001`); `local` starts one on this machine,
            with a worker for each CPU. None does the work here, without Ray.

    Raises:
        PruningError: if Ray is not installed, or the cluster cannot be reached.

    >>> list(in_order(abs, [-3, 2]))
    [3, 2]
    """
    if cluster is None:
        yield from map(work, items)
        return
    ray, begun = _connected(cluster)
    try:
        run = ray.remote(max_retries=RETRIES)(_run)
        shared = ray.put(work)  # sent to each machine once
        results = [run.remote(shared, item) for item in items]
        for result in results:
            try:
                yield ray.get(result)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.WorkerCrashedError as error:
                raise PruningError(
                    f"the cluster {cluster!r} lost a piece of the work {RETRIES + 1} times; the workers may "
                    "lack memory: start fewer on a machine"
                ) from error
    finally:
        if begun:
            ray.shutdown()


def require_cluster(cluster: str | None) -> None:
    """Raise `PruningError` if a cluster is named and Ray is not installed."""
    if cluster is not None and importlib.util.find_spec("ray") is None:
        raise PruningError("a cluster needs Ray, which is not installed: pip install 'pruning[cluster]'")


def _connected(cluster: str) -> tuple[Any, bool]:
    """Return the module ray, connected, and whether this call made the connection."""
    require_cluster(cluster)
    import ray  # an extra

    if ray.is_initialized():
        return ray, False
    try:
        if cluster == LOCAL:
            with _modules_shared():
                ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(address=cluster, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # of any kind: Ray raises several
        reason = " ".join(str(error).split())[:200]
        raise PruningError(
            f"the Ray cluster {cluster!r} cannot be reached: {reason}. Start one by `ray start --head`, or "
            f"give {LOCAL!r} for workers on this machine"
        ) from error
    return ray, True


@contextlib.contextmanager
def _modules_shared() -> Iterator[None]:
    """Let processes that are started in the block import what this one can."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    try:
        yield
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _run(work: Callable[[T], R], item: T) -> R:
    return work(item)
