"""Examples that are spread over batches."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from pruning.training.batches import spread_examples

pytestmark = pytest.mark.quick


class Sorted(Dataset):
    """Examples sorted by class, which note that they are read."""

    def __init__(self, count):
        self.count, self.read = count, []

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        self.read.append(i)
        return torch.tensor([float(i)]), i * 10 // self.count


@pytest.mark.parametrize("count", [1, 7, 10, 33, 100, 500])
@pytest.mark.parametrize("kind", ["loader", "list"])
def test_examples_are_spread_over_all_classes(kind, count):
    data = Sorted(100)
    batches = DataLoader(data, 16)
    if kind == "list":
        batches = list(batches)
        data.read.clear()
    chosen = spread_examples(batches, count)
    inputs = torch.cat([inputs for inputs, _ in chosen]).flatten()
    targets = torch.cat([targets for _, targets in chosen])
    assert count // 2 <= len(inputs) <= count or len(inputs) == 100
    assert torch.equal(targets, inputs.long() // 10) and len(inputs.unique()) == len(inputs)
    if count >= 10:
        assert set(targets.tolist()) == set(range(10))
    if kind == "loader":
        assert sorted(data.read) == inputs.long().tolist(), "only these are read"


def test_shuffled_loaders_and_other_targets_are_taken_as_they_come():
    loader = DataLoader(Sorted(40), 8, shuffle=True)
    assert sum(len(inputs) for inputs, _ in spread_examples(loader, 10)) == 10
    [(inputs, targets)] = spread_examples([((torch.zeros(4, 2), torch.ones(4, 3)), ["a", "b"])], 2)
    assert [len(x) for x in inputs] == [2, 2] and targets == ["a", "b"]
