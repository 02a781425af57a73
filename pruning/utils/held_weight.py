"""A parameter of any module in the form of a layer, so that code that multiplies by it can be pruned."""

from __future__ import annotations

from collections.abc import Iterator
from weakref import WeakKeyDictionary

from torch import Tensor, nn


class HeldWeight(nn.Module):
    """A layer whose weight is a parameter of another module; `weight` reads and sets that parameter.

    It is no submodule of the model. `held_weight` makes it, with a type for each class and attribute.

    Args:
        owner: the module that holds the parameter. attribute: its name there.
    """

    owner: nn.Module
    attribute: str

    def __init__(self, owner: nn.Module, attribute: str):
        super().__init__()
        object.__setattr__(self, "owner", owner)  # not a submodule
        object.__setattr__(self, "attribute", attribute)

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        if name == "weight":
            weight = self.owner._parameters[self.attribute]
            assert weight is not None
            return weight
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Tensor | nn.Module) -> None:
        if name == "weight":
            setattr(self.owner, self.attribute, value)
        else:
            super().__setattr__(name, value)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the weight by its name."""
        yield "weight", self.get_parameter("weight")


_TYPES: WeakKeyDictionary[type[nn.Module], dict[str, type[HeldWeight]]] = WeakKeyDictionary()


def held_weight(owner: nn.Module, attribute: str) -> HeldWeight:
    """Return a parameter as a layer.

    Args:
        owner, attribute: see `HeldWeight`.

    >>> layer = held_weight(nn.Linear(3, 4), "weight")
    >>> layer.weight.shape, type(layer) is type(held_weight(nn.Linear(5, 6), "weight"))
    (torch.Size([4, 3]), True)
    """
    types = _TYPES.setdefault(type(owner), {})
    if attribute not in types:
        types[attribute] = type("HeldWeight", (HeldWeight,), {})
    return types[attribute](owner, attribute)
