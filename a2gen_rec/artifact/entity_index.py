"""In-memory index from raw identifiers to table rows: dictionaries and arrays, so that a request needs no query."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from a2gen_rec.data.bags import Bags
from a2gen_rec.data.columns import CandidateItems
from a2gen_rec.data.inputs import Number
from a2gen_rec.data.parquet_reader import read_bags, read_feature_column, read_numbers, read_statistics, read_table
from a2gen_rec.data.schema import RAW_DURATION_COLUMN, STATISTICS_COLUMN, Feature
from a2gen_rec.errors import DataError


@dataclass(frozen=True)
class EntityIndex:
    """Users or items of a dataset by index; the last index stands for all unknown ones.

    Attributes:
        index_of: Raw identifier -> index.
        rows: Feature -> [entities + 1] table rows; 0 at the last index.
        duration_s: [entities + 1] raw durations of videos in seconds, NaN if unknown; empty for users.
        statistics: [entities + 1, statistics] float16; 0 at the last index.
        numbers: [entities + 1, numbers] float32; NaN at the last index, or if missing.
        bags: Multi-valued feature -> [entities + 1] table rows; row 0 at the last index.
    """

    index_of: dict[str, int]
    rows: dict[str, np.ndarray]
    duration_s: np.ndarray
    statistics: np.ndarray
    numbers: np.ndarray
    bags: dict[str, Bags]

    @classmethod
    def read(
        cls,
        file: str,
        id_column: str,
        features: Sequence[Feature],
        duration_feature: str = "",
        num_statistics: int = 0,
        numbers: Sequence[Number] = (),
    ) -> "EntityIndex":
        """Read ``users.parquet`` or ``items.parquet``.

        Args:
            file: Path of the file.
            id_column: Column of the raw identifiers.
            features: Features to read.
            duration_feature: Feature whose rows are computed from the raw durations, if the file has them.
            num_statistics: Number of statistics per entity.
            numbers: Numbers to read.

        Raises:
            DataError: The file cannot be read or violates its format.
        """
        table = read_table(file)
        duration = np.zeros(0)
        if RAW_DURATION_COLUMN in table.column_names:
            known = table[RAW_DURATION_COLUMN].cast(pa.float64()).to_numpy(zero_copy_only=False)
            duration = np.append(known, np.nan)
        rows, bags = {}, {}
        for feature in features:
            if feature.multi_valued:
                bags[feature.name] = Bags.concat([read_bags(table, feature, file), Bags.unknown(1)])
            elif feature.name == duration_feature and len(duration):
                rows[feature.name] = _duration_buckets(duration, feature)
            elif feature.name in table.column_names:
                rows[feature.name] = _rows(table[feature.name], feature, file)
            else:
                raise DataError("column is missing", file=file, field=feature.name)
        if id_column not in table.column_names:
            raise DataError("column is missing", file=file, field=id_column)
        if num_statistics and STATISTICS_COLUMN not in table.column_names:
            raise DataError("column is missing", file=file, field=STATISTICS_COLUMN)
        statistics = np.zeros((len(table) + 1, num_statistics), np.float16)
        if num_statistics:
            statistics[:-1] = read_statistics(table[STATISTICS_COLUMN], num_statistics, file)
        values = np.full((len(table) + 1, len(numbers)), np.nan, np.float32)
        values[:-1] = read_numbers(table, numbers, file)
        ids = table[id_column].to_pylist()
        return cls(dict(zip(ids, range(len(ids)), strict=True)), rows, duration, statistics, values, bags)

    def lookup(self, ids: Sequence[str]) -> np.ndarray:
        """Return [ids] int64 indices; -1, the last index, for unknown ones."""
        get = self.index_of.get
        return np.array([get(raw_id, -1) for raw_id in ids], np.int64)

    def items(self, ids: Sequence[str]) -> CandidateItems:
        """Return candidate items; unknown ones have row 0 of every feature and no number."""
        indices = self.lookup(ids)
        rows, statistics, numbers = self.rows_at(indices), self.statistics[indices], self.numbers[indices]
        return CandidateItems(list(ids), indices >= 0, rows, statistics, numbers, self.bags_at(indices), indices)

    def bags_at(self, indices: np.ndarray) -> dict[str, Bags]:
        """Return multi-valued feature -> [indices] table rows."""
        return {name: bags[indices] for name, bags in self.bags.items()}

    def rows_at(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return feature -> [indices] int64 rows."""
        return {name: rows[indices].astype(np.int64) for name, rows in self.rows.items()}


def _duration_buckets(duration: np.ndarray, feature: Feature) -> np.ndarray:
    """Return [entities + 1] int32 rows of durations, as ``prepare`` computes them; 0 for NaN."""
    rows = 1 + np.searchsorted(feature.boundaries, duration, side="right")
    return np.where(np.isnan(duration), 0, rows).astype(np.int32)


def _rows(column: pa.ChunkedArray, feature: Feature, file: str) -> np.ndarray:
    """Return [entities + 1] int32 rows with 0 at the end; int64 for tables of 2^31 rows or more."""
    values = read_feature_column(column, feature, file)
    return np.append(values, 0).astype(np.int32 if feature.cardinality < 2**31 else np.int64)
