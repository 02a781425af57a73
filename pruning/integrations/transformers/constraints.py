"""Constraints under which a configuration of transformers can describe the pruned model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypedDict

from torch import nn

from pruning.errors import PruningError
from pruning.graph.groups import Trace
from pruning.graph.plan import Plan
from pruning.integrations.transformers.adapting import adapted
from pruning.integrations.transformers.fitting import ConfigFit
from pruning.integrations.transformers.inputs import example_inputs as inputs_for
from pruning.integrations.transformers.inputs import without_cache
from pruning.surgery.apply import apply
from pruning.utils.meta import on_meta
from pruning.utils.tree import Inputs
from pruning.utils.wrappers import unwrapped


class Constraints(TypedDict):
    """Arguments of `prune`."""

    alike: list[str]
    widths: dict[str, int | str]


@dataclass(frozen=True)
class _Set:
    """Groups that are narrowed together."""

    names: tuple[str, ...]
    channels: int


def loadable(model: nn.Module, trace: Trace, example_inputs: Inputs | None = None) -> Constraints:
    """Return the arguments of `prune` with which a configuration can describe the result.

    Groups at the same place of each layer get one width (`alike`). Those that no number of the configuration
    describes keep all channels (`widths`). Where the library computes one width from another, as
    `hidden_size / heads` in BERT, both keep one share (`alike`). All of this is tried: each set of groups is
    narrowed, a configuration is searched as by `save_pretrained`, and outputs are compared at random weights.

    Args:
        model: of transformers. trace: of this model.
        example_inputs: on which outputs are compared; made from the configuration by default.

    Raises:
        PruningError: if no group can be narrowed in this way.

    Example:
        ```python
        traced = trace(model, inputs, outputs=["logits"])
        step = prune(model, inputs, Budget(macs="50%"), outputs=["logits"], **loadable(model, traced))
        save_pretrained(step.model, "small")
        ```
    """
    model = unwrapped(model)
    fit, bare = ConfigFit(model), on_meta(model)
    inputs = without_cache(model, inputs_for(model) if example_inputs is None else example_inputs)

    def fits(group_sets: Iterable[_Set]) -> bool:
        # The first channels go: what a class counts from 0, as the frequencies of positions, then differs.
        together = list(group_sets)
        parts = math.gcd(*(each.channels for each in together))
        plan = Plan({n: tuple(range(s.channels // parts, s.channels)) for s in together for n in s.names})
        configs = fit.configs(apply(bare, trace, plan))[0]
        small = apply(model, trace, plan) if configs else model
        return any(adapted(small, config, inputs, trace.outputs)[0] is not None for config in configs)

    described, fixed = _tried(trace, fits)
    if not described:
        raise PruningError(
            f"no configuration of {type(model).__name__} describes it with fewer channels; save it with "
            "pruning.save, or ignore other layers"
        )
    everything = list(trace.groups)
    return {
        "alike": [_pattern(each.names, everything) for each in described if len(each.names) > 1],
        "widths": dict.fromkeys(fixed, "100%"),
    }


def _tried(trace: Trace, fits: Callable[[Iterable[_Set]], bool]) -> tuple[list[_Set], list[str]]:
    """Return the sets of groups that a configuration describes, and the names of the other groups."""
    described: list[_Set] = []
    others: list[_Set] = []
    fixed: list[str] = []
    for each in _places(trace):
        if each.channels == 1:
            fixed += each.names
        else:
            (described if fits([each]) else others).append(each)
    for channels in sorted({each.channels for each in others}):
        equal = [each for each in others if each.channels == channels]
        for together in _candidates(equal):
            if fits(together):
                described.append(_Set(tuple(n for each in together for n in each.names), channels))
                equal = [each for each in equal if each not in together]
        others = [each for each in others if each.channels != channels] + equal
    for together in _coupled(trace, others):
        if all(each in others for each in together) and fits(together):
            described.append(_Set(tuple(n for each in together for n in each.names), together[0].channels))
            others = [each for each in others if each not in together]
    fixed += [name for each in others for name in each.names]
    return described, fixed


def _places(trace: Trace) -> list[_Set]:
    """Return the groups in sets of those whose names differ in numbers alone."""
    sets: dict[tuple[str, int], list[str]] = {}
    for name, group in trace.groups.items():
        sets.setdefault((re.sub(r"\d+", "*", name), group.channels), []).append(name)
    return [_Set(tuple(names), channels) for (_, channels), names in sets.items()]


def _candidates(sets: Sequence[_Set]) -> list[list[_Set]]:
    """Return combinations of sets of equal widths: those with the same last part of a name, then all."""
    by_end: dict[str, list[_Set]] = {}
    for each in sets:
        by_end.setdefault(re.split(r"[./]", each.names[0])[-1], []).append(each)
    found = [together for together in by_end.values() if len(together) > 1]
    return [*found, list(sets)] if len(sets) > 1 and [list(sets)] != found else found


def _coupled(trace: Trace, sets: Sequence[_Set]) -> Iterator[list[_Set]]:
    """Yield combinations of sets of different widths, of which a class may compute one from the other.

    These are the residual width, alone or with all sets as wide, and the places within a head, or the heads,
    of the layers that read it.
    """
    for channels in sorted({each.channels for each in sets}, reverse=True):
        wide = [each for each in sets if each.channels == channels and "/" not in each.names[0]]
        for chosen in [*([each] for each in wide), *([wide] if len(wide) > 1 else [])]:
            readers = {m.layer for each in chosen for n in each.names for m in trace.groups[n].side("in")}
            by_end: dict[str, list[_Set]] = {}
            for each in sets:
                makers = {m.layer for n in each.names for m in trace.groups[n].side("out")}
                if "/" in each.names[0] and makers <= readers and math.gcd(each.channels, channels) > 1:
                    by_end.setdefault(each.names[0].rpartition("/")[2], []).append(each)
            for end in sorted(by_end, reverse=True):  # widths before heads, which are fewer
                yield [*chosen, *by_end[end]]


def _pattern(names: Sequence[str], everything: Sequence[str]) -> str:
    """Return a pattern that matches these names alone; if there is none, the names.

    >>> _pattern(["h.0.fc", "h.1.fc"], ["h.0.fc", "h.1.fc", "h.0.proj"])
    'h.*.fc'
    >>> _pattern(["h.0.fc", "h.1.fc"], ["h.0.fc", "h.1.fc", "h.2.fc"])
    'h.0.fc,h.1.fc'
    """
    patterns = list(dict.fromkeys(re.sub(r"\d+", "*", name) for name in names))
    matched = {name for name in everything for pattern in patterns if fnmatchcase(name, pattern)}
    return ",".join(patterns if matched == set(names) else names)
