"""Remove whole experts of mixtures, with the rows of the router that choose them.

A mixture is a module that holds a router, a matrix with a row for each expert, beside experts in a list or in
tensors of three dimensions, and that chooses experts by `topk`. The smaller model must compute what the model
does whose router chooses among the experts that are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from pruning.errors import PruningError
from pruning.load_pruned import drop_blocks
from pruning.surgery.statistics import operator_name
from pruning.surgery.verify import with_random_weights
from pruning.surgery.width_attributes import mark_changed, numbers_of
from pruning.utils.compare import compare, outputs_of
from pruning.utils.modules import call, copied, eval_mode, submodule
from pruning.utils.outputs import Outputs
from pruning.utils.tree import Inputs, fresh
from pruning.utils.wording import number_of
from pruning.utils.wrappers import unwrapped


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts.

    Attributes:
        name: of the module. experts: their number. chosen: how many of them a token uses.
        lists: names of lists with a module for each expert.
    """

    name: str
    experts: int
    chosen: int
    lists: tuple[str, ...] = ()


def mixtures(model: nn.Module, inputs: Inputs) -> dict[str, Mixture]:
    """Return the mixtures of experts in a model, by name.

    Args:
        model: it is not changed. inputs: example inputs, on which the mixtures run.
    """
    found = {mixture.name: mixture for mixture in _candidates(unwrapped(model))}
    with _Routing(model, found) as routing, torch.no_grad(), eval_mode(model):
        call(model, fresh(inputs))
    return {
        name: Mixture(name, mixture.experts, routing.chosen[name], mixture.lists)
        for name, mixture in found.items()
        if name in routing.chosen
    }


def expert_usage(model: nn.Module, batches: Iterable[Inputs]) -> dict[str, Tensor]:
    """Return by mixture how often each expert is chosen, as a share of all choices, (experts,).

    Experts that are chosen least are removed first: heavy hitters counting of SEER-MoE (Muzio et al., 2024,
    arXiv:2404.05089).

    Args:
        model: it is not changed. batches: inputs.
    """
    found = {mixture.name: mixture for mixture in _candidates(unwrapped(model))}
    with _Routing(model, found) as routing, torch.no_grad(), eval_mode(model):
        for inputs in batches:
            call(model, fresh(inputs))
    return {name: counts / counts.sum() for name, counts in routing.counts.items()}


def without_experts(
    model: nn.Module, keep: Mapping[str, Sequence[int]], inputs: Inputs, outputs: Outputs = None
) -> nn.Module:
    """Return a copy of a model whose mixtures have some of their experts.

    Args:
        model: it is not changed. keep: by mixture, the numbers of the experts that stay.
        inputs: example inputs, on which the result is checked. outputs: those that count (see `trace`).

    Raises:
        PruningError: for names and numbers that the model does not have, for fewer experts than a token uses,
            and if the code depends on the number of experts in another way.

    Example:
        ```python
        usage = expert_usage(model, batches)
        keep = {name: share.topk(6).indices.tolist() for name, share in usage.items()}
        small = without_experts(model, keep, inputs, outputs=["logits"])
        ```
    """
    model = unwrapped(model)
    found = mixtures(model, inputs)
    kept = {name: sorted({*numbers}) for name, numbers in keep.items()}
    for name, numbers in kept.items():
        if name not in found:
            listed = ", ".join(found) or "none"
            raise PruningError(f"{name!r} is no mixture of experts of this model; its mixtures: {listed}")
        mixture = found[name]
        if not numbers or numbers[0] < 0 or numbers[-1] >= mixture.experts:
            raise PruningError(f"{name}: expected numbers of experts from 0 to {mixture.experts - 1}")
        if len(numbers) < mixture.chosen:
            raise PruningError(
                f"{name}: {number_of(len(numbers), 'expert')} would be left, and each token uses "
                f"{mixture.chosen}; keep more"
            )
    small = _cut(model, found, kept)
    probe = with_random_weights(model, inputs)
    for dense, narrow in ((probe, _cut(probe, found, kept)), (model, small)):
        with _Routing(dense, found, kept):
            expected = outputs_of(dense, inputs, outputs)
        problem = compare(expected, outputs_of(narrow, inputs, outputs))[0]
        if problem:
            raise PruningError(
                f"{', '.join(kept)} cannot lose experts: {problem}; its code depends on their number"
            )
    return small


