"""Readers of the columns of a dataset's Parquet files: table rows, bags, numbers and statistics."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from iopath.common.file_io import g_pathmgr

from a2gen_rec.data.bag_sql import WEIGHTS_COLUMN
from a2gen_rec.data.bags import Bags
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.inputs import Number
from a2gen_rec.data.new_rows import NewRows
from a2gen_rec.data.schema import STATISTICS_COLUMN, Feature
from a2gen_rec.errors import DataError, first_line

NO_NEW_ROWS = NewRows()


def read_feature_column(
    column: pa.ChunkedArray, feature: Feature, file: str, new_rows: NewRows = NO_NEW_ROWS
) -> np.ndarray:
    """Return the table rows in a feature's column of ``users.parquet`` or ``items.parquet``; row 0 for new rows.

    Raises:
        DataError: a row is not an integer, missing, or outside the feature's table.
    """
    if not pa.types.is_integer(column.type):
        raise DataError(f"is {column.type}, expected an integer", file=file, field=feature.name)
    values: np.ndarray = new_rows.mask(feature.name, column.to_numpy())
    if column.null_count or ((values < 0) | (values >= feature.cardinality)).any():
        raise DataError(f"id is not in [0, {feature.cardinality})", file=file, field=feature.name)
    return values


def read_statistics(column: pa.ChunkedArray, num_statistics: int, file: str) -> np.ndarray:
    """Return [rows, statistics] float16 of the column ``statistics`` of ``items.parquet``.

    Raises:
        DataError: a row does not have ``num_statistics`` finite values.
    """
    column = column.combine_chunks()
    if not pa.types.is_list(column.type) or not pa.types.is_floating(column.type.value_type):
        raise DataError(f"is {column.type}, expected a list of numbers", file=file, field=STATISTICS_COLUMN)
    values = column.flatten().to_numpy(zero_copy_only=False).astype(np.float16)
    lengths = np.diff(column.offsets.to_numpy())
    if column.null_count or (lengths != num_statistics).any() or not np.isfinite(values).all():
        raise DataError(f"must contain {num_statistics} finite values", file=file, field=STATISTICS_COLUMN)
    return values.reshape(-1, num_statistics)


def read_bags(table: pa.Table, feature: Feature, file: str, new_rows: NewRows = NO_NEW_ROWS) -> Bags:
    """Return the bags of a multi-valued feature in ``users.parquet`` or ``items.parquet``, without new rows.

    Raises:
        DataError: a column is missing or no list of numbers, or a row or weight is out of range.
    """
    names = [feature.name, *([WEIGHTS_COLUMN + feature.name] if feature.weighted else [])]
    parts = []
    for name, is_type in zip(names, (pa.types.is_integer, pa.types.is_floating), strict=False):
        if name not in table.column_names:
            raise DataError("column is missing", file=file, field=name)
        column = table[name].combine_chunks()
        if not pa.types.is_list(column.type) or not is_type(column.type.value_type):
            raise DataError(f"is {column.type}, expected a list of numbers", file=file, field=name)
        parts.append((np.diff(column.offsets.to_numpy()).astype(np.int64), column.flatten().to_numpy()))
    (lengths, ids), (weight_lengths, weights) = parts[0], parts[-1]
    if not feature.weighted:
        weights = np.ones(len(ids), np.float32)
    is_valid = (lengths > 0).all() and len(ids) == len(weights) and (lengths == weight_lengths).all()
    if is_valid:
        bags = Bags(lengths, ids.astype(np.int64), weights.astype(np.float32))
        bags = new_rows.mask_bags(feature.name, bags)
        is_valid = ((bags.ids >= 0) & (bags.ids < feature.cardinality)).all() and (weights > 0).all()
    if not is_valid:
        reason = f"must contain ids in [0, {feature.cardinality}), and as many positive weights"
        raise DataError(reason, file=file, field=feature.name)
    return bags


def read_numbers(table: pa.Table, numbers: Sequence[Number], file: str) -> np.ndarray:
    """Return [rows, numbers] float32 of rows of ``users.parquet`` or ``items.parquet``.

    Raises:
        DataError: a column is missing, or a value is not a number, null or infinite.
    """
    values = np.zeros((len(table), len(numbers)), np.float32)
    for index, number in enumerate(numbers):
        if number.name not in table.column_names:
            raise DataError("column is missing", file=file, field=number.name)
        column = table[number.name]
        if not pa.types.is_floating(column.type):
            raise DataError(f"is {column.type}, expected a number", file=file, field=number.name)
        values[:, index] = column.to_numpy()
        if column.null_count or np.isinf(values[:, index]).any():
            raise DataError("value is null or infinite", file=file, field=number.name)
    return values


def read_table(file: str, columns: list[str] | None = None, filters: pc.Expression | None = None) -> pa.Table:
    """Read a small table of a dataset, or the given columns and the rows that match ``filters``.

    Raises:
        DataError: the file is missing, not Parquet, or lacks a column.
    """
    try:
        with g_pathmgr.open(file, "rb") as stream:
            return pq.read_table(stream, columns=columns, filters=filters, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DataError(f"cannot be read ({reason})", file=file) from error


def read_user_ids(dataset: Dataset, keys: np.ndarray) -> list[str]:
    """Return the raw identifiers of users by key; the key itself for unknown keys.

    Raises:
        DataError: ``users.parquet`` is missing or invalid.
    """
    query = pa.array(keys, pa.int64())
    table = read_table(dataset.users_file, ["user", "user_key"], pc.field("user_key").isin(query))
    name = dict(zip(table["user_key"].to_pylist(), table["user"].to_pylist(), strict=True))
    return [name.get(key, str(key)) for key in query.to_pylist()]
