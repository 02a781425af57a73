"""The networks of a frontier: each is pruned to one budget, all from one trace and one scoring."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.graph.groups import Trace
from pruning.graph.plan import Plan
from pruning.planning.budget import LABELS, Budget, LatencyBudget
from pruning.planning.cost import CostModel
from pruning.planning.judge import Judge, Metric
from pruning.planning.latency import LatencyFound, LatencyPlanner
from pruning.planning.module_keys import with_group_names
from pruning.planning.scores import Scores, score_channels
from pruning.planning.search import least_cost, plan_within
from pruning.planning.side_by_side import SideBySideTimer
from pruning.planning.width_limits import ways_to_narrow
from pruning.stages.checked_cut import Task
from pruning.stages.frontier_folder import FrontierFolder
from pruning.stages.frontier_result import LIMITS, Frontier, FrontierPoint
from pruning.stages.prune import Step, StepSettings, cut
from pruning.surgery.apply import channel_constants
from pruning.tracing.left_out import without_groups
from pruning.tracing.trace import require_groups
from pruning.training.batches import Batch, to_device
from pruning.training.output_comparison import Comparison
from pruning.utils.digests import digest_of
from pruning.utils.modules import device_of
from pruning.utils.tree import Inputs


@dataclass(frozen=True)
class Asked:
    """The budgets of a frontier, and how its networks are timed and compared; see `frontier`.

    Raises:
        PruningError: if the limit is unknown, or there are fewer than two budgets.
    """

    limit: str
    points: int
    budgets: tuple[str, ...]
    timing: LatencyBudget | None
    compare: Comparison
    metric: Metric | None

    def __post_init__(self) -> None:
        if self.limit not in LIMITS:
            raise PruningError(f"limit {self.limit!r}: expected one of {', '.join(LIMITS)}")
        if len(set(self.budgets)) == 1 or (not self.budgets and self.points < 2):
            raise PruningError("a frontier needs at least two budgets: give more points or budgets")
        if self.limit == "latency" and self.timing is None:
            object.__setattr__(self, "timing", LatencyBudget("1x"))


class FrontierNetworks:
    """Prune one model to several budgets.

    Args:
        model: the model; it is not changed. example_inputs: inputs to verify it with.
        traced: trace of the model.
        settings, asked: how to prune, and to which budgets.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Inputs,
        traced: Trace,
        settings: StepSettings,
        asked: Asked,
    ):
        require_groups(model, traced)
        settings = replace(settings, options=with_group_names(settings.options, model, traced))
        self.model, self.example_inputs, self.settings, self.asked = model, example_inputs, settings, asked
        self.widths, self.options = traced.widths, settings.options
        #: The groups that keep all channels because the check failed with them, with the reason.
        self.left_out: dict[str, str] = {}
        self.traced, self.cost_model = traced, CostModel(model, traced)
        self.dense_cost = self.cost_model(self.cost_model.full)
        device = device_of(model)
        self.batches = [to_device(batch, device)[0] for batch in settings.calibration]
        self.constants: dict[str, Tensor] | None = None
        self.scores: Scores = {}
        if callable(settings.score):  # what a function returns is known only when it has run
            self.scores = self._scored()
        self.stack, self.is_timing = contextlib.ExitStack(), False
        self.planner: LatencyPlanner | None = None
        self.timer: SideBySideTimer | None = None
        for budget in asked.budgets:
            self._require_below_dense(budget)

    def judge(self, validation: Sequence[Batch]) -> Judge:
        """Return what judges the networks on validation batches, as is asked for."""
        asked, batch = self.asked, self.traced.batch
        outputs = self.settings.outputs
        return Judge(
            self.model, validation, batch, compare=asked.compare, outputs=outputs, metric=asked.metric
        )

    def identity(self, validation: Sequence[Batch]) -> dict[str, object]:
        """Return what the points depend on, by the words in which a difference is reported."""
        settings = self.settings
        options = {key: _plain(value) for key, value in asdict(settings.options).items()}
        score = _plain(settings.score)
        return {
            "model": digest_of([self.model.state_dict()]),
            "validation inputs": digest_of(validation),
            "calibration inputs": digest_of(settings.calibration),
            "score": f"{score} {digest_of([self.scores])}" if self.scores else score,
            "loss": _plain(settings.loss),
            "refit": settings.refit,
            "limit": self.asked.limit,
            **options,
            "ignored layers": sorted(self.traced.ignored),
            "outputs": _plain(settings.outputs),
            "comparison": self.asked.compare,
            "metric": _plain(self.asked.metric),
            "timing": _plain(self.asked.timing and asdict(self.asked.timing)),
        }

    def prepare(self, store: FrontierFolder) -> None:
        """Score the channels and measure the constants of all plans, unless the scores are stored."""
        if not self.scores:
            stored = store.scores()
            self.scores = self._scored() if stored is None else stored
            if stored is None:
                store.write_scores(self.scores)
        if self.batches:
            self.constants = channel_constants(self.model, self.traced, self.batches)

    def _scored(self) -> Scores:
        settings = self.settings
        return score_channels(self.model, self.traced, settings.score, settings.calibration, settings.loss)

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Time networks within the block, where that is asked for."""
        self.is_timing = True
        with self.stack:
            self._start_timer()
            yield

    def _start_timer(self) -> None:
        self.stack.close()
        timing, traced = self.asked.timing, self.traced
        if timing is None or not self.is_timing:
            return
        if self.asked.limit != "latency":
            timing = replace(timing, batch_size=timing.batch_size or traced.batch.size)
            inputs = timing.batch_of(self.example_inputs, traced.batch)
            self.timer = self.stack.enter_context(SideBySideTimer(self.model, inputs, traced, timing))
            return
        self.planner = self.stack.enter_context(
            LatencyPlanner(
                self.model,
                self.example_inputs,
                traced,
                self.cost_model,
                self.scores,
                timing,
                self.options,
            )
        )

    def empty(self, judge: Judge) -> Frontier:
        """Return the frontier without points.

        Raises:
            PruningError: if no plan costs less than the dense network.
        """
        score, limit = self.settings.score, self.asked.limit
        least = self.least()
        if least >= 0.999:
            what = "takes less time" if limit == "latency" else f"has fewer {LABELS[limit]}"
            ways = ways_to_narrow(self.traced, self.scores, self.options)
            raise PruningError(
                f"no network of these options {what} than the dense one ({least:.1%} with every group "
                f"at its floor): choose other options{ways.replace('or the', 'or raise the', 1)}"
            )
        return Frontier(
            limit,
            judge.metric,
            judge.dense,
            self.dense_cost,
            self.widths,
            judge.examples,
            dict(judge.totals),
            least,
            str(_plain(score)),
            self.settings.refit,
        )

    def least(self) -> float:
        """Return the least cost or time that a plan can reach, as a share of the dense network's."""
        if self.planner is not None:
            found = self.planner.least()
            return found.pruned / found.dense
        limit = self.asked.limit
        cost = least_cost(self.traced, self.cost_model, self.scores, self.options)
        return getattr(cost, limit) / max(1, getattr(self.dense_cost, limit))

    def budgets(self) -> list[str]:
        """Return the budgets that are asked for, each once; or evenly spaced ones, the largest first."""
        given = list(self.asked.budgets)
        if not given:
            least, count = self.least(), self.asked.points
            shares = [least + (1 - least) * k / count for k in reversed(range(count))]
            given = [self._as_budget(share) for share in shares]
        return list({self.key(budget): budget for budget in given}.values())

    def _as_budget(self, share: float) -> str:
        """Return a share of the dense network as a budget that is at least as large."""
        if self.asked.limit == "latency":
            return f"{math.ceil(100 * share - 1e-9) / 100:.2f}x"
        return f"{math.ceil(1000 * share - 1e-9) / 10:g}%"

    def key(self, budget: str) -> str | int:
        """Return what two texts of the same budget have in common."""
        if self.asked.limit != "latency":
            return self._limits(budget).limits()[self.asked.limit]
        text = budget.strip().lower()
        return f"{LatencyBudget(text).target(1.0):g}{'ms' if text.endswith('ms') else 'x'}"

    def _limits(self, budget: str) -> Budget:
        return Budget(**{self.asked.limit: budget}).resolve(self.dense_cost)

    def _require_below_dense(self, budget: str) -> None:
        limit, key = self.asked.limit, self.key(budget)
        if isinstance(key, int):
            dense = getattr(self.dense_cost, limit)
            if key > dense:
                raise PruningError(
                    f"budget {budget}: the dense network has {dense:,} {LABELS[limit]}; give budgets of at "
                    "most that"
                )
        elif key.endswith("x") and float(key[:-1]) > 1:
            raise PruningError(f"budget {budget}: give at most 1x, the time of the dense network")

    def point(self, budget: str, judge: Judge, points: Sequence[FrontierPoint]) -> FrontierPoint | None:
        """Prune to a budget and judge the network; None if the budget cannot be reached.

        A plan that one of the other points has is not judged again.
        """
        while True:
            found = self._plan(budget)
            if found is None:
                return None
            plan, latency = found
            same = next((point for point in points if point.plan == plan), None)
            if same is not None:
                return replace(same, budget=budget)
            step = self._cut(plan)
            if not step.left_out:
                break
            self.leave_out(step.left_out)
        if self.timer is not None:
            latency = LatencyFound(*self.timer.run(plan), networks=1)
        judgement = judge(step.model)
        return FrontierPoint(budget, step.plan, step.after, judgement, latency, dict(self.left_out))

    def _plan(self, budget: str) -> tuple[Plan, LatencyFound | None] | None:
        if self.planner is not None:
            timing = self.asked.timing
            assert timing is not None
            asked, least = replace(timing, limit=budget), self.planner.least()
            if asked.target(least.dense) > least.dense * 1.001:
                raise PruningError(
                    f"budget {budget}: the dense network takes {least.dense:.4f} ms; give less"
                )
            return None if asked.target(least.dense) < least.pruned else self.planner.plan(asked)
        limits = self._limits(budget)
        if limits.excess(least_cost(self.traced, self.cost_model, self.scores, self.options)):
            return None
        return plan_within(limits, self.traced, self.cost_model, self.scores, self.options), None

    def _cut(self, plan: Plan) -> Step:
        task = Task(
            self.model,
            self.example_inputs,
            self.batches,
            {},
            plan,
            None,
            None,
            (),
            self.options,
            self.settings.check,
            self.constants,
        )
        return cut(task, self.traced, self.cost_model, self.dense_cost, refits=self.settings.refit)

    def leave_out(self, reasons: Mapping[str, str]) -> None:
        """Keep all channels of some groups from now on."""
        new = {name: why for name, why in reasons.items() if name not in self.left_out}
        if not new:
            return
        self.left_out = {**self.left_out, **new}
        self.traced = without_groups(self.traced, new)
        require_groups(self.model, self.traced)
        self.cost_model = CostModel(self.model, self.traced)
        if self.options.widths:
            widths = {name: width for name, width in self.options.widths.items() if name not in new}
            self.options = replace(self.options, widths=widths)
        self._start_timer()


def _plain(value: object) -> object:
    """Return a setting as plain data; of a function, its name."""
    function: Callable[..., object] | None = getattr(value, "func", value) if callable(value) else None
    if function is None:
        return value
    return (
        f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__name__)}"
    )
