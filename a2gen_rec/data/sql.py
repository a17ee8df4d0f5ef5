"""DuckDB for ``prepare``: a bounded connection, quoting, and its errors in one line."""

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

from a2gen_rec.errors import DataError, UserError

IntArray = npt.NDArray[np.int64]

ROW_COLUMN = "row_"
"""Prefix of the columns of impressions that hold a feature's table rows."""

# md5 and not DuckDB's own hash(), which may change between versions; the top bit is dropped to fit int64.
STABLE_HASH_SQL = "(md5_number_lower({0}) >> 1)::BIGINT"


def connect(memory_limit_gb: float, threads: int, spill: Path) -> duckdb.DuckDBPyConnection:
    """A private in-memory database that spills to ``spill`` beyond ``memory_gb``; 0 threads takes all cores."""
    settings: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": f"{memory_limit_gb:.3f}GB",
        "temp_directory": str(spill),
        "preserve_insertion_order": False,
        "autoinstall_known_extensions": False,
    }
    if threads:
        settings["threads"] = threads
    connection = duckdb.connect(":memory:", config=settings)
    connection.execute("SET enable_progress_bar = false")
    return connection


def quote_identifier(name: str) -> str:
    """A column or table name as SQL, whatever characters it has."""
    return '"' + name.replace('"', '""') + '"'


def quote_literal(value: object) -> str:
    """A string as SQL."""
    return "'" + str(value).replace("'", "''") + "'"


def read_parquet_sql(*files: object) -> str:
    """SQL relation of Parquet files or globs."""
    return f"read_parquet([{', '.join(quote_literal(file) for file in files)}], hive_partitioning = false)"


def fetch_one(connection: duckdb.DuckDBPyConnection, query: str) -> tuple:
    """The only row of a query that always has one, such as an aggregate."""
    (row,) = connection.execute(query).fetchall()
    return row


def order_statistics(
    connection: duckdb.DuckDBPyConnection, relation: str, column: str, ranks: list[int], group_by: str = ""
) -> list[float]:
    """Values at 1-based ``places`` of the column's known values, sorted (first ``by`` another column); out of core."""
    known = f"{column} IS NOT NULL AND NOT isnan({column}::DOUBLE)"
    order = f"{group_by}, {column}" if group_by else column
    rows = connection.execute(
        f"SELECT place, value FROM (SELECT {column} AS value, row_number() OVER (ORDER BY {order}) AS place"
        f" FROM {relation} WHERE {known}) WHERE place IN ({', '.join(map(str, sorted(set(ranks))))})"
    ).fetchall()
    found = dict(rows)
    return [found[place] for place in ranks]


def medians(connection: duckdb.DuckDBPyConnection, relation: str, column: str, group_by: str) -> dict[int, float]:
    """Median of a column without NULL and NaN for every value of the column ``by``; sorts out of core."""
    counts = connection.execute(f"SELECT {group_by}, count(*) FROM {relation} GROUP BY ALL ORDER BY ALL").fetchall()
    before, middle = 0, []
    for _, count in counts:
        middle += [before + (count + 1) // 2, before + count // 2 + 1]
        before += count
    values = order_statistics(connection, relation, column, middle, group_by) if counts else []
    pairs = zip(values[::2], values[1::2], strict=True)
    return {key: float(low + high) / 2 for (key, _), (low, high) in zip(counts, pairs, strict=True)}


def write_sorted(connection: duckdb.DuckDBPyConnection, query: str, file: Path, rows: int = 100_000) -> int:
    """Stream a query with a total order into one Parquet file, in row groups of ``rows``; returns the row count.

    DuckDB's own writer cuts row groups by thread; this one gives equal bytes for equal results.
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
    """Turn DuckDB's errors on data into one-line errors of ours; ``file`` where DuckDB names none.

    Raises:
        DataError: a file cannot be parsed or a value cannot be converted.
        UserError: memory or disk ran out.
    """
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise UserError(
            f"{file}: DuckDB ran out of its memory; raise memory_gb or partitions ({first_line(error)})"
        ) from error
    except duckdb.Error as error:
        raise to_data_error(error, file) from error


def first_line(error: Exception) -> str:
    """The first line of DuckDB's message, without the kind of error it begins with."""
    return re.sub(r"^[A-Z][\w ]* Error: ", "", str(error).strip().splitlines()[0])


def to_data_error(error: duckdb.Error, file: object) -> DataError:
    """Name file, line and column as far as DuckDB's message tells them."""
    text = str(error)
    line = re.search(r"CSV Error on Line: (\d+)", text)
    if line is None:
        return DataError(first_line(error), file=file)
    named = re.search(r"^\s*file\s*=\s*(.+)$", text, re.MULTILINE)
    column = re.search(r'converting column "([^"]+)"', text)
    reason = re.search(r"(Could not convert .+?|Expected Number of Columns.+?)\.?$", text, re.MULTILINE)
    return DataError(
        reason[1] if reason else text.splitlines()[min(3, len(text.splitlines()) - 1)],
        file=named[1].strip() if named else file,
        row=int(line[1]),
        field=column[1] if column else None,
    )


def is_first_of_user(impressions: pa.Table) -> npt.NDArray[np.bool_]:
    """``(impressions,)`` whether a user's first impression, of impressions in order of user."""
    user = impressions["user_id"]
    new_user = np.ones(len(user), bool)
    new_user[1:] = pc.not_equal(user[1:], user[:-1]).to_numpy()
    return new_user
