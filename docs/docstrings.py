"""A griffe extension: docstrings in the form that griffe parses into examples and arguments."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Parsed(griffe.Extension):
    """Gather the examples of each docstring in one section, and list each argument on its own."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = gathered(separated(obj.docstring.value))


def gathered(text: str) -> str:
    """Return a docstring whose paragraphs of `>>>` lines stand in one section `Examples:`."""
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    if "Examples:" in text:
        return text
    paragraphs = text.split("\n\n")
    shown = [each for each in paragraphs if each.lstrip().startswith(">>>")]
    if not shown:
        return text
    rest = [each for each in paragraphs if each not in shown]
    lines = "\n\n".join(shown).splitlines()
    section = "\n".join(f"    {line}" if line else "" for line in lines)
    return "\n\n".join([*rest, f"Examples:\n{section}"])


def separated(text: str) -> str:
    """Return a docstring in which `a, b: text` is listed as `a: text` and `b: text`."""
    return re.sub(
        r"^( +)(\w+(?:,\s+\w+)+): (.+)$",
        lambda m: "\n".join(f"{m[1]}{name}: {m[3]}" for name in re.split(r",\s+", m[2])),
        text,
        flags=re.MULTILINE,
    )
