"""Calls of a model that run code which its example inputs do not reach: flags, and other methods."""

from __future__ import annotations

import builtins
import dis
import functools
import inspect
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType

import torch
from torch import nn

from pruning.tracing.held_widths import names_read
from pruning.utils.entries import Entry
from pruning.utils.modules import submodule
from pruning.utils.tree import Inputs

#: Most calls that are made for one attribute of one type of module.
MOST_CALLS = 6

#: The number that a method gets for a parameter without a default.
ARGUMENT = 2

#: Functions of Python that only compute.
_BUILTINS = frozenset(
    ("len", "range", "zip", "enumerate", "int", "float", "bool", "list", "tuple", "dict", "set", "min", "max",
     "sum", "abs", "round", "reversed", "sorted", "isinstance", "getattr", "hasattr", "any", "all", "super")
)  # fmt: skip

#: Methods that exchange modules for others that compute the same (RepVGG, MobileOne), by convention.
_REPARAMETERIZING = (
    "reparameterize", "switch_to_deploy", "deploy", "fuse", "convert_to_deploy", "reparam", "fuse_convs",
    "merge_kernel",
)  # fmt: skip

#: Instructions with which code changes something other than its own variables, or imports.
_CHANGING = frozenset(
    ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL", "IMPORT_NAME", "IMPORT_FROM")
)

#: Methods that read or write files, or change a module.
_ACTING = frozenset(
    ("save", "load", "open", "write", "read", "download", "print", "train", "eval", "to", "cuda", "cpu",
     "apply", "register_buffer", "register_parameter", "add_module", "load_state_dict", "requires_grad_",
     "backward", "step", "compile", "numpy", "tolist", "item", "hub", "distributed", "multiprocessing", "jit",
     "onnx", "export", "__dict__", "__class__")
)  # fmt: skip


def other_calls(model: nn.Module, modules: list[str], attribute: str, inputs: Inputs) -> Iterator[Entry]:
    """Yield calls of a model in which modules of one type may read an attribute.

    They set a flag of these modules to its other value, run another method with the parameters of
    `forward` instead of it, or call a method that takes only numbers. Only methods are called that compute,
    and change nothing.

    Args:
        model: its copies will be called. modules: names of modules of one type.
        inputs: example inputs of the model.
    """
    first = submodule(model, modules[0])
    kind, read = type(first), names_read(type(first))
    changes: list[tuple[str, Callable[[nn.Module], None]]] = []
    for name, value in vars(first).items():
        if type(value) is bool and name in read and name != "training":
            changes.append((f"{name} = {not value}", functools.partial(_set, name=name, value=not value)))
    parameters = list(inspect.signature(kind.forward).parameters)
    calls: list[Entry] = []
    for name, method in _computing(kind).items():
        given = inspect.signature(method).parameters
        if list(given) == parameters:
            changes.append((name, functools.partial(_replace_forward, name=name)))
        elif attribute in names_in(method.__code__):
            run = functools.partial(_call_method, module=modules[0], name=name, count=_required(method))
            calls.append(Entry(name, function=run))
    for name, change in changes:
        prepare = functools.partial(_prepare, modules=modules, change=change)
        calls.append(Entry(name, inputs=inputs, prepare=prepare))
    yield from calls[:MOST_CALLS]


def reparameterization(model: nn.Module, inputs: Inputs) -> Entry | None:
    """Return a call of a model after its modules are exchanged for others that compute the same.

    Returns None if no module has a method for that, by the names that RepVGG and MobileOne gave it.

    Args:
        model: its copies will be called. inputs: example inputs of the model.
    """
    if not any(map(_reparameterizing, model.modules())):
        return None
    return Entry("reparameterization", inputs=inputs, prepare=_reparameterize)


def _reparameterizing(module: nn.Module) -> str:
    """Return the name of a module's method that reparameterizes it; empty without one."""
    if isinstance(module, torch.jit.ScriptModule):
        return ""
    held = ((name, inspect.getattr_static(type(module), name, None)) for name in _REPARAMETERIZING)
    return next((n for n, held in held if isinstance(held, FunctionType) and not _required(held)), "")


def _reparameterize(module: nn.Module) -> None:
    """Reparameterize the outermost modules that have a method for that."""
    if name := _reparameterizing(module):
        getattr(module, name)()
        return
    for child in [*module.children()]:
        _reparameterize(child)


def _computing(kind: type[nn.Module]) -> dict[str, FunctionType]:
    """Return the methods of a class that compute only, without `forward` and those of every module."""
    names = [name for name in dir(kind) if name != "forward" and not hasattr(nn.Module, name)]
    held = {name: inspect.getattr_static(kind, name) for name in names}
    return {n: m for n, m in held.items() if isinstance(m, FunctionType) and computes(kind, n)}


def _required(method: FunctionType) -> int:
    """Return the number of arguments that a method needs."""
    given = inspect.signature(method).parameters.values()
    return sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in given) - 1


def _set(module: nn.Module, name: str, value: bool) -> None:
    setattr(module, name, value)


def _replace_forward(module: nn.Module, name: str) -> None:
    setattr(module, "forward", getattr(module, name))  # noqa: B010 - a method of the class


def _call_method(model: nn.Module, module: str, name: str, count: int) -> object:
    return getattr(submodule(model, module), name)(*[ARGUMENT] * count)


def _prepare(model: nn.Module, modules: list[str], change: Callable[[nn.Module], None]) -> None:
    for name in modules:
        change(submodule(model, name))


def computes(kind: type[nn.Module], name: str, seen: frozenset[str] = frozenset()) -> bool:
    """Whether a method, as far as its code shows, computes only: it neither changes nor writes anything.

    >>> class Net(nn.Module):
    ...     def sample(self, n): return torch.randn(n, 4)
    ...     def keep(self, n): self.kept = n
    ...     def store(self, n): open("file", "w")
    >>> import torch
    >>> [computes(Net, name) for name in ("sample", "keep", "store")]
    [True, False, False]
    """
    method = inspect.getattr_static(kind, name, None)
    return isinstance(method, FunctionType) and _only_computes(method.__code__, method, kind, seen | {name})


def _only_computes(code: CodeType, method: FunctionType, kind: type[nn.Module], seen: frozenset[str]) -> bool:
    for step in dis.get_instructions(code):
        if step.opname in _CHANGING:
            return False
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and not _is_of_torch(str(step.argval), method):
            return False
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            used = str(step.argval)
            own = isinstance(inspect.getattr_static(kind, used, None), FunctionType)
            if used in _ACTING or (own and used not in seen and not computes(kind, used, seen)):
                return False
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return all(_only_computes(each, method, kind, seen) for each in inner)


def _is_of_torch(name: str, method: FunctionType) -> bool:
    """Whether a global name of a method is one of torch or math, or a plain value."""
    if name not in method.__globals__:
        return name in _BUILTINS or isinstance(getattr(builtins, name, None), type)
    held = method.__globals__[name]
    if isinstance(held, int | float | str | None):
        return True
    module = held.__name__ if inspect.ismodule(held) else getattr(held, "__module__", None) or ""
    return module.partition(".")[0] in ("torch", "math", "einops") and name not in _ACTING


def names_in(code: CodeType) -> set[str]:
    """Return the names of attributes and globals in code, also of the functions that it defines."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(names_in, inner))
