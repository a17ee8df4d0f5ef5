"""Separators of a CSV file, guessed from its beginning.

A guess is a proposal only: the whole log is read with it before it is proposed, and ``prepare`` never guesses.
"""

import csv
import io
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from a2gen_rec.data.csv_errors import CsvDialect, open_bytes

HEAD_BYTES = 1 << 18
HEAD_RECORDS = 200
MAX_NAME_LENGTH = 200
DELIMITERS = (",", "\t", ";", "|", "\x01")
QUOTES = (('"', '"'), ('"', "\\"), ("", ""), ("'", "'"))
"""Pairs of quote and escape, the usual ones first."""


@dataclass(frozen=True)
class _Reading:
    """Records of a file's beginning under one dialect.

    Attributes:
        dialect: the dialect.
        header: fields of the first record.
        share: share of the records with as many fields as the header.
        single_quoted: share of the other records' fields between single quotes.
    """

    dialect: CsvDialect
    header: tuple[str, ...]
    share: float
    single_quoted: float

    @property
    def preference(self) -> tuple[bool, int, float, bool]:
        wanted_quote = "'" if self.single_quoted > 0.5 else self.dialect.quote
        return self.share > 0.9, len(self.header), self.share, self.dialect.quote == wanted_quote


def guess_dialects(file: Path) -> list[CsvDialect]:
    """Return dialects that give a file equally many columns, the most probable one first."""
    with open_bytes(file) as stream:
        head = stream.read(HEAD_BYTES)
    if len(head) == HEAD_BYTES:
        head = head[: head.rfind(b"\n") + 1] or head
    text = head.decode("utf-8-sig", "surrogateescape")
    readings = [
        _read(text, CsvDialect(delimiter, quote, escape)) for delimiter in DELIMITERS for quote, escape in QUOTES
    ]
    # The sort is stable: of equal readings, the usual separators are first.
    readings.sort(key=lambda reading: reading.preference, reverse=True)
    columns = len(readings[0].header)
    return [reading.dialect for reading in readings if len(reading.header) == columns]


def looks_like_values(header: tuple[str, ...]) -> bool:
    """Return whether a first line contains values, as in a file without a header, rather than names."""

    def is_value(name: str) -> bool:
        has_letters = any(character.isalpha() for character in name)
        has_digits = any(character.isdigit() for character in name)
        return (has_digits and not has_letters) or re.match(r"\d{2,4}[-/]\d{1,2}[-/]\d{1,4}\b", name) is not None

    return any(is_value(name.strip()) or len(name) > MAX_NAME_LENGTH for name in header)


def _read(text: str, dialect: CsvDialect) -> _Reading:
    records = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=dialect.delimiter,
        quotechar=dialect.quote or None,
        quoting=csv.QUOTE_MINIMAL if dialect.quote else csv.QUOTE_NONE,
        doublequote=dialect.escape == dialect.quote,
        escapechar=dialect.escape if dialect.escape != dialect.quote else None,
    )
    try:
        header, *rest = islice(records, HEAD_RECORDS)
    except (csv.Error, ValueError):
        return _Reading(dialect, (), 0, 0)
    fields = [field for record in rest for field in record if field]
    single_quoted = sum(len(field) > 1 and field[0] == field[-1] == "'" for field in fields) / max(1, len(fields))
    share = sum(len(record) in (0, len(header)) for record in rest) / max(1, len(rest))
    return _Reading(dialect, tuple(header), share, single_quoted)
