"""Sections of a page with charts and tables, the same for HTML and Markdown."""

from dataclasses import dataclass, field

from matplotlib.figure import Figure


@dataclass(frozen=True)
class SectionTable:
    """A table of text cells.

    Attributes:
        columns: Headers; the first column names the rows.
        rows: Cells of each row.
        caption: Text below the table.
        text_columns: Headers of further columns that hold text, not numbers.
    """

    columns: list[str]
    rows: list[list[str]]
    caption: str = ""
    text_columns: tuple[str, ...] = ("kind", "second", "second action")


@dataclass(frozen=True)
class Section:
    """One topic.

    Attributes:
        title: Heading.
        text: Main finding, or the reason for the section's absence.
        charts: Charts with their captions.
        tables: Tables.
    """

    title: str
    text: str
    charts: list[tuple[Figure, str]] = field(default_factory=list)
    tables: list[SectionTable] = field(default_factory=list)
