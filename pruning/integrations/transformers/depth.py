"""State in a configuration that blocks were removed: their number, and lists with an entry for each."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from pruning.integrations.transformers.sizes import (
    Path,
    numbers_in,
    sizes_of,
    sizes_of_config,
    with_numbers,
)
from pruning.load_pruned import REMOVED, WORDS


def lists_with_removed(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield the lists of modules from which blocks were removed, by name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and hasattr(module, REMOVED):
            yield name, module


def config_of_blocks(model: nn.Module) -> PretrainedConfig:
    """Return the configuration of a model whose class makes the blocks that the model has.

    The number is found by proof: each number of the configuration that equals the number of blocks before is
    tried. Where none gives the blocks, the configuration is that of the model.
    """
    config: Any = getattr(model, "config", None)
    for name, blocks in lists_with_removed(model):
        wanted = _keys(sizes_of(model, []), name)
        trials = _trials(config, len(blocks), getattr(blocks, REMOVED))
        fits = (
            trial for trial in trials if _keys(sizes_of_config(type(model), trial, []) or {}, name) == wanted
        )
        config = next(fits, config)
    return config


def dense_config(model: nn.Module) -> Any:
    """Return the configuration of the model before blocks were removed."""
    config: Any = copy.deepcopy(getattr(model, "config", None))
    for name, blocks in lists_with_removed(model):
        owner: Any = model.get_submodule(name.rpartition(".")[0])
        for path, held in _parts(model.config):
            if held is owner.config:
                for attribute, words in getattr(blocks, WORDS, {}).items():
                    setattr(_part(config, path), attribute, list(words))
    return config


def _keys(sizes: Any, name: str) -> set[str]:
    """Return the names of the sizes of the tensors in a module."""
    return {key for key in sizes if key.startswith(f"{name}.") and key.endswith("]")}


def _trials(config: PretrainedConfig, left: int, removed: list[int]) -> Iterator[PretrainedConfig]:
    """Yield configurations that state fewer blocks: those with a number named after layers first."""
    before = left + len(removed)
    paths = [path for path, number in numbers_in(config).items() if type(number) is int and number == before]
    for path in sorted(paths, key=lambda path: not any("layer" in part for part in path)):
        changed = with_numbers(config, {path: left})
        shortened = copy.deepcopy(changed)
        if _shorten(shortened, path, before, removed):
            yield shortened
        yield changed


def _shorten(config: PretrainedConfig, path: Path, before: int, removed: list[int]) -> bool:
    """Shorten lists with an entry for each block, beside a number, in place; return whether there are any."""
    holder, found = _part(config, path[:-1]), False
    for attribute, value in list(vars(holder).items()) if hasattr(holder, "__dict__") else ():
        if isinstance(value, list | tuple) and len(value) == before and attribute != path[-1]:
            kept = [entry for i, entry in enumerate(value) if i not in removed]
            setattr(holder, attribute, type(value)(kept))
            found = True
    return found


def _part(config: PretrainedConfig, path: Path) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


def _parts(config: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield a configuration and those inside it, by path."""
    yield path, config
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _parts(value, (*path, name))
