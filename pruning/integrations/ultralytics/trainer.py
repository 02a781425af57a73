"""Train models by the library's own trainers, which keep the widths of pruned ones."""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from ultralytics import YOLO

from pruning.errors import PruningError
from pruning.integrations.ultralytics.library import is_pruned, network
from pruning.utils.modules import copied
from pruning.utils.wording import number_of


class KeepsWidths:
    """What a trainer of the library needs to train a pruned model: it takes the model as it is.

    The library's trainers build a model of the description that comes with the weights, and load what fits.
    """

    data: Any

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        """Return a model to train: a copy of pruned weights, else what the library makes."""
        if not is_pruned(weights):
            if is_pruned(cfg):
                raise PruningError(
                    "pretrained=False: the widths of a pruned model are those of its weights; train with them"
                )
            return super().get_model(cfg, weights, verbose)  # type: ignore[misc]
        model = copied(weights).float()
        model.criterion = None
        for parameter in model.parameters():
            parameter.requires_grad_(True)  # the trainer freezes what has to be
        classes = self.data["nc"]
        if model.yaml["nc"] != classes:
            _set_classes(model, classes)
        return model


def trainer_for(yolo: YOLO) -> type:
    """Return the library's trainer for the task of a model, with `KeepsWidths`."""
    try:
        base = yolo.task_map[yolo.task]["trainer"]
    except KeyError:
        raise PruningError(f"ultralytics has no trainer for the task {yolo.task!r}") from None
    return _made(base)


def _made(base: type) -> type:
    """Return a class of this module, which other processes of a training import by name."""
    name = f"Pruned{base.__name__}"
    if name not in globals():
        globals()[name] = type(name, (KeepsWidths, base), {"__module__": __name__, "__doc__": base.__doc__})
    made: type = globals()[name]
    return made


def __getattr__(name: str) -> type:
    """Make a trainer that another process asks for by name."""
    tasks = vars(YOLO)["task_map"].fget(None)
    for parts in tasks.values():
        if name == f"Pruned{parts['trainer'].__name__}":
            return _made(parts["trainer"])
    raise AttributeError(name)


def train(yolo: YOLO, **arguments: Any) -> Any:
    """Train a model, pruned or not, by the library's trainer; return the metrics that it returns.

    All that its `train` does is as documented there: EMA, mixed precision, early stopping, files. To resume a
    training that was interrupted, load its `weights/last.pt` and give `resume=True`. If the data has other
    classes than the model, the last layers of its head start anew.

    Args:
        yolo: gets the trained network. arguments: of `YOLO.train`, such as data, epochs, imgsz.

    Raises:
        PruningError: if the model was fused, or is trained on several devices before it was saved.

    Example:
        ```python
        train(yolo, data="data.yaml", epochs=20, imgsz=640)
        ```
    """
    model = network(yolo)
    devices = str(arguments.get("device") or "").split(",")
    if is_pruned(model) and len(devices) > 1 and not _is_stored(yolo):
        raise PruningError(
            "several devices load the model from a file in processes of their own: save it first, by "
            "pruning.integrations.ultralytics.save(yolo, 'pruned.pt')"
        )
    metrics = yolo.train(trainer=trainer_for(yolo), **arguments)
    yolo.ckpt_path = yolo.overrides["model"]
    return metrics


def _is_stored(yolo: YOLO) -> bool:
    path = str(yolo.overrides.get("model", ""))
    return path.endswith(".pt") and os.path.exists(path) and path == str(yolo.ckpt_path)


def _set_classes(model: Any, classes: int) -> None:
    """Give a pruned detector another number of classes, in place: its last layers of classes start anew."""
    head = model.model[-1]
    if not hasattr(head, "bias_init") or not hasattr(head, "cv3"):
        raise PruningError(
            f"the data has {number_of(classes, 'class')}, and the pruned model {model.yaml['nc']}; train "
            "the dense model on this data before pruning it"
        )
    before = head.nc
    for branch in ("cv3", "one2one_cv3"):
        for layers in getattr(head, branch, None) or ():
            old = layers[-1]
            layers[-1] = nn.Conv2d(old.in_channels, classes, old.kernel_size).to(old.weight)
    head.no += classes - before
    head.nc = classes
    model.yaml = {**model.yaml, "nc": classes}
    model.nc, model.names = classes, {i: str(i) for i in range(classes)}
    head.bias_init()
