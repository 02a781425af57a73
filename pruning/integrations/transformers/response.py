"""How the sizes of a model depend on the numbers of its configuration, found by changing each in turn."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from torch import nn
from transformers import PretrainedConfig

from pruning.integrations.transformers.sizes import (
    Number,
    Path,
    Sizes,
    numbers_in,
    sizes_of_config,
    with_numbers,
)


@dataclass(frozen=True)
class Response:
    """How the sizes of a model depend on the numbers of its configuration.

    Attributes:
        sizes: of the model that the configuration gives.
        numbers: the numbers on which sizes depend.
        powers: by size, the power of each number to which it is proportional.
        mixed: by size, the numbers on which it depends otherwise, such as a sum.
    """

    sizes: Sizes
    numbers: Mapping[Path, Number]
    powers: Mapping[str, Mapping[Path, int]]
    mixed: Mapping[str, frozenset[Path]]


def with_stated_numbers(kind: type[nn.Module], config: PretrainedConfig, sizes: Sizes) -> PretrainedConfig:
    """Return the configuration with the numbers stated that it leaves to the class, such as `n_inner`."""
    for path, number in numbers_in(config).items():
        if number is not None:
            continue
        trial = sizes_of_config(kind, config, sizes.keys(), {path: 24})
        if trial is None:
            continue
        changed = [key for key in sizes if key.endswith("]") and trial.get(key, sizes[key]) != sizes[key]]
        implied = {Fraction(sizes[key] * 24, trial[key]) for key in changed if trial[key]}
        if len(implied) != 1 or (value := implied.pop()).denominator != 1:
            continue
        if sizes_of_config(kind, config, sizes.keys(), {path: int(value)}) == sizes:
            config = with_numbers(config, {path: int(value)})
    return config


def response_of(kind: type[nn.Module], config: PretrainedConfig, target: Sizes) -> Response:
    """Multiply each number of a configuration in turn, and see which sizes follow, and how."""
    base = sizes_of_config(kind, config, target.keys())
    assert base is not None  # it was made before
    numbers: dict[Path, Number] = {}
    powers: dict[str, dict[Path, int]] = defaultdict(dict)
    mixed: dict[str, set[Path]] = defaultdict(set)
    for path, number in numbers_in(config).items():
        if not number:
            continue
        for factor in (Fraction(2), Fraction(3), Fraction(1, 2)):
            made = None
            if (changed := stated(Fraction(number) * factor, number)) is not None:
                made = sizes_of_config(kind, config, target.keys(), {path: changed})
            if made is not None:
                break
        if made is None:
            continue
        for key, size in base.items():
            if made.get(key, size) == size:
                continue
            numbers[path] = number
            ratio = Fraction(made[key], size) if size else None
            if ratio in (factor, 1 / factor):
                powers[key][path] = 1 if ratio == factor else -1
            else:
                mixed[key].add(path)
    return Response(base, numbers, powers, {key: frozenset(paths) for key, paths in mixed.items()})


def stated(value: Fraction, like: Number) -> Number | None:
    """Return a value as a number of the same type as another one; None if there is none above 0.

    Ratios are rounded up: classes round products of them down, as `int(width * mlp_ratio)`.

    >>> stated(Fraction(7, 2), 4.0), stated(Fraction(7, 2), 4), int(14 * stated(Fraction(64, 14), 4.0))
    (3.5, None, 64)
    """
    if value <= 0 or (type(like) is int and value.denominator != 1):
        return None
    if type(like) is int:
        return int(value)
    ratio = float(value)
    return ratio if Fraction(ratio) >= value else math.nextafter(ratio, math.inf)
