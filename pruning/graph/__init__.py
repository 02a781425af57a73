"""Plain data: channel groups, the table of layers, plans."""

from pruning.graph.groups import Group, LayerUse, Member, Trace, WidthAttribute
from pruning.graph.layers import Rule, register_layer
from pruning.graph.plan import Plan

__all__ = ["Group", "LayerUse", "Member", "Plan", "Rule", "Trace", "WidthAttribute", "register_layer"]
