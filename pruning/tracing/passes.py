"""Run a model to follow its channels: in eval mode, and in training mode if that runs more layers."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pruning.errors import PruningError
from pruning.graph.computed import can_be_narrowed
from pruning.graph.deformable import count_deformable
from pruning.graph.layers import is_inferred, is_weighted, rule_for
from pruning.surgery.statistics import plain_attention
from pruning.tracing.axes import Axes
from pruning.tracing.labels import FIXED_SIZE
from pruning.tracing.other_sizes import inputs_of_other_sizes
from pruning.tracing.products import AxesNeeded
from pruning.tracing.record import Composed, Flow
from pruning.tracing.reshapes import Reshapes, ReshapeShapes, Shapes
from pruning.tracing.tracer import Tracer
from pruning.utils.entries import Entry, exchanges_modules
from pruning.utils.meta import on_meta, to_meta, without_computing
from pruning.utils.modules import copied, submodule
from pruning.utils.outputs import Outputs, counted
from pruning.utils.tree import Inputs, fresh, map_tensors, tensors
from pruning.utils.work import Pass

#: Number of other sizes of the inputs at which reshapes are looked at.
_OTHER_SIZES = 2

#: Runs a model on inputs.
Run = Callable[[nn.Module, Inputs], object]


def flow(
    model: nn.Module, run: Run, inputs: Inputs, outputs: Outputs = None, also: tuple[Entry, ...] = ()
) -> Flow:
    """Follow the channels of a model through a forward pass in eval mode, and through other calls of it.

    Channels of the outputs that count are fixed. If some layers do not run in eval mode (auxiliary heads),
    a pass in training mode follows.

    Raises `PruningError` when the model does not run on the inputs, or cannot be followed.
    """
    try:
        found = _passes(partial(_follow, run=run, outputs=outputs, also=also), model, inputs)
        if found.reshapes.doubtful:
            _fix_mixed(found, partial(_follow, run=run, outputs=outputs, also=()), model, inputs)
        return found
    except PruningError:
        raise
    except Exception as error:  # of a foreign model, of a registered rule, or of this toolkit
        name, said = type(model).__name__, f"{type(error).__name__}: {error}"
        if _runs(model, run, inputs):
            raise PruningError(
                f"{name} runs on the example inputs, but its channels could not be followed: {said}. This "
                "is an error in a registered rule or in the toolkit; please report the latter"
            ) from error
        raise PruningError(
            f"{name} does not run on the example inputs: {said}; give inputs that it takes"
        ) from error


def _passes(follow: Callable[..., Flow], model: nn.Module, inputs: Inputs) -> Flow:
    """Repeat the pass until it has the labels that it needs: along single dimensions, of weights, of rows."""
    axes, composed, rows, divided = False, dict[str, Composed](), frozenset[str](), frozenset[str]()
    opened = frozenset(name for name, layer in model.named_modules() if _is_opaque(layer))
    while True:
        again = partial(follow, axes=axes, composed=composed, rows=rows, opened=opened, divided=divided)
        try:
            found = without_computing(again, model, inputs)
        except AxesNeeded:
            axes = True
            continue
        lent = {
            name for name in found.read_elsewhere if _only_lends(submodule(model, name), found.calls[name])
        }
        if not lent <= opened:
            opened |= lent
        elif more := found.spanned - divided - composed.keys() - found.noted.keys():
            divided |= more
        elif not found.noted.keys() <= composed.keys():
            composed = {**found.noted, **composed}
        elif more := found.rows - rows - composed.keys():
            rows |= more
        else:
            return found


def _is_opaque(layer: nn.Module) -> bool:
    """Whether a layer computes a tensor by parametrizations without an inverse, such as those of LoRA."""
    rule = rule_for(layer)
    if rule is None or not nn.utils.parametrize.is_parametrized(layer):
        return False
    return not can_be_narrowed(layer, [*rule.out, *rule.into])


def _only_lends(layer: nn.Module, calls: int) -> bool:
    """Whether a layer does not run, so that it holds no more than the weight that other code reads."""
    return is_weighted(layer) and not is_inferred(layer) and not calls


def _fix_mixed(found: Flow, follow: partial[Flow], model: nn.Module, inputs: Inputs) -> None:
    """Fix channels that a reshape mixes with positions: those that end up elsewhere at other sizes."""
    others, passed, run = list[Reshapes](), 0, follow.keywords["run"]
    own = _shapes_of_reshapes(*_to_run(found, model, inputs), run)
    for other in inputs_of_other_sizes(inputs):
        probe, example = _to_run(found, model, other)
        with contextlib.suppress(Exception, AxesNeeded):  # the model need not take this size
            if not found.reshapes.are_same_at(own, _shapes_of_reshapes(probe, example, run)):
                options: dict[str, object] = {"axes": found.axes is not None, "composed": found.composed}
                options |= {"rows": found.shared_rows, "opened": found.opened, "divided": found.divided}
                others.append(follow(probe, example, **options).reshapes)
            passed += 1
        if passed == _OTHER_SIZES:
            break
    found.fixed[:0] = found.reshapes.mixed(others)  # this reason before what follows from it


def _to_run(found: Flow, model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    """Return a copy of the model and inputs, on the meta device if the model was traced there."""
    if found.probe is None:
        return copied(model).eval(), fresh(inputs)
    return on_meta(model).eval(), map_tensors(to_meta, inputs)


def _shapes_of_reshapes(probe: nn.Module, inputs: Inputs, run: Run) -> Shapes:
    shapes = ReshapeShapes(probe)
    with plain_attention(), torch.no_grad(), torch.random.fork_rng(devices=[]), shapes:
        run(probe, inputs)
    return shapes.found


def _runs(model: nn.Module, run: Run, inputs: Inputs) -> bool:
    """Whether the model itself, untraced, runs on the inputs."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            run(copied(model).eval(), fresh(inputs))
    except Exception:  # whatever a foreign model raises
        return False
    return True


