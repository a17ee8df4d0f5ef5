"""The style of terminal tables."""

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

HIGHLIGHT = "bold green"


def new_table(title: str, caption: str = "") -> Table:
    """Return an empty table. ``title`` and ``caption`` are plain text, not markup."""
    return Table(
        title=Text(f"\n{title}", style="bold"),
        title_justify="left",
        caption=Text(caption, style="dim") if caption else None,
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )


def new_metrics_table(title: str, caption: str, *headers: str) -> Table:
    """Return an empty table with names in the first column and right-aligned metrics under ``headers``."""
    table = new_table(title, caption)
    table.add_column("", no_wrap=True)
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def new_numeric_table(title: str, *columns: str) -> Table:
    """Return an empty table with text in the first column and numbers in the others."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left")
    return table
