"""Raw identifiers to the table rows of what they name: dictionaries and arrays, so that a request costs no query."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from a2gen_rec.data.columns import CandidateItems
from a2gen_rec.data.parquet_reader import read_feature_column, read_table
from a2gen_rec.data.schema import RAW_DURATION_COLUMN, Feature
from a2gen_rec.errors import DataError


@dataclass(frozen=True)
class EntityIndex:
    """Users or items of a dataset, each by its place; the last place stands for all that are unknown.

    Attributes:
        place: raw identifier -> place.
        rows: feature -> [places] table rows, 0 at the last.
        length: [places] the videos' raw lengths, NaN where there are none; empty of users.
    """

    row_of: dict[str, int]
    rows: dict[str, np.ndarray]
    duration_s: np.ndarray

    @classmethod
    def read(cls, file: str, key: str, features: Sequence[Feature], of_length: str = "") -> "EntityIndex":
        """Read ``users.parquet`` or ``items.parquet``, whose raw identifiers are in the column ``key``.

        Args:
            of_length: the feature whose rows are buckets of the raw lengths, and follow from them where they are there.

        Raises:
            DataError: it cannot be read, or breaks its contract.
        """
        table = read_table(file)
        length = np.zeros(0)
        if RAW_DURATION_COLUMN in table.column_names:
            known = table[RAW_DURATION_COLUMN].cast(pa.float64()).to_numpy(zero_copy_only=False)
            length = np.append(known, np.nan)
        rows = {}
        for feature in features:
            if feature.name == of_length and len(length):
                rows[feature.name] = _buckets(length, feature)
            elif feature.name in table.column_names:
                rows[feature.name] = _rows(table[feature.name], feature, file)
            else:
                raise DataError("column is missing", file=file, field=feature.name)
        if key not in table.column_names:
            raise DataError("column is missing", file=file, field=key)
        names = table[key].to_pylist()
        return cls(dict(zip(names, range(len(names)), strict=True)), rows, length)

    def lookup(self, names: Sequence[str]) -> np.ndarray:
        """[names] int64 places, -1 (which is the last) of unknown ones."""
        find = self.row_of.get
        return np.array([find(name, -1) for name in names], np.int64)

    def items(self, names: Sequence[str]) -> CandidateItems:
        """Items to rank; row 0 of every feature for unknown ones."""
        places = self.lookup(names)
        return CandidateItems(list(names), places >= 0, self.rows_at(places))

    def rows_at(self, places: np.ndarray) -> dict[str, np.ndarray]:
        """Feature -> [places] int64 rows."""
        return {name: rows[places].astype(np.int64) for name, rows in self.rows.items()}


def _buckets(length: np.ndarray, feature: Feature) -> np.ndarray:
    """[places + 1] int32 rows of lengths that end with NaN, as ``data/vocabulary.py`` has them: 0 of NaN."""
    rows = 1 + np.searchsorted(feature.boundaries, length, side="right")
    return np.where(np.isnan(length), 0, rows).astype(np.int32)


def _rows(column: pa.ChunkedArray, feature: Feature, file: str) -> np.ndarray:
    """[places + 1] int32 rows and, last, 0."""
    values = read_feature_column(column, feature, file)
    return np.append(values, 0).astype(np.int32 if feature.cardinality < 2**31 else np.int64)
