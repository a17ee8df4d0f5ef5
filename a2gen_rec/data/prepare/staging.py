"""From a source's relation to clean impressions on disk, partitioned by user.

Two passes, each with bounded memory: :func:`partition_by_user` writes every row of the source once,
:func:`deduplicate` drops the unusable rows and duplicates of one partition. A clean impression has the source's columns
(``sources/base.py``) with FLOAT times, ``user_key`` and no ``drop_reason``. The split method ``last`` adds ``split``.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import duckdb

from a2gen_rec.data.bag_sql import VALUES_TYPE
from a2gen_rec.data.features.calendar import CALENDAR_FEATURES, calendar_feature
from a2gen_rec.data.names import IDENTIFIERS, check_names
from a2gen_rec.data.prepare.splits import split_by_user_tail
from a2gen_rec.data.schema import ITEM_ID, NUMERIC_KINDS, FeatureSpec
from a2gen_rec.data.sources.base import SourceInfo, SplitRule
from a2gen_rec.data.sql import STABLE_HASH_SQL, fetch_one, quote_identifier, quote_literal, read_parquet_sql
from a2gen_rec.data.time_zone import MIN_CALENDAR_MS, TimeZone
from a2gen_rec.errors import DataError

PARTITION = "user partition"
LATE, REPEATED, DUPLICATE = "late", "repeated", "duplicate"
"""Reasons of dropped rows: not after the end of the base; among these, in the base; equal user, item and time."""


@dataclass(frozen=True)
class StagedColumns:
    """Names of a relation's columns by role.

    Attributes:
        features: features, including calendar features.
        actions: actions without ``start`` and ``exit``.
        labels: impression labels.
        oracle: actions and labels with a true probability.
        calendar_features: features computed from time.
    """

    features: tuple[FeatureSpec, ...]
    actions: tuple[str, ...]
    labels: tuple[str, ...]
    oracle: tuple[str, ...]
    calendar_features: tuple[str, ...]

    @classmethod
    def from_source(cls, info: SourceInfo) -> "StagedColumns":
        """Return the columns of a source with calendar features.

        Raises:
            DataError: a name is malformed, duplicate or reserved (:mod:`a2gen_rec.data.names`), or the feature
                ``item_id`` is missing.
        """
        source_names = [feature.name for feature in info.features]
        calendar = tuple(name for name in CALENDAR_FEATURES if info.has_calendar_time and name not in source_names)
        names = [*source_names, *calendar, *(vector.name for vector in info.vectors)]
        check_names(names, [*info.actions, *info.labels])
        if ITEM_ID not in names:
            raise DataError(f"source {info.name} has no feature {ITEM_ID!r}", field=ITEM_ID)
        if len(info.actions) > 100:
            raise DataError(f"{len(info.actions)} actions; the maximum is 100", field="actions")
        features = (*info.features, *(FeatureSpec(name, "context") for name in calendar))
        return cls(features, info.actions, info.labels, info.oracle, calendar)

    @property
    def action_columns(self) -> list[str]:
        return [quote_identifier(f"at_{name}") for name in self.actions]

    @property
    def label_columns(self) -> list[str]:
        """Columns of labels and true probabilities."""
        return [
            quote_identifier(name)
            for name in [f"label_{x}" for x in self.labels] + [f"oracle_{x}" for x in self.oracle]
        ]


def raw_type(kind: str, multi_valued: bool) -> str:
    """Return the DuckDB type of raw values."""
    if multi_valued:
        return VALUES_TYPE
    return "DOUBLE" if kind in NUMERIC_KINDS else "VARCHAR"


def canonical_columns_sql(columns: StagedColumns, zone: TimeZone) -> list[str]:
    """Return the SELECT list from a source's relation to clean impressions.

    A watch time shorter than a recorded action time in the impression is raised to that action's time [ours].
    """
    recorded = [f"CASE WHEN NOT isnan({at}) THEN {at} END" for at in columns.action_columns]
    dwell = "coalesce(dwell_s, 'nan'::DOUBLE)"
    select = [
        "user_id::VARCHAR AS user_id",
        f"coalesce({STABLE_HASH_SQL.format('user_id::VARCHAR')}, 0) AS user_key",
        "item_id::VARCHAR AS item_id",
        "ts_ms::BIGINT AS ts_ms",
        f"(greatest({', '.join([dwell, *recorded])}))::FLOAT AS dwell_s",
        *[f"{name}::FLOAT AS {name}" for name in columns.action_columns + columns.label_columns],
    ]
    for feature in columns.features:
        name = quote_identifier(feature.name)
        if feature.name in columns.calendar_features:
            select.append(f"{calendar_feature(feature.name, zone)} AS {name}")
        elif feature.name not in IDENTIFIERS:
            select.append(f"{name}::{raw_type(feature.kind, feature.multi_valued)} AS {name}")
    return select


def partition_by_user(
    connection: duckdb.DuckDBPyConnection,
    relation: str,
    columns: StagedColumns,
    info: SourceInfo,
    num_partitions: int,
    directory: Path,
) -> tuple[int, dict[str, int]]:
    """Write a source's rows to ``directory`` by partition (:func:`partition_dir`).

    Returns:
        Number of rows read, and unusable rows by reason.

    Raises:
        DataError: a usable impression of a log with a calendar starts before the year 2000.
    """
    select = canonical_columns_sql(columns, info.time_zone)
    missing = " ".join(f"WHEN {name} IS NULL THEN 'no {name}'" for name in ("user_id", "item_id", "ts_ms"))
    select.append(f"CASE WHEN drop_reason IS NOT NULL THEN drop_reason {missing} END AS drop_reason")
    # DuckDB buffers up to this many rows per thread: the threshold bounds memory on machines with many cores.
    connection.execute("SET partitioned_write_flush_threshold = 131072")
    connection.execute(
        f'COPY (SELECT *, user_key % {num_partitions} AS "{PARTITION}"'
        f" FROM (SELECT {', '.join(select)} FROM ({relation})))"
        f' TO {quote_literal(directory)} (FORMAT parquet, PARTITION_BY ("{PARTITION}"))'
    )
    if not directory.exists() or not any(directory.rglob("*.parquet")):
        return 0, {}
    written = read_parquet_sql(directory, pattern="*/*.parquet")
    counts = connection.execute(
        f"SELECT drop_reason, count(*), min(ts_ms) FROM {written} GROUP BY ALL ORDER BY ALL"
    ).fetchall()
    for reason, _, first_ms in counts:
        if reason is None and info.has_calendar_time and first_ms < MIN_CALENDAR_MS:
            raise DataError(f"{first_ms} ms is before the year 2000", file=info.name, field="ts_ms")
    return sum(count for _, count, _ in counts), {reason: count for reason, count, _ in counts if reason is not None}


def partition_dir(directory: Path, number: int) -> Path:
    """Return the directory of a partition's rows; DuckDB percent-encodes the name of the column."""
    return directory / f"{PARTITION.replace(' ', '%20')}={number}"


