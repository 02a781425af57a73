"""Numbers and lists of things, in messages."""

from collections.abc import Sequence


def number_of(count: int, noun: str, verbs: tuple[str, str] | None = None) -> str:
    """Return a number with its noun in the singular or the plural, and with the verb that goes with it.

    Args:
        count: how many there are. noun: in the singular.
        verbs: the verb for one and for several.

    >>> number_of(1, "layer"), number_of(1200, "class"), number_of(0, "epoch")
    ('1 layer', '1,200 classes', '0 epochs')
    >>> number_of(1, "layer", ("keeps", "keep")), number_of(2, "layer", ("keeps", "keep"))
    ('1 layer keeps', '2 layers keep')
    """
    is_one = count == 1
    ending = "" if is_one else "es" if noun.endswith(("s", "x", "sh", "tch", "nch")) else "s"
    verb = "" if verbs is None else f" {verbs[0 if is_one else 1]}"
    return f"{count:,} {noun}{ending}{verb}"


def alternatives(names: Sequence[str]) -> str:
    """Return names with `or` before the last.

    >>> alternatives(["a"]), alternatives(["a", "b", "c"])
    ('a', 'a, b or c')
    """
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
