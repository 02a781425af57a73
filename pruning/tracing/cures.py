"""Say for each reason to skip a layer what the user can do about it."""

from __future__ import annotations

import re

#: Words with which a reason already says what to do.
_TOLD = re.compile(
    r"to let (it|them)|let it be pruned|; (untie|list|remove|set|give|put|normalize|return|run|call)\b|"
    r"outputs=|ignored=|also=|\. (Compute|Replace|Use|List|Call|Run|Give|Remove)\b|list it as ignored"
)

#: What to do, by words of the reason; the first that occur count.
_CURES: tuple[tuple[str, str], ...] = (
    ("an operation without a rule", "register a rule (pruning.tracing.operators.register_operator)"),
    ("ignored, as asked by", "leave it out of ignored= (--ignore)"),
    (
        "consumes its channels",
        "outputs= (--outputs) says which outputs count; register what else takes them "
        "(register_layer, register_operator)",
    ),
    ("model's output", "outputs= (--outputs) says which outputs count"),
    ("an output of", "return only what has to keep its size"),
    ("it has one channel", "make it wider"),
    ("all tied to each other", "do not join or select its channels one by one"),
    ("is the same tensor as", "untie them"),
    ("no tensor", "let the layer return one tensor"),
    ("along another dimension", "keep the channels along one dimension (permute them back)"),
    ("along the dimension that", "keep the channels along one dimension (permute them back)"),
    ("along several dimensions", "give the parameter one dimension for its channels"),
    ("reads positions", "make what is read by a layer of its own"),
    ("by position", "use a layer for each part, or equal parts (chunk)"),
    ("code of another module", "let each module read its own parameters alone"),
    ("fixed size", "make the other tensor by a layer, or fill it by torch.zeros of the size of this one"),
    ("have no channels", "make both tensors by layers"),
    ("over its channels", "use a norm or a mean of torch, or reduce over other dimensions"),
    ("normalizes", "normalize over the channels alone"),
    ("max_norm", "set max_norm=None"),
    ("keeps its hidden size", "start from zeros"),
)

#: What to do where nothing else is known.
_OTHERWISE = "change this code to operations between layers of torch"


def with_cure(reason: str) -> str:
    """Return a reason to skip a layer with what the user can do about it, unless it says so already.

    >>> with_cure("it has one channel")
    'it has one channel; make it wider, to let it be pruned'
    >>> with_cure("a.weight is frozen; set requires_grad=True to let it be pruned")
    'a.weight is frozen; set requires_grad=True to let it be pruned'
    """
    if _TOLD.search(reason):
        return reason
    cure = next((cure for words, cure in _CURES if words in reason), _OTHERWISE)
    if cure.startswith("outputs="):
        return f"{reason}; {cure}"
    return f"{reason}; {cure}, to let it be pruned"
