"""The assignment's score and table in closed form."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from eval.metrics import Indicators, table
from eval.score import score
from pruning.deploy import Latency

REFERENCE = SimpleNamespace(accuracy=0.5, infer_time_ms=0.04, params=60_000, macs=200_000)


def net(**changes):
    return SimpleNamespace(**{**vars(REFERENCE), "accuracy": 0.98, **changes})


def test_a_network_equal_to_the_reference_scores_60():
    assert score(net(), REFERENCE, 0.98) == (60, 60, ())


@pytest.mark.parametrize(
    ("changes", "points"),
    [
        ({"accuracy": 0.985}, 70),
        ({"infer_time_ms": 0.02}, 85),
        ({"params": 6_000}, 78),
        ({"macs": 50_000}, 66),
        ({"accuracy": 0.99, "infer_time_ms": 0.03, "params": 2_000, "macs": 40_000}, 60 + 20 + 12.5 + 58 + 8),
    ],
)
def test_each_indicator_adds_its_points(changes, points):
    capped, uncapped, worse = score(net(**changes), REFERENCE, 0.98)
    assert uncapped == pytest.approx(points) and capped == pytest.approx(min(points, 100)) and not worse


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"accuracy": 0.979}, "accuracy"),
        ({"infer_time_ms": 0.041}, "inference time"),
        ({"params": 60_001}, "params"),
        ({"macs": 200_001}, "MACs"),
    ],
)
def test_any_worse_indicator_makes_the_score_0(changes, name):
    assert score(net(**{"params": 2000, **changes}), REFERENCE, 0.98) == (0, 0, (name,))


def test_the_table_has_the_format_of_the_assignment():
    latency = Latency(0.0554, 0.06, 0.05, 0.06, 20, 64, 1)
    row = Indicators("LeNet-5", "mnist", "test", 10_000, 0.9804, latency, latency, 60_074, 199_968, 206_174)
    assert table([row]) == "\n".join([
        "----------------------------------------------------------------",
        "| Model Name | Accuracy | Infer Time(ms) | Params(M) | MACs(M) |",
        "----------------------------------------------------------------",
        "|    LeNet-5 |    0.980 |          0.055 |     0.060 |   0.200 |",
        "----------------------------------------------------------------",
    ])  # fmt: skip
