"""Compute the assignment's score, which compares a network with the reference in four indicators."""

from __future__ import annotations

from typing import NamedTuple, Protocol

#: The accuracy of the reference on the 10,000 test images of MNIST, as the assignment gives it.
REFERENCE_ACCURACY = 0.980


class FourIndicators(Protocol):
    """The indicators of a network: accuracy (0 to 1), time per image (ms), params and MACs."""

    @property
    def accuracy(self) -> float: ...
    @property
    def infer_time_ms(self) -> float: ...
    @property
    def params(self) -> int: ...
    @property
    def macs(self) -> int: ...


class Score(NamedTuple):
    """The score, capped at 100 and uncapped; `worse` names the indicators that make it 0."""

    capped: float
    uncapped: float
    worse: tuple[str, ...]


def score(net: FourIndicators, reference: FourIndicators, reference_accuracy: float) -> Score:
    """Return 60 + (a'−a)·2000 + (i−i')/i·50 + (p−p')/p'·2 + (m−m')/m'·2; primes denote `net`.

    The score is 0 if any indicator is worse than the reference's. `reference_accuracy` is a.
    """
    pairs = {
        "accuracy": net.accuracy < reference_accuracy,
        "inference time": net.infer_time_ms > reference.infer_time_ms,
        "params": net.params > reference.params,
        "MACs": net.macs > reference.macs,
    }
    worse = tuple(name for name, is_worse in pairs.items() if is_worse)
    if worse:
        return Score(0.0, 0.0, worse)
    points = (
        60
        + (net.accuracy - reference_accuracy) * 2000
        + (reference.infer_time_ms - net.infer_time_ms) / reference.infer_time_ms * 50
        + (reference.params - net.params) / net.params * 2
        + (reference.macs - net.macs) / net.macs * 2
    )
    return Score(min(points, 100.0), points, ())
