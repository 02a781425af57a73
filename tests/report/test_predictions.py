"""Find the examples that only one of two classifiers predicts correctly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pruning import PruningError
from pruning.report.predictions import differing_predictions


class Predictor(nn.Module):
    """Predicts the class that is the value of one pixel."""

    def __init__(self, column):
        super().__init__()
        self.column, self.unused = column, nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return nn.functional.one_hot(images[:, 0, 0, self.column].long(), 3).float()


def test_examples_and_confusion_are_counted():
    images = torch.zeros(4, 1, 2, 2)
    images[:, 0, 0, 0] = torch.tensor([0, 1, 2, 0])  # predictions of the dense network
    images[:, 0, 0, 1] = torch.tensor([0, 2, 1, 1])  # and of the small one
    labels = torch.tensor([0, 1, 1, 2])
    found = differing_predictions(
        Predictor(0), Predictor(1), [(images[:3], labels[:3]), (images[3:], labels[3:])]
    )
    assert found["confusion"]["dense"] == [[1, 0, 0], [0, 1, 1], [1, 0, 0]]
    assert found["confusion"]["small"] == [[1, 0, 0], [0, 1, 1], [0, 1, 0]]
    assert [{k: e[k] for k in ("truth", "dense", "small")} for e in found["lost"]] == [
        {"truth": 1, "dense": 1, "small": 2}
    ]
    assert [e["truth"] for e in found["won"]] == [1] and found["count"] == {"lost": 1, "won": 1}
    assert torch.tensor(found["lost"][0]["image"]).shape == (1, 2, 2)
    assert differing_predictions(Predictor(0), Predictor(1), [(images, labels)], most=0)["lost"] == []


def test_a_network_that_is_not_a_classifier_raises():
    with pytest.raises(PruningError, match="only predictions of classifiers"):
        differing_predictions(
            nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1), [(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2))]
        )


def test_ignored_targets_are_left_out_and_soft_targets_count_as_their_argmax():
    images = torch.zeros(3, 1, 2, 2)
    images[:, 0, 0, 0] = torch.tensor([0, 1, 2])  # of the dense network; the small one predicts 0
    found = differing_predictions(Predictor(0), Predictor(1), [(images, torch.tensor([-100, 1, 2]))])
    assert found["confusion"]["dense"] == [[0, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert [(e["truth"], e["dense"]) for e in found["lost"]] == [(1, 1), (2, 2)]
    shares = nn.functional.one_hot(torch.tensor([0, 1, 2]), 3) * 0.8 + 0.2 / 3
    assert differing_predictions(Predictor(0), Predictor(1), [(images, shares)])["count"] == {
        "lost": 2,
        "won": 0,
    }
