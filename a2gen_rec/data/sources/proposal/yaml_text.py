"""YAML with comments, as lines."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

WIDTH = 120
COMMENT_COLUMN = 36


class SpecText:
    """Lines of a YAML file with comments next to or above its keys."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str, indent: int = 0) -> None:
        """Add a comment, wrapped."""
        prefix = " " * indent + "# "
        self.lines += textwrap.wrap(plain(text), WIDTH, initial_indent=prefix, subsequent_indent=prefix + "  ")

    def add(self, line: str, comment: str = "") -> None:
        """Add a line of YAML and a comment behind it, or above it where the line has no room."""
        if not comment:
            self.lines.append(line)
        elif len(joined := f"{line:<{COMMENT_COLUMN - 1}} # {plain(comment)}") <= WIDTH:
            self.lines.append(joined)
        else:
            self.note(comment, len(line) - len(line.lstrip(" ")))
            self.lines.append(line)

    def blank(self) -> None:
        self.lines.append("")

    def __str__(self) -> str:
        return "\n".join(self.lines) + "\n"


def plain(text: str) -> str:
    """Return a text in one line, with escapes for characters that YAML does not allow in comments."""
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in text)


def scalar(value: Any) -> str:
    """Return a value, list or mapping as YAML in one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{scalar(key)}: {scalar(each)}" for key, each in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(scalar, value)) + "]"
    if not isinstance(value, str):
        return str(value).lower() if isinstance(value, bool) else str(value)
    # In a list in flow style, so that its separators are quoted as well; in double quotes, line breaks are escapes.
    style = None if value.isprintable() else '"'
    text = yaml.safe_dump([value], default_flow_style=True, default_style=style, allow_unicode=True, width=10**9)
    return text.strip()[1:-1]
