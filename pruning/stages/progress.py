"""How far a pipeline has come; if there is a run, it is saved to it after every epoch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from typing import NamedTuple

from torch import nn

from pruning import checkpoint
from pruning.load_pruned import rebuild
from pruning.planning.budget import Budget
from pruning.planning.cost import Cost
from pruning.stages.given import Given
from pruning.stages.prune import Step
from pruning.stages.run import Run, RunState
from pruning.stages.scales import ChannelScales, joined
from pruning.training.loop import Epoch
from pruning.training.state import TrainingState
from pruning.utils.modules import copied, device_of


class Candidate(NamedTuple):
    """A network that meets the budget: its validation score, the stage that made it, and a copy of it."""

    score: float
    stage: str
    network: nn.Module


class Progress:
    """The progress of a pipeline; if there is a run, it is saved to it after every epoch.

    Args:
        run: the run to save to; if it has a state, the progress continues from that state.
        model: the model that the pipeline was given; it is not changed.

    Attributes:
        network: the network in training.
        dense: the model after stage 1.
        best: the best network so far that meets the budget; None before there is one.
        state: see `RunState`.
    """

    def __init__(self, run: Run | None, model: nn.Module):
        self.run = run
        self.state: RunState = (run.state if run else None) or {"stage": 0, "fit": None}
        self.network, self.dense = copied(model), copied(model)
        if self.state["fit"] is not None:
            weights = self.state["fit"]["model"]
            rebuild(self.network.cpu(), {**self.state["layers"], "state_dict": weights})
            self.network.to(device_of(model))
        if "dense" in self.state:
            self.dense.load_state_dict(self.state["dense"])
        self.dense.eval()
        self.best: Candidate | None = None
        if "best" in self.state:
            best = self.state["best"]
            network = copied(model).cpu()
            rebuild(network, best["network"])
            self.best = Candidate(best["score"], best["stage"], network.to(device_of(model)).eval())

    @property
    def stage(self) -> int:
        """Return the number of the current stage (see `RunState`)."""
        return self.state["stage"]

    @property
    def target(self) -> Budget | None:
        """Return the budget as counts; None before it is known."""
        return Budget(**self.state["target"]) if "target" in self.state else None

    @property
    def start(self) -> Cost:
        """Return the cost of the network without the channels whose scales are 0 after stage 1."""
        return Cost(**self.state["start"])

    @property
    def line(self) -> str:
        """Return the log line of the current pruning step."""
        return self.state.get("line", "")

    def resume(self, stage: int) -> TrainingState | None:
        """Return the state that `fit` resumes from; None if the stage starts from its beginning."""
        return self.state["fit"] if stage == self.stage else None

    def recorder(self, stage: int, label: str, model: nn.Module) -> Callable[[Epoch], None]:
        """Return a function for `fit(on_epoch=...)` that records each epoch and then saves the state."""

        def record(epoch: Epoch) -> None:
            if self.run is None:
                return
            self.run.note(
                stage=label,
                epoch=epoch.number,
                train_loss=epoch.train_loss,
                validation=epoch.score,
                lr=epoch.lr,
            )
            layers = checkpoint.describe(model)
            del layers["state_dict"]  # the state of `fit` has the weights
            self.state = {**self.state, "stage": stage, "layers": layers, "fit": epoch.state()}
            self.run.save(self.state)

        return record

    def note(self, **event: object) -> None:
        """Append one line to the history of the run, if there is a run."""
        if self.run is not None:
            self.run.note(**event)

    @property
    def given(self) -> Given | None:
        """Return what is known of the network that the pipeline was given; None before it is validated.

        A run of an earlier version did not tell trained networks from untrained ones.
        """
        if "given" in self.state:
            return Given(**self.state["given"])
        return None if self.state["fit"] is None else Given(float("nan"))

    def record(self, given: Given) -> Given:
        """Store what is known of the given network in the state, and return it."""
        self.state = {**self.state, "given": asdict(given)}
        return given

    def consider(self, stage: str, score: float, network: nn.Module) -> None:
        """Keep a copy of a network that meets the budget, if none before it had a better score."""
        if self.best is None or score >= self.best.score:
            self.best = Candidate(score, stage, copied(network).eval())
            if self.run is not None:
                described = checkpoint.describe(self.best.network)
                self.state = {**self.state, "best": {"score": score, "stage": stage, "network": described}}

    def begin(self, scales: ChannelScales, asked: Budget, given: Given) -> None:
        """Record the dense network and the budget; of a trained network, its score and its rate, too."""
        known = {"validation": given.score, "trained": True, "rate": given.rate} if given.trained else {}
        self.note(
            stage="dense",
            widths=scales.trace.widths,
            asked=asked.limits(),
            skipped=dict(scales.trace.skipped),
            scales=_rounded(scales),
            **asdict(scales.dense),
            **known,
        )

    def end_sparsify(self, model: nn.Module, scales: ChannelScales, validation: float) -> str:
        """Store the weights after stage 1, record the channels left alive, and return the log line."""
        alive, start = scales.alive(), scales.left()
        weights = model.state_dict()
        self.dense.load_state_dict(weights)
        self.state = {**self.state, "start": asdict(start), "dense": copy.deepcopy(weights)}
        self.note(
            stage="sparsify", alive=alive, scales=_rounded(scales), **asdict(start), validation=validation
        )
        return f"{scales.sign} ≠ 0 in {joined(alive)}: {start}; validation {validation:.4f}"

    def note_step(self, label: str, step: Step, validation: float) -> str:
        """Record a pruning step, before the training that follows it, and return the log line."""
        self.note(
            stage=label,
            widths=step.plan.widths,
            removed=step.plan.removed,
            asked=step.asked.limits() if isinstance(step.asked, Budget) else {},
            **asdict(step.after),
            **({"latency": {"asked": str(step.asked), **asdict(step.latency)}} if step.latency else {}),
            validation=validation,
        )
        without = f" without {', '.join(step.plan.removed)}" if step.plan.removed else ""
        latency = f", got {step.latency}" if step.latency else ""
        line = (
            f"{joined(step.plan.widths)}{without}: {step.after} (asked {step.asked}{latency}); "
            f"validation {validation:.4f}"
        )
        self.state = {**self.state, "line": line}
        return line


def _rounded(scales: ChannelScales) -> dict[str, list[float]]:
    """Return the largest |γ| of every channel, by group with norms, rounded for the history."""
    sizes = scales.magnitudes()
    return {group: [round(x, 5) for x in sizes[group].tolist()] for group in scales.norms}
