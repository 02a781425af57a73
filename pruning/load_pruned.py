"""Load a pruned network without the toolkit: only torch and the network's class are needed.

    from load_pruned import load_pruned
    model = load_pruned("small.pth", lambda: torchvision.models.resnet18(num_classes=10))

A checkpoint is a plain dict: class and arguments of the dense network, channel counts, weights.
"""

from __future__ import annotations

import importlib
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def load_pruned(path: Any, factory: Callable[..., nn.Module] | None = None, device: Any = "cpu") -> nn.Module:
    """Load the network of a checkpoint, in eval mode; raise ValueError if it does not fit.

    `factory` returns the dense network, given the stored arguments if it takes them; by default the class.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    found: Any = factory
    if factory is None:
        module, _, name = content["class"].partition(":")
        found = operator.attrgetter(name)(importlib.import_module(module))
        if not (isinstance(found, type) and issubclass(found, nn.Module)):
            raise ValueError(f"{content['class']!r} is not a subclass of nn.Module; give a factory")
    if factory is None and not takes(found, content["arguments"]):
        raise ValueError(f"{path} does not hold all arguments of {content['class']!r}; give a factory")
    model = found(**(content["arguments"] if takes(found, content["arguments"]) else {}))
    try:
        rebuild(model, content)
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path} does not fit {type(model).__name__}: {error}") from error
    return model.to(device).eval()


def takes(factory: Callable[..., object], arguments: Mapping[str, object]) -> bool:
    """Return whether a factory can be called with these keyword arguments."""
    try:
        return inspect.signature(factory).bind(**arguments) is not None
    except (TypeError, ValueError):
        return False


#: The attribute in which a list of modules keeps the numbers of the blocks that were removed from it.
REMOVED = "_removed_blocks"

#: The attribute in which it keeps the configuration's lists with a word for each block, as they were before.
WORDS = "_words_of_blocks"


def drop_blocks(model: nn.Module, name: str, numbers: Iterable[int]) -> None:
    """Remove blocks from a list of modules, in place; `numbers` are those in the list with all blocks.

    Attributes in which blocks hold their own number, and lists of words in the configuration of the module
    that holds the list, with a word for each block, follow.
    """
    blocks: Any = model.get_submodule(name)
    before, gone = getattr(blocks, REMOVED, ()), set(numbers)
    dense = [i for i in range(len(blocks) + len(before)) if i not in before]
    kept = [place for place, number in enumerate(dense) if number not in gone]
    if not kept or gone - set(dense):
        raise ValueError(f"{name} has the blocks {dense}, of which {sorted(gone)} cannot be removed")
    own: dict[tuple[str, str], list[bool]] = {}
    for place, block in enumerate(blocks):
        for inner, module in block.named_modules():
            for attribute, value in vars(module).items():
                if type(value) is int:
                    own.setdefault((inner, attribute), []).append(value == place)
    numbered = [key for key, holds in own.items() if len(holds) > 1 and all(holds)]
    config = getattr(model.get_submodule(name.rpartition(".")[0]), "config", None)
    for attribute, value in list(vars(config).items()) if hasattr(config, "__dict__") else ():
        if type(value) is list and len(value) == len(blocks) and {*map(type, value)} == {str}:
            setattr(blocks, WORDS, {attribute: list(value), **getattr(blocks, WORDS, {})})
            setattr(config, attribute, [value[place] for place in kept])
    left = [blocks[place] for place in kept]
    blocks._modules.clear()
    for place, block in enumerate(left):
        blocks._modules[str(place)] = block
        inside = dict(block.named_modules())
        for inner, attribute in numbered:
            if inner in inside and hasattr(inside[inner], attribute):
                setattr(inside[inner], attribute, place)
    setattr(blocks, REMOVED, sorted({*before, *gone}))


class NoBranch(nn.Module):
    """A residual branch that was removed: it returns zeros of the size of its first input.

    `outputs` is the number of outputs in a tuple, of which the others are None; 0 for a tensor.
    """

    def __init__(self, outputs: int = 0):
        super().__init__()
        self.outputs = outputs

    def forward(self, *args: object, **kwargs: object) -> object:
        """Return zeros."""
        given = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point())
        zeros = torch.zeros_like(next(given))
        return (zeros, *[None] * (self.outputs - 1)) if self.outputs else zeros


def rebuild(model: nn.Module, content: Mapping[str, Any]) -> None:
    """Set the channel counts and weights of a dense network to those of a checkpoint, in place."""
    for name, numbers in sorted(content.get("removed", {}).items(), key=lambda item: item[0].count(".")):
        drop_blocks(model, name, numbers)
    for name, outputs in content.get("branches", {}).items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, NoBranch(outputs))
    inputs = 0  # most input channels of a removed layer; the layer behind it receives these instead
    for name in content["folded"]:  # norms that are folded, and removed layers
        removed, (owner, _, attribute) = model.get_submodule(name), name.rpartition(".")
        inputs = max(inputs, *(getattr(removed, n, 0) for n in ("in_channels", "in_features")))
        setattr(model.get_submodule(owner), attribute, nn.Identity())
    for name in content.get("not_in_place", ()):
        setattr(model.get_submodule(name), "inplace", False)  # noqa: B010 - nn.Module declares none
    sized = content.get("sizes", {})  # attributes by which a module's own code views or splits channels
    for name, counts in (*content["layers"].items(), *sized.items()):
        module = model.get_submodule(name)
        for attribute, count in counts.items():
            made, limit = getattr(module, attribute), inputs if attribute[:3] == "in_" else 0
            dense, given = ([n] if isinstance(n, int) else list(n) for n in (made, count))
            fits = (g == m or m is True or 0 < g <= max(m, limit) for g, m in zip(given, dense, strict=False))
            if len(dense) != len(given) or not all(fits):
                raise ValueError(f"{name}.{attribute} is stored as {count}, the factory makes {made}")
            setattr(module, attribute, count if isinstance(made, int) else type(made)(count))
        if name in sized:
            setattr(module, "_pruned_sizes", sorted(counts))  # noqa: B010 - for `save`
    replaced: dict[Tensor, list[tuple[Tensor, Tensor]]] = {}
    for name, stored in content["state_dict"].items():
        if isinstance(stored, Tensor):  # `get_extra_state` may return other objects
            _resize(model, name, stored, name.rpartition(".")[0] in content["layers"], replaced)
    versioned = model.state_dict()  # has the version numbers that some classes check
    versioned.clear()
    versioned.update(content["state_dict"])
    model.load_state_dict(versioned)
    for name, stored in content.get("buffers", {}).items():  # those with persistent=False
        owner, _, attribute = name.rpartition(".")
        model.get_submodule(owner).register_buffer(attribute, stored.clone(), persistent=False)


def _resize(model: nn.Module, name: str, stored: Tensor, in_layer: bool, replaced: dict[Tensor, Any]) -> None:
    """Give a tensor the shape and type of a stored one; tied tensors stay tied if the values are equal."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    made: Any = {**module._buffers, **module._parameters}.get(attribute)
    shape = tuple(made.shape) if made is not None else tuple(stored.shape)
    sizes = _sizes(module, attribute) if in_layer else ()
    given, expected = tuple(stored.shape), sizes + shape[len(sizes) :]
    fewer = stored.ndim == len(shape) and all(map(int.__le__, stored.shape, shape))
    if given != expected and (sizes or not fewer):
        raise ValueError(f"{name} is stored as {given}, not {expected}: the factory makes {shape}")
    twins = replaced.setdefault(stored if made is None else made, [])
    tensor = next((t for s, t in twins if s.dtype == stored.dtype and torch.equal(s, stored)), None)
    if tensor is None:
        unchanged = not twins and made is not None and (shape, made.dtype) == (stored.shape, stored.dtype)
        tensor = made if unchanged else torch.empty_like(stored)
    if attribute in module._parameters and not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor, made.requires_grad if made is not None else stored.is_floating_point())
    if attribute in module._parameters or attribute in module._buffers:  # else `load_state_dict` rejects it
        setattr(module, attribute, tensor)
    twins.append((stored, tensor))


def _sizes(layer: Any, attribute: str) -> tuple[int, ...]:
    """Return the leading sizes of a layer's tensor that its channel counts determine; may be empty."""
    if attribute in ("weight_ih", "weight_ih_l0", "weight_ih_l0_reverse"):
        rows = 1 + 3 * isinstance(layer, (nn.LSTM, nn.LSTMCell)) + 2 * isinstance(layer, (nn.GRU, nn.GRUCell))
        return (rows * layer.hidden_size, layer.input_size)
    if attribute not in ("weight", "bias", "running_mean", "running_var"):
        return ()
    if hasattr(layer, "num_embeddings") or hasattr(layer, "normalized_shape"):
        return getattr(layer, "normalized_shape", None) or (layer.num_embeddings, layer.embedding_dim)
    counts = ("out_channels", "out_features", "num_features", "num_channels", "num_parameters")
    out = next(getattr(layer, count) for count in counts if hasattr(layer, count))
    into = getattr(layer, "in_channels", getattr(layer, "in_features", 0))
    out, into = (into, out) if attribute == "weight" and getattr(layer, "transposed", False) else (out, into)
    return (out, into // getattr(layer, "groups", 1)) if attribute == "weight" and into else (out,)
