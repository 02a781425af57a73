"""Sets of attributes that may hold the sizes of groups are tried, each once."""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import nn

from pruning.graph.groups import Positions, WidthAttribute
from pruning.tracing.bisection import Structure
from pruning.tracing.size_attributes import CountedSize, following

WIDTH = 4


class Block(nn.Module):
    """A module in which two attributes equal a width."""

    def __init__(self):
        super().__init__()
        self.heads, self.width = WIDTH, WIDTH


class Runs:
    """Groups can be narrowed if `width` alone follows, up to two groups at once; counts the questions."""

    sizes = ()

    def __init__(self):
        self.asked = Counter()

    def is_exact(self, sizes: Mapping[str, tuple[WidthAttribute, ...]]) -> bool:
        chosen = tuple((name, *sorted(size.attribute for size in several)) for name, several in sizes.items())
        self.asked[chosen] += 1
        return len(chosen) < 3 and all(rest == ["width"] for _, *rest in chosen)


def test_each_set_of_attributes_is_tried_once_for_a_group():
    names = ["a", "b", "c"]
    model, runs = nn.ModuleDict({name: Block() for name in names}), Runs()
    channels = torch.arange(WIDTH)
    sizes = {name: [CountedSize(name, Positions(WIDTH, {name: (channels, channels)}))] for name in names}
    structures = {name: Structure(name, (WIDTH,)) for name in names}
    reads = {name: {"heads", "width"} for name in names}
    assert following(model, runs, sizes, structures, reads) == {}
    alone = {chosen: count for chosen, count in runs.asked.items() if len(chosen) == 1}
    assert {chosen[0][0] for chosen in alone} == set(names) and set(alone.values()) == {1}


class Stages(Runs):
    """Groups can be narrowed if `width` follows, however many."""

    def is_exact(self, sizes):
        chosen = tuple((name, *sorted(size.attribute for size in several)) for name, several in sizes.items())
        self.asked[chosen] += 1
        return all(rest == ["width"] for _, *rest in chosen if rest)


def test_what_works_in_one_stage_is_taken_for_the_others_and_tried_together():
    names = ["a", "b", "c", "d"]
    model, runs = nn.ModuleDict({name: Block() for name in names}), Stages()
    channels = torch.arange(WIDTH)
    sizes = {
        f"{name}/width": [CountedSize(name, Positions(WIDTH, {f"{name}/width": (channels, channels)}))]
        for name in names
    }
    structures = {f"{name}/width": Structure(name, (WIDTH,)) for name in names}
    found = following(model, runs, sizes, structures, {name: {"heads", "width"} for name in names})
    assert {name: [size.attribute for size in own] for name, own in found.items()} == {
        f"{name}/width": ["width"] for name in names
    }
    assert {asked[0][0] for asked in runs.asked if len(asked) == 1} == {"a/width"}


def test_groups_without_attributes_are_compared_in_the_same_run():
    model, runs = nn.ModuleDict({"a": Block()}), Stages()
    channels = torch.arange(WIDTH)
    sizes = {"a": [CountedSize("a", Positions(WIDTH, {"a": (channels, channels)}))]}
    found = following(model, runs, sizes, {"a": Structure("a", ())}, {"a": {"width"}}, ["plain"])
    assert list(found) == ["a"], "a group without attributes is not returned"
    assert list(runs.asked) == [(("a", "width"), ("plain",))]
