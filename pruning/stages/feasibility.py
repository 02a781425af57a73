"""Check before any training that `slim` can meet a budget with the given settings."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from pruning.errors import PruningError
from pruning.graph.groups import Ignored
from pruning.planning.budget import Budget, LatencyBudget
from pruning.planning.cost import CostModel
from pruning.planning.latency import even_scores, plan_latency
from pruning.planning.options import PlanOptions
from pruning.planning.search import DEFAULT_OPTIONS, plan_within
from pruning.stages.config import PruneConfig, SlimConfig
from pruning.surgery.layer_removal import removable, without_layer
from pruning.tracing.trace import require_groups, trace
from pruning.training.distillation import require_features
from pruning.training.loop import require_trainable
from pruning.training.optimizers import require_small
from pruning.training.output_comparison import require_comparable
from pruning.utils.entries import Also
from pruning.utils.modules import call, eval_mode, fresh_weights
from pruning.utils.outputs import Outputs
from pruning.utils.tree import Inputs, fresh


def feasible(
    model: nn.Module,
    example_inputs: Inputs,
    config: SlimConfig,
    *,
    ignored: Iterable[Ignored] = (),
    teacher: nn.Module | None = None,
    outputs: Outputs = None,
    also: Iterable[Also] = (),
) -> Budget:
    """Return the budget as counts if `slim` can meet it with these settings; nothing is trained.

    Args:
        model, example_inputs, config, ignored, teacher, outputs, also: see `slim`.

    Raises:
        PruningError: if the budget cannot be met (see `reachable`), if the teacher's outputs cannot be
            compared with the model's, if the budget leaves more parameters than the optimizer
            supports, if `config.restart` is set and a layer cannot be reinitialized, or if a stage cannot
            train (see `require_trainable`).

    >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> feasible(net, torch.zeros(1, 3), SlimConfig.within(Budget(params="50%")))
    Budget(params=25, macs=None, channels=None)
    """
    if teacher is not None and config.distill:
        with torch.no_grad(), eval_mode(model, teacher):
            require_comparable(*(call(net, fresh(example_inputs)) for net in (model, teacher)))
    require_features(model, teacher or model, config.distill_features)
    target = reachable(
        model, example_inputs, config.budget, ignored, config.prune, outputs=outputs, also=also
    )
    require_trainable(model, config.trainings)
    if config.finetune.optimizer == "soap":
        require_small(model.parameters(), target.limits().get("params"))
    if config.restart:
        with torch.random.fork_rng(devices=[]):
            fresh_weights(model)
    return target


def reachable(
    model: nn.Module,
    example_inputs: Inputs,
    budget: Budget | LatencyBudget,
    ignored: Iterable[Ignored] = (),
    config: PruneConfig | None = None,
    *,
    outputs: Outputs = None,
    also: Iterable[Also] = (),
) -> Budget:
    """Return the budget as counts if some widths of the model meet it.

    A latency budget is converted to MACs: those of a network that meets it, planned with scores
    under which all groups narrow alike.

    Args:
        config: the floor, the multiple and the groups of one width to plan with. If it allows removing
            whole layers, the budget may also be met by the network without some or all removable layers.
        outputs, also: see `trace`.

    Raises:
        PruningError: if no widths meet the budget; the message states the least cost.

    >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> reachable(net, torch.zeros(1, 3), Budget(macs="50%"))
    Budget(params=None, macs=20, channels=None)
    """
    also = tuple(also)
    traced = trace(model, example_inputs, ignored, outputs=outputs, also=also)
    cost_model = CostModel(model, traced)
    options = (
        PlanOptions(floor=config.floor, multiple=config.multiple, alike=config.alike)
        if config
        else DEFAULT_OPTIONS
    )
    if isinstance(budget, LatencyBudget):
        scores = even_scores(traced)
        plan, _ = plan_latency(model, example_inputs, traced, cost_model, scores, budget, options)
        return Budget(macs=cost_model(plan.widths).macs)
    target = budget.resolve(cost_model(cost_model.full))
    while True:
        equal = {name: torch.ones(group.channels) for name, group in traced.groups.items()}
        try:
            plan_within(target, traced, cost_model, equal, options)
            return target
        except PruningError:
            candidates = removable(model, traced, example_inputs) if config and config.layers else {}
            if not candidates:
                require_groups(model, traced)
                raise
        *_, last = candidates.values()
        model = without_layer(model, traced, last, [example_inputs])
        traced = trace(model, example_inputs, ignored, outputs=outputs, also=also)
        cost_model = CostModel(model, traced)
