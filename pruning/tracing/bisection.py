"""Find the groups that fail a test of narrowed copies, in few tests: by bisection over groups alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from pruning.graph.groups import Group, Trace
from pruning.graph.layers import Side, layer_width, rule_of
from pruning.tracing.record import Flow
from pruning.utils.modules import submodule

_SIDES: tuple[Side, ...] = ("out", "in")


def faulty_groups(
    test: Callable[[list[str]], str],
    names: list[str],
    structures: Mapping[str, Structure],
    assumed: set[str] | None = None,
) -> dict[str, str]:
    """Return the groups that fail a test, with the error; search by bisection.

    Groups of equal structure are narrowed together. If they fail, and the first one alone fails, its
    answer holds for all of them, so that many blocks alike take as many tests as one.

    Args:
        assumed: receives the groups that only have the shape of one that fails, but other sizes. Without
            it, each structure is tested.
    """
    error = test(names) if names else ""
    if not error:
        return {}
    alike: dict[Structure | str, list[str]] = {}
    for name in sorted(names, key=lambda name: structures[name].shape):  # groups that fail are neighbors
        structure = structures[name]
        alike.setdefault(structure if assumed is None else structure.shape, []).append(name)
    failing = _bisect(test, list(alike.values()), error, structures)
    if assumed is not None:
        for same in alike.values():
            tested = structures[next((name for name in same if name in failing), same[0])]
            assumed.update(name for name in same if name in failing and structures[name] != tested)
    return {name: failing[name] for name in names if name in failing}


def _bisect(
    test: Callable[[list[str]], str],
    sets: list[list[str]],
    error: str,
    structures: Mapping[str, Structure],
) -> dict[str, str]:
    """Search several sets of similar groups, which fail a test together with this error."""
    if len(sets) > 1:
        first, second = sets[: len(sets) // 2], sets[len(sets) // 2 :]
        of_first = test([name for same in first for name in same])
        found = _bisect(test, first, of_first, structures) if of_first else {}
        # If the first half passes, the error is in the second, which needs no test of its own.
        names = [name for same in second for name in same]
        if of_first or len(names) == 1:
            error = test(names)
        return found | _bisect(test, second, error, structures) if error else found
    (same,) = sets
    if len(same) == 1:
        return {same[0]: error}
    if error := test(same[:1]):
        return dict.fromkeys(same, error)
    by_structure: dict[Structure, list[str]] = {}
    for name in same:
        by_structure.setdefault(structures[name], []).append(name)
    smaller = [*by_structure.values()] if len(by_structure) > 1 else [[name] for name in same]
    return _bisect(test, smaller, "no error", structures)


@dataclass(frozen=True)
class Structure:
    """What groups of similar blocks have in common.

    Attributes:
        shape: the modules that hold its channels, as text. sizes: the widths and numbers of positions.
    """

    shape: str
    sizes: tuple[object, ...]


def structure_of(model: nn.Module, found: Flow | Trace, group: Group) -> Structure:
    """Describe a group by the types, roles and sizes of its members, without their places in the model."""
    shape: list[str] = []
    sizes: list[object] = [group.channels]
    for member in group.members:
        owner, _, role = member.layer.rpartition(".")
        kinds = [type(submodule(model, owner)).__name__, "" if role.isdecimal() else role, member.side]
        if member.side != "self":
            layer = submodule(model, member.layer)
            kinds.append(type(layer).__name__)
            sizes += [layer_width(layer, side) for side in _SIDES if rule_of(layer).count(side)]
        shape.append(".".join(kinds))
        sizes += [member.dim, len(member.index), found.uses.get(member.layer)]
    return Structure(" ".join(shape), tuple(sizes))
