"""Constraints under which a configuration of transformers can describe the pruned model."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
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


#: Names of groups that keep one share of their channels.
_Set = tuple[str, ...]


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
    described = _described(trials)
    if not described:
        causes = "; ".join(f"{each[0]}: {trials.reason([each])}" for each in _places(trace))
        raise PruningError(
            f"no configuration of {type(trials.model).__name__} describes it with fewer channels ({causes}); "
            "save it with pruning.save, or ignore other layers"
        )
    everything = list(trace.groups)
    narrowed = {name for each in described for name in each}
    return {
        "alike": [_pattern(each, everything) for each in described if len(each) > 1],
        "widths": dict.fromkeys([name for name in everything if name not in narrowed], "100%"),
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
        self._reasons: dict[Plan, str] = {}

    def reason(self, sets: Sequence[_Set], removed: Sequence[int] | None = None) -> str:
        """Return why no configuration describes the model with these sets narrowed; empty if one does.

        Args:
            removed: of each set, how many of its `parts` are removed; by default one of each.
        """
        plan = self._narrower(sets, [1] * len(sets) if removed is None else removed)
        if plan not in self._reasons:
            self._reasons[plan] = self._tried(plan)
        return self._reasons[plan]

    def _tried(self, plan: Plan) -> str:
        configs, reason = self.fit.configs(apply(self.bare, self.trace, plan))
        small = apply(self.model, self.trace, plan) if configs else self.model
        for config in configs:
            made, _, reason = adapted(small, config, self.inputs, self.trace.outputs)
            if made is not None:
                return ""
        return reason

    def parts(self, names: _Set) -> int:
        """Return into how many equal parts the channels of all groups of a set can be divided."""
        groups = [self.trace.groups[name] for name in names]
        most = math.gcd(*(group.channels for group in groups))
        return next(
            parts
            for parts in range(most, 0, -1)
            if all(g.channels % parts == 0 and g.channels // parts % g.multiple == 0 for g in groups)
            or parts == 1
        )

    def sizes(self, names: _Set) -> set[str]:
        """Return the names of the sizes that change where a set is narrowed."""
        before = sizes_of(self.bare, [])
        after = sizes_of(apply(self.bare, self.trace, self._narrower([names], [1])), [])
        return {key for key, size in after.items() if before[key] != size}

    def _narrower(self, sets: Sequence[_Set], removed: Sequence[int]) -> Plan:
        """Return a plan that removes so many parts of each set.

        The first channels go: what a class counts from 0, as the frequencies of positions, then differs.
        """
        keep: dict[str, tuple[int, ...]] = {}
        for names, count in zip(sets, removed, strict=True):
            for name in names:
                channels = self.trace.groups[name].channels
                keep[name] = tuple(range(channels // self.parts(names) * count, channels))
        return Plan(keep)


def _described(trials: _Trials) -> list[_Set]:
    """Return the sets of groups that a configuration describes, each alone and all together."""
    sets = [each for each in _places(trials.trace) if trials.parts(each) > 1]
    alone = [each for each in sets if not trials.reason([each])]
    sizes = {each: trials.sizes(each) for each in sets if each not in alone}
    found = _combined(trials, sizes, ())
    left = [each for each in sizes if not any(set(each) <= set(together) for together in found)]
    if left:  # combinations of these may cover more groups
        found = max(found, _combined(trials, sizes, left), key=lambda every: sum(map(len, every)))
    return _compatible(trials, [*alone, *found])


def _compatible(trials: _Trials, sets: Sequence[_Set]) -> list[_Set]:
    """Return the sets, without those that no configuration describes while the sets before are narrowed."""

    def fit(together: Sequence[_Set]) -> bool:
        removed = [max(1, trials.parts(names) // (2 + i % 2)) for i, names in enumerate(together)]
        return len(together) < 2 or not trials.reason(together, removed)

    if fit(sets):
        return list(sets)
    kept: list[_Set] = []
    for each in sets:
        kept += [each] if fit([*kept, each]) else []
    return kept


def _places(trace: Trace) -> list[_Set]:
    """Return the groups in sets of those whose names differ in numbers alone."""
    sets: dict[tuple[str, int], list[str]] = {}
    for name, group in trace.groups.items():
        sets.setdefault((re.sub(r"\d+", "*", name), group.channels), []).append(name)
    return [tuple(names) for names in sets.values()]


def _combined(trials: _Trials, sizes: Mapping[_Set, set[str]], first: Collection[_Set]) -> list[_Set]:
    """Return unions of sets that a configuration describes together.

    Those on whose widths one number of the configuration acts are tried, the smallest first. Where it acts on
    heads, these are the places within a head, or the heads.

    Args:
        sizes: by set, those that change where it is narrowed.
        first: combinations with one of these sets go first.
    """
    left, found = list(sizes), list[_Set]()
    while left:
        tried: dict[tuple[_Set, ...], None] = {}
        for affected in trials.fit.affected.values():
            acted = [each for each in left if sizes[each] & affected]
            plain = [each for each in acted if "/" not in each[0]]
            ends = sorted({each[0].rpartition("/")[2] for each in acted if each not in plain})
            for end in reversed(ends):  # widths before heads, which are fewer
                tried[tuple(s for s in acted if s in plain or s[0].endswith(f"/{end}"))] = None
            tried[tuple(plain)] = None
        several = [together for together in tried if len(together) > 1]
        several.sort(key=lambda together: (not any(each in first for each in together), len(together)))
        union = next(
            (t for t in several if trials.parts(sum(t, ())) > 1 and not trials.reason([sum(t, ())])), ()
        )
        if not union:
            break
        found.append(sum(union, ()))
        left = [each for each in left if each not in union]
    return found


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
