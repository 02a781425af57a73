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
