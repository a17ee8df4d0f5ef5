"""Files of a raw log as one relation of canonical values, joined by the names of their columns.

The cost of a file is one read of its footer or first line: files with equal columns are scanned together, and one
query checks the rows of all files.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import duckdb

from a2gen_rec.data.csv_errors import STANDARD_DIALECT, CsvDialect, line_of_record
from a2gen_rec.data.sources.formats import FileFormat, read_format
from a2gen_rec.data.sources.values import Check, Column, Value
from a2gen_rec.data.sql import fetch_one, quote_identifier, quote_literal, translate_errors
from a2gen_rec.errors import DataError

Columns = Mapping[str, Column]
Convert = Callable[[Columns], dict[str, Value]]
"""Function from the columns of some files to canonical values by name."""


def find_files(directory: Path, pattern: str) -> list[Path]:
    """Return the files of a directory that match ``pattern``, sorted.

    Names that begin with ``_`` or ``.`` are skipped, unless the pattern begins so: Spark and Hive write ``_SUCCESS``
    and checksums next to their data.

    Raises:
        DataError: no file matches.
    """

    def is_hidden(path: Path) -> bool:
        return any(part.startswith(("_", ".")) for part in path.relative_to(directory).parts)

    files = sorted(path for path in directory.glob(pattern) if path.is_file())
    if not pattern.startswith(("_", ".")):
        files = [path for path in files if not is_hidden(path)]
    if not files:
        raise DataError(f"no file matching {pattern}", file=directory)
    return files


@dataclass(frozen=True)
class FileGroup:
    """Files with equal columns.

    Attributes:
        format: format of the files.
        files: their paths.
        columns: columns by name; a name that occurs twice is missing.
        dialect: separators of CSV files.
        filename: name of the column of the row's path, which no file has.
    """

    format: FileFormat
    files: tuple[str, ...]
    columns: dict[str, Column]
    dialect: CsvDialect
    filename: str

    def rows(self, file: str | None = None) -> str:
        """Return the SQL of the raw rows of all files, or of one."""
        return self.format.reader_sql([file] if file else self.files, self.dialect, self.filename)


class RawFiles:
    """Files of a raw log.

    Args:
        files: paths of the files; at least one.
        required: for every value, the names of the columns that contain it; each file has at least one of them.
        dialect: separators of CSV files.
        partitions: names of ``name=value`` folders that are columns; other folder names do not matter.

    Raises:
        DataError: a file is empty or not readable, or lacks a column.
    """

    def __init__(
        self,
        files: Sequence[Path],
        required: Iterable[str | Sequence[str]],
        dialect: CsvDialect = STANDARD_DIALECT,
        partitions: Sequence[str] = (),
    ) -> None:
        self.files = [str(file) for file in files]
        alternatives = [(names,) if isinstance(names, str) else tuple(names) for names in required]
        formats: dict[FileFormat, list[str]] = {}
        for file in files:
            for name in partitions:
                _require_partition(file, name)
            formats.setdefault(read_format(file, dialect), []).append(str(file))
        names = {name.casefold() for kind in formats for name in kind.names}
        self.filename = next(name for length in count() if (name := "filename" + "_" * length) not in names)
        with duckdb.connect(":memory:") as connection:
            self.groups = [
                FileGroup(kind, tuple(members), _columns(connection, kind, members[0], dialect), dialect, self.filename)
                for kind, members in formats.items()
            ]
        for group in self.groups:
            for name in partitions:
                if name in group.columns:
                    reason = "is a column of the file and one of partition_columns"
                    raise DataError(reason, file=group.files[0], field=name)
                group.columns[name] = _partition_column(name, group)
        for group in self.groups:
            _require_columns(group, alternatives)

    def relation(self, connection: duckdb.DuckDBPyConnection, convert: Convert) -> str:
        """Check all rows and return the SQL of their canonical values.

        Raises:
            DataError: for the first invalid row of the first file with one, or a column of an unsuitable type.
        """
        values = [convert(group.columns) for group in self.groups]
        self._check(connection, [[check for value in columns.values() for check in value.checks] for columns in values])
        return " UNION ALL ".join(
            f"SELECT {', '.join(f'{value.sql} AS {quote_identifier(name)}' for name, value in columns.items())}"
            f" FROM {group.rows()}"
            for group, columns in zip(self.groups, values, strict=True)
        )

    def _check(self, connection: duckdb.DuckDBPyConnection, checks: list[list[Check]]) -> None:
        """Find files with violations in one query, then the row in the first of these files."""
        queries = [
            f"SELECT {quote_identifier(self.filename)} FROM {group.rows()}"
            f" WHERE {' OR '.join(f'coalesce({check.violation_sql}, false)' for check in group_checks)}"
            for group, group_checks in zip(self.groups, checks, strict=True)
            if group_checks
        ]
        if not queries:
            return
        with translate_errors(self.files[0]):
            invalid_files = connection.execute(f"SELECT DISTINCT * FROM ({' UNION ALL '.join(queries)})").fetchall()
        if invalid_files:
            file = min((file for (file,) in invalid_files), key=self.files.index)
            index = next(index for index, group in enumerate(self.groups) if file in group.files)
            raise _row_error(connection, self.groups[index], file, checks[index])


def check_unique(connection: duckdb.DuckDBPyConnection, relation: str, key: str, files: Sequence[str]) -> None:
    """Check that rows to join have different keys: impressions would multiply.

    Raises:
        DataError: for a key of several rows.
    """
    query = f"SELECT {key} FROM ({relation}) GROUP BY {key} HAVING count(*) > 1 ORDER BY {key} LIMIT 1"
    for (value,) in connection.execute(query).fetchall():
        raise DataError(f"{value!r} occurs in several rows", file=", ".join(files), field=key)


def _row_error(
    connection: duckdb.DuckDBPyConnection, group: FileGroup, file: str, checks: Sequence[Check]
) -> DataError:
    """Return the error of the first violation in a file: line of a CSV file, or row of a Parquet file."""
    violations = " ".join(f"WHEN {check.violation_sql} THEN {index}" for index, check in enumerate(checks))
    values = ", ".join(f"({check.value_sql})::VARCHAR" for check in checks)
    connection.execute("SET preserve_insertion_order = true")
    with translate_errors(file):
        number, violation, row_values = fetch_one(
            connection,
            f"""SELECT number, violation, texts FROM (
                SELECT row_number() OVER () AS number, CASE {violations} END AS violation,
                    [{values}] AS texts FROM {group.rows(file)})
            WHERE violation IS NOT NULL ORDER BY number LIMIT 1""",
        )
    connection.execute("SET preserve_insertion_order = false")
    check = checks[violation]
    if not group.format.is_parquet:
        # One more than the row: the first record is the header.
        number = line_of_record(file, group.dialect, number + 1, with_empty=False)
    return DataError(check.message(row_values[violation]), file=file, row=number, field=check.field)


def _columns(
    connection: duckdb.DuckDBPyConnection, kind: FileFormat, file: str, dialect: CsvDialect
) -> dict[str, Column]:
    """Return the columns of a file by name."""
    if kind.is_parquet:
        with translate_errors(file):
            described = connection.execute(f"DESCRIBE SELECT * FROM {kind.reader_sql([file], dialect)}").fetchall()
        # DuckDB renames columns that differ in case only; the order is that of the file.
        sql_types = [(quote_identifier(sql_name), sql_type) for sql_name, sql_type, *_ in described]
    else:
        sql_types = [(f"c{index}", "VARCHAR") for index in range(len(kind.names))]
    return {
        name: Column(name, sql, sql_type, file, is_utc_by_format=name in kind.int96)
        for name, (sql, sql_type) in zip(kind.names, sql_types, strict=True)
        if kind.names.count(name) == 1
    }


def _require_columns(group: FileGroup, required: Iterable[Sequence[str]]) -> None:
    names = group.format.names
    for alternatives in required:
        for name in alternatives:
            if names.count(name) > 1:
                raise DataError("names several columns", file=group.files[0], field=name)
        if not any(name in group.columns for name in alternatives):
            reason = f"column is missing; found {', '.join(names)}"
            raise DataError(reason, file=group.files[0], field=" or ".join(alternatives))


def _require_partition(file: Path, name: str) -> None:
    if not any(part.startswith(f"{name}=") for part in file.parent.parts):
        raise DataError(f"is not in a folder {name}=…, which partition_columns requires", file=file, field=name)


def _partition_column(name: str, group: FileGroup) -> Column:
    """Return the column of the folder ``name=value`` above a file, with Hive's encoding of values."""
    pattern = quote_literal(f"^(?:.*/)?{re.escape(name)}=([^/]*)/")
    value = f"regexp_extract({quote_identifier(group.filename)}, {pattern}, 1)"
    sql = f"url_decode(nullif(nullif({value}, '__HIVE_DEFAULT_PARTITION__'), ''))"
    return Column(name, sql, "VARCHAR", group.files[0])
