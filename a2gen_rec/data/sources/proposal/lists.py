"""Multi-valued features and vectors of a proposed spec: list columns, and text with a delimiter."""

from dataclasses import dataclass

from a2gen_rec.data.sources.proposal import words
from a2gen_rec.data.sources.proposal.levels import Level, level_of
from a2gen_rec.data.sources.proposal.profiles import ColumnProfile, LogProfile

MAY_BE_OUTCOME = "may be an outcome of the impression: as a feature it would reveal the target"
DELIMITERS = ("|", ";", ",")
MIN_DELIMITED = 0.01
"""Minimum share of values with the delimiter."""
FRACTIONS = ("FLOAT", "DOUBLE", "DECIMAL")
"""DuckDB types of the elements of vectors."""


@dataclass(frozen=True)
class ProposedList:
    """A list column as a feature or a vector, and the evidence for it.

    Attributes:
        name: name of the column.
        level: level of the feature.
        evidence: reason for the level.
        width: number of elements of a vector; 0 for a multi-valued feature.
    """

    name: str
    level: Level
    evidence: str
    width: int


def propose_lists(profile: LogProfile, user: str, item: str) -> tuple[list[ProposedList], dict[str, str]]:
    """Return list columns as features and vectors, and the reasons of list columns that are neither.

    Args:
        profile: columns of the log.
        user: SQL of users; empty if unknown.
        item: SQL of items; empty if unknown.
    """
    proposed, unused = [], {}
    for column in profile.lists:
        by_item, by_user = (profile.list_variation(key, column) if key else None for key in (item, user))
        level, evidence = level_of(by_item, by_user)
        is_numeric = column.element.startswith(FRACTIONS)
        if not column.max_length:
            unused[column.name] = "has no values"
        elif column.is_constant:
            unused[column.name] = "has one value"
        elif not column.in_all_files:
            unused[column.name] = "is not in every file"
        elif level == "context" and words.may_be_outcome(column.name):
            unused[column.name] = MAY_BE_OUTCOME
        elif not is_numeric:
            proposed.append(ProposedList(column.name, level, evidence, 0))
        elif column.min_length != column.max_length:
            unused[column.name] = f"has {column.min_length:,} to {column.max_length:,} numbers, so that it is no vector"
        elif level != "item":
            unused[column.name] = "is a list of numbers, but does not belong to an item; only items have vectors"
        else:
            proposed.append(ProposedList(column.name, level, evidence, column.max_length))
    return proposed, unused


def delimiter_of(profile: LogProfile, column: ColumnProfile) -> str:
    """Return the delimiter of a text column with several values per row; empty for a column of single values."""
    if column.is_number or not set(words.words(column.name)) & words.LISTS:
        return ""
    counts = {delimiter: profile.count(f"contains(t{column.index}, '{delimiter}')") for delimiter in DELIMITERS}
    delimiter = max(DELIMITERS, key=lambda x: counts[x])
    return delimiter if counts[delimiter] >= max(1, MIN_DELIMITED * column.present) else ""
