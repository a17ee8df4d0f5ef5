"""Finding the files of a raw log and reading their headers."""

from collections.abc import Iterable
from pathlib import Path

import duckdb

from a2gen_rec.data.sql import quote_literal, translate_errors
from a2gen_rec.errors import DataError


def find_files(folder: Path, pattern: str) -> list[Path]:
    """Files of a folder that match, sorted.

    Raises:
        DataError: there are none.
    """
    found = sorted(path for path in folder.glob(pattern) if path.is_file())
    if not found:
        raise DataError(f"no file {pattern} here", file=folder)
    return found


def read_csv_sql(files: Iterable[Path], options: str = "all_varchar = true") -> str:
    """SQL relation of comma-separated files with a header; columns are matched by name, text unless told."""
    listed = ", ".join(quote_literal(file) for file in files)
    return f"read_csv([{listed}], delim = ',', header = true, union_by_name = true, {options})"


def require_columns(file: Path, relation: str, required: Iterable[str]) -> list[str]:
    """Columns of a file.

    Raises:
        DataError: one that is needed is missing, or the header cannot be read.
    """
    with translate_errors(file), duckdb.connect(":memory:") as connection:
        columns = [row[0] for row in connection.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall()]
    for name in required:
        if name not in columns:
            raise DataError(f"missing column; there are {', '.join(columns)}", file=file, field=name)
    return columns
