"""Remove residual branches: the attention or the MLP of a block alone, of which a shortcut adds the result.

A branch is a module whose first output is added to another tensor, behind nothing but movements of data,
dropouts and factors (a layer scale). `NoBranch` takes its place and returns zeros, an identity that of a norm
that only the branch reads. Every candidate is checked: the result must compute what the model does whose
branch puts out zeros, it must depend on the inputs, and all other parameters must be trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from pruning.load_pruned import NoBranch
from pruning.surgery.apply import replace_module
from pruning.surgery.block_removal import stream
from pruning.surgery.sites import ADDITIONS, DROPOUTS, Arguments, Function, Keywords
from pruning.surgery.verify import with_random_weights
from pruning.utils.calls import Call
from pruning.utils.compare import compare, outputs_of
from pruning.utils.modules import call, copied, eval_mode, hooked, submodule
from pruning.utils.outputs import Outputs, counted
from pruning.utils.tree import Inputs, fresh, map_tensors, tensors_among

#: Functions that make zeros of zeros, and nothing else of them.
_MOVES = frozenset(
    ("view", "reshape", "permute", "transpose", "flatten", "unflatten", "contiguous", "clone", "roll", "to",
     "type_as", "float", "half", "squeeze", "unsqueeze", "__getitem__", "movedim", "narrow", "pad")
)  # fmt: skip

_PRODUCTS = frozenset(("mul", "mul_", "__mul__", "__rmul__", "__imul__", "div", "__truediv__"))


@dataclass(frozen=True)
class Branch:
    """A residual branch.

    Attributes:
        name: of the module. outputs: how many outputs it returns in a tuple; 0 if it returns a tensor.
        norm: name of a norm that the branch alone reads; empty if there is none.
    """

    name: str
    outputs: int
    norm: str = ""

    def removed_from(self, model: nn.Module) -> nn.Module:
        """Return a copy of a model without the branch."""
        smaller = copied(model)
        replace_module(smaller, self.name, NoBranch(self.outputs))
        if self.norm:
            replace_module(smaller, self.norm, nn.Identity())
        return smaller


def removable_branches(
    model: nn.Module,
    inputs: Inputs,
    seen: Mapping[str, Sequence[Call]],
    outputs: Outputs,
    ignored: Iterable[str],
) -> dict[str, Branch]:
    """Return the residual branches that can be removed, by name.

    Args:
        model: it is not changed. inputs: example inputs. seen: the calls of its modules with these.
        outputs: those that count. ignored: names of layers whose branches stay.
    """
    kept = tuple(ignored)
    candidates = [
        name
        for name, module in model.named_modules()
        if name
        and len(seen.get(name, ())) == 1
        and any(True for _ in module.children())
        and any(p.ndim > 1 for p in module.parameters())
        and not any(f"{layer}.".startswith(f"{name}.") for layer in kept)
        and not _counts_for_cache(model, name)
        and (passed := stream(seen[name][0].args, seen[name][0].kwargs, seen[name][0].output)) is not None
        and passed[0] is _first_tensor(seen[name][0])
    ]
    added = _added(model, inputs, candidates)
    if not added:
        return {}
    probe = with_random_weights(model, inputs)
    before = _reached(probe, inputs, outputs)
    found: dict[str, Branch] = {}
    for name in (name for name in candidates if name in added):
        made = seen[name][0].output
        count = len(made) if isinstance(made, tuple | list) else 0
        norms = [norm for norm in _norms(model, seen, name) if norm not in kept]
        for norm in (*norms, ""):
            branch = Branch(name, count, norm)
            if _is_exact(probe, branch, inputs, outputs, before):
                found[name] = branch
                break
    return found


def _counts_for_cache(model: nn.Module, name: str) -> bool:
    """Whether a branch of the first block holds its number, by which a cache counts the tokens so far."""
    parts = name.split(".")
    for place in (i for i, part in enumerate(parts) if part == "0"):
        try:
            second = submodule(model, ".".join([*parts[:place], "1", *parts[place + 1 :]]))
        except AttributeError:
            continue
        first = vars(submodule(model, name))
        if any(type(v) is int and v == 0 and vars(second).get(key) == 1 for key, v in first.items()):
            return True
    return False


def _first_tensor(use: Call) -> Tensor:
    return next(x for x in use.inputs() if x.is_floating_point())


def _norms(model: nn.Module, seen: Mapping[str, Sequence[Call]], name: str) -> Iterator[str]:
    """Yield the norms whose output is the input of a branch: modules with vectors alone as parameters."""
    x = _first_tensor(seen[name][0])
    for other, uses in seen.items():
        own = [p.ndim for p in submodule(model, other).parameters()]
        if len(uses) == 1 and uses[0].output is x and own and max(own) == 1:
            yield other


class _Additions(TorchFunctionMode):
    """Record which tensors are added to others, directly or behind what makes zeros of zeros."""

    def __init__(self) -> None:
        super().__init__()
        #: By tensor, the name of the branch that made it.
        self.made = WeakTensorKeyDictionary()
        #: By tensor, the number of functions that had run when it was made; by branch, when it began.
        self.order, self.begun = WeakTensorKeyDictionary(), dict[str, int]()
        self.functions = 0
        self.added: set[str] = set()

    def __torch_function__(
        self, func: Function, types: object, args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        self.functions += 1
        for made in tensors_among((result,)):
            self.order[made] = self.functions
        held = [value for value in args if isinstance(value, Tensor)]
        tracked = [value for value in held if value in self.made]
        if not isinstance(result, Tensor) or not tracked:
            return result
        kind, others = getattr(func, "__name__", ""), [value for value in held if value is not tracked[0]]
        if func in ADDITIONS:
            if len(held) == 2 and all(value.shape == result.shape for value in held):
                self._note(*held)
        elif func in DROPOUTS or kind in _MOVES or (kind in _PRODUCTS and _are_factors(others)):
            self.made[result] = self.made[tracked[0]]
        return result

    def _note(self, left: Tensor, right: Tensor) -> None:
        """Note the branch of a sum, whose other operand is older than the branch: the shortcut."""
        for branch, shortcut in ((left, right), (right, left)):
            name = self.made.get(branch)
            if name is not None and self.order.get(shortcut, 0) <= self.begun[name]:
                self.added.add(name)


def _are_factors(others: Sequence[Tensor]) -> bool:
    return all(isinstance(each, nn.Parameter) or each.numel() == 1 for each in others)


def _added(model: nn.Module, inputs: Inputs, names: Iterable[str]) -> set[str]:
    """Return the modules whose first output is added to another tensor."""
    additions = _Additions()

    def begin(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: object) -> None:
            additions.begun[name] = additions.functions

        return hook

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple | list) else output
            assert isinstance(first, Tensor)
            additions.made[first] = name

        return hook

    modules = {name: submodule(model, name) for name in names}
    handles = [module.register_forward_pre_hook(begin(name)) for name, module in modules.items()]
    handles += [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    with hooked(handles), torch.no_grad(), eval_mode(model), additions:
        call(model, fresh(inputs))
    return additions.added


def _reached(model: nn.Module, inputs: Inputs, outputs: Outputs) -> set[str]:
    """Return the parameters that a backward pass reaches."""
    probe = copied(model).requires_grad_(True).eval()
    probe.zero_grad(set_to_none=True)
    with torch.enable_grad():
        made = [x for x in counted(call(probe, fresh(inputs)), outputs) if x.requires_grad]
        torch.stack([x.float().square().mean() for x in made]).sum().backward()
    return {name for name, p in probe.named_parameters() if p.grad is not None}


def _is_exact(probe: nn.Module, branch: Branch, inputs: Inputs, outputs: Outputs, before: set[str]) -> bool:
    """Whether the model without a branch computes what it does if the branch puts out zeros, and trains."""

    def zero(_: nn.Module, args: object, output: object) -> object:
        if isinstance(output, tuple | list):
            return type(output)([torch.zeros_like(output[0]), *output[1:]])
        return torch.zeros_like(output) if isinstance(output, Tensor) else output

    smaller = branch.removed_from(probe)
    gone = tuple(f"{name}." for name in (branch.name, branch.norm) if name)
    try:
        reached = _reached(smaller, inputs, outputs)
    except Exception:  # of code that reads attributes of the branch
        return False
    if not {name for name in before if not name.startswith(gone)} <= reached:
        return False
    with hooked([submodule(probe, branch.name).register_forward_hook(zero)]):
        expected = outputs_of(probe, inputs, outputs)
    made = outputs_of(smaller, inputs, outputs)
    if compare(expected, made)[0]:
        return False
    other = outputs_of(smaller, map_tensors(_changed, inputs), outputs)
    return isinstance(made, list) and isinstance(other, list) and bool(compare(made, other)[0])


def _changed(x: Tensor) -> Tensor:
    return -x if x.is_floating_point() else x.flip(-1) if x.ndim else x
