"""Files of a raw log and their headers."""

from collections.abc import Iterable
from pathlib import Path

import duckdb

from a2gen_rec.data.sql import quote_literal, translate_errors
from a2gen_rec.errors import DataError


def find_files(directory: Path, pattern: str) -> list[Path]:
    """Return the files of a directory that match ``pattern``, sorted.

    Raises:
        DataError: no file matches.
    """
    files = sorted(path for path in directory.glob(pattern) if path.is_file())
    if not files:
        raise DataError(f"no file matching {pattern}", file=directory)
    return files


def read_csv_sql(files: Iterable[Path], options: str = "all_varchar = true") -> str:
    """Return the SQL relation of CSV files with a header; columns are matched by name, and text by default."""
    file_list = ", ".join(quote_literal(file) for file in files)
    return f"read_csv([{file_list}], delim = ',', header = true, union_by_name = true, {options})"


def require_columns(file: Path, relation: str, required: Iterable[str]) -> list[str]:
    """Return the columns of a file.

    Raises:
        DataError: a required column is missing, or the header cannot be read.
    """
    with translate_errors(file), duckdb.connect(":memory:") as connection:
        columns = [row[0] for row in connection.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall()]
    for name in required:
        if name not in columns:
            raise DataError(f"column is missing; found {', '.join(columns)}", file=file, field=name)
    return columns
