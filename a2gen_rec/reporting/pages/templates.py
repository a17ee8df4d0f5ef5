"""Filling the templates of pages and of Markdown that lie beside this module."""

from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined


def render(name: str, filters: Mapping[str, Callable[..., Any]] | None = None, **values: Any) -> str:
    """The template ``name`` with its values; one that is missing is an error.

    Values are escaped in HTML; in Markdown the filter ``md`` does it.
    """
    environment = Environment(
        autoescape=name.endswith(".html.j2"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"md": plain_markdown, **(filters or {})}
    template = files(__package__).joinpath(name).read_text(encoding="utf-8")
    return environment.from_string(template).render(**values)


def plain_markdown(text: object) -> str:
    """Text that Markdown shows as it is, on one line, in a table's cell too."""
    one_line = " ".join(str(text).split()).replace("&", "&amp;")
    return "".join(f"\\{letter}" if letter in "\\`*_|<>[]" else letter for letter in one_line)
