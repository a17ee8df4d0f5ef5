"""Formats of raw files: Parquet or CSV by content, and columns by the footer or the first line.

DuckDB's sniffer is not used: it guesses from a sample, and rows after it are then dropped or changed (DuckDB 2.0.1).
"""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from a2gen_rec.data.csv_errors import CsvDialect, check_complete, compression_of, open_bytes
from a2gen_rec.data.sql import NAN_OPTION, quote_literal, quote_path
from a2gen_rec.errors import DataError, first_line

HEADER_BYTES = 1 << 20
"""Maximum bytes of a CSV file's first line."""
UNSUPPORTED = {
    b"PARE": "encrypted Parquet",
    b"BZh": "bzip2",
    b"PK\x03\x04": "ZIP",
    b"ORC": "ORC",
    b"Obj\x01": "Avro",
    b"ARROW1": "Arrow IPC",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"\xfd7zXZ": "xz",
    b"\x04\x22\x4d\x18": "LZ4",
    b"{": "JSON",
    b"[": "JSON",
}


@dataclass(frozen=True)
class FileFormat:
    """Format of files that one reader reads together: equal columns, in the same order.

    Attributes:
        names: names of the columns.
        compression: compression of CSV files; None for Parquet.
        schema: physical types of Parquet columns, as text; empty for CSV.
        int96: names of Parquet columns with the deprecated type INT96.
    """

    names: tuple[str, ...]
    compression: str | None = None
    schema: str = ""
    int96: frozenset[str] = frozenset()

    @property
    def is_parquet(self) -> bool:
        return self.compression is None

    def reader_sql(self, files: Sequence[str], dialect: CsvDialect, filename: str = "") -> str:
        """Return the SQL relation of files; CSV columns are text and named ``c0``, ``c1``, … by position.

        Args:
            files: paths of files of this format.
            dialect: separators of CSV files.
            filename: name of a column of the row's path; empty for none.
        """
        options = "hive_partitioning = false" + (f", filename = {quote_literal(filename)}" if filename else "")
        if self.is_parquet:
            return f"read_parquet([{', '.join(map(quote_path, files))}], {options}, {NAN_OPTION})"
        columns = ", ".join(f"'c{index}': 'VARCHAR'" for index in range(len(self.names)))
        return (
            f"read_csv([{', '.join(map(quote_path, files))}], {options}, auto_detect = false, header = false, skip = 1,"
            f" columns = {{{columns}}}, delim = {quote_literal(dialect.delimiter)}, comment = '',"
            f" quote = {quote_literal(dialect.quote)}, escape = {quote_literal(dialect.escape)},"
            f" compression = {quote_literal(self.compression)}, strict_mode = {dialect.strict})"
        )


def read_format(file: Path, dialect: CsvDialect) -> FileFormat:
    """Return the format of a file by its content; its name does not matter.

    Raises:
        DataError: the file is empty, or has neither a Parquet footer nor a first line with names of columns.
    """
    with open(file, "rb") as stream:
        start = stream.read(8)
    if not start:
        raise DataError("is empty; a CSV file starts with the names of its columns", file=file)
    for magic, name in UNSUPPORTED.items():
        if start.startswith(magic):
            raise DataError(f"is {name}; logs are Parquet, or CSV in UTF-8", file=file)
    return _parquet_format(file) if start.startswith(b"PAR1") else _csv_format(file, start, dialect)


def _parquet_format(file: Path) -> FileFormat:
    try:
        schema = pq.read_metadata(file).schema
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"is not a complete Parquet file ({first_line(error)})", file=file) from error
    # The text's first line contains the address of the object.
    text = str(schema).split("\n", 1)[1]
    columns = [schema.column(index) for index in range(len(schema))]
    int96 = frozenset(column.path for column in columns if column.physical_type == "INT96")
    return FileFormat(tuple(schema.to_arrow_schema().names), None, text, int96)


def _csv_format(file: Path, start: bytes, dialect: CsvDialect) -> FileFormat:
    try:
        with open_bytes(file) as stream:
            head = stream.read(HEADER_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"cannot be read ({first_line(error)})", file=file) from error
    check_complete(file)
    names = _header(head.decode("utf-8-sig", "surrogateescape"), dialect)
    if not any(names):
        raise DataError("the first line must contain the names of the columns", file=file, row=1)
    if any(re.search(r"[\ud800-\udfff\0]", name) for name in names):
        raise DataError("is not UTF-8", file=file, row=1)
    return FileFormat(names, compression_of(start))


def _header(text: str, dialect: CsvDialect) -> tuple[str, ...]:
    """Return the fields of the first record."""
    records = dialect.records(io.StringIO(text, newline=""))
    try:
        return tuple(next(records, ()))
    except csv.Error:
        return ()
