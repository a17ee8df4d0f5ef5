"""Statistics of item feature values, computed point in time in SQL [ours].

A statistic summarizes all users' impressions that share a value of one item feature: the video itself, its author, its
topic. The value at a target depends only on impressions of earlier *periods*, never on the target's own:

* a log with a calendar has one period per local day, and a target reads all impressions before the start of its day;
* a log without a calendar has one period per fold of users. A training target reads the training impressions of the
  other folds, every other target those of all folds.

The sums are integers, so the result does not depend on the order of rows or threads.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb

from a2gen_rec.data.features.encodings import FeatureEncoding
from a2gen_rec.data.schema import EXIT, WATCH_TIME, Statistic, StatisticKind
from a2gen_rec.data.sql import fetch_one, quote_identifier, quote_literal, read_parquet_sql
from a2gen_rec.data.time_zone import TimeZone

PRIOR_WEIGHT = 5.0
"""Weight of the training mean in every rate and mean, in impressions."""
NUM_FOLDS = 5
"""Number of folds of users in a log without a calendar."""
PERIOD, STATISTIC = "statistics period", "statistic "
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


def period_sql(has_calendar_time: bool, zone: TimeZone) -> str:
    """Return the SQL of an impression's period."""
    if has_calendar_time:
        return f"({zone.local_ms_sql('ts_ms')} // {DAY_MS})"
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
    candidates: list[tuple[str, StatisticKind, str, str]] = [
        (action, "rate", f"count({action_time_column(action)})", "count(*)") for action in actions
    ]
    candidates += [
        (name, "rate", f"coalesce(sum({column}), 0)::BIGINT", f"count({column})") for name, column in flags.items()
    ]
    for action in timed_actions:
        time = action_time_column(action)
        known = f"{time} IS NOT NULL AND NOT isnan({time})"
        name = WATCH_TIME if action == EXIT else f"time_{action}"
        total = f"sum(CASE WHEN {known} THEN round({TIME_UNIT} * ln(1 + {time}::DOUBLE)) ELSE 0 END)::BIGINT"
        candidates.append((name, "mean", total, f"count(*) FILTER ({known})"))
    if not candidates:
        return []
    sums = fetch_one(connection, f"SELECT {', '.join(f'{x[2]}, {x[3]}' for x in candidates)} FROM {train}")
    outcomes = []
    for (name, kind, total_sql, count_sql), total, count in zip(candidates, sums[::2], sums[1::2], strict=True):
        if total and count:
            unit = TIME_UNIT if kind == "mean" else 1
            outcomes.append(Outcome(name, kind, total_sql, count_sql, total / unit / count))
    return outcomes


class PointInTime:
    """Statistics of one log, by feature value and period.

    Args:
        connection: DuckDB connection.
        impressions: relation of all impressions with the column ``split``.
        encodings: encodings of the item features.
        outcomes: outcomes to summarize.
        period: SQL of the period.
        has_calendar_time: whether periods are days.
        directory: directory of temporary files.
    """

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        impressions: str,
        encodings: Iterable[FeatureEncoding],
        outcomes: Sequence[Outcome],
        period: str,
        has_calendar_time: bool,
        directory: Path,
    ) -> None:
        self.outcomes, self.period, self.has_calendar_time, self.directory = (
            outcomes,
            period,
            has_calendar_time,
            directory,
        )
        self.encodings: list[FeatureEncoding] = []
        directory.mkdir()
        for number, encoding in enumerate(encodings):
            connection.execute(self._totals_query(impressions, encoding, number))
            self.encodings.append(encoding)

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
    def num_columns(self) -> int:
        return len(self.encodings) * (1 + len(self.outcomes))

    @property
    def values(self) -> list[str]:
        """SQL of the statistics after :meth:`joins`; 0 without any earlier impression."""
        width = 1 + len(self.outcomes)
        return [
            f"coalesce({self._alias(number // width)}.s{number % width}, 0::FLOAT)"
            for number in range(self.num_columns)
        ]

    def joins(self, latest: bool = False) -> list[str]:
        """Return the joins of the statistics to a relation ``raw`` with the features' raw values.

        Args:
            latest: join the statistics after the last period instead of those at the column ``PERIOD``.
        """
        joins = []
        for number, encoding in enumerate(self.encodings):
            alias, table = self._alias(number), read_parquet_sql(self._file(number))
            source = f"(SELECT * FROM {table} WHERE period IS {'' if latest else 'NOT '}NULL)"
            condition = f"{alias}.key = {_key_sql(encoding)}"
            if not latest:
                condition += f" AND {alias}.period = raw.{quote_identifier(PERIOD)}"
            joins.append(f"LEFT JOIN {source} AS {alias} ON {condition}")
        return joins

    def _alias(self, number: int) -> str:
        return quote_identifier(f"statistics {number}")

    def _file(self, number: int) -> Path:
        return self.directory / f"{number}.parquet"

    def _totals_query(self, impressions: str, encoding: FeatureEncoding, number: int) -> str:
        """Return the statement that writes a feature's statistics per period, and those after the last (NULL)."""
        sums = ", ".join(
            f"{outcome.sum_sql} AS t{index}, {outcome.count_sql} AS c{index}"
            for index, outcome in enumerate(self.outcomes)
        )
        names = ["n", *(f"{part}{index}" for index in range(len(self.outcomes)) for part in "tc")]
        separator = ", " if sums else ""
        totals = (
            f"SELECT {_key_sql(encoding)} AS key, {self.period} AS period, count(*) AS n{separator}{sums}"
            f" FROM {impressions} AS raw GROUP BY ALL"
        )
        if self.has_calendar_time:
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
        values = ["ln(1 + n)::FLOAT AS s0"]
        for index, outcome in enumerate(self.outcomes, start=1):
            values.append(f"{_smoothed_sql(outcome, f't{index - 1}', f'c{index - 1}')}::FLOAT AS s{index}")
        return f"""COPY (
            WITH totals AS (SELECT * FROM ({totals}) WHERE key IS NOT NULL),
            sums AS (SELECT key, period, {before} FROM totals {window} 
                UNION ALL SELECT key, NULL AS period, {final} FROM totals GROUP BY key)
            SELECT key, period, {", ".join(values)} FROM sums
        ) TO {quote_literal(self._file(number))} (FORMAT parquet)"""


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
