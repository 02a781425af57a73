"""Rules of layers that the tracer infers: modules that multiply by a weight of their own.

`torch.addmm(self.bias, x, self.weight)` in a module's code, for example, makes it a weighted layer. A rule
belongs to a type of module, as in the table of layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from weakref import WeakKeyDictionary

from torch import nn

from pruning.graph.rule import Rule

_INFERRED: WeakKeyDictionary[type[nn.Module], Rule] = WeakKeyDictionary()


def infer_rule(kind: type[nn.Module], rule: Rule, inferred: set[type[nn.Module]]) -> bool:
    """Give a type of module a rule; return whether it has this rule now.

    A type whose code uses two weights, or one weight in two ways, keeps the first rule of a pass.

    Args:
        inferred: types that got a rule in the present pass; rules of earlier passes are replaced.
    """
    if kind not in inferred:
        _INFERRED[kind] = rule
        inferred.add(kind)
    known = _INFERRED[kind]
    if known.into == rule.into and known.weight == rule.weight and known.spans == rule.spans:
        merged = {**known.out, **rule.out}
        if merged != known.out:  # another instance of the type has a bias
            _INFERRED[kind] = replace(known, out=merged)
        return known.out[known.weight] == rule.out[rule.weight]
    return False


def reinstate(rules: Mapping[type[nn.Module], Rule]) -> None:
    """Let types of modules have the rules that were inferred when a model was traced.

    Another model, traced since, may have modules of the same type that use their weight differently.
    """
    _INFERRED.update(rules)


def inferred_rule(kind: type[nn.Module]) -> Rule | None:
    """Return the rule that was inferred for a type of module; None if there is none."""
    return _INFERRED.get(kind)
