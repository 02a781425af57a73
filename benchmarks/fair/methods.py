"""The methods of the benchmark: each trains, prunes and trains again within the same total of epochs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.fair.cells import locked
from benchmarks.fair.training import LATER, Part, Workshop
from benchmarks.peers import Peer, regularized
from pruning import Budget, PruningError, SlimConfig, prune, save, slim, trace
from pruning.graph.groups import Trace
from pruning.graph.layers import layer_width, makes_channels
from pruning.graph.plan import Plan
from pruning.planning import CostModel
from pruning.planning.options import PlanOptions
from pruning.planning.scores import ScoreFunction, l1
from pruning.planning.search import plan_within
from pruning.stages import PruneConfig, Run
from pruning.surgery.apply import apply, dropped_positions

#: File of a complete cell's network in its folder.
RESULT = "result.pth"


@dataclass(frozen=True)
class Job:
    """A cell to compute: what its network shares, its budget and seed, and the folder of its training."""

    workshop: Workshop
    budget: str
    seed: int
    folder: Path

    def part(self, name: str) -> Part:
        return Part(self.workshop, self.folder / name)

    def tuned(self, make: Callable[[], nn.Module]) -> nn.Module:
        """Train a pruned network for the epochs that the dense one has left."""
        recipe = self.workshop.recipe
        return self.part("tuned").learn(
            make, recipe.later_epochs, recipe.later_rate, LATER + self.seed, keep_best=True
        )

    def from_scratch(self, widths: Callable[[nn.Module], dict[str, int]]) -> nn.Module:
        """Train a network with the given widths from new weights for all epochs."""
        workshop, recipe = self.workshop, self.workshop.recipe

        def make() -> nn.Module:
            new = workshop.new(self.seed)
            return narrowed(new, widths(new), workshop.example)

        return self.part("trained").learn(make, recipe.epochs, recipe.rate, self.seed, keep_best=True)


@dataclass(frozen=True)
class Method:
    """A row of the page.

    Attributes:
        label: its name there. note: what it does, and its source.
        steps: how often it removes channels, as its authors say.
        run: returns the trained network of a cell.
        ours: whether it is a method of this toolkit.
        needs: methods of which it takes the result with the same budget and seed.
    """

    label: str
    note: str
    steps: str
    run: Callable[[Job], nn.Module]
    ours: bool = False
    needs: tuple[str, ...] = ()


def _dense(job: Job) -> nn.Module:
    return job.workshop.dense(job.seed)


def _slimming(job: Job) -> nn.Module:
    """Stage 1 takes the place of the dense network's training; an epoch follows each of two pruning steps."""
    workshop, recipe = job.workshop, job.workshop.recipe
    steps = min(2, recipe.later_epochs - 1)
    between = recipe.training(1 if steps else 0, recipe.later_rate)
    config = SlimConfig(
        Budget(macs=job.budget),
        sparsify=recipe.training(recipe.dense_epochs, recipe.rate),
        prune=PruneConfig(max(1, steps), between),
        finetune=recipe.training(recipe.later_epochs - steps, recipe.later_rate),
    )
    new = workshop.new(job.seed)
    run = Run(job.folder / "run", config.to_json(), resume=(job.folder / "run" / "config.json").exists())
    torch.manual_seed(job.seed)
    done = slim(
        new,
        workshop.batches,
        workshop.example,
        config,
        validate=workshop.validate,
        calibration=workshop.calibration,
        loss=workshop.loss,
        run=run,
        log=lambda line: None,
    )
    assert done.epochs == recipe.epochs
    return done.model


def _taylor_refit(job: Job) -> nn.Module:
    workshop = job.workshop

    def make() -> nn.Module:
        dense = workshop.dense(job.seed)
        return prune(
            dense,
            workshop.example,
            workshop.budget(job.budget, dense),
            score="taylor",
            calibration=workshop.calibration,
            refit=True,
        ).model

    return job.tuned(make)


