"""The numbers of a configuration, and the sizes of the model that its class makes of them."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.utils import logging

from pruning.surgery.width_attributes import numbers_of

#: Where a configuration holds a number: names of attributes, and indices of lists.
Path = tuple[str, ...]

#: A number of a configuration: a width, or a ratio of widths such as `mlp_ratio`.
Number = int | float

#: Attributes that classes read although their configurations may omit them.
_OPTIONAL = ("head_dim", "attention_head_size")

#: By `name[dim]` of a tensor or `module.attribute`, its size.
Sizes = Mapping[str, int]


def numbers_in(config: PretrainedConfig) -> dict[Path, Number | None]:
    """Return the numbers of a configuration and of those inside it; None for attributes without a value.

    Numbers of tokens (`pad_token_id`) are left out.
    """
    found: dict[Path, Number | None] = {}
    stated = {**{key: None for key in _OPTIONAL if hasattr(config, "hidden_size")}, **config.to_dict()}
    for key in stated:
        value: Any = getattr(config, key, None)
        if key.endswith(("_id", "_ids", "_token", "_index")) or key.startswith("_"):
            continue
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            found.update({(key, *path): number for path, number in numbers_in(value).items()})
        elif value is None or type(value) in (int, float):
            found[(key,)] = value
        elif isinstance(value, list | tuple) and {*map(type, value)} in ({int}, {float}):
            found.update({(key, str(i)): number for i, number in enumerate(value)})
    return found


def with_numbers(config: PretrainedConfig, numbers: Mapping[Path, Number]) -> PretrainedConfig:
    """Return a copy of a configuration with other numbers.

    >>> from types import SimpleNamespace
    >>> with_numbers(SimpleNamespace(width=4, sizes=[1, 2]), {("width",): 3, ("sizes", "1"): 5})
    namespace(width=3, sizes=[1, 5])
    """
    changed = copy.deepcopy(config)
    for path, number in numbers.items():
        holder: Any = changed
        for name in path[:-1]:
            owner, holder = holder, getattr(holder, name)
        if isinstance(holder, list | tuple):
            entries = [number if str(i) == path[-1] else n for i, n in enumerate(holder)]
            setattr(owner, path[-2], type(holder)(entries))
        else:
            setattr(holder, path[-1], number)
    return changed


def named(path: Path) -> str:
    """Return the name of a number as a reader knows it.

    >>> named(("text_config", "hidden_size"))
    'text_config.hidden_size'
    """
    return ".".join(path)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers: trial configurations and files are checked here."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def sizes_of_config(
    kind: type[nn.Module],
    config: PretrainedConfig,
    attributes: Collection[str],
    numbers: Mapping[Path, Number] | None = None,
) -> dict[str, int] | None:
    """Return the sizes of the model that a class makes of a configuration; None if it refuses.

    Args:
        attributes: the attributes of modules to return, by their full names.
        numbers: replace those of the configuration.
    """
    try:
        with quiet(), torch.device("meta"):
            model = kind(with_numbers(config, numbers or {}))
    except Exception:  # of any kind: the class checks its configuration
        return None
    return sizes_of(model, attributes)


def sizes_of(model: nn.Module, attributes: Collection[str] | None = None) -> dict[str, int]:
    """Return the sizes of a model's stored tensors, and the integers that its modules hold.

    Args:
        attributes: full names of the integers to return; all by default.

    >>> sizes_of(nn.Linear(3, 2), [])
    {'weight[0]': 2, 'weight[1]': 3, 'bias[0]': 2}
    """
    found = {
        f"{name}[{dim}]": size
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, torch.Tensor)
        for dim, size in enumerate(tensor.shape)
    }
    for name, module in model.named_modules():
        for attribute, number in numbers_of(module).items():
            full = f"{name}.{attribute}".lstrip(".")
            if isinstance(number, int) and (attributes is None or full in attributes):
                found[full] = number
    return found
