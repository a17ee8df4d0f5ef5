"""Statistics of item feature values, computed point in time in SQL [ours].

A statistic summarizes all users' impressions that share a value of one item feature: the video itself, its author, its
topic. The value at a target depends only on impressions of earlier *periods*, never on the target's own:

* a log with a calendar has one period per local day, and a target reads all impressions before the start of its day;
* a log without a calendar has one period per fold of users. A training target reads the training impressions of the
  other folds, every other target those of all folds.

An increment starts from the sums of its lineage. Without a calendar, it is one period: its targets read the impressions
of all earlier datasets.

The sums are integers, so the result does not depend on the order of rows or threads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from a2gen_rec.data.features.encodings import FeatureEncoding
from a2gen_rec.data.schema import EXIT, STATISTICS_COLUMN, WATCH_TIME, Statistic, StatisticKind
from a2gen_rec.data.sql import fetch_one, quote_identifier, quote_literal, quote_path, read_parquet_sql, write_sorted
from a2gen_rec.data.time_zone import TimeZone

PRIOR_WEIGHT = 5.0
"""Weight of the training mean in every rate and mean, in impressions."""
NUM_FOLDS = 5
"""Number of folds of users in a log without a calendar."""
PERIOD, POSITION = "statistics period", "position of statistics "
DAY_MS = 86_400_000
TIME_UNIT = 10_000
"""Inverse resolution of log1p seconds in the integer sums."""


@dataclass(frozen=True)
class Outcome:
    """An outcome of impressions that statistics summarize.

    Attributes:
        name: action, label, objective or ``watch_time``; ``time_`` + action for the time of an action.
        kind: ``rate`` of a binary outcome, or ``mean`` of log1p seconds.
        sum_sql: aggregate of the outcome, an integer.
        count_sql: aggregate that counts the impressions with a known outcome.
        prior: training mean: share of positives, or log1p seconds.
    """

    name: str
    kind: StatisticKind
    sum_sql: str
    count_sql: str
    prior: float


def action_time_column(action: str) -> str:
    return "dwell_s" if action == EXIT else quote_identifier(f"at_{action}")


def period_sql(has_calendar_time: bool, zone: TimeZone, is_increment: bool = False) -> str:
    """Return the SQL of an impression's period."""
    if has_calendar_time:
        return f"({zone.local_ms_sql('ts_ms')} // {DAY_MS})"
    if is_increment:
        return "0"
    return f"(CASE WHEN split = 0 THEN user_key % {NUM_FOLDS} ELSE {NUM_FOLDS} END)"


def fit_outcomes(
    connection: duckdb.DuckDBPyConnection,
    train: str,
    actions: Sequence[str],
    flags: Mapping[str, str],
    timed_actions: Sequence[str],
) -> list[Outcome]:
    """Return the outcomes with a known, non-zero training mean.

    Args:
        connection: DuckDB connection.
        train: relation of training impressions.
        actions: actions without ``start`` and ``exit``.
        flags: label or objective -> its column.
        timed_actions: actions with recorded times, including ``exit``.
    """
    candidates = _candidates(actions, flags, timed_actions)
    if not candidates:
        return []
    sums = fetch_one(connection, f"SELECT {', '.join(f'{x.sum_sql}, {x.count_sql}' for x in candidates)} FROM {train}")
    outcomes = []
    for outcome, total, count in zip(candidates, sums[::2], sums[1::2], strict=True):
        if total and count:
            unit = TIME_UNIT if outcome.kind == "mean" else 1
            outcomes.append(replace(outcome, prior=total / unit / count))
    return outcomes


def fitted_outcomes(
    statistics: Sequence[Statistic], actions: Sequence[str], flags: Mapping[str, str], timed_actions: Sequence[str]
) -> list[Outcome]:
    """Return the outcomes of the statistics of a dataset card; other arguments as in :func:`fit_outcomes`."""
    priors = {(x.outcome, x.kind): x.prior for x in statistics}
    candidates = _candidates(actions, flags, timed_actions)
    return [replace(x, prior=priors[x.name, x.kind]) for x in candidates if (x.name, x.kind) in priors]


