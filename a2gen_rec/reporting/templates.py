"""Filling the templates of pages and of Markdown that lie beside this module."""

from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined


def render(name: str, filters: Mapping[str, Callable[..., Any]] | None = None, **values: Any) -> str:
    """The template ``name`` with its values, which are escaped in HTML only; one that is missing is an error."""
    environment = Environment(
        autoescape=name.endswith(".html.j2"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= filters or {}
    template = files(__package__).joinpath(name).read_text(encoding="utf-8")
    return environment.from_string(template).render(**values)
