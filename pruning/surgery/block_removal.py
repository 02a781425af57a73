"""Remove whole blocks from lists of modules, such as the layers of a transformer.

A block is a candidate if its output can take the place of its input, and a shortcut leads around its layers.
It is deleted from its list, so code that loops over the list makes one step less. Numbers that the following
blocks hold of themselves (`layer_idx`, by which a cache finds keys and values) move up. Every candidate is
checked: the shorter model must compute what the model does whose block returns its input.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning.load_pruned import REMOVED, drop_blocks
from pruning.surgery.verify import with_random_weights
from pruning.utils.calls import Call
from pruning.utils.compare import compare, outputs_of
from pruning.utils.modules import call, copied, eval_mode, hooked, submodule
from pruning.utils.outputs import Outputs
from pruning.utils.tree import Inputs, fresh, tensors_among


@dataclass(frozen=True)
class Block:
    """A block in a list of modules.

    Attributes:
        name: its name in the model with all blocks. present: its name in the model at hand.
        holder: name of the list. number: of the block, in the list with all blocks.
    """

    name: str
    present: str
    holder: str
    number: int

    def removed_from(self, model: nn.Module) -> nn.Module:
        """Return a copy of a model without the block."""
        smaller = copied(model)
        drop_blocks(smaller, self.holder, [self.number])
        return smaller


def blocks_of(model: nn.Module) -> Iterator[Block]:
    """Yield the entries of all lists of modules that hold two or more.

    >>> model = nn.Sequential(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]))
    >>> [block.name for block in blocks_of(model)]
    ['0.0', '0.1']
    """
    for holder, blocks in model.named_modules():
        if not isinstance(blocks, nn.ModuleList) or len(blocks) < 2:
            continue
        removed = getattr(blocks, REMOVED, ())
        numbers = [i for i in range(len(blocks) + len(removed)) if i not in removed]
        for place, number in enumerate(numbers):
            before = f"{holder}." if holder else ""
            yield Block(f"{before}{number}", f"{before}{place}", holder, number)


def dense_name(model: nn.Module, present: str) -> str:
    """Return the name that a module had before blocks were removed from a model."""
    for block in blocks_of(model):
        if f"{present}.".startswith(f"{block.present}."):
            return block.name + present[len(block.present) :]
    return present


def stream(
    args: Iterable[object], kwargs: Mapping[str, object], output: object
) -> tuple[Tensor, Tensor] | None:
    """Return the tensor that a block changes, before and after; None if there is none.

    It is the first output, and the first argument of its shape and type.

    >>> x = torch.ones(2, 3)
    >>> stream([x], {}, (2 * x, None))
    (tensor([[1., 1., 1.],
            [1., 1., 1.]]), tensor([[2., 2., 2.],
            [2., 2., 2.]]))
    """
    made = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(made, Tensor) or not made.is_floating_point():
        return None
    given = tensors_among((*args, *kwargs.values()))
    before = next((x for x in given if x.shape == made.shape and x.dtype == made.dtype), None)
    return None if before is None else (before, made)


def removable_blocks(
    model: nn.Module,
    inputs: Inputs,
    seen: Mapping[str, Sequence[Call]],
    outputs: Outputs,
    ignored: Iterable[str],
    identities: Container[str] = (),
) -> dict[str, Block]:
    """Return the blocks that can be deleted from their lists, by name.

    A block that an identity can replace is not among them, unless its class has a configuration, as those of
    transformers, which make as many blocks as it says.

    Args:
        model: it is not changed. inputs: example inputs. seen: the calls of its modules with these.
        outputs: those that count. ignored: names of layers whose blocks stay.
        identities: names of blocks that identities can replace.
    """
    kept, candidates = tuple(ignored), list[Block]()
    modules = dict(model.named_modules(remove_duplicate=False))
    for block in blocks_of(model):
        module, owner = modules[block.present], modules[block.holder.rpartition(".")[0]]
        if block.present in identities and getattr(owner, "config", None) is None:
            continue
        if any(f"{name}.".startswith(f"{block.present}.") for name in kept):
            continue
        if not any(True for _ in module.children()) or all(p.ndim < 2 for p in module.parameters()):
            continue
        uses = seen.get(block.present, ())
        if len(uses) == 1 and _has_shortcut(module, uses[0]):
            candidates.append(block)
    if not candidates:
        return {}
    probe = with_random_weights(model, inputs)
    return {block.name: block for block in candidates if _is_exact(probe, block, inputs, outputs)}


def block_influence(model: nn.Module, blocks: Iterable[str], batches: Iterable[Inputs]) -> dict[str, float]:
    """Return how much blocks change what passes through them: 1 − the mean cosine of input and output.

    This is the block influence of ShortGPT (Men et al., 2024, arXiv:2403.03853): for x and y, a block's input
    and output at one position, 1 − E[x·y / (‖x‖‖y‖)]. The block with the least influence is removed first.

    Args:
        model: it is not changed. blocks: names of blocks, as `removable` returns them. batches: inputs.

    >>> class Double(nn.Module):
    ...     def forward(self, x):
    ...         return 2 * x
    >>> block_influence(nn.Sequential(nn.ModuleList([Double()])[0]), ["0"], [torch.ones(2, 3)])
    {'0': 0.0}
    """
    places = {block.name: block.present for block in blocks_of(model)}
    totals, handles = {name: torch.zeros(2, dtype=torch.double) for name in blocks}, []

    def watch(name: str) -> None:
        def observe(
            _: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object
        ) -> None:
            passed = stream(args, kwargs, output)
            if passed is not None:
                before, after = (x.detach().double() for x in passed)
                cosine = nn.functional.cosine_similarity(before, after, dim=-1)
                totals[name] += torch.stack(
                    [cosine.sum(), torch.tensor(float(cosine.numel())).to(cosine)]
                ).cpu()

        module = submodule(model, places.get(name, name))
        handles.append(module.register_forward_hook(observe, with_kwargs=True))

    for name in totals:
        watch(name)
    with hooked(handles), torch.no_grad(), eval_mode(model):
        for inputs in batches:
            call(model, fresh(inputs))
    influence = {name: 1 - (total / count).item() for name, (total, count) in totals.items()}
    return {name: max(0.0, round(value, 12)) for name, value in influence.items()}  # rounding may pass 0


def _has_shortcut(block: nn.Module, use: Call) -> bool:
    """Whether the output of a block depends on its input when all its matrices are 0."""
    passed = stream(use.args, use.kwargs, use.output)
    if passed is None:
        return False
    zeroed = copied(block).eval()
    with torch.no_grad():
        for parameter in zeroed.parameters():
            if parameter.ndim > 1:
                parameter.zero_()
        made = []
        for x in (passed[0], passed[0].flip(-1)):
            try:
                again = stream([x], {}, use.repeated(zeroed, passed[0], x.clone()))
            except Exception:  # of the block's code
                return False
            made.append(None if again is None else again[1].clone())
    first, second = made
    return first is not None and second is not None and not torch.equal(first, second)


def _is_exact(probe: nn.Module, block: Block, inputs: Inputs, outputs: Outputs) -> bool:
    """Whether the model without a block computes what it does if the block returns its input."""

    def bypass(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> object:
        passed = stream(args, kwargs, output)
        assert passed is not None
        return (passed[0], *output[1:]) if isinstance(output, tuple) else passed[0]

    handle = submodule(probe, block.present).register_forward_hook(bypass, with_kwargs=True)
    with hooked([handle]):
        expected = outputs_of(probe, inputs, outputs)
    return not compare(expected, outputs_of(block.removed_from(probe), inputs, outputs))[0]