def deduplicate(
    connection: duckdb.DuckDBPyConnection,
    directory: Path,
    columns: StagedColumns,
    rule: SplitRule,
    file: Path,
    after_ms: int | None = None,
    history: Path | None = None,
) -> dict[str, int]:
    """Write one partition's usable rows without duplicates to ``file``; return the dropped rows by reason.

    Of several rows with one user, item and time, the row with the longest watch time, then the most actions, is kept.
    The partition's directory is removed.

    Args:
        connection: DuckDB connection.
        directory: directory of the partition's rows.
        columns: roles of the columns.
        rule: rule of the splits.
        file: file to write.
        after_ms: start of the last impression of the base; earlier rows are late or repeated. None without a base.
        history: latest impressions of the base's users; None or missing for none.
    """
    if not directory.exists():
        return {}
    staged = read_parquet_sql(directory, pattern="*.parquet")
    usable = f"(SELECT * EXCLUDE (drop_reason) FROM {staged} WHERE drop_reason IS NULL)"
    features = [quote_identifier(feature.name) for feature in columns.features if feature.name not in IDENTIFIERS]
    preference = ["nullif(dwell_s, 'nan'::FLOAT)", *columns.action_columns, *columns.label_columns, *features]
    (before,) = fetch_one(connection, f"SELECT count(*) FROM {usable}")
    dropped = {}
    if after_ms is not None:
        past = f"{usable} WHERE ts_ms <= {after_ms}"
        (num_past,) = fetch_one(connection, f"SELECT count(*) FROM {past}")
        repeated = 0
        if num_past and history is not None and history.exists():
            known = f"SELECT user_id, item_id, ts_ms FROM {read_parquet_sql(history)}"
            query = f"SELECT count(*) FROM {past} AND (user_id, item_id, ts_ms) IN ({known})"
            (repeated,) = fetch_one(connection, query)
        dropped = {LATE: num_past - repeated, REPEATED: repeated}
        before -= num_past
        usable = f"(SELECT * FROM {usable} WHERE ts_ms > {after_ms})"
    unique = f"""(
        SELECT * FROM {usable} QUALIFY 1 = row_number() OVER (
            PARTITION BY user_id, ts_ms, item_id
            ORDER BY {", ".join(f"{name} DESC NULLS LAST" for name in preference)}))"""
    relation = split_by_user_tail(unique, rule) if rule.method == "last" else unique
    file.parent.mkdir(parents=True, exist_ok=True)
    (after,) = fetch_one(connection, f"COPY (SELECT * FROM {relation}) TO {quote_literal(file)} (FORMAT parquet)")
    shutil.rmtree(directory)
    if not after:
        file.unlink()
    return {**dropped, DUPLICATE: before - after}
