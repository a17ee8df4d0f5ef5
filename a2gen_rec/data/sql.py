"""DuckDB helpers for ``prepare``: a connection with a memory limit, quoting, one-line errors."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from a2gen_rec.data.csv_errors import to_data_error
from a2gen_rec.errors import UserError, first_line

IntArray = npt.NDArray[np.int64]

ROW_COLUMN = "row of "
"""Column prefix of a feature's table rows in impressions."""

# md5 because DuckDB's hash() may change between versions; the top bit is dropped to fit int64.
STABLE_HASH_SQL = "(md5_number_lower({0}) >> 1)::BIGINT"


NAN_OPTION = "can_have_nan = true"
"""Option of ``read_parquet``. Parquet's statistics ignore NaN: without the option, DuckDB 2.0.1 takes ``isnan`` of a
column with statistics and without NULL for false."""


def connect(memory_limit_gb: float, threads: int, spill: Path) -> duckdb.DuckDBPyConnection:
    """Open an in-memory database that spills to ``spill`` above ``memory_limit_gb``; 0 threads means all cores."""
    settings: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": f"{memory_limit_gb:.3f}GB",
        "temp_directory": str(spill),
        "preserve_insertion_order": False,
        "autoinstall_known_extensions": False,
        # No result may depend on the time zone of the machine.
        "TimeZone": "UTC",
    }
    if threads:
        settings["threads"] = threads
    connection = duckdb.connect(":memory:", config=settings)
    disable_progress_bar(connection)
    return connection


def disable_progress_bar(connection: duckdb.DuckDBPyConnection) -> None:
    """Disable the progress bar. Jupyter without ipywidgets has none, and DuckDB refuses the setting there."""
    if fetch_one(connection, "SELECT current_setting('enable_progress_bar')")[0]:
        connection.execute("SET enable_progress_bar = false")


def quote_identifier(name: str) -> str:
    """Quote a column or table name."""
    return '"' + name.replace('"', '""') + '"'


def quote_literal(value: object) -> str:
    """Quote a string."""
    return "'" + str(value).replace("'", "''") + "'"


def quote_path(file: object, pattern: str = "") -> str:
    """Quote a path, and a pattern of files below it.

    DuckDB 2.0.1 reads ``[``, ``*`` and ``?`` in a path as a pattern, even where a file has this name.
    """
    escaped = re.sub(r"([\[*?])", r"[\1]", str(file))
    return quote_literal(f"{escaped}/{pattern}" if pattern else escaped)


def read_parquet_sql(*files: object, pattern: str = "") -> str:
    """Return the SQL relation of Parquet files, or of the files that match ``pattern`` in a directory."""
    paths = ", ".join(quote_path(file, pattern) for file in files)
    return f"read_parquet([{paths}], hive_partitioning = false, {NAN_OPTION})"


def fetch_one(connection: duckdb.DuckDBPyConnection, query: str) -> tuple:
    """Return the only row of a query with exactly one row, such as an aggregate."""
    (row,) = connection.execute(query).fetchall()
    return row


def order_statistics(
    connection: duckdb.DuckDBPyConnection, relation: str, column: str, ranks: list[int], group_by: str = ""
) -> list[float]:
    """Return the column's known values at 1-based ``ranks``, sorted (first by ``group_by``), out of core."""
    known = f"{column} IS NOT NULL AND NOT isnan({column}::DOUBLE)"
    order = f"{group_by}, {column}" if group_by else column
    rows = connection.execute(
        f"SELECT rank, value FROM (SELECT {column} AS value, row_number() OVER (ORDER BY {order}) AS rank"
        f" FROM {relation} WHERE {known}) WHERE rank IN ({', '.join(map(str, sorted(set(ranks))))})"
    ).fetchall()
    values = dict(rows)
    return [values[rank] for rank in ranks]


def medians(connection: duckdb.DuckDBPyConnection, relation: str, column: str, group_by: str) -> dict[int, float]:
    """Return the median of a column without NULL and NaN per value of ``group_by``; sorts out of core."""
    counts = connection.execute(f"SELECT {group_by}, count(*) FROM {relation} GROUP BY ALL ORDER BY ALL").fetchall()
    before, middle = 0, []
    for _, count in counts:
        middle += [before + (count + 1) // 2, before + count // 2 + 1]
        before += count
    values = order_statistics(connection, relation, column, middle, group_by) if counts else []
    pairs = zip(values[::2], values[1::2], strict=True)
    return {key: float(low + high) / 2 for (key, _), (low, high) in zip(counts, pairs, strict=True)}


def write_sorted(connection: duckdb.DuckDBPyConnection, query: str, file: Path, rows: int = 100_000) -> int:
    """Stream a query with a total order to one Parquet file with ``rows`` rows per row group; return the row count.

    DuckDB's writer splits row groups by thread. This one writes equal bytes for equal results.
    """
    reader = connection.sql(query).to_arrow_reader(rows)
    count = 0
    file.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(file, reader.schema, compression="zstd") as writer:
        for batch in reader:
            writer.write_table(pa.Table.from_batches([batch]))
            count += batch.num_rows
    return count


@contextmanager
def translate_errors(file: object) -> Iterator[None]:
    """Translate DuckDB errors to one-line errors; ``file`` is the fallback if DuckDB reports no file.

    Raises:
        DataError: a file cannot be parsed or a value cannot be converted.
        UserError: out of memory or disk space.
    """
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise UserError(
            f"{file}: DuckDB is out of memory; increase memory_limit_gb or num_partitions ({first_line(error)})"
        ) from error
    except duckdb.Error as error:
        raise to_data_error(error, file) from error


def is_first_of_user(impressions: pa.Table) -> npt.NDArray[np.bool_]:
    """Return ``(impressions,)`` whether each is its user's first impression; the input is sorted by user."""
    user = impressions["user_id"]
    is_first = np.ones(len(user), bool)
    is_first[1:] = pc.not_equal(user[1:], user[:-1]).to_numpy()
    return is_first
