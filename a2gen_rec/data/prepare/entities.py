"""Tables of items and users: latest known raw values, which increments carry on, and their encoded form."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb

from a2gen_rec.data.features.encodings import FeatureEncoding, encode_relation
from a2gen_rec.data.features.numbers import NumberEncoding
from a2gen_rec.data.prepare.point_in_time import PointInTime, action_time_column
from a2gen_rec.data.prepare.quality import known_sql
from a2gen_rec.data.schema import ITEM_ID, RAW_DURATION_COLUMN, STATISTICS_COLUMN, FeatureSpec
from a2gen_rec.data.sql import ROW_COLUMN, quote_identifier, read_parquet_sql, write_sorted

# Small enough for row groups of several list columns, large enough to compress well.
ROW_GROUP_SIZE = 100_000
LAST_MS, IMPRESSIONS = "last_ms", "impressions"
COUNT_COLUMN = "count of "
"""Prefix of the columns of positives per action, label and objective."""


@dataclass(frozen=True)
class EntityTable:
    """Raw values of all items, or of all users.

    A file has one row per entity: identifier; ``user_key`` of a user; ``last_ms``; per feature the latest known value,
    a struct of ``ts_ms`` and ``value``; per item ``impressions`` and ``COUNT_COLUMN`` columns, of all splits.

    Attributes:
        level: ``item`` or ``user``.
        features: features of the level, and numbers, without the identifier.
        positives: action, label or objective -> SQL of the number of positives; empty for users.
    """

    level: str
    features: Sequence[FeatureSpec]
    positives: Mapping[str, str]

    @classmethod
    def from_features(
        cls, level: str, features: Sequence[FeatureSpec], actions: Sequence[str], flags: Mapping[str, str]
    ) -> "EntityTable":
        """Return the table of a level; other arguments as in :func:`statistics.count_splits`."""
        positives = {name: f"count({action_time_column(name)})" for name in actions}
        positives |= {name: f"coalesce(sum({column}), 0)::BIGINT" for name, column in flags.items()}
        identifier = _identifier(level)
        own = [feature for feature in features if feature.level == level and feature.name != identifier]
        return cls(level, own, positives if level == "item" else {})

    @property
    def identifier(self) -> str:
        return _identifier(self.level)

    def write(
        self,
        connection: duckdb.DuckDBPyConnection,
        impressions: str,
        file: Path,
        earlier: Path | None = None,
        further: str = "",
        retire_before_ms: int | None = None,
    ) -> None:
        """Write the file after a relation of impressions.

        If several impressions have the latest time, every feature takes its maximum, which makes the result unique.

        Args:
            connection: DuckDB connection.
            impressions: relation of impressions.
            file: file to write, sorted by identifier.
            earlier: file of the base; None for none.
            further: relation of identifiers to write even without impressions; empty for none.
            retire_before_ms: entities without an impression since then are left out; None for never.
        """
        key = self.identifier
        columns = ["max(user_key) AS user_key"] if self.level == "user" else []
        columns.append(f"max(ts_ms) AS {LAST_MS}")
        for feature in self.features:
            column = quote_identifier(feature.name)
            known = f"FILTER ({known_sql(column, feature.kind)})"
            columns.append(f"max({{'ts_ms': ts_ms, 'value': {column}}}) {known} AS {column}")
        columns += [f"{sql} AS {quote_identifier(name)}" for name, sql in self._counts.items()]
        query = f"SELECT {key}, {', '.join(columns)} FROM {impressions} GROUP BY {key}"
        if earlier is not None:
            merged = ["max(user_key) AS user_key"] if self.level == "user" else []
            latest = [LAST_MS, *(feature.name for feature in self.features)]
            merged += [f"max({quote_identifier(name)}) AS {quote_identifier(name)}" for name in latest]
            merged += [f"sum({quote_identifier(x)})::BIGINT AS {quote_identifier(x)}" for x in self._counts]
            both = f"({query} UNION ALL BY NAME SELECT * FROM {read_parquet_sql(earlier)})"
            query = f"SELECT {key}, {', '.join(merged)} FROM {both} GROUP BY {key}"
        seen = f"({query})"
        if retire_before_ms is not None:
            query = f"SELECT * FROM {seen} WHERE {LAST_MS} >= {retire_before_ms}"
            if further:
                query += f" OR {key} IN (SELECT {key} FROM ({further}))"
        if further:
            zeros = "".join(f", 0::BIGINT AS {quote_identifier(name)}" for name in self._counts)
            unseen = f"SELECT DISTINCT {key}{zeros} FROM ({further}) WHERE {key} IS NOT NULL"
            query += f" UNION ALL BY NAME ({unseen} AND {key} NOT IN (SELECT {key} FROM {seen}))"
        write_sorted(connection, f"SELECT * FROM ({query}) ORDER BY {key}", file, ROW_GROUP_SIZE)

    @property
    def _counts(self) -> dict[str, str]:
        counts = {f"{COUNT_COLUMN}{name}": sql for name, sql in self.positives.items()}
        return {IMPRESSIONS: "count(*)", **counts} if self.level == "item" else {}

    def write_encoded(
        self,
        connection: duckdb.DuckDBPyConnection,
        raw_file: Path,
        encodings: Sequence[FeatureEncoding],
        numbers: Sequence[NumberEncoding],
        file: Path,
        duration_feature: str = "",
        statistics: PointInTime | None = None,
    ) -> int:
        """Write rows and numbers of the latest values, sorted by identifier; return the row count.

        Args:
            connection: DuckDB connection.
            raw_file: file of :meth:`write`.
            encodings: encodings of all features.
            numbers: encodings of all numbers.
            file: file to write.
            duration_feature: feature of this level whose raw value is written as ``RAW_DURATION_COLUMN``; empty for
                none.
            statistics: statistics after the log, written as ``statistics``; None for none.
        """
        key = self.identifier
        level_encodings = [encoding for encoding in encodings if encoding.feature.level == self.level]
        level_numbers = [encoding for encoding in numbers if encoding.number.level == self.level]
        extra = ["user_key"] if self.level == "user" else []
        names = [quote_identifier(feature.name) for feature in self.features]
        values = ", ".join([key, *extra, *(f"{name}.value AS {name}" for name in names)])
        columns = [f"raw.{key} AS {quote_identifier(self.level)}", *(f"raw.{column}" for column in extra)]
        if duration_feature in (encoding.feature.name for encoding in level_encodings):
            columns.append(f"raw.{quote_identifier(duration_feature)} AS {RAW_DURATION_COLUMN}")
        joins = []
        if statistics is not None and statistics.encodings:
            joins = statistics.latest_joins()
            columns.append(f"[{', '.join(statistics.latest_values)}] AS {STATISTICS_COLUMN}")
        relation = f"(SELECT {values} FROM {read_parquet_sql(raw_file)})"
        query = encode_relation(relation, level_encodings, columns, joins=joins, numbers=level_numbers)
        return write_sorted(connection, f"{query} ORDER BY raw.{key}", file, ROW_GROUP_SIZE)


def _identifier(level: str) -> str:
    return ITEM_ID if level == "item" else "user_id"


def write_item_statistics(
    connection: duckdb.DuckDBPyConnection, counts: str, item: FeatureEncoding, positives: Sequence[str], file: Path
) -> None:
    """Write impressions and positives per row of the item table, including row 0 if it occurs.

    Args:
        connection: DuckDB connection.
        counts: relation of ``item_id``, ``impressions`` and columns named as ``positives``.
        item: encoding of items.
        positives: actions, labels and objectives.
        file: file to write.
    """
    names = [IMPRESSIONS, *(quote_identifier(name) for name in positives)]
    rows = encode_relation(counts, [item], [f"raw.{name}" for name in names], ROW_COLUMN)
    sums = ", ".join(f"sum({name})::BIGINT AS {name}" for name in names)
    query = f'SELECT "{ROW_COLUMN}{ITEM_ID}" AS {ITEM_ID}, {sums} FROM ({rows}) GROUP BY ALL ORDER BY {ITEM_ID}'
    write_sorted(connection, query, file, ROW_GROUP_SIZE)


def training_counts_sql(train: str, positives: Mapping[str, str]) -> str:
    """Return the relation of the counts of training impressions per item."""
    totals = "".join(f", {sql} AS {quote_identifier(name)}" for name, sql in positives.items())
    return f"(SELECT {ITEM_ID}, count(*) AS {IMPRESSIONS}{totals} FROM {train} GROUP BY {ITEM_ID})"


def earlier_counts_sql(file: Path, positives: Mapping[str, str]) -> str:
    """Return the relation of the counts in a file of items."""
    totals = "".join(f", {quote_identifier(COUNT_COLUMN + x)} AS {quote_identifier(x)}" for x in positives)
    return f"(SELECT {ITEM_ID}, {IMPRESSIONS}{totals} FROM {read_parquet_sql(file)} WHERE {IMPRESSIONS} > 0)"