def _follow(
    probe: nn.Module,
    inputs: Inputs,
    run: Run,
    outputs: Outputs,
    also: tuple[Entry, ...],
    axes: bool,
    composed: dict[str, Composed],
    rows: frozenset[str],
    opened: frozenset[str],
    divided: frozenset[str],
) -> Flow:
    example = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    count_deformable()
    found = Flow(probe=probe if any(leaf.is_meta for leaf in example) else None)
    found.axes = Axes(found.ties) if axes else None
    found.composed, found.shared_rows, found.opened, found.divided = composed, rows, opened, divided
    with plain_attention(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        with Tracer(probe.eval(), found) as tracer, tracer.functions:
            output = run(probe, inputs)
            tracer.finish(output, outputs)
        found.outputs = [leaf.shape for leaf in counted(output, outputs)]
        found.done.shapes = [leaf.shape for leaf in tensors(output)]
        for entry in also:
            _follow_entry(probe, found, entry)
        table = [name for name, layer in probe.named_modules() if rule_for(layer) is not None]
        if any(not found.calls[name] for name in table):
            # Keep the ties of this pass; calls, uses and readers (costs, folding) are those of eval mode.
            in_training = replace(
                found, calls=Counter(), uses={}, readers={}, products=[], done=Pass(), reshapes=Reshapes()
            )
            with (
                contextlib.suppress(Exception),  # the model need not run in this mode
                Tracer(probe.train(), in_training) as tracer,
                tracer.functions,
            ):
                tracer.finish(run(probe, inputs), outputs)
            probe.eval()
    if found.axes is not None:
        found.fixed += [(labels, FIXED_SIZE) for labels in found.axes.settle()]
    return found


def _follow_entry(probe: nn.Module, found: Flow, entry: Entry) -> None:
    """Follow another call of the model; its ties and readers are added, its costs are not.

    One that exchanges modules (a reparameterization) is not followed: narrowed copies of the model run it.
    """
    convert = to_meta if found.probe is not None else None
    try:
        exchanged, output = exchanges_modules(entry, probe, convert)
    except Exception as error:  # of the user's function, or of the model
        raise PruningError(
            f"{entry.name} fails: {type(error).__name__}: {error}; correct this entry of `also`"
        ) from error
    found.outputs += [leaf.shape for leaf in tensors(output)]
    if exchanged:
        return
    with (
        Tracer(
            probe, replace(found, uses={}, other_macs=0.0, products=[], done=Pass(), reshapes=Reshapes())
        ) as tracer,
        tracer.functions,
    ):
        tracer.finish_entry(entry.run(probe, convert), entry.name)