def _candidates(actions: Sequence[str], flags: Mapping[str, str], timed_actions: Sequence[str]) -> list[Outcome]:
    """Return all possible outcomes, with the prior 0."""
    candidates = [
        Outcome(action, "rate", f"count({action_time_column(action)})", "count(*)", 0.0) for action in actions
    ]
    candidates += [
        Outcome(name, "rate", f"coalesce(sum({column}), 0)::BIGINT", f"count({column})", 0.0)
        for name, column in flags.items()
    ]
    for action in timed_actions:
        time = action_time_column(action)
        known = f"{time} IS NOT NULL AND NOT isnan({time})"
        name = WATCH_TIME if action == EXIT else f"time_{action}"
        total = f"sum(CASE WHEN {known} THEN round({TIME_UNIT} * ln(1 + {time}::DOUBLE)) ELSE 0 END)::BIGINT"
        candidates.append(Outcome(name, "mean", total, f"count(*) FILTER ({known})", 0.0))
    return candidates


@dataclass(frozen=True)
class CarriedSums:
    """Sums that an increment continues, and those for the next increment.

    Attributes:
        earlier: feature -> file of the sums of all earlier datasets; empty in the first dataset.
        files: feature -> file to write; empty for none.
        retire_before: values last seen before this period are forgotten; None for never.
    """

    earlier: Mapping[str, Path] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    retire_before: int | None = None


