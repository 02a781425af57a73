"""Render HTML pages from templates: each page is one file that opens from disk, in light or dark mode."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render(template: Path, values: Mapping[str, object]) -> str:
    """Fill a jinja2 template with plain data.

    The template can extend `page.html` and include the files beside it. Included CSS and JavaScript
    are templates too, so they must not contain `{{`, `{%` or `{#`.

    Args:
        template: path of the template file.
        values: plain data by the name that the template uses. Text is escaped; `tojson` writes
            data for a script element.

    Returns:
        The whole page.

    Raises:
        jinja2.TemplateError: If the template is invalid or uses a name that `values` lacks.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     template = Path(folder) / "hello.html"
        ...     _ = template.write_text('{% extends "page.html" %}{% block body %}{{ name }}{% endblock %}')
        ...     page = render(template, {"title": "Hello", "name": "a < b"})
        >>> "a &lt; b" in page, page.count("<title>Hello</title>")
        (True, 1)
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment.get_template(template.name).render(values)
