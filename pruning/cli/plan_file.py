"""The file of `prune --plan`: a plan as JSON, as the page of a frontier saves it."""

from __future__ import annotations

import argparse
import json
from typing import NamedTuple

from pruning.errors import PruningError
from pruning.graph.plan import Plan


class PlanFile(NamedTuple):
    """A plan, and whether it was judged with a refit; None if the file does not say."""

    plan: Plan
    refit: bool | None


def given_plan(args: argparse.Namespace) -> PlanFile | None:
    """Return what the file of --plan holds, or the plan of --remove alone; None for a budget.

    Raises:
        PruningError: a budget is given, too, or the file holds no plan.
    """
    limits = (args.max_params, args.max_macs, args.max_channels, args.max_latency)
    limited = any(limit is not None for limit in limits)
    if args.plan is None:
        alone = args.remove and not limited
        return PlanFile(Plan({}, tuple(args.remove)), None) if alone else None
    if limited:
        raise PruningError(
            "--plan takes the place of a budget: give no --max-params, --max-macs, "
            "--max-channels or --max-latency"
        )
    try:
        content = json.loads(args.plan.read_text())
        refit = content.get("frontier", {}).get("refit")
        return PlanFile(Plan.from_json(content), refit if isinstance(refit, bool) else None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PruningError(
            f"{args.plan} holds no plan: expected JSON with `keep`, the channels that each group keeps, as "
            "the page of `python -m pruning frontier` saves it"
        ) from error
