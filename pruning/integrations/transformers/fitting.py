"""Find the configuration whose model has given sizes, by proof: nothing is known of any class.

Each number of the configuration is doubled in turn, and the class is called on the meta device. A size that
doubles is proportional to the number; sizes that are products of numbers give equations, which are solved
one unknown at a time. The class then makes the model of the result, and all its sizes are compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from fractions import Fraction
from functools import cached_property
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from pruning.integrations.transformers.depth import config_of_blocks
from pruning.integrations.transformers.response import (
    Response,
    response_of,
    stated,
    with_stated_numbers,
)
from pruning.integrations.transformers.sizes import (
    Number,
    Path,
    Sizes,
    named,
    sizes_of,
    sizes_of_config,
    with_numbers,
)
from pruning.surgery.width_attributes import changed_attributes

#: Most configurations that are tried where attributes of modules allow several.
_MOST_TRIALS = 64


class _NoConfig(Exception):
    """No configuration has these sizes; the message says why."""


class ConfigFit:
    """Finds the configurations of models that were pruned from one model, whose class is probed once.

    Args:
        model: of transformers, pruned or not; its attribute `config` is that of the dense model.
    """

    def __init__(self, model: nn.Module):
        self.kind, self.config = type(model), config_of_blocks(model)
        self.start = sizes_of_config(self.kind, self.config, sizes_of(model).keys())

    @cached_property
    def response(self) -> Response:
        """How the sizes depend on the configuration, all of whose numbers are stated."""
        return response_of(self.kind, self.explicit, self.start or {})

    @cached_property
    def explicit(self) -> Any:
        """The configuration, with the numbers stated that it leaves to the class."""
        return with_stated_numbers(self.kind, self.config, self.start or {})

    @cached_property
    def affected(self) -> dict[Path, set[str]]:
        """By number of the configuration, the sizes that depend on it."""
        found: dict[Path, set[str]] = {}
        for by_size in (self.response.powers, self.response.mixed) if self.start is not None else ():
            for key, paths in by_size.items():
                for path in paths:
                    found.setdefault(path, set()).add(key)
        return found

    def configs(self, model: nn.Module) -> tuple[list[PretrainedConfig], str]:
        """Return the configurations from which the class makes the sizes of a pruned model.

        Several differ in numbers that show in no tensor, such as the number of heads.

        Returns the configurations, and why there are none (empty if there are).
        """
        target = sizes_of(model)
        hard = {key for key in target if key.endswith("]")} | {
            f"{name}.{attribute}".lstrip(".")
            for name, module in model.named_modules()
            for attribute in changed_attributes(module)
        }
        if self.start is None:
            return [], f"{self.kind.__name__} cannot be made from its own configuration"
        differing = sorted(key for key in self.start.keys() ^ target.keys() if key.endswith("]"))
        if differing:
            whose = "the pruned model" if differing[0] in target else "what its configuration gives"
            return [], f"{differing[0]} and {len(differing) - 1} more are sizes of {whose} alone"
        if not any(self.start.get(key) != target[key] for key in hard & self.start.keys()):
            return [self.config], ""
        found: list[PretrainedConfig] = []
        reason = ""
        try:
            for numbers in itertools.islice(_solutions(self.response, target, hard), _MOST_TRIALS):
                trial, reason = self._tried(numbers, target, hard)
                found += [] if trial is None else [trial]
        except _NoConfig as error:
            reason = str(error)
        return found, "" if found else reason

    def _tried(
        self, numbers: dict[Path, Number], target: Sizes, hard: set[str]
    ) -> tuple[PretrainedConfig | None, str]:
        """Return the configuration with these numbers, or None and why it does not give the sizes."""
        numbers = _mixed_solved(self.kind, self.explicit, self.response, target, hard, numbers)
        made = sizes_of_config(self.kind, self.explicit, target.keys(), numbers)
        if made is None:
            stated = ", ".join(f"{named(path)}={number}" for path, number in numbers.items())
            return None, f"{self.kind.__name__} cannot be made with {stated}"
        wrong = sorted(key for key in hard & made.keys() if made[key] != target[key])
        if wrong:
            return None, (
                f"no number of the configuration gives {wrong[0]} = {target[wrong[0]]}"
                f"{_more(len(wrong) - 1)}; it would be {made[wrong[0]]}"
            )
        return with_numbers(self.explicit, numbers), ""


def _more(count: int) -> str:
    return f" (nor {count} other sizes)" if count else ""


def _solutions(response: Response, target: Sizes, hard: set[str]) -> Iterator[dict[Path, Number]]:
    """Yield the numbers that explain all sizes of the target which are products of numbers.

    Attributes of modules that pruning has not changed may be ones that no code reads, so they only offer
    values for the numbers that the other sizes leave open.
    """
    equations = {
        key: powers
        for key, powers in response.powers.items()
        if key in hard and key in target and not response.mixed.get(key)
    }
    wrong = {key for key in hard & response.sizes.keys() if response.sizes[key] != target[key]}
    for key in sorted(wrong):
        if not response.powers.get(key) and not response.mixed.get(key):
            raise _NoConfig(f"no number of the configuration changes {key}, which is {target[key]} here")
    active = {path for key in wrong for path in (*response.powers.get(key, ()), *response.mixed.get(key, ()))}
    soft = {
        key: powers
        for key, powers in response.powers.items()
        if key in target and key not in hard and not response.mixed.get(key) and active & powers.keys()
    }
    active |= {path for powers in soft.values() for path in powers}
    fixed = {path: Fraction(number) for path, number in response.numbers.items() if path not in active}
    yield from _completed(response, target, equations, soft, active, fixed)


def _completed(
    response: Response,
    target: Sizes,
    equations: Mapping[str, Mapping[Path, int]],
    soft: Mapping[str, Mapping[Path, int]],
    active: set[Path],
    known: dict[Path, Fraction],
) -> Iterator[dict[Path, Number]]:
    """Solve equations of one unknown until there are none; then try values of one number, and go on."""
    known = dict(known)
    while votes := _votes(response, target, equations, known):
        for path, values in votes.items():
            known[path] = _agreed(response, path, values)
    unknown = sorted(active - known.keys())
    if not unknown:
        numbers = {path: stated(known[path], response.numbers[path]) for path in sorted(active)}
        yield {path: number for path, number in numbers.items() if number is not None}
        return
    offered = _votes(response, target, soft, known)
    path = next((p for p in unknown if p in offered), unknown[0])
    tried = dict.fromkeys([*offered.get(path, {}), Fraction(response.numbers[path])])
    for value in [value for value in tried if stated(value, response.numbers[path]) is not None]:
        try:
            yield from _completed(response, target, equations, soft, active, {**known, path: value})
        except _NoConfig:
            if len(tried) == 1:
                raise


def _votes(
    response: Response,
    target: Sizes,
    equations: Mapping[str, Mapping[Path, int]],
    known: Mapping[Path, Fraction],
) -> dict[Path, dict[Fraction, list[str]]]:
    """Return, for the numbers that are the only unknown of an equation, their values and from which sizes."""
    votes: dict[Path, dict[Fraction, list[str]]] = {}
    for key, powers in equations.items():
        unknown = [path for path in powers if path not in known]
        if len(unknown) != 1 or not response.sizes[key]:
            continue
        (path,) = unknown
        ratio = Fraction(target[key], response.sizes[key])
        for other, power in powers.items():
            if other in known:
                ratio /= (known[other] / Fraction(response.numbers[other])) ** power
        share = ratio if powers[path] == 1 else 1 / ratio if ratio else ratio
        value = Fraction(response.numbers[path]) * share
        votes.setdefault(path, {}).setdefault(value, []).append(key)
    return votes


def _agreed(response: Response, path: Path, values: Mapping[Fraction, list[str]]) -> Fraction:
    """Return the value on which all sizes agree."""

    def shown(value: Fraction, keys: list[str]) -> str:
        more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
        return f"{_shown(value)} for {keys[0]}{more}{_factor(response, path, keys[0])}"

    if len(values) > 1:
        listed = "; ".join(shown(value, keys) for value, keys in sorted(values.items()))
        raise _NoConfig(f"{named(path)} would have to be {listed}")
    ((value, keys),) = values.items()
    if stated(value, response.numbers[path]) is None:
        raise _NoConfig(f"{named(path)} would have to be {shown(value, keys[:1])}")
    return value


def _factor(response: Response, path: Path, key: str) -> str:
    """Say by which constant the class multiplies a number for a size, if it is another than 1."""
    factor = Fraction(response.sizes[key]) / Fraction(response.numbers[path])
    if response.powers[key] != {path: 1} or factor == 1 or factor.denominator != 1:
        return ""
    return f" (which the class makes {factor} * {path[-1]})"


def _shown(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.2f}"


def _mixed_solved(
    kind: type[nn.Module],
    config: PretrainedConfig,
    response: Response,
    target: Sizes,
    hard: set[str],
    numbers: dict[Path, Number],
) -> dict[Path, Number]:
    """Solve for numbers that occur in sums alone, such as the heads of keys in a fused layer."""
    for key in sorted(hard & response.mixed.keys()):
        for path in sorted(response.mixed[key]):
            start = numbers.get(path, response.numbers[path])
            if not isinstance(start, int) or any(
                path in powers for k, powers in response.powers.items() if k in hard
            ):
                continue
            points: dict[int, int] = {}  # sizes at some values of this number: two give the line
            for value in dict.fromkeys((start, 1, 2, 3, 2 * start, 3 * start)):  # the class may refuse some
                made = sizes_of_config(kind, config, target.keys(), {**numbers, path: value})
                if made is not None and made[key] not in points.values():
                    points[value] = made[key]
                if len(points) == 2 or target[key] in points.values():
                    break
            solved = _on_line(points, target[key])
            if solved is not None:
                numbers = {**numbers, path: solved}
    return numbers


def _on_line(points: Mapping[int, int], size: int) -> int | None:
    """Return the number at which a size is reached that depends on it linearly; None if there is none.

    >>> _on_line({1: 10, 2: 14}, 22)
    4
    """
    known = next((value for value, made in points.items() if made == size), None)
    if known is not None or len(points) < 2:
        return known
    (first, low), (second, high) = points.items()
    value = first + Fraction((size - low) * (second - first), high - low)
    return int(value) if value.denominator == 1 and value >= 1 else None
