"""Plain data: channel groups, the table of layers, plans."""

from pruning.graph.groups import Group, LayerUse, Member, Reduction, Trace, WidthAttribute
from pruning.graph.layers import register_layer
from pruning.graph.plan import Plan
from pruning.graph.rule import Rule

__all__ = [
    "Group",
    "LayerUse",
    "Member",
    "Plan",
    "Reduction",
    "Rule",
    "Trace",
    "WidthAttribute",
    "register_layer",
]
