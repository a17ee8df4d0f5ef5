"""Terminal tables as text."""

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text


def rendered(tables: Sequence[Table | Text], color: bool = False, width: int = 100) -> str:
    """Return the tables as printed on a console of ``width`` columns, with escape codes if ``color``."""
    out = io.StringIO()
    color_system = "standard" if color else None
    console = Console(file=out, width=width, highlight=False, force_terminal=color, color_system=color_system)
    for table in tables:
        console.print(table)
    return out.getvalue()


def row(text: str, name: str) -> str:
    """Return the line that starts with ``name``, with runs of spaces collapsed."""
    return next(" ".join(line.split()) for line in text.splitlines() if line.split()[:1] == [name])
