"""Table rows whose values are new to a model: admitted by increments after those that it was trained on [ours].

A model has no trained vector for such a row: the row had no value, or another one that has retired. To the model, these
values are unknown. It reads row 0 instead.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from iopath.common.file_io import g_pathmgr

from a2gen_rec.data.bags import Bags
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.schema import VOCABULARY_DIR
from a2gen_rec.errors import DataError, first_line
from a2gen_rec.utils import paths


@dataclass(frozen=True)
class NewRows:
    """Rows that a model does not know.

    Attributes:
        rows: vocabulary feature -> ``(rows,)`` int64, ascending; features without new rows may be absent.
        reused: vocabulary feature -> ``(rows,)`` whether a retired value had the row before.
    """

    rows: Mapping[str, np.ndarray] = field(default_factory=dict)
    reused: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def since(cls, data: str, card: DatasetCard, trained: DatasetCard) -> "NewRows":
        """Return the rows admitted to the dataset ``data`` after the dataset that a model was trained on.

        Args:
            data: dataset directory.
            card: its card.
            trained: card of the training data; that of an earlier increment, or one with the same encodings.

        Raises:
            DataError: a vocabulary is missing or invalid.
        """
        known, current = len(trained.identity.lineage), len(card.identity.lineage)
        if current <= known or not card.identity.continues(trained.identity):
            return cls()
        rows, reused = {}, {}
        for name in card.vocabularies:
            file = paths.join(data, VOCABULARY_DIR, f"{name}.parquet")
            try:
                with g_pathmgr.open(file, "rb") as stream:
                    columns, condition = ["row", "reused"], pc.field("admitted") >= known
                    table = pq.read_table(stream, columns=columns, filters=condition, use_threads=False)
                rows[name], reused[name] = (table[column].to_numpy() for column in columns)
            except (OSError, ValueError) as error:  # Arrow's errors are among them
                raise DataError(f"cannot be read ({first_line(error)})", file=file) from error
        return cls(rows, reused)

    def mask(self, feature: str, rows: np.ndarray) -> np.ndarray:
        """Return rows of a feature, with row 0 for new rows."""
        return np.where(self._is_new(feature, rows), 0, rows) if self.has(feature) else rows

    def mask_bags(self, feature: str, bags: Bags) -> Bags:
        """Return bags of a feature without new rows; a bag of new rows only is unknown."""
        return bags.without(self._is_new(feature, bags.ids)) if self.has(feature) else bags

    def has(self, feature: str) -> bool:
        """Return whether a feature has new rows."""
        return feature in self.rows and len(self.rows[feature]) > 0

    def _is_new(self, feature: str, rows: np.ndarray) -> np.ndarray:
        new = self.rows[feature]
        return new[np.minimum(np.searchsorted(new, rows), len(new) - 1)] == rows
