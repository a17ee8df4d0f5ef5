"""Rendering of the HTML and Markdown templates in this package."""

from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined


def render(name: str, filters: Mapping[str, Callable[..., Any]] | None = None, **values: Any) -> str:
    """Return the rendered template. HTML values are escaped; Markdown templates escape with the filter ``md``.

    Args:
        name: Path of the template in this package.
        filters: Further filters by name.
        values: Values of the template; a missing value is an error.
    """
    environment = Environment(
        autoescape=name.endswith(".html.j2"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"md": escape_markdown, **(filters or {})}
    template = files(__package__).joinpath(name).read_text(encoding="utf-8")
    return environment.from_string(template).render(**values)


def escape_markdown(text: object) -> str:
    """Escape text for Markdown, on one line, so that it can be in a table cell."""
    one_line = " ".join(str(text).split()).replace("&", "&amp;")
    return "".join(f"\\{character}" if character in "\\`*_|<>[]" else character for character in one_line)