def _candidates(model: nn.Module) -> Iterator[Mixture]:
    """Yield the innermost modules that hold experts, and a matrix with a row for each."""
    found: list[str] = []
    for name, module in reversed(list(model.named_modules())):  # inner modules first
        if any(not name or inner.startswith(f"{name}.") for inner in found):
            continue
        lists = {n: m for n, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1}
        fused = {len(p) for p in module.parameters() if p.ndim == 3 and len(p) > 1}
        for experts in sorted(fused | {len(blocks) for blocks in lists.values()}):
            own = tuple(n for n, blocks in lists.items() if len(blocks) == experts)
            fused_in = tuple(n.rpartition(".")[0] for n, p in module.named_parameters() if p.ndim == 3)
            routers = (
                p
                for n, p in module.named_parameters()
                if p.ndim == 2 and not n.startswith(tuple(f"{o}." for o in own))
                if n.rpartition(".")[0] not in fused_in  # there it is a bias of each expert
            )
            if any(len(p) == experts for p in routers):
                found.append(name)
                yield Mixture(name, experts, 0, own)
                break


def _cut(model: nn.Module, found: Mapping[str, Mixture], keep: Mapping[str, list[int]]) -> nn.Module:
    """Return a copy of a model without some experts and the rows of the router that choose them."""
    small = copied(model)
    for name, kept in keep.items():
        mixture, module = found[name], submodule(small, name)
        dropped = [i for i in range(mixture.experts) if i not in kept]
        for blocks in mixture.lists if dropped else ():
            drop_blocks(module, blocks, dropped)
        for inner, part in module.named_modules():
            if inner.startswith(tuple(f"{blocks}." for blocks in mixture.lists)):
                continue
            _narrow(part, mixture.experts, kept)
    return small


def _narrow(module: nn.Module, experts: int, kept: list[int]) -> None:
    """Keep the rows of some experts in the tensors of a module, and their number in its attributes."""
    rows = torch.tensor(kept)
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if tensor.ndim and len(tensor) == experts:
            chosen = tensor.detach().index_select(0, rows.to(tensor.device))
            if isinstance(tensor, nn.Parameter):
                chosen = nn.Parameter(chosen, requires_grad=tensor.requires_grad)
            setattr(module, name, chosen)
    held = vars(module)
    counts = [name for name in numbers_of(module) if "expert" in name and held.get(name) == experts]
    if isinstance(module, nn.Linear) and module.out_features == experts:
        module.out_features = len(kept)
    for name in counts:
        setattr(module, name, len(kept))
    if counts and len(kept) < experts:
        mark_changed(module, counts)


class _Routing(TorchDispatchMode):
    """Count which experts mixtures choose, and let them choose among some of their experts alone.

    Args:
        model: it runs in the block. found: its mixtures. keep: by mixture, the experts to choose among.
    """

    def __init__(
        self, model: nn.Module, found: Mapping[str, Mixture], keep: Mapping[str, list[int]] | None = None
    ):
        super().__init__()
        self.model, self.found, self.keep = unwrapped(model), found, keep or {}
        self.running: list[str] = []
        self.chosen: dict[str, int] = {}
        self.counts: dict[str, Tensor] = {}
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> _Routing:
        for name in self.found:
            module = submodule(self.model, name)
            self.handles.append(
                module.register_forward_pre_hook(lambda *_, name=name: self.running.append(name))
            )
            self.handles.append(module.register_forward_hook(lambda *_: self._leave()))
        super().__enter__()
        return self

    def _leave(self) -> None:
        self.running.pop()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: tuple[type, ...],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        name, x = operator_name(func), args[0] if args else None
        if not self.running or name not in ("topk", "_softmax") or not isinstance(x, Tensor):
            return func(*args, **(kwargs or {}))
        running = self.running[-1]
        experts = self.found[running].experts
        if x.shape[-1] != experts:
            return func(*args, **(kwargs or {}))
        if running in self.keep:
            dropped = torch.ones(experts, dtype=torch.bool, device=x.device)
            dropped[self.keep[running]] = False
            x = x.masked_fill(dropped, float("-inf"))
        output = func(x, *args[1:], **(kwargs or {}))
        if name == "topk":
            indices = output[1]
            self.chosen.setdefault(running, indices.shape[-1])
            counts = torch.bincount(indices.flatten().cpu(), minlength=experts).double()
            self.counts[running] = self.counts.get(running, 0) + counts
        return output
