"""Which row of an exported table is which of the dataset's [ours].

A dataset numbers the values of a vocabulary by how often they occur, so that beside values in order their rows are as
good as random: two bytes and a half of each item, whatever the table is stored as. Rows of an export follow the values
instead, and cost nothing. Rows that are hashes or buckets of values stay: they follow from the values too.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from a2gen_rec.artifact.artifact import ENTITY_TABLES, has_vocabulary, vocabulary_file
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.parquet_reader import read_feature_column, read_table
from a2gen_rec.utils import paths


def export_permutation(dataset: Dataset) -> dict[str, np.ndarray]:
    """Vocabulary feature -> [rows] int64: of each row of its exported table, the dataset's row.

    Row 0 is unknown in both; then come the rows that a raw value has, in the values' order, then those without.

    Raises:
        DataError: a vocabulary, or ``users.parquet`` or ``items.parquet``, cannot be read or breaks its contract.
    """
    order = {}
    for feature in dataset.card.features:
        if feature.kind != "vocabulary":
            continue
        if has_vocabulary(feature):
            file, column = paths.join(dataset.path, vocabulary_file(feature)), "row"
            table = read_table(file, ["value", column]).sort_by("value")
        else:  # the identifier of a catalogue, which is in order
            file, column = paths.join(dataset.path, ENTITY_TABLES[feature.level]), feature.name
            table = read_table(file, [column])
        rows = np.concatenate([[0], read_feature_column(table[column], feature, file)])
        told, first = np.unique(rows, return_index=True)
        untold = np.setdiff1d(np.arange(feature.cardinality), told)
        order[feature.name] = np.concatenate([rows[np.sort(first)], untold]).astype(np.int64)
    return order


def renumber_rows(table: pa.Table, order: Mapping[str, np.ndarray], key: str) -> pa.Table:
    """A table of a dataset with the rows of exported tables, its lines by the column ``key`` of rows, 0 last.

    Args:
        order: column -> [rows] as :func:`row_order` gives it; other columns, perhaps ``key`` too, stay as they are.
    """
    for place, name in enumerate(table.column_names):
        if name in order:
            exported = np.empty_like(order[name])
            exported[order[name]] = np.arange(len(exported))
            table = table.set_column(place, name, pa.array(exported[table[name].to_numpy()]))
    rows = table[key].to_numpy()
    return table.take(np.lexsort([rows, rows == 0])) if key in order else table
