"""From a source's relation to clean impressions on disk, spread over partitions by user.

Two passes, each bounded in memory: :func:`spread` writes every row of the source once, :func:`clean` drops one
partition's drop_reason rows and duplicates. A clean impression has the source's columns (``sources/base.py``) with
FLOAT times, ``user_key`` and no ``drop_reason``; with a rule by users' last impressions, ``split`` too.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import duckdb

from a2gen_rec.data.features.calendar import CALENDAR_FEATURES, calendar_feature
from a2gen_rec.data.prepare.splits import split_by_user_tail
from a2gen_rec.data.schema import (
    FEEDBACK,
    ITEM_ID,
    OBJECTIVES,
    PREVIOUS_FEEDBACK,
    RAW_DURATION_COLUMN,
    SESSION_GAP,
    SESSION_POSITION,
    WATCH_RATIO,
    WATCH_TIME,
    FeatureSpec,
)
from a2gen_rec.data.sources.base import SourceInfo, SplitRule
from a2gen_rec.data.sql import STABLE_HASH_SQL, fetch_one, quote_identifier, quote_literal, read_parquet_sql
from a2gen_rec.errors import DataError

IDENTIFIERS = ("user_id", ITEM_ID)
RESERVED = frozenset(
    (
        "user",
        "user_key",
        "ts_ms",
        "dwell_s",
        "action",
        "action_offset_s",
        "first_target",
        "split",
        "drop_reason",
        "impressions",
        SESSION_POSITION,
        SESSION_GAP,
        PREVIOUS_FEEDBACK,
        FEEDBACK,
        WATCH_RATIO,
        RAW_DURATION_COLUMN,
        *OBJECTIVES,
    )
)
RESERVED_OUTCOMES = ("start", "exit", "padding", WATCH_TIME, "watch", "ensemble")
"""Reserved among actions and labels: what else is predicted, or ranked by, under these names."""


@dataclass(frozen=True)
class StagedColumns:
    """Names of a relation's columns by role; ``calendar`` are the features this module computes from time."""

    features: tuple[FeatureSpec, ...]
    actions: tuple[str, ...]
    labels: tuple[str, ...]
    oracle: tuple[str, ...]
    calendar_features: tuple[str, ...]

    @classmethod
    def from_source(cls, info: SourceInfo) -> "StagedColumns":
        """Columns of a source, calendar features added.

        Raises:
            DataError: a name is taken twice or reserved, or there is no ``item_id`` feature.
        """
        own = [feature.name for feature in info.features]
        calendar = tuple(name for name in CALENDAR_FEATURES if info.has_calendar_time and name not in own)
        names = [*own, *calendar]
        events = [*info.actions, *info.labels]
        for name in names + events:
            if name in RESERVED or (name in events and name in RESERVED_OUTCOMES):
                raise DataError(f"the name {name!r} is reserved", field=name)
        for taken in (names, events):
            for name in taken:
                if taken.count(name) > 1:
                    raise DataError(f"the name {name!r} is taken twice", field=name)
        if ITEM_ID not in names:
            raise DataError(f"the source {info.name} declares no feature {ITEM_ID!r}", field=ITEM_ID)
        if len(info.actions) > 100:
            raise DataError(f"{len(info.actions)} actions are more than the format's 100", field="actions")
        features = (*info.features, *(FeatureSpec(name, "context") for name in calendar))
        return cls(features, info.actions, info.labels, info.oracle, calendar)

    @property
    def action_columns(self) -> list[str]:
        return [quote_identifier(f"at_{name}") for name in self.actions]

    @property
    def label_columns(self) -> list[str]:
        """Labels and true probabilities."""
        return [
            quote_identifier(name)
            for name in [f"label_{x}" for x in self.labels] + [f"oracle_{x}" for x in self.oracle]
        ]


def canonical_columns_sql(columns: StagedColumns, utc_offset_hours: float) -> list[str]:
    """SELECT list that makes clean impressions of a source's relation.

    A dwell shorter than a recorded action inside the impression is raised to that action's time [ours].
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
            select.append(f"{calendar_feature(feature.name, utc_offset_hours)} AS {name}")
        elif feature.name not in IDENTIFIERS:
            select.append(f"{name}::{'DOUBLE' if feature.kind == 'buckets' else 'VARCHAR'} AS {name}")
    return select


def partition_by_user(
    connection: duckdb.DuckDBPyConnection,
    relation: str,
    columns: StagedColumns,
    utc_offset_hours: float,
    num_partitions: int,
    folder: Path,
) -> tuple[int, dict[str, int]]:
    """Write a source's rows to ``folder``/partition=P; returns rows read and drop_reason rows by reason."""
    select = canonical_columns_sql(columns, utc_offset_hours)
    missing = " ".join(f"WHEN {name} IS NULL THEN 'no {name}'" for name in ("user_id", "item_id", "ts_ms"))
    select.append(f"CASE WHEN drop_reason IS NOT NULL THEN drop_reason {missing} END AS drop_reason")
    # DuckDB holds back so many rows per thread: the threshold bounds memory on machines of many cores.
    connection.execute("SET partitioned_write_flush_threshold = 131072")
    connection.execute(
        f"COPY (SELECT *, user_key % {num_partitions} AS partition FROM (SELECT {', '.join(select)} FROM ({relation})))"
        f" TO {quote_literal(folder)} (FORMAT parquet, PARTITION_BY (partition))"
    )
    if not folder.exists() or not any(folder.rglob("*.parquet")):
        return 0, {}
    written = read_parquet_sql(folder / "*" / "*.parquet")
    counts = connection.execute(f"SELECT drop_reason, count(*) FROM {written} GROUP BY ALL ORDER BY ALL").fetchall()
    return sum(count for _, count in counts), {reason: count for reason, count in counts if reason is not None}


def deduplicate(
    connection: duckdb.DuckDBPyConnection, folder: Path, columns: StagedColumns, rule: SplitRule, file: Path
) -> int:
    """Write one partition's good rows without duplicates to ``file``; returns the duplicates dropped.

    Of several rows of one user, item and time, the one of longest dwell and of most actions stays. The
    partition's folder is removed.
    """
    if not folder.exists():
        return 0
    good = f"(SELECT * EXCLUDE (drop_reason) FROM {read_parquet_sql(folder / '*.parquet')} WHERE drop_reason IS NULL)"
    features = [quote_identifier(feature.name) for feature in columns.features if feature.name not in IDENTIFIERS]
    preference = ["nullif(dwell_s, 'nan'::FLOAT)", *columns.action_columns, *columns.label_columns, *features]
    unique = f"""(
        SELECT * FROM {good} QUALIFY 1 = row_number() OVER (
            PARTITION BY user_id, ts_ms, item_id
            ORDER BY {", ".join(f"{name} DESC NULLS LAST" for name in preference)}))"""
    relation = split_by_user_tail(unique, rule) if rule.method == "last" else unique
    file.parent.mkdir(parents=True, exist_ok=True)
    (before,) = fetch_one(connection, f"SELECT count(*) FROM {good}")
    (after,) = fetch_one(connection, f"COPY (SELECT * FROM {relation}) TO {quote_literal(file)} (FORMAT parquet)")
    shutil.rmtree(folder)
    return before - after