class PointInTime:
    """Statistics of one log, by feature value and period.

    One scan sums the impressions by the values of all features and by period. Every feature's statistics are then
    sums of these sums, in one Parquet table per feature. Windows read them by position from a memory-mapped matrix, so
    that no query joins or sorts their values.

    Args:
        connection: DuckDB connection.
        impressions: relation of all impressions with the column ``split``.
        encodings: encodings of the item features; empty for no statistics.
        outcomes: outcomes to summarize.
        period: SQL of the period.
        has_calendar_time: whether periods are days.
        directory: directory of temporary files.
        carried: sums of earlier datasets, and for later ones.
    """

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        impressions: str,
        encodings: Sequence[FeatureEncoding],
        outcomes: Sequence[Outcome],
        period: str,
        has_calendar_time: bool,
        directory: Path,
        carried: CarriedSums | None = None,
    ) -> None:
        self.encodings, self.outcomes, self.directory = encodings, outcomes, directory
        self.has_calendar_time, self.carried = has_calendar_time, carried or CarriedSums()
        aggregates = dict.fromkeys(["count(*)", *(sql for x in outcomes for sql in (x.sum_sql, x.count_sql))])
        self._sums = {aggregate: f"sum{number}" for number, aggregate in enumerate(aggregates)}
        if not encodings:
            return
        directory.mkdir()
        totals = directory / "totals.parquet"
        connection.execute(self._totals_query(impressions, period, totals))
        for number in range(len(encodings)):
            self._write_statistics(connection, totals, number)
        totals.unlink()

    @property
    def statistics(self) -> list[Statistic]:
        """The statistics in the order of their columns."""
        return [
            statistic
            for encoding in self.encodings
            for statistic in (
                Statistic(encoding.feature.name, "impressions", "count", 0.0),
                *(Statistic(encoding.feature.name, x.name, x.kind, x.prior) for x in self.outcomes),
            )
        ]

    @property
    def positions(self) -> list[str]:
        """SQL of the columns that :meth:`append_values` reads, after :meth:`joins`."""
        return [
            f"coalesce({_alias(number)}.file_row_number, -1) AS {quote_identifier(POSITION + str(number))}"
            for number in range(len(self.encodings))
        ]

    @property
    def latest_values(self) -> list[str]:
        """SQL of the statistics after the last period, after :meth:`latest_joins`; 0 without any impression."""
        return [
            f"coalesce({_alias(number)}.s{column}, 0::FLOAT)"
            for number in range(len(self.encodings))
            for column in range(1 + len(self.outcomes))
        ]

    def joins(self) -> list[str]:
        """Return the joins of positions to a relation ``raw`` with the features' raw values and ``PERIOD``."""
        period = f"raw.{quote_identifier(PERIOD)}"
        return [
            f"{self._join_sql(number, 'period IS NOT NULL')} AND {_alias(number)}.period = {period}"
            for number in range(len(self.encodings))
        ]

    def latest_joins(self) -> list[str]:
        """Return the joins of the statistics after the last period to a relation ``raw`` with raw values."""
        return [self._join_sql(number, "period IS NULL") for number in range(len(self.encodings))]

    def append_values(self, impressions: pa.Table) -> pa.Table:
        """Replace the columns ``positions`` by one column of half-precision statistics, a list per impression."""
        if not self.encodings:
            return impressions
        width = 1 + len(self.outcomes)
        values = np.empty((impressions.num_rows, len(self.encodings), width), np.float16)
        names = [f"{POSITION}{number}" for number in range(len(self.encodings))]
        for number, name in enumerate(names):
            matrix = np.memmap(self._values_file(number), np.float16, "r").reshape(-1, width)
            values[:, number] = matrix[impressions[name].to_numpy()]
        lists = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), len(self.encodings) * width)
        return impressions.drop_columns(names).append_column(STATISTICS_COLUMN, lists)

    def _join_sql(self, number: int, condition: str) -> str:
        table = f"read_parquet([{quote_path(self._table_file(number))}], file_row_number = true)"
        key = f"{_alias(number)}.key = {_key_sql(self.encodings[number])}"
        return f"LEFT JOIN (SELECT * FROM {table} WHERE {condition}) AS {_alias(number)} ON {key}"

    def _table_file(self, number: int) -> Path:
        return self.directory / f"{number}.parquet"

    def _values_file(self, number: int) -> Path:
        return self.directory / f"{number}.float16"

    def _totals_query(self, impressions: str, period: str, file: Path) -> str:
        """Return the statement that writes the sums of impressions with equal values of all features and period."""
        keys = [f"{_key_sql(encoding)} AS key{number}" for number, encoding in enumerate(self.encodings)]
        sums = [f"{aggregate} AS {name}" for aggregate, name in self._sums.items()]
        return f"""COPY (
            SELECT {", ".join([*keys, f"{period} AS period", *sums])} FROM {impressions} AS raw GROUP BY ALL
        ) TO {quote_literal(file)} (FORMAT parquet)"""

    def _write_statistics(self, connection: duckdb.DuckDBPyConnection, totals: Path, number: int) -> None:
        """Write a feature's statistics per period, those after the last (NULL), and the sums for later datasets."""
        name = self.encodings[number].feature.name
        sums = ", ".join(f"sum({x})::BIGINT AS {x}" for x in self._sums.values())
        relation = f"SELECT key{number} AS key, period, {sums} FROM {read_parquet_sql(totals)}"
        relation += f" WHERE key{number} IS NOT NULL GROUP BY ALL"
        if name in self.carried.earlier:
            both = f"{relation} UNION ALL BY NAME SELECT * FROM {read_parquet_sql(self.carried.earlier[name])}"
            relation = f"SELECT key, period, {sums} FROM ({both}) GROUP BY ALL"
        table = quote_identifier(f"sums of {name}")
        connection.execute(f"CREATE TEMP TABLE {table} AS {relation}")
        if name in self.carried.files:
            write_sorted(connection, self._carried_query(table), self.carried.files[name])
        connection.execute(self._statistics_query(table, number))
        connection.execute(f"DROP TABLE {table}")
        self._write_values(number)

    def _carried_query(self, table: str) -> str:
        """Return the query of the sums of a value's earlier periods, and of the last period of the log.

        The sums of earlier periods have the last of them. The log's last day is apart, as an increment may continue it.
        """
        sums = ", ".join(f"sum({x})::BIGINT AS {x}" for x in self._sums.values())
        if not self.has_calendar_time:
            return f"SELECT key, -1::BIGINT AS period, {sums} FROM {table} GROUP BY key ORDER BY key"
        last = f"(SELECT max(period) FROM {table})"
        before = self.carried.retire_before
        alive = "" if before is None else f"HAVING max(period) >= {before}"
        alive = f"WHERE key IN (SELECT key FROM {table} GROUP BY key {alive})" if alive else ""
        return f"""SELECT key, max(period)::BIGINT AS period, {sums} FROM {table} {alive}
            GROUP BY key, period = {last} ORDER BY key, period"""

    def _statistics_query(self, table: str, number: int) -> str:
        """Return the statement that writes a feature's statistics."""
        names = list(self._sums.values())
        if self.has_calendar_time or self.carried.earlier:
            before = ", ".join(f"coalesce(sum({x}) OVER earlier, 0)::BIGINT AS {x}" for x in names)
            window = (
                "WINDOW earlier AS (PARTITION BY key ORDER BY period ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)"
            )
            final = ", ".join(f"sum({x})::BIGINT AS {x}" for x in names)
        else:
            is_train = f"period < {NUM_FOLDS}"
            before = ", ".join(
                f"coalesce(sum({x}) FILTER ({is_train}) OVER (PARTITION BY key), 0)::BIGINT"
                f" - CASE WHEN {is_train} THEN {x} ELSE 0 END AS {x}"
                for x in names
            )
            window = ""
            final = ", ".join(f"coalesce(sum({x}) FILTER ({is_train}), 0)::BIGINT AS {x}" for x in names)
        values = [f"ln(1 + {names[0]})::FLOAT AS s0"]
        for index, outcome in enumerate(self.outcomes, start=1):
            value = _smoothed_sql(outcome, self._sums[outcome.sum_sql], self._sums[outcome.count_sql])
            values.append(f"{value}::FLOAT AS s{index}")
        return f"""COPY (
            WITH sums AS (SELECT key, period, {before} FROM {table} {window}
                UNION ALL SELECT key, NULL AS period, {final} FROM {table} GROUP BY key)
            SELECT key, period, {", ".join(values)} FROM sums
        ) TO {quote_literal(self._table_file(number))} (FORMAT parquet)"""

    def _write_values(self, number: int) -> None:
        """Write a feature's statistics as a half-precision matrix in the order of its table; a last row of zeros."""
        names = [f"s{column}" for column in range(1 + len(self.outcomes))]
        with pq.ParquetFile(self._table_file(number)) as table, self._values_file(number).open("wb") as file:
            for group in range(table.num_row_groups):
                columns = table.read_row_group(group, names, use_threads=False).columns
                file.write(np.stack([column.to_numpy().astype(np.float16) for column in columns], axis=1).tobytes())
            file.write(np.zeros(len(names), np.float16).tobytes())


def _alias(number: int) -> str:
    return quote_identifier(f"statistics {number}")


def _key_sql(encoding: FeatureEncoding) -> str:
    """Return the SQL of the value that impressions share: the raw value, or the bucket of a number."""
    if encoding.feature.kind == "buckets":
        return f"nullif({encoding.row_sql}, 0)"
    return f"raw.{quote_identifier(encoding.feature.name)}"


def _smoothed_sql(outcome: Outcome, total: str, count: str) -> str:
    """Return the SQL of a smoothed rate as log ratio to the training rate, or of a smoothed mean minus the training
    mean; 0 without impressions."""
    prior, weight = (f"{quote_literal(repr(value))}::DOUBLE" for value in (outcome.prior, PRIOR_WEIGHT))
    if outcome.kind == "rate":
        return f"ln(({total} + {weight} * {prior}) / (({count} + {weight}) * {prior}))"
    return f"(({total} / {TIME_UNIT}.0 - {count} * {prior}) / ({count} + {weight}))"
