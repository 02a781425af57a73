"""Union-find over channel labels."""

from __future__ import annotations

import pytest
import torch

from pruning.tracing.ties import Ties

pytestmark = pytest.mark.quick


def test_ties_are_transitive_and_find_returns_the_smallest_label():
    ties = Ties()
    first, second, third = ties.new(4), ties.new(4), ties.new(2)
    ties.union(first, second)
    ties.union(third, second[2:])
    ties.union(first[:1], first[3:])
    assert ties.find(third).tolist() == [2, 0]
    assert ties.find(second).tolist() == [0, 1, 2, 0]


def test_a_long_chain_of_ties_forms_one_set():
    ties = Ties()
    numbers = ties.new(10_000)
    shuffled = numbers[torch.randperm(10_000).numpy()]
    ties.union(shuffled[:-1], shuffled[1:])
    assert (ties.find(numbers) == 0).all()
