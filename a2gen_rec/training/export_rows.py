"""Which row of an exported table is which of the dataset's [ours].

A dataset numbers the values of a vocabulary by how often they occur, so that beside names in order their rows are as
good as random: two bytes and a half of each item, whatever the table is stored as. Rows of an export's identifiers
follow their names instead, and cost nothing. Rows that are hashes of names stay: they follow from the names too.
"""

import numpy as np
import pyarrow as pa

from a2gen_rec import paths
from a2gen_rec.data.columns import feature_rows, read_table
from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.serving.artifact import CATALOGUES, IDENTIFIERS


def row_order(dataset: str, card: DatasetCard) -> dict[str, np.ndarray]:
    """Identifier that is a vocabulary -> [rows] int64: of each row of its exported table, the dataset's row.

    Row 0 is unknown in both; then come the rows that have a name, in the order of ``users.parquet`` or
    ``items.parquet``, then those without.

    Raises:
        DataError: one of these files cannot be read or breaks its contract.
    """
    order = {}
    for feature in card.features:
        if feature.kind == "vocabulary" and IDENTIFIERS.get(feature.level) == feature.name:
            file = paths.join(dataset, CATALOGUES[feature.level])
            rows = np.concatenate([[0], feature_rows(read_table(file, [feature.name])[feature.name], feature, file)])
            named, first = np.unique(rows, return_index=True)
            nameless = np.setdiff1d(np.arange(feature.cardinality), named)
            order[feature.name] = np.concatenate([rows[np.sort(first)], nameless]).astype(np.int64)
    return order


def reordered(catalogue: pa.Table, feature: str, order: np.ndarray) -> pa.Table:
    """A catalogue with the exported rows of its identifier: those in the table first, the others after them.

    Args:
        order: of the feature, as :func:`row_order` gives it.
    """
    exported = np.empty_like(order)
    exported[order] = np.arange(len(order))
    rows = exported[catalogue[feature].to_numpy()]
    place = catalogue.column_names.index(feature)
    return catalogue.set_column(place, feature, pa.array(rows)).take(np.argsort(rows == 0, kind="stable"))
