"""Row permutation of exported tables [ours].

A dataset numbers the values of a vocabulary by frequency. Next to sorted values, these row numbers are nearly random
and cost 2.5 bytes per item in any encoding. In an export, table rows are sorted by raw value instead, so the row
numbers cost nothing. Rows of hashed or bucketed features are unchanged, because they are computed from the values.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from a2gen_rec.artifact.artifact import ENTITY_TABLES, has_vocabulary, vocabulary_file
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.parquet_reader import read_feature_column, read_table
from a2gen_rec.data.schema import Feature
from a2gen_rec.utils import paths


def export_permutation(dataset: Dataset) -> dict[str, np.ndarray]:
    """Return vocabulary feature -> [rows] int64, the dataset's row of each exported row.

    Row 0 is "unknown" in both. It is followed by rows with a raw value, sorted by value, then rows without.

    Raises:
        DataError: A vocabulary, ``users.parquet`` or ``items.parquet`` cannot be read or violates its contract.
    """
    permutation = {}
    for feature in dataset.card.features:
        if feature.kind != "vocabulary":
            continue
        if has_vocabulary(feature):
            file, column = paths.join(dataset.path, vocabulary_file(feature)), "row"
            table = without_new_rows(dataset, feature, read_table(file, ["value", column])).sort_by("value")
        else:  # identifier of an entity table, which is sorted
            file, column = paths.join(dataset.path, ENTITY_TABLES[feature.level]), feature.name
            table = read_table(file, [column])
        rows = np.concatenate([[0], read_feature_column(table[column], feature, file, dataset.new_rows)])
        used, first = np.unique(rows, return_index=True)
        unused = np.setdiff1d(np.arange(feature.cardinality), used)
        permutation[feature.name] = np.concatenate([rows[np.sort(first)], unused]).astype(np.int64)
    return permutation


def without_new_rows(dataset: Dataset, feature: Feature, vocabulary: pa.Table) -> pa.Table:
    """Return the values of a vocabulary that the model knows."""
    rows = vocabulary["row"].to_numpy()
    return vocabulary.filter(pa.array(dataset.new_rows.mask(feature.name, rows) == rows))


def renumber_rows(table: pa.Table, permutation: Mapping[str, np.ndarray], key: str) -> pa.Table:
    """Replace dataset rows by exported rows, and sort the table by column ``key`` with row 0 last.

    Args:
        table: Table of a dataset.
        permutation: Column -> [rows] from :func:`export_permutation`; other columns are unchanged.
        key: Column to sort by, if it is in ``permutation``.
    """
    for index, name in enumerate(table.column_names):
        if name in permutation:
            exported = np.empty_like(permutation[name])
            exported[permutation[name]] = np.arange(len(exported))
            column = table[name].combine_chunks()
            if pa.types.is_list(column.type):
                rows = pa.array(exported[column.flatten().to_numpy()])
                column = pa.ListArray.from_arrays(column.offsets, rows)
            else:
                column = pa.array(exported[column.to_numpy()])
            table = table.set_column(index, name, column)
    rows = table[key].to_numpy()
    return table.take(np.lexsort([rows, rows == 0])) if key in permutation else table
