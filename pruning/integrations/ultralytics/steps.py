"""Prune the network of a `YOLO` object."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics import YOLO

from pruning.errors import PruningError
from pruning.graph.groups import ByGroup, Ignored
from pruning.integrations.ultralytics.calibration import model_loss
from pruning.integrations.ultralytics.files import OF_TRAINING
from pruning.integrations.ultralytics.library import mark, network
from pruning.planning.budget import Budget, LatencyBudget
from pruning.planning.options import MOST, PlanOptions
from pruning.planning.scores import Score
from pruning.planning.width_sweep import Batch
from pruning.stages.prune import Step, StepSettings, default_score, prune_step
from pruning.utils.modules import copied, device_of


def prune(
    yolo: YOLO,
    budget: Budget | LatencyBudget,
    *,
    imgsz: int = 640,
    calibration: Iterable[Batch] = (),
    score: Score | None = None,
    refit: bool = False,
    ignored: Iterable[Ignored] = (),
    floor: int | ByGroup[int] | None = None,
    most: float | ByGroup[float] = MOST,
    multiple: int = 1,
) -> Step:
    """Remove channels of a model until it meets a budget; its network is replaced.

    The outputs that count are boxes, classes, masks and points; the features which the head returns beside
    them may change. Afterwards `yolo.val`, `predict`, `track` and `export` work as before, and
    `pruning.integrations.ultralytics.train` trains the model.

    Args:
        yolo: after an error its network is as it was.
        budget: limits on the result; percentages refer to this model at this size of images.
        imgsz: height and width of the images, for costs and for the check of the outputs.
        calibration: batches of `calibration_batches`, for scores and for BatchNorm.
        score: by default `taylor` with the model's own loss; `l2` without batches.
        refit, ignored, floor, most, multiple: see `pruning.prune`.

    Returns:
        The pruning step; its model is the network of `yolo`.

    Raises:
        PruningError: as `pruning.prune`, and if the model was fused for inference.

    Example:
        ```python
        step = prune(yolo, Budget(macs="50%"), calibration=calibration_batches(yolo, "data.yaml"))
        ```
    """
    model, batches = network(yolo), list(calibration)
    if score is None:
        score = default_score(batches, refit) if batches else "l2"
    settings = StepSettings(
        score,
        batches,
        model_loss(yolo),
        tuple(ignored),
        PlanOptions(floor=floor, most=most, multiple=multiple),
        refit=refit,
        outputs=counted_outputs,
    )
    step = prune_step(_prepared(model), example_images(model, imgsz), budget, settings)
    small: Any = step.model
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(".dfl" not in name)
    _restore(model, small)
    mark(small)
    yolo.model, yolo.predictor, yolo.ckpt_path = small, None, None
    yolo.ckpt = {k: v for k, v in (yolo.ckpt or {}).items() if k not in OF_TRAINING} | {"model": small}
    return step


def example_images(model: nn.Module, imgsz: int) -> Tensor:
    """Return one random image of this height and width, on the device of a model.

    Raises:
        PruningError: if the size is no multiple of the model's stride.
    """
    stride = int(torch.as_tensor(getattr(model, "stride", 32)).max())
    if imgsz < 1 or imgsz % stride:
        raise PruningError(f"imgsz {imgsz}: expected a multiple of the model's stride, {stride}")
    description: Any = model.yaml
    shape = 1, description.get("channels", 3), imgsz, imgsz
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device_of(model))


def counted_outputs(output: Any) -> list[Tensor]:
    """Return the tensors of a model's output without the features that its head took."""
    return list(_counted(output))


def _counted(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for name, held in output.items():
            if name != "feats":
                yield from _counted(held)
    elif isinstance(output, Sequence):
        for held in output:
            yield from _counted(held)


def _prepared(model: nn.Module) -> nn.Module:
    """Return a copy to trace: it can be trained, and stores no grid of an earlier image."""
    copy: Any = copied(model).eval()
    copy.criterion = None
    for parameter in copy.parameters():
        parameter.requires_grad_(True)
    for module in copy.modules():
        if isinstance(getattr(module, "dynamic", None), bool):
            module.dynamic = True
    return copy


def _restore(model: nn.Module, small: nn.Module) -> None:
    """Undo in the pruned network what `_prepared` changed."""
    for module, pruned in zip(model.modules(), small.modules(), strict=True):
        if isinstance(getattr(module, "dynamic", None), bool):
            pruned.__dict__.pop("dynamic", None)
            if "dynamic" in vars(module):
                setattr(pruned, "dynamic", module.dynamic)  # noqa: B010 (not a declared attribute)
            for grid in ("shape", "anchors", "strides"):
                pruned.__dict__.pop(grid, None)
    small.train(model.training)
