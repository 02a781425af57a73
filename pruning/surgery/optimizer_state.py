"""Carry an optimizer over to a pruned model, with its momenta."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pruning.errors import PruningError
from pruning.graph.groups import Trace
from pruning.graph.plan import Plan
from pruning.surgery.apply import apply, cut_channels, replace_module
from pruning.utils.modules import copied
from pruning.utils.wrappers import unwrapped

#: States that hold squares of gradients.
_SQUARES = frozenset(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_avg_var"))


def transfer(
    optimizer: Optimizer,
    model: nn.Module,
    small: nn.Module,
    trace: Trace,
    plan: Plan,
    others: Iterable[Tensor] = (),
) -> None:
    """Let an optimizer train a pruned model, in place: its momenta are those of the kept entries.

    Learning rates, schedulers and other settings stay. States that are shaped like their parameter
    (`exp_avg`, `momentum_buffer`) are narrowed like it; where pruning multiplied a weight by f, its gradient
    is divided by f, so they are, too (squares by f²). A parameter with a state of another shape, such as the
    rows and columns of Adafactor, starts anew. Parameters of removed layers leave the optimizer.

    Args:
        optimizer: of the dense model.
        model: the dense model that was pruned. small: the pruned model, with the same names of parameters.
        trace, plan: of the pruning, as in `Step`.
        others: parameters of the optimizer that are not of this model, and stay.

    Raises:
        PruningError: if the optimizer has a parameter that is none of the dense model.

    >>> from pruning import Budget, prune
    >>> model, x = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.ones(2, 3)
    >>> optimizer = torch.optim.Adam(model.parameters())
    >>> model(x).sum().backward(); optimizer.step()
    >>> step = prune(model, x, Budget(channels=4), score="l2")
    >>> transfer(optimizer, model, step.model, step.trace, step.plan)
    >>> optimizer.state[step.model[0].weight]["exp_avg"].shape
    torch.Size([4, 3])
    """
    model, small = unwrapped(model), unwrapped(small)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    staying = {id(parameter) for parameter in others} - names.keys()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names and id(parameter) not in staying:
                raise PruningError(
                    f"the optimizer has a parameter of shape {tuple(parameter.shape)} that is none of "
                    f"{type(model).__name__}; give the model that it trains"
                )
    states = {names[id(p)]: state for p, state in optimizer.state.items() if id(p) in names}
    narrowed = _narrowed_states(model, trace, plan, states)
    own = dict(small.named_parameters(remove_duplicate=False))
    kept = {p: state for p, state in optimizer.state.items() if id(p) in staying}
    for group in optimizer.param_groups:
        carried = [p if id(p) in staying else own.get(names[id(p)]) for p in group["params"]]
        group["params"] = [p for p in carried if p is not None]
    for name, state in states.items():
        if name in own and (found := _state_of(own[name], state, narrowed.get(name, {}))) is not None:
            kept[own[name]] = found
    optimizer.state.clear()
    optimizer.state.update(kept)


def _state_of(
    parameter: Tensor, state: dict[str, object], narrowed: dict[str, Tensor]
) -> dict[str, object] | None:
    """Return the state of a parameter of the pruned model; None if it has to start anew."""
    found: dict[str, object] = {}
    for key, value in state.items():
        if key in narrowed:
            if narrowed[key].shape != parameter.shape:
                return None
            value = narrowed[key]
        elif isinstance(value, Tensor) and value.ndim > 0:
            return None
        found[key] = value
    return found


def _narrowed_states(
    model: nn.Module, trace: Trace, plan: Plan, states: dict[str, dict[str, object]]
) -> dict[str, dict[str, Tensor]]:
    """Return by parameter the states that are shaped like it, narrowed by the plan."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    keys = {
        key
        for name, state in states.items()
        for key, value in state.items()
        if isinstance(value, Tensor) and value.ndim > 0 and value.shape == shapes[name]
    }
    factors = dict(_parameters(apply(_filled(model, plan, {}), trace, plan))) if trace.rescales else {}
    narrowed: dict[str, dict[str, Tensor]] = {}
    for key in sorted(keys):
        held = {
            name: value
            for name, state in states.items()
            if isinstance(value := state.get(key), Tensor) and value.shape == shapes[name]
        }
        filled = _filled(model, plan, held)
        cut_channels(filled, trace, plan)
        for name, parameter in _parameters(filled):
            if name in held:
                value = parameter.to(held[name].dtype)
                if name in factors:
                    value = value / factors[name].to(value) ** (2 if key in _SQUARES else 1)
                narrowed.setdefault(name, {})[key] = value
    return narrowed


def _filled(model: nn.Module, plan: Plan, values: dict[str, Tensor]) -> nn.Module:
    """Return a copy of a model without its removed layers, and with other values of parameters, or 1."""
    filled = copied(model)
    for name in plan.removed:
        replace_module(filled, name, nn.Identity())
    with torch.no_grad():
        for name, parameter in filled.named_parameters():
            parameter.copy_(values[name]) if name in values else parameter.fill_(1)
    return filled


def _parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, parameter.detach()) for name, parameter in model.named_parameters())
