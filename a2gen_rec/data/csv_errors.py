"""DuckDB's errors on raw files as one line with file, row and field."""

import csv
import io
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, BinaryIO, TextIO

import duckdb
import pyarrow as pa

from a2gen_rec.errors import DataError, first_line

if TYPE_CHECKING:
    from _csv import Reader

MAX_FIELD_BYTES = 1 << 25
"""Maximum bytes of one value when lines are counted; DuckDB accepts 2 MB a line."""
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
"""First bytes of a file -> compression."""
CHUNK_BYTES = 1 << 20
_REASONS = (
    r"^(Could not convert .+?|Expected Number of Columns.+?"
    r"|Value with unterminated quote found|Maximum line size.+?)\.?$"
)
_OTHER_ENDINGS = {b"\n": rb"\r\n?", b"\r\n": rb"(?<!\r)\n|\r(?!\n)", b"\r": rb"\r?\n"}
"""Line ending of a file -> pattern of the others."""


@dataclass(frozen=True)
class CsvDialect:
    """Separators of CSV values; an empty quote means that values are never quoted."""

    delimiter: str = ","
    quote: str = '"'
    escape: str = '"'
    strict: bool = True
    """Whether quotes inside of values and further columns are errors."""

    def records(self, text: TextIO, skip_spaces: bool = False) -> "Reader":
        """Return Python's reader of records, with ``line_num``; an empty line is an empty record.

        Args:
            text: text of a file, opened with ``newline=""``.
            skip_spaces: whether a quoted value may begin with spaces, as in DuckDB.
        """
        return csv.reader(
            text,
            delimiter=self.delimiter,
            quotechar=self.quote or None,
            quoting=csv.QUOTE_MINIMAL if self.quote else csv.QUOTE_NONE,
            doublequote=self.escape == self.quote,
            escapechar=(self.escape or None) if self.escape != self.quote else None,
            skipinitialspace=skip_spaces,
        )


STANDARD_DIALECT = CsvDialect()


def compression_of(start: bytes) -> str:
    """Return the compression of a file from its first bytes; "none" for none."""
    return next((name for magic, name in COMPRESSIONS.items() if start.startswith(magic)), "none")


def open_bytes(file: object) -> BinaryIO:
    """Open a file for reading, decompressed."""
    with open(str(file), "rb") as stream:
        compression = compression_of(stream.read(4))
    return pa.input_stream(str(file), compression=None if compression == "none" else compression)


def check_complete(file: object) -> None:
    """Check that a compressed file does not end early; its rows are then not known.

    DuckDB 2.0.1 reads an incomplete zstd file up to its end without an error, and reports an incomplete gzip file.

    Raises:
        DataError: the file is incomplete or cannot be decompressed.
    """
    with open(str(file), "rb") as stream:
        if compression_of(stream.read(4)) != "zstd":
            return
    try:
        with open_bytes(file) as stream:
            while stream.read(CHUNK_BYTES):
                pass
    except OSError as error:
        raise DataError(f"cannot be read ({first_line(error)})", file=file) from error


def line_of_record(file: object, dialect: CsvDialect, number: int, with_empty: bool) -> int:
    """Return the line, from 1, in which a record starts: quoted values may contain line endings.

    The file is read again up to this line, in bounded memory.

    Args:
        file: path of the CSV file.
        dialect: its separators.
        number: number of the record from 1, which is that of the first line.
        with_empty: whether empty lines count as records. DuckDB 2.0.1 counts them in errors, but returns no rows.
    """
    limit = csv.field_size_limit(MAX_FIELD_BYTES)
    try:
        with open_bytes(file) as stream, io.TextIOWrapper(stream, "latin-1", newline="") as text:
            records = dialect.records(text, skip_spaces=True)
            counted: Iterator[list[str]] = records if with_empty else filter(None, records)
            deque(islice(counted, number - 1), 0)
            line = records.line_num + 1
            if not with_empty:
                while next(records, None) == []:
                    line = records.line_num + 1
            return line
    except csv.Error:
        return number
    finally:
        csv.field_size_limit(limit)


def to_data_error(error: duckdb.Error, file: object) -> DataError:
    """Return an error with the file, line and column of DuckDB's message, if present; ``file`` is the fallback."""
    text = str(error)
    # The last lines, since the invalid row is part of the text.
    settings = dict(re.findall(r"^  (file|delimiter|quote|escape) = (.+?)(?: \(Set By User\))?$", text, re.MULTILINE))
    named = settings.get("file", file)
    if "state machine reached an invalid state" in text:
        return _line_ending_error(named)
    line = re.search(r"CSV Error on Line: (\d+)", text)
    if line is None:
        return DataError(first_line(error), file=file)
    column = re.search(r'converting column "([^"]+)"', text)
    reason = re.search(_REASONS, text, re.MULTILINE)
    message = reason[1] if reason else "is not valid CSV"
    if "Invalid unicode" in text:
        message = "is not UTF-8"
    number, row = int(line[1]), int(line[1])
    if "delimiter" in settings:
        values = [settings.get(name, "").replace("(empty)", "") for name in ("delimiter", "quote", "escape")]
        row = line_of_record(named, CsvDialect(*values), number, with_empty=True)
    return DataError(message, file=named, row=row, field=column[1] if column else None)


def _line_ending_error(file: object) -> DataError:
    """Return the error of the first line that ends unlike the lines before it, which DuckDB 2.0.1 cannot read."""
    row, usual, rest = 1, b"", b""
    with open_bytes(file) as stream:
        while chunk := rest + (more := stream.read(CHUNK_BYTES)):
            # An ending may continue in the next chunk.
            chunk, rest = (chunk[:-1], chunk[-1:]) if more and chunk.endswith(b"\r") else (chunk, b"")
            usual = usual or next(iter(re.findall(rb"\r\n|\n|\r", chunk)), b"")
            if usual and (other := re.search(_OTHER_ENDINGS[usual], chunk)):
                row += chunk[: other.start()].count(usual)
                ending = other[0].decode().replace("\r", "\\r").replace("\n", "\\n")
                return DataError(f"ends with {ending}, unlike the rows before it", file=file, row=row)
            row += chunk.count(usual) if usual else 0
    return DataError("is not valid CSV", file=file)
