"""Vectors of items, such as embeddings of their content: frozen tables, looked up on the host for each batch.

A vector is stored once per item, in the order of ``items.parquet``. An item without a row in any vocabulary, which no
user has seen in training, has its vector all the same. An item without a vector has NaN.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.compute as pc

from a2gen_rec.data.inputs import Vector
from a2gen_rec.data.sql import quote_literal, read_parquet_sql
from a2gen_rec.errors import DataError
from a2gen_rec.utils import paths

VECTORS_DIR = "vectors"
BATCH_ROWS = 10_000
MAX_MAGNITUDE = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class VectorTable:
    """Vectors of one kind.

    Attributes:
        values: [items, width] float16, float32 or int8 codes.
        scale: [items] float16 scales of int8 codes, otherwise None.
    """

    values: np.ndarray
    scale: np.ndarray | None = None

    def lookup(self, items: np.ndarray) -> np.ndarray:
        """Return [items, width] float32 vectors of item indices; NaN for a negative index."""
        known = items >= 0
        found = np.full((len(items), self.values.shape[1]), np.nan, np.float32)
        found[known] = self.values[items[known]]
        if self.scale is not None:
            found[known] *= self.scale[items[known]].astype(np.float32)[:, None]
        return found


VectorTables = Mapping[str, VectorTable]


@dataclass(frozen=True)
class EarlierVectors:
    """Vectors of the dataset that an increment continues.

    Attributes:
        items_file: its ``items.parquet``.
        table: vectors in the order of this file.
        vector: their description.
    """

    items_file: Path
    table: VectorTable
    vector: Vector


def vectors_file(folder: str, vector: Vector) -> str:
    """Return the path of a vector's table within a dataset."""
    return paths.join(folder, VECTORS_DIR, f"{vector.name}.npy")


def open_vectors(folder: str, vectors: Sequence[Vector]) -> dict[str, VectorTable]:
    """Map the tables of a dataset into memory: processes of one machine share the pages that they read.

    Raises:
        DataError: a file is missing or damaged, or has another width.
    """
    tables = {}
    for vector in vectors:
        file = vectors_file(folder, vector)
        if not paths.exists(file):
            raise DataError("file not found", file=file)
        try:
            values = np.load(paths.to_local_path(file), mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise DataError(f"cannot be read ({str(error).splitlines()[0]})", file=file) from error
        if values.ndim != 2 or values.shape[1] != vector.width or values.dtype != np.float16:
            raise DataError(f"must contain float16 vectors of width {vector.width}", file=file)
        tables[vector.name] = VectorTable(values)
    return tables


def write_vectors(
    connection: duckdb.DuckDBPyConnection,
    relation: str,
    name: str,
    width: int,
    items_file: Path,
    folder: Path,
    earlier: EarlierVectors | None = None,
) -> Vector:
    """Write the vectors of all items to ``vectors/NAME.npy`` in a dataset's folder.

    Args:
        connection: DuckDB connection.
        relation: relation of ``item_id`` and ``vector``; each item once.
        name: name of the vector.
        width: number of elements.
        items_file: ``items.parquet`` of the dataset.
        folder: folder of the dataset.
        earlier: vectors of items that ``relation`` lacks; the root mean square is theirs. None for none.

    Raises:
        DataError: a vector has another width, or an element that is missing, not finite or too large.
    """
    file = Path(vectors_file(str(folder), Vector(name, width, 1.0)))
    file.parent.mkdir(exist_ok=True)
    (count,) = connection.sql(f"SELECT count(*) FROM {read_parquet_sql(items_file)}").fetchall()[0]
    table = np.lib.format.open_memmap(file, "w+", np.float16, (count, width))
    squares, elements, first = 0.0, 0, 0
    for part in _batches(connection, relation, name, width, items_file, earlier):
        table[first : first + len(part)] = part
        known = part[~np.isnan(part[:, 0])]
        squares, elements, first = squares + float(np.square(known).sum()), elements + known.size, first + len(part)
    table.flush()
    if earlier is not None:
        return earlier.vector
    rms = (squares / elements) ** 0.5 if elements else 1.0
    return Vector(name, width, rms or 1.0)


def _batches(
    connection: duckdb.DuckDBPyConnection,
    relation: str,
    name: str,
    width: int,
    items_file: Path,
    earlier: EarlierVectors | None,
) -> Iterator[np.ndarray]:
    """Yield [rows, width] float64 vectors in the order of the items; NaN without a vector."""
    items, known_items = (
        f"read_parquet([{quote_literal(file)}], file_row_number = true)"
        for file in (items_file, items_file if earlier is None else earlier.items_file)
    )
    query = f"""SELECT items.item, vectors.vector::DOUBLE[] AS vector, known.file_row_number AS earlier_row
        FROM {items} AS items LEFT JOIN ({relation}) AS vectors ON vectors.item_id = items.item
        LEFT JOIN {known_items} AS known ON known.item = items.item ORDER BY items.file_row_number"""
    for batch in connection.sql(query).to_arrow_reader(BATCH_ROWS):
        column = batch.column("vector")
        known = column.is_valid().to_numpy(zero_copy_only=False)
        lengths = np.diff(column.offsets.to_numpy())[known]
        values = column.flatten()
        numbers = values.to_numpy(zero_copy_only=False)
        if (lengths != width).any():
            index = np.flatnonzero(known)[np.flatnonzero(lengths != width)[0]]
            length = len(column[int(index)])
            raise _invalid(batch.column("item")[int(index)], name, f"has {length} elements, expected {width}")
        valid = values.is_valid().to_numpy(zero_copy_only=False) & (np.abs(numbers) <= MAX_MAGNITUDE)
        if not valid.all():
            index = np.flatnonzero(known)[np.flatnonzero(~valid)[0] // width]
            reason = f"has an element that is missing, not finite or above {MAX_MAGNITUDE:.0f}"
            raise _invalid(batch.column("item")[int(index)], name, reason)
        part = np.full((len(column), width), np.nan)
        if earlier is not None:
            part[:] = earlier.table.lookup(pc.fill_null(batch.column("earlier_row"), -1).to_numpy())
        part[known] = numbers.reshape(-1, width)
        yield part


def _invalid(item: object, name: str, reason: str) -> DataError:
    return DataError(f"vector of item {str(item)!r} {reason}", file="the log's vectors", field=name)