def _scratch(job: Job) -> nn.Module:
    """Train the widths that slimming found from new weights."""
    path = job.workshop.folder("slimming", job.budget, job.seed) / RESULT
    if not path.exists():  # its figures came from elsewhere, or it was refused, which this says again
        with locked(path.parent, wait=True):
            save(path, compute("slimming", job.workshop, job.budget, job.seed))
    found = job.workshop.load(path)

    def widths(new: nn.Module) -> dict[str, int]:
        traced = trace(new, job.workshop.example)
        return {name: layer_width(found.get_submodule(name), "out") for name in traced.groups}

    return job.from_scratch(widths)


def _uniform(job: Job) -> nn.Module:
    """Train a network that keeps the same share of every group from new weights."""
    return job.from_scratch(lambda new: _equal_shares(job, new)[1].widths)


def _torch_pruning(job: Job, kind: str, ranking: str = "global") -> nn.Module:
    """Prune with torch-pruning in one go, as its scripts do, and train."""
    workshop = job.workshop

    def make() -> nn.Module:
        if kind == "bn-scale":
            net = workshop.dense_with("regularized", job.seed, regularized(workshop.loss))
        else:
            net = workshop.dense(job.seed)
        budget = workshop.budget(job.budget, net)
        calibration = workshop.calibration
        Peer(kind, net, workshop.example, calibration, ranking).reach(budget)
        return net

    return job.tuned(make)


def _l1_filters(job: Job) -> nn.Module:
    """Li et al. leave the channels of a residual sum as they are, and cut the same share elsewhere."""
    workshop = job.workshop

    def make() -> nn.Module:
        dense = workshop.dense(job.seed)
        budget = workshop.budget(job.budget, dense)
        summed = summed_layers(dense, trace(dense, workshop.example))
        return prune(dense, workshop.example, budget, score="l1", ranking="group", ignored=summed).model

    return job.tuned(make)


def _fpgm(job: Job) -> nn.Module:
    """He et al. choose filters anew before every epoch, and set them to zero while it trains."""
    workshop, recipe = job.workshop, job.workshop.recipe
    zeros: list[tuple[Tensor, Tensor]] = []

    def choose(net: nn.Module) -> None:
        traced, plan = _equal_shares(job, net, distances)
        zeros[:] = _removed(net, traced, plan)
        hold(net)

    @torch.no_grad()
    def hold(_: nn.Module) -> None:
        for parameter, positions in zeros:
            parameter[positions] = 0

    masked = job.part("tuned").learn(
        lambda: workshop.dense(job.seed),
        recipe.later_epochs,
        recipe.later_rate,
        LATER + job.seed,
        keep_best=True,
        before_epoch=choose,
        after_step=hold,
    )
    return apply(masked, *_equal_shares(job, masked, l1))  # filters of zeros have the lowest norm


def _equal_shares(job: Job, net: nn.Module, score: ScoreFunction = l1) -> tuple[Trace, Plan]:
    """Return a plan that keeps the same share of every group, the channels with the highest scores."""
    traced = trace(net, job.workshop.example)
    cost_model = CostModel(net, traced)
    budget = Budget(macs=job.budget).resolve(cost_model(cost_model.full))
    scores = score(net, traced, [], job.workshop.loss)
    return traced, plan_within(budget, traced, cost_model, scores, PlanOptions(ranking="group"))


@torch.no_grad()
def distances(model: nn.Module, trace: Trace, batches: object = (), loss: object = None) -> dict[str, Tensor]:
    """Score a channel by the sum of the distances of its filter to all others of its layer.

    He et al., Filter Pruning via Geometric Median, CVPR 2019 (arXiv 1811.00250). In a group of several
    layers, the score is the mean of theirs, each divided by its own mean.
    """
    scores = {}
    for name, group in trace.groups.items():
        found = []
        for member in group.side("out"):
            layer = model.get_submodule(member.layer)
            weight = getattr(layer, "weight", None)
            if not makes_channels(layer) or not isinstance(weight, Tensor):
                continue
            filters = weight.detach().flatten(1).float()
            far = torch.cdist(filters, filters).sum(1)
            each = torch.zeros(group.channels).index_add_(0, member.channel, far.cpu()[member.index])
            found.append(each / each.mean().clamp(min=1e-12))
        scores[name] = torch.stack(found).mean(0)
    return scores


