"""Constraints under which a configuration of transformers can describe the pruned model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
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
from pruning.integrations.transformers.sizes import sizes_of
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
    trials = _Trials(unwrapped(model), trace, example_inputs)
    described, fixed = _described(trials)
    if not described:
        causes = "; ".join(f"{each.names[0]}: {trials.reason([each])}" for each in _places(trace))
        raise PruningError(
            f"no configuration of {type(trials.model).__name__} describes it with fewer channels ({causes}); "
            "save it with pruning.save, or ignore other layers"
        )
    everything = list(trace.groups)
    return {
        "alike": [_pattern(each.names, everything) for each in described if len(each.names) > 1],
        "widths": dict.fromkeys(fixed, "100%"),
    }


class _Trials:
    """Narrow sets of groups on trial, and see whether a configuration describes the result.

    Args:
        model: of transformers. trace: of this model.
        example_inputs: on which outputs are compared; made from the configuration by default.
    """

    def __init__(self, model: nn.Module, trace: Trace, example_inputs: Inputs | None):
        self.model, self.trace, self.fit, self.bare = model, trace, ConfigFit(model), on_meta(model)
        given = inputs_for(model) if example_inputs is None else example_inputs
        self.inputs = without_cache(model, given)
        self._reasons: dict[tuple[_Set, ...], str] = {}

    def reason(self, group_sets: Sequence[_Set]) -> str:
        """Return why no configuration describes the model with these groups narrowed; empty if one does."""
        key = tuple(group_sets)
        if key not in self._reasons:
            self._reasons[key] = self._tried(_narrower(group_sets))
        return self._reasons[key]

    def _tried(self, plan: Plan) -> str:
        configs, reason = self.fit.configs(apply(self.bare, self.trace, plan))
        small = apply(self.model, self.trace, plan) if configs else self.model
        for config in configs:
            made, _, reason = adapted(small, config, self.inputs, self.trace.outputs)
            if made is not None:
                return ""
        return reason

    def sizes(self, each: _Set) -> set[str]:
        """Return the names of the sizes that change where a set is narrowed."""
        before = sizes_of(self.bare, [])
        after = sizes_of(apply(self.bare, self.trace, _narrower([each])), [])
        return {key for key, size in after.items() if before[key] != size}


def _narrower(group_sets: Sequence[_Set]) -> Plan:
    """Return a plan in which sets of groups lose the same share, the least that all can.

    The first channels go: what a class counts from 0, as the frequencies of positions, then differs.
    """
    parts = math.gcd(*(each.channels for each in group_sets))
    return Plan({n: tuple(range(s.channels // parts, s.channels)) for s in group_sets for n in s.names})


def _described(trials: _Trials) -> tuple[list[_Set], list[str]]:
    """Return the sets of groups that a configuration describes, and the names of the other groups."""
    sets = _places(trials.trace)
    several = [each for each in sets if each.channels > 1]
    described = [each for each in several if not trials.reason([each])]
    others = {each: trials.sizes(each) for each in several if each not in described}
    while together := next((t for t in _by_number(trials, others) if not trials.reason(t)), None):
        described.append(_Set(tuple(n for s in together for n in s.names), together[0].channels))
        for each in together:
            del others[each]
    left = [each for each in sets if each.channels == 1 or each in others]
    return described, [name for each in left for name in each.names]


def _places(trace: Trace) -> list[_Set]:
    """Return the groups in sets of those whose names differ in numbers alone."""
    sets: dict[tuple[str, int], list[str]] = {}
    for name, group in trace.groups.items():
        sets.setdefault((re.sub(r"\d+", "*", name), group.channels), []).append(name)
    return [_Set(tuple(names), channels) for (_, channels), names in sets.items()]


def _by_number(trials: _Trials, sizes: Mapping[_Set, set[str]]) -> Iterator[list[_Set]]:
    """Yield combinations of sets on whose widths one number of the configuration acts, the smallest first.

    Where it acts on heads, these are the places within a head, or the heads.

    Args:
        sizes: by set, those that change where it is narrowed.
    """
    found: dict[tuple[_Set, ...], None] = {}
    for affected in trials.fit.affected.values():
        acted = [each for each, changed in sizes.items() if changed & affected]
        plain = [each for each in acted if "/" not in each.names[0]]
        ends = sorted({each.names[0].rpartition("/")[2] for each in acted if each not in plain})
        for end in reversed(ends):  # widths before heads, which are fewer
            found[tuple(s for s in acted if s in plain or s.names[0].endswith(f"/{end}"))] = None
        found[tuple(plain)] = None
    yield from (list(together) for together in sorted(found, key=len) if len(together) > 1)


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
