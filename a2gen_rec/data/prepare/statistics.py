"""Counts, rates and medians of the dataset card, and the item and user tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb

from a2gen_rec.data.features.encodings import FeatureEncoding, encode_relation
from a2gen_rec.data.features.numbers import NumberEncoding
from a2gen_rec.data.prepare.point_in_time import PointInTime, action_time_column
from a2gen_rec.data.prepare.quality import known_sql
from a2gen_rec.data.schema import EXIT, ITEM_ID, RAW_DURATION_COLUMN, SPLITS, STATISTICS_COLUMN, SplitSummary
from a2gen_rec.data.sql import ROW_COLUMN, fetch_one, order_statistics, quote_identifier, write_sorted

# Small enough for row groups of several list columns, large enough to compress well.
ROW_GROUP_SIZE = 100_000


@dataclass(frozen=True)
class SplitCounts:
    """Target counts of one split.

    Attributes:
        targets: number of targets.
        first_ms: start of the first target; None without targets.
        last_ms: start of the last target; None without targets.
        positives: targets per positive action, label and objective.
        num_known: targets per known action, label and objective.
    """

    targets: int
    first_ms: int | None
    last_ms: int | None
    positives: dict[str, int]
    num_known: dict[str, int]

    def to_summary(self, windows: int, feedback: dict[str, int]) -> SplitSummary:
        return SplitSummary(windows, self.targets, self.first_ms, self.last_ms, self.positives, feedback)

    def base_rates(self) -> dict[str, float]:
        """Return the share of positives among the targets with a known value, per action, label and objective."""
        return {
            name: positives / self.num_known[name] if self.num_known[name] else 0.0
            for name, positives in self.positives.items()
        }


def count_splits(
    connection: duckdb.DuckDBPyConnection, impressions: str, actions: Sequence[str], flags: Mapping[str, str]
) -> dict[str, SplitCounts]:
    """Count the targets of every split of the relation ``impressions``.

    Args:
        connection: DuckDB connection.
        impressions: relation whose column ``split`` is an index into ``SPLITS``.
        actions: actions to count.
        flags: label or objective -> SQL of its column.

    Returns:
        Split name -> counts.
    """
    select = ["count(*)", "min(ts_ms)", "max(ts_ms)", *(f"count({action_time_column(name)})" for name in actions)]
    select += [f"coalesce(sum({column}), 0)::BIGINT" for column in flags.values()]
    select += [f"count({column})" for column in flags.values()]
    rows = connection.execute(f"SELECT split, {', '.join(select)} FROM {impressions} GROUP BY split").fetchall()
    counts = {}
    for split, targets, first_ms, last_ms, *numbers in rows:
        occurred, numbers = numbers[: len(actions)], numbers[len(actions) :]
        positive, known = numbers[: len(flags)], numbers[len(flags) :]
        counts[SPLITS[split]] = SplitCounts(
            targets=targets,
            first_ms=first_ms,
            last_ms=last_ms,
            positives=dict(zip([*actions, *flags], [*occurred, *positive], strict=True)),
            num_known={**dict.fromkeys(actions, targets), **dict(zip(flags, known, strict=True))},
        )
    zeros = dict.fromkeys([*actions, *flags], 0)
    empty = SplitCounts(0, None, None, zeros, zeros)
    return {name: counts.get(name, empty) for name in SPLITS}


def median_times(connection: duckdb.DuckDBPyConnection, train: str, actions: Sequence[str]) -> dict[str, float]:
    """Return the median offset (s) of every action and ``exit`` with recorded times in the relation ``train``."""
    columns = {action: action_time_column(action) for action in [*actions, EXIT]}
    known = [f"count(*) FILTER (NOT isnan({column}))" for column in columns.values()]
    counts = fetch_one(connection, f"SELECT {', '.join(known)} FROM {train}")
    return {
        action: sum(order_statistics(connection, train, columns[action], [(count + 1) // 2, count // 2 + 1])) / 2
        for action, count in zip(columns, counts, strict=True)
        if count
    }


def write_entities(
    connection: duckdb.DuckDBPyConnection,
    impressions: str,
    encodings: Sequence[FeatureEncoding],
    level: str,
    file: Path,
    duration_feature: str = "",
    statistics: PointInTime | None = None,
    numbers: Sequence[NumberEncoding] = (),
    further: str = "",
) -> int:
    """Write one row per item or user with the latest known value of each feature and number; return the row count.

    If several impressions have the latest time, every feature takes its maximum, which makes the result unique.

    Args:
        connection: DuckDB connection.
        impressions: relation of impressions.
        encodings: encodings of all features.
        level: ``item`` or ``user``.
        file: Parquet file to write, sorted by raw identifier.
        duration_feature: feature of this level whose raw value is written as ``RAW_DURATION_COLUMN``; empty for none.
        statistics: statistics after the log, written as ``statistics``; None for none.
        numbers: encodings of all numbers.
        further: relation of identifiers to write even without impressions; empty for none.
    """
    key, name, extra = (ITEM_ID, "item", []) if level == "item" else ("user_id", "user", ["user_key"])
    level_encodings = [encoding for encoding in encodings if encoding.feature.level == level]
    latest = "".join(f", max({column}) AS {column}" for column in extra)
    level_numbers = [encoding for encoding in numbers if encoding.number.level == level]
    kinds = {x.feature.name: str(x.feature.kind) for x in level_encodings if x.feature.name != key}
    kinds |= {x.number.name: "number" for x in level_numbers}
    for feature, kind in kinds.items():
        column = quote_identifier(feature)
        last = f"max({{'ts_ms': ts_ms, 'value': {column}}}) FILTER ({known_sql(column, kind)})"
        latest += f", ({last}).value AS {column}"
    relation = f"SELECT {key}{latest} FROM {impressions} GROUP BY {key}"
    if further:
        unseen = f"SELECT DISTINCT {key} FROM ({further}) WHERE {key} IS NOT NULL"
        relation += f" UNION ALL BY NAME ({unseen} AND {key} NOT IN (SELECT {key} FROM {impressions}))"
    relation = f"({relation})"
    columns = [f"raw.{key} AS {quote_identifier(name)}", *(f"raw.{column}" for column in extra)]
    if duration_feature in (encoding.feature.name for encoding in level_encodings):
        columns.append(f"raw.{quote_identifier(duration_feature)} AS {RAW_DURATION_COLUMN}")
    joins = []
    if statistics is not None and statistics.encodings:
        joins = statistics.latest_joins()
        columns.append(f"[{', '.join(statistics.latest_values)}] AS {STATISTICS_COLUMN}")
    query = encode_relation(relation, level_encodings, columns, joins=joins, numbers=level_numbers)
    return write_sorted(connection, f"{query} ORDER BY raw.{key}", file, ROW_GROUP_SIZE)


def write_item_statistics(
    connection: duckdb.DuckDBPyConnection,
    train: str,
    item: FeatureEncoding,
    actions: Sequence[str],
    flags: Mapping[str, str],
    file: Path,
) -> None:
    """Write training targets and positives per row of the item table, including row 0 if it occurs."""
    counts = [f"count({action_time_column(name)}) AS {quote_identifier(name)}" for name in actions]
    counts += [f"coalesce(sum({column}), 0)::BIGINT AS {quote_identifier(name)}" for name, column in flags.items()]
    totals = "".join(f", {count}" for count in counts)
    per_item = f"(SELECT {ITEM_ID}, count(*) AS impressions{totals} FROM {train} GROUP BY {ITEM_ID})"
    names = ["impressions", *(quote_identifier(name) for name in [*actions, *flags])]
    rows = encode_relation(per_item, [item], [f"raw.{name}" for name in names], ROW_COLUMN)
    sums = ", ".join(f"sum({name})::BIGINT AS {name}" for name in names)
    query = f'SELECT "{ROW_COLUMN}{ITEM_ID}" AS {ITEM_ID}, {sums} FROM ({rows}) GROUP BY ALL ORDER BY {ITEM_ID}'
    write_sorted(connection, query, file, ROW_GROUP_SIZE)
