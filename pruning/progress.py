"""Where the pipeline stands: what a run keeps of it, to resume from and to report."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

from torch import nn

from pruning import checkpoint
from pruning.budget import Budget
from pruning.copies import copied
from pruning.cost import Cost, CostModel
from pruning.graph import Trace, device_of
from pruning.load_pruned import rebuild
from pruning.prune import Step
from pruning.run import Run
from pruning.sparsify import ScalePull
from pruning.training import Epoch


class Progress:
    """Where a pipeline stands, kept in its run (where it has one) after every epoch.

    Stages count 0 (sparsify), 1 to n (pruning steps, each with its training), n + 1 (fine-tune).
    """

    def __init__(self, run: Run | None, model: nn.Module):
        self.run = run
        self.state: dict[str, Any] = (run.state if run else None) or {"stage": 0, "fit": None}
        self.network, self.dense = copied(model), copied(model)
        if self.state["fit"] is not None:
            weights = self.state["fit"]["model"]
            rebuild(self.network.cpu(), {**self.state["layers"], "state_dict": weights})
            self.network.to(device_of(model))
        if "dense" in self.state:
            self.dense.load_state_dict(self.state["dense"])
        self.dense.eval()

    @property
    def at(self) -> int:
        """The stage under way."""
        return self.state["stage"]

    @property
    def start(self) -> Cost:
        """What the network costs without the channels that stage 1 has turned off."""
        return Cost(**self.state["start"])

    def resume(self, stage: int) -> dict[str, Any] | None:
        """What `fit` goes on from; None for a stage that starts anew."""
        return self.state["fit"] if stage == self.at else None

    def options(self, stage: int, label: str, model: nn.Module) -> dict[str, Any]:
        """The arguments of `fit` that make a stage resume and record its epochs."""

        def on_epoch(epoch: Epoch) -> None:
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
            del layers["state_dict"]  # the state of `fit` has it
            self.state = {**self.state, "stage": stage, "layers": layers, "fit": epoch.state()}
            self.run.save(self.state)

        return {"label": label, "on_epoch": on_epoch, "resume": self.resume(stage)}

    def note(self, **event: Any) -> None:
        if self.run is not None:
            self.run.note(**event)

    def begin(self, traced: Trace, asked: Budget) -> None:
        """Record what is asked of the dense network."""
        cost_model = CostModel(self.network, traced)
        dense = cost_model(cost_model.full)
        limits, skipped = asked.limits(), dict(traced.skipped)
        self.note(
            stage="dense",
            widths=traced.widths,
            asked=limits,
            skipped=skipped,
            scales=_rounded(ScalePull(self.network, traced, 0.0)),
            **asdict(dense),
        )

    def end_sparsify(self, small: nn.Module, pull: ScalePull, validation: float) -> str:
        """Keep the dense weights and the channels left; returns the line to log."""
        alive, start = pull.alive(), pull.left()
        scales = _rounded(pull)
        self.dense.load_state_dict(small.state_dict())
        self.state = {**self.state, "start": asdict(start), "dense": copy.deepcopy(small.state_dict())}
        self.note(stage="sparsify", alive=alive, scales=scales, **asdict(start), validation=validation)
        return f"γ ≠ 0 in {_widths(alive)}: {start}; validation {validation:.4f}"

    def note_step(self, label: str, step: Step, validation: float) -> str:
        """Record a pruning step before the training after it; returns the line to log."""
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
        line = (
            f"{_widths(step.plan.widths)}{without}: {step.after} (asked {step.asked}"
            f"{f', got {step.latency}' if step.latency else ''}); "
            f"validation {validation:.4f}"
        )
        self.state = {**self.state, "line": line}
        return line

    @property
    def line(self) -> str:
        """The line of the pruning step under way."""
        return self.state.get("line", "")


def _rounded(pull: ScalePull) -> dict[str, list[float]]:
    """The largest scale of every channel, by group, for the history."""
    return {group: [round(x, 5) for x in sizes.tolist()] for group, sizes in pull.magnitudes().items()}


def _widths(widths: dict[str, int]) -> str:
    """Widths in the order of the groups: `3-7-8-12`; of many, how many channels in all."""
    if len(widths) <= 12:
        return "-".join(str(w) for w in widths.values())
    return f"{sum(widths.values()):,} channels in {len(widths)} groups"
