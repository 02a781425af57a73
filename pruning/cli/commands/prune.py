"""`python -m pruning prune`: remove channels in one step, without training."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence

from torch import nn

from pruning.cli import build
from pruning.cli.commands.results import save_network
from pruning.cli.plan_file import PlanFile, given_plan
from pruning.cli.sources import Data
from pruning.errors import GroupsLeftOut, PruningError
from pruning.planning.options import NEED_DATA
from pruning.stages.prune import Step, default_score, prune
from pruning.surgery.refit import LayerFit
from pruning.training.losses import accuracy, why_not_classifier
from pruning.utils.wording import number_of


def execute(args: argparse.Namespace) -> None:
    model, data = build.network(args), build.data_of(args)
    example = build.examples(args, model, data)
    calibration = data.calibration(args.calibration) if data is not None else []
    given = given_plan(args)
    if not calibration and args.refit:
        raise PruningError("--refit needs data: add --data")
    score = args.score or default_score(calibration, args.refit)
    if not calibration and score in NEED_DATA and given is None:
        raise PruningError(f"score {score} needs data: add --data, or --score l1, l2 or bn_scale")
    with warnings.catch_warnings():  # what is left out is printed below
        warnings.simplefilter("ignore", GroupsLeftOut)
        step = prune(
            model,
            example,
            build.budget(args) if given is None else given.plan,
            score=score,
            calibration=calibration,
            ignored=args.ignore,
            remove=args.remove,
            refit=args.refit,
            ranking=args.ranking,
            floor=args.floor,
            most=args.most,
            multiple=args.multiple,
            outputs=args.outputs or None,
            alike=args.alike,
        )
    lines = [] if data is None else [_accuracies(model, step.model, data)]
    save_network(args, args.output, step.model, example, data)
    asked = step.asked if given is None else args.plan or "no budget"
    print(f"before: {step.before}\nafter:  {step.after} (asked {asked})")
    if step.latency is not None:
        print(f"time:   {step.latency}; {number_of(step.latency.networks, 'network', ('was', 'were'))} timed")
    narrowed = {g: f"{step.trace.groups[g].channels}→{w}" for g, w in step.plan.widths.items()}
    if step.plan.removed:
        print(f"removed: {', '.join(step.plan.removed)}")
    if narrowed:
        print("widths: " + ", ".join(f"{g} {w}" for g, w in narrowed.items()))
    lines += [_refitted(step.refits)] if args.refit else []
    lines += _thin_groups(step)
    lines += _judged_otherwise(args, given)
    lines += [f"left out: {name}: {why}" for name, why in step.left_out.items()]
    lines += [f"not changed: {held}" for held in step.stale]
    print(*lines, f"{args.output}: outputs agree with the plan to {step.difference:.1e}", sep="\n")


def _judged_otherwise(args: argparse.Namespace, given: PlanFile | None) -> list[str]:
    """The warning that a plan was judged with a refit, and is applied without, or the other way round."""
    if given is None or given.refit in (None, args.refit):
        return []
    how, cure = ("with", "add --refit") if given.refit else ("without", "omit --refit")
    return [f"warning: {args.plan} was judged {how} a refit; to get that network, {cure}"]


def _thin_groups(step: Step) -> list[str]:
    """The warning about groups that keep less than a tenth of their channels."""
    if not step.thin:
        return []
    thin = ", ".join(f"{name} {kept}" for name, kept in step.thin.items())
    return [
        f"warning: these groups keep less than a tenth of their channels: {thin}; --most 0.9 or "
        "--floor N keeps more, --ranking group the same share of all"
    ]


def _refitted(fits: Sequence[LayerFit]) -> str:
    """The line on the layers that were refitted, with the one whose outputs differ most."""
    changed = [fit for fit in fits if fit.ridge is not None]
    if not changed:
        return "refit: no layer's outputs came closer to those of before"
    worst = max(changed, key=lambda fit: fit.after)
    return (
        f"refit: {number_of(len(changed), 'layer')}; the largest relative error of outputs that remains is "
        f"{worst.after:.3f} ({worst.layer}, {worst.before:.3f} before the refit)"
    )


def _accuracies(before: nn.Module, after: nn.Module, data: Data) -> str:
    """The line on accuracy, or on why a network that is no classifier has none."""
    if (reason := why_not_classifier(before, data.validation)) is not None:
        return f"validation accuracy was not taken: {reason}"
    first, then = (accuracy(model, data.validation) for model in (before, after))
    return f"validation accuracy, without training: {first:.4f} before, {then:.4f} after"