def _removed(net: nn.Module, traced: Trace, plan: Plan) -> list[tuple[Tensor, Tensor]]:
    """Return the parameters that make the channels that a plan removes, and the positions of these."""
    found: list[tuple[Tensor, Tensor]] = []
    for (layer, side), positions in dropped_positions(traced, plan).items():
        module = net.get_submodule(layer)
        if side == "out":
            found += [(p, positions.to(p.device)) for p in module.parameters(recurse=False)]
    return found


def summed_layers(net: nn.Module, traced: Trace) -> list[str]:
    """Return the layers whose outputs are added to those of other layers."""
    makers = [
        [m.layer for m in group.side("out") if makes_channels(net.get_submodule(m.layer))]
        for group in traced.groups.values()
    ]
    return [layer for layers in makers if len(layers) > 1 for layer in layers]


def narrowed(new: nn.Module, widths: dict[str, int], example: Tensor) -> nn.Module:
    """Return a network of new weights with the first channels of each group.

    Weights are scaled to their new number of inputs, as if they had been drawn for it.
    """
    traced = trace(new, example)
    small = apply(new, traced, Plan({name: tuple(range(count)) for name, count in widths.items()}))
    with torch.no_grad():
        for name, module in small.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                before = new.get_submodule(name).weight
                assert isinstance(before, Tensor)
                module.weight *= (prod(before.shape[1:]) / prod(module.weight.shape[1:])) ** 0.5
    return small


_TP = "torch-pruning: {}, all layers compared, in 200ths until the budget is met, then training."

#: The methods in the order of the page; the dense network is the reference.
METHODS: dict[str, Method] = {
    "dense": Method("dense", "The network that others begin with.", "–", _dense),
    "slimming": Method(
        "slimming (ours)",
        "An L1 penalty on the BatchNorm scales in place of the dense training (Liu et al., ICCV 2017) with λ "
        "found from the budget, then Taylor scores.",
        "2, an epoch after each",
        _slimming,
        ours=True,
    ),
    "taylor-refit": Method(
        "Taylor, refit (ours)",
        "Taylor scores per cost freed, layers refitted to their former outputs by least squares.",
        "1",
        _taylor_refit,
        ours=True,
    ),
    "scratch": Method(
        "slimming's widths, from scratch", "New weights, all epochs.", "0", _scratch, needs=("slimming",)
    ),
    "uniform": Method("uniform widths, from scratch", "New weights, all epochs.", "0", _uniform),
    "tp-bn-scale": Method(
        "torch-pruning, BNScale",
        _TP.format("BNScalePruner after dense training with its L1 term of 1e-5"),
        "1",
        partial(_torch_pruning, kind="bn-scale"),
    ),
    "tp-magnitude": Method(
        "torch-pruning, magnitude",
        _TP.format("GroupMagnitudeImportance"),
        "1",
        partial(_torch_pruning, kind="magnitude"),
    ),
    "tp-taylor": Method(
        "torch-pruning, Taylor",
        _TP.format("GroupTaylorImportance"),
        "1",
        partial(_torch_pruning, kind="taylor"),
    ),
    "tp-isomorphic": Method(
        "torch-pruning, isomorphic",
        _TP.replace("all layers", "layers of one form").format("GroupTaylorImportance with isomorphic=True"),
        "1",
        partial(_torch_pruning, kind="taylor", ranking="isomorphic"),
    ),
    "l1-filters": Method(
        "L1 filters",
        "The same share of every layer by the L1 norm of its filters, none at residual sums (Li et al., ICLR "
        "2017).",
        "1",
        _l1_filters,
    ),
    "fpgm": Method(
        "FPGM",
        "The same share of every layer by the distance to the other filters (He et al., CVPR 2019), chosen "
        "anew and set to zero in every epoch.",
        "every epoch",
        _fpgm,
    ),
}


def compute(name: str, workshop: Workshop, budget: str, seed: int) -> nn.Module:
    """Return the trained network of a cell. Raises `PruningError` if the method does not meet the budget."""
    job = Job(workshop, budget, seed, workshop.folder(name, budget, seed))
    model = METHODS[name].run(job)
    if name != "dense":
        limit = workshop.budget(budget, workshop.new(seed))
        if limit.excess(workshop.cost(model)):
            raise PruningError(f"{name} ends at {workshop.cost(model)}, over {limit}")
    return model.eval()
