"""The configuration of given sizes is found from the class alone: products, sums, lists, unstated numbers."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from dataclasses import asdict, dataclass, field

from torch import nn

from pruning.integrations.transformers.fitting import ConfigFit
from pruning.surgery.width_attributes import mark_changed

pytestmark = pytest.mark.quick


@dataclass
class Config:
    width: int = 12
    heads: int = 4
    groups: int = 2
    depth: int = 5
    inner: int | None = None
    stages: list[int] = field(default_factory=lambda: [7, 9])
    ratio: float = 2.5
    unused: int = 3

    def to_dict(self):
        return asdict(self)


class Toy(nn.Module):
    """Fused q, k and v of `heads + 2 * groups` heads of `depth`; an MLP of 4 widths if none is stated."""

    def __init__(self, config):
        super().__init__()
        self.config, self.depth = config, config.depth
        if config.heads % config.groups:
            raise ValueError("groups do not divide heads")
        inner = 4 * config.width if config.inner is None else config.inner
        self.qkv = nn.Linear(config.width, (config.heads + 2 * config.groups) * config.depth, bias=False)
        self.out = nn.Linear(config.heads * config.depth, config.width)
        self.up, self.down = nn.Linear(config.width, inner), nn.Linear(inner, config.width)
        self.ratio = nn.Linear(config.width, int(config.width * config.ratio))
        self.stages = nn.ModuleList(nn.Linear(2, size) for size in config.stages)


def fitted(changed=(), **numbers):
    """Return the numbers found for a model of other numbers that still holds the dense configuration."""
    small = Toy(Config(**numbers))
    small.config = Config()
    mark_changed(small, list(changed))
    configs, reason = ConfigFit(small).configs(small)
    return [config.to_dict() for config in configs], reason


@pytest.mark.parametrize(
    "numbers",
    [
        {},
        {"width": 7, "inner": 48},
        {"inner": 11},
        {"width": 5, "inner": 9},
        {"heads": 2, "groups": 1},
        {"heads": 3, "groups": 1, "width": 6},
        {"depth": 3},
        {"depth": 2, "heads": 2, "groups": 2, "stages": [3, 9]},
        {"stages": [1, 4]},
        {"ratio": 5 / 3},
        {"width": 7, "ratio": 19 / 7, "inner": 48},
    ],
)
def test_numbers_are_recovered_from_sizes(numbers):
    found, reason = fitted(["depth"] if "depth" in numbers else [], **numbers)
    expected = {**Config().to_dict(), **numbers}
    if expected["inner"] is None and found[0]["inner"] is not None:
        expected["inner"] = 4 * expected["width"]  # it may be stated
    matching = [each for each in found if each == {**expected, "ratio": each["ratio"]}]
    assert matching and not reason
    for each in matching:  # a ratio may be one of those that give the same size
        assert int(each["width"] * each["ratio"]) == int(expected["width"] * expected["ratio"])


def test_sizes_that_exclude_one_another_are_named():
    small = Toy(Config())
    small.up = nn.Linear(9, 48)  # its input has lost channels that other layers keep
    found, reason = ConfigFit(small).configs(small)
    assert not found and "width would have to be 9 for up.weight[1]" in reason and "12 for" in reason


def test_sizes_that_no_number_gives_are_named():
    small = Toy(Config())
    small.stages[0] = nn.Linear(1, 7)
    assert ConfigFit(small).configs(small) == (
        [],
        "no number of the configuration changes stages.0.weight[1], which is 1 here",
    )
    small = Toy(Config())
    del small.down
    found, reason = ConfigFit(small).configs(small)
    assert not found and "down.bias[0]" in reason and "of what its configuration gives alone" in reason
