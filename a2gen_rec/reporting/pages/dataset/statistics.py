"""Statistics of the actions inside the impressions of a dataset: rates, times, order and sequences.

Windows repeat impressions as history; each impression is a target once. The targets are written once as flat rows,
in the columns that ``prepare`` stages. All statistics are DuckDB aggregates over these rows with small results, so
memory is bounded by ``MEMORY_GB`` for logs of any size.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
from rich.progress import Progress

from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.prepare.statistics import SplitCounts, count_splits
from a2gen_rec.data.schema import COMPLETE, EXIT, FEEDBACK, ITEM_ID, SPLITS
from a2gen_rec.data.sql import connect, fetch_one, quote_identifier, quote_literal, read_parquet_sql, translate_errors
from a2gen_rec.errors import DataError
from a2gen_rec.reporting.pages.dataset.value_counts import ValueCounts
from a2gen_rec.utils import paths

MEMORY_GB = 2.0
MAX_SEQUENCES = 20
MAX_DURATION_GROUPS = 12


@dataclass(frozen=True)
class SplitStatistics:
    """Statistics of one split.

    Attributes:
        counts: Targets, and targets with each action, label and objective.
        users: Distinct users.
        items: Distinct rows of the item table, without row 0 (unknown items).
        new_user_impressions: Targets of users without a training target.
        unknown_item_impressions: Targets whose item is not in the training vocabulary.
        num_actions: Actions of all targets, without ``start`` and ``exit``.
        watch_time: Seconds watched.
    """

    counts: SplitCounts
    users: int
    items: int
    new_user_impressions: int
    unknown_item_impressions: int
    num_actions: int
    watch_time: ValueCounts


@dataclass(frozen=True)
class ActionPairs:
    """Pairs of actions inside one impression, as [actions, actions] counts of targets.

    Attributes:
        both: Targets with both actions; on the diagonal, with the action.
        before: Targets in which the row's action precedes the column's.
        simultaneous: Targets in which both actions have the same recorded time.
    """

    both: np.ndarray
    before: np.ndarray
    simultaneous: np.ndarray

    def order(self) -> np.ndarray:
        """Return the share of targets with the row's action first among those with different times; NaN without any."""
        return _ratio(self.before, self.before + self.before.T)

    def lift(self, targets: int) -> np.ndarray:
        """Return P(a, b) / (P(a) P(b)), which is 1 for independent actions; NaN on the diagonal."""
        single = self.both.diagonal().astype(np.float64)
        lift = _ratio(self.both * float(targets), np.outer(single, single))
        np.fill_diagonal(lift, np.nan)
        return lift


@dataclass(frozen=True)
class DurationGroup:
    """Targets of videos of similar duration.

    Attributes:
        from_s: Minimum duration in seconds, inclusive; None is unbounded.
        to_s: Maximum duration in seconds, exclusive; None is unbounded.
        targets: Number of targets.
        glance: Share of glances among targets with known watch time; NaN without any.
        effective: Share of effective views among targets with known watch time; NaN without any.
        complete: Share of complete views among targets with known watch time; NaN without any.
    """

    from_s: float | None
    to_s: float | None
    targets: int
    glance: float
    effective: float
    complete: float


@dataclass(frozen=True)
class DataStatistics:
    """Statistics of a dataset, of training targets except for ``splits``. Times are in seconds with four digits.

    Attributes:
        card: Dataset card.
        splits: Statistics of each split.
        impressions_per_user: Impressions of each user.
        impressions_per_item: Impressions of each known item.
        actions_per_impression: Actions of each impression, without ``start`` and ``exit``.
        times: Seconds from the start of the impression to each timed action and ``exit``.
        relative_times: Times as a share of the watch time, if known.
        pairs: Pairs of actions.
        sequences: Most frequent sequences as action codes without ``start`` and ``exit``, with their counts.
        distinct_sequences: Number of distinct sequences.
        by_duration: Groups of videos by duration; None if the log has no durations or no watch times.
        gaps: Seconds between the starts of a user's consecutive impressions; None if the log has their order only.
        impressions_per_session: Impressions of each session; None if the log has the order of impressions only.
    """

    card: DatasetCard
    splits: dict[str, SplitStatistics]
    impressions_per_user: ValueCounts
    impressions_per_item: ValueCounts
    actions_per_impression: ValueCounts
    times: dict[str, ValueCounts]
    relative_times: dict[str, ValueCounts]
    pairs: ActionPairs
    sequences: list[tuple[list[int], int]]
    distinct_sequences: int
    by_duration: list[DurationGroup] | None
    gaps: ValueCounts | None
    impressions_per_session: ValueCounts | None

    @property
    def train(self) -> SplitCounts:
        return self.splits["train"].counts

    @property
    def has_order(self) -> bool:
        """Whether the log has the times of at least two actions, and hence their order."""
        return len(self.times.keys() - {EXIT}) > 1


def compute_statistics(data: str, scratch: Path, bars: Progress) -> DataStatistics:
    """Compute the statistics of a prepared dataset.

    Args:
        data: Dataset directory, local or remote.
        scratch: Empty directory for the targets and for data that exceed the memory limit.
        bars: Progress bars.

    Raises:
        DataError: The directory is not a dataset, a file violates the format, or there are no training targets.
        UserError: Out of memory or disk space.
    """
    dataset = Dataset.open(data)
    connection = connect(MEMORY_GB, 0, scratch / "spill")
    try:
        with translate_errors(data):
            targets = write_targets(connection, dataset, scratch, bars)
            return StatisticsQueries(connection, dataset.card, targets, bars).run()
    finally:
        connection.close()


def write_targets(connection: duckdb.DuckDBPyConnection, dataset: Dataset, scratch: Path, bars: Progress) -> str:
    """Write the targets of all splits to ``scratch``, one row each, and return their SQL relation.

    Raises:
        DataError: The dataset has no training impressions, or a file violates the format.
    """
    files = [(code, file) for code, split in enumerate(SPLITS) for file in dataset.files(split)]
    for index, (code, file) in enumerate(bars.track(files, description="reading windows")):
        query = targets_relation(read_parquet_sql(paths.to_local_path(file)), code, dataset.card)
        with translate_errors(file):
            connection.execute(f"COPY ({query}) TO {quote_literal(scratch / f'{index}.parquet')} (FORMAT parquet)")
    targets = read_parquet_sql(scratch, pattern="*.parquet")
    if not files or not fetch_one(connection, f"SELECT count(*) FROM {targets} WHERE split = 0")[0]:
        raise DataError("no training impressions", file=dataset.path)
    return targets


def targets_relation(windows: str, split: int, card: DatasetCard) -> str:
    """Return the SQL of the targets of a split's windows, in the columns of ``data/sources/base.py`` and two more.

    ``action`` has codes without ``start`` and ``exit``; ``duration_row`` is the row of the video's duration feature.
    """
    flags = [*(f"label_{name}" for name in card.labels), *(f"objective_{name}" for name in card.objectives)]
    columns = {name: name for name in ("ts_ms", "dwell_s", "action", "action_offset_s", *flags)} | {"item": ITEM_ID}
    extra = ["NULL AS duration_row"]
    if card.feedback is not None and has_durations(card):
        columns |= {"duration_row": card.feedback.duration_feature, FEEDBACK: FEEDBACK}
        extra = ["duration_row", FEEDBACK]
    unnested = [
        f"unnest({quote_identifier(old)}[first_target + 1:]) AS {quote_identifier(new)}" for new, old in columns.items()
    ]
    action_times = [
        f"action_offset_s[list_position(action, {code})] AS {quote_identifier(f'at_{name}')}"
        for code, name in enumerate(card.predicted_actions, start=1)
    ]
    nullable = [f"nullif({quote_identifier(name)}, 'nan'::FLOAT) AS {quote_identifier(name)}" for name in flags]
    select = [
        f"{split} AS split",
        "user",
        "item",
        "ts_ms",
        "dwell_s",
        "action[2:-2] AS action",
        *action_times,
        *nullable,
        *extra,
    ]
    return f"SELECT {', '.join(select)} FROM (SELECT user_key AS user, {', '.join(unnested)} FROM {windows})"


def has_durations(card: DatasetCard) -> bool:
    """Return whether the dataset has durations and feedback levels."""
    names = [feature.name for feature in card.features]
    return card.feedback is not None and card.feedback.duration_feature in names and FEEDBACK in names


def round_significant(column: str) -> str:
    """Return the SQL of a number rounded to four digits, which limits the number of distinct values."""
    number = f"{column}::DOUBLE"
    return f"(CASE WHEN {number} = 0 THEN 0.0 ELSE round({number}, (3 - floor(log10(abs({number}))))::INT) END)"


@dataclass
class StatisticsQueries:
    """Queries over the relation returned by :func:`write_targets`.

    Attributes:
        connection: DuckDB connection.
        card: Dataset card.
        targets: SQL relation of the targets.
        bars: Progress bars.
    """

    connection: duckdb.DuckDBPyConnection
    card: DatasetCard
    targets: str
    bars: Progress

    def run(self) -> DataStatistics:
        queries: dict[str, Any] = {
            "splits": self.splits,
            "impressions_per_user": lambda: self.value_counts(self.counts_by("user"), "n"),
            "impressions_per_item": lambda: self.value_counts(self.counts_by("item"), "n", "item > 0"),
            "actions_per_impression": lambda: self.value_counts(self.split_rows(), "len(action)"),
            "times": self.times,
            "relative_times": self.relative_times,
            "pairs": self.pairs,
            "sequences": self.sequences,
            "distinct_sequences": self.distinct_sequences,
            "by_duration": self.durations,
            "gaps": self.gaps,
            "impressions_per_session": self.impressions_per_session,
        }
        results = {name: query() for name, query in self.bars.track(list(queries.items()), description="counting")}
        return DataStatistics(self.card, **results)

    def split_rows(self, split: str = "train") -> str:
        return f"(SELECT * FROM {self.targets} WHERE split = {SPLITS.index(split)})"

    def counts_by(self, column: str, split: str = "train") -> str:
        return f"(SELECT {column}, count(*) AS n FROM {self.split_rows(split)} GROUP BY {column})"

    def scalar(self, expression: str, relation: str) -> int:
        return int(fetch_one(self.connection, f"SELECT {expression} FROM {relation}")[0])

    def value_counts(self, relation: str, value: str, where: str = "true") -> ValueCounts:
        """Return the distribution of an expression, without NULL and NaN."""
        rows = f"(SELECT ({value})::DOUBLE AS value FROM {relation} WHERE {where})"
        query = f"SELECT value, count(*) AS count FROM {rows} WHERE NOT isnan(value) GROUP BY value ORDER BY value"
        result = self.connection.execute(query).fetchnumpy()
        return ValueCounts(np.asarray(result["value"], np.float64), np.asarray(result["count"], np.int64))

    def splits(self) -> dict[str, SplitStatistics]:
        flags = {name: quote_identifier(f"label_{name}") for name in self.card.labels}
        flags |= {name: quote_identifier(f"objective_{name}") for name in self.card.objectives}
        counts = count_splits(self.connection, self.targets, self.card.predicted_actions, flags)
        return {split: self.split(split, counts[split]) for split in SPLITS}

    def split(self, split: str, counts: SplitCounts) -> SplitStatistics:
        train_users = f"(SELECT DISTINCT user FROM {self.split_rows()})"
        return SplitStatistics(
            counts,
            users=self.scalar("count(*)", self.counts_by("user", split)),
            items=self.scalar("count(*)", f"{self.counts_by('item', split)} WHERE item > 0"),
            new_user_impressions=self.scalar(
                "count(*)", f"{self.split_rows(split)} ANTI JOIN {train_users} USING (user)"
            ),
            unknown_item_impressions=self.scalar("count(*)", f"{self.split_rows(split)} WHERE item = 0"),
            num_actions=self.scalar("coalesce(sum(len(action)), 0)", self.split_rows(split)),
            watch_time=self.value_counts(self.split_rows(split), round_significant("dwell_s"), "NOT isnan(dwell_s)"),
        )

    def time_columns(self) -> dict[str, str]:
        columns = {name: quote_identifier(f"at_{name}") for name in self.card.predicted_actions} | {EXIT: "dwell_s"}
        return {name: column for name, column in columns.items() if name in self.card.timed_actions}

    def times(self) -> dict[str, ValueCounts]:
        distributions = {
            name: self.value_counts(self.split_rows(), round_significant(column), f"NOT isnan({column})")
            for name, column in self.time_columns().items()
        }
        return {name: counts for name, counts in distributions.items() if counts.total}

    def relative_times(self) -> dict[str, ValueCounts]:
        watched = "dwell_s > 0 AND NOT isnan(dwell_s)"
        distributions = {
            name: self.value_counts(
                self.split_rows(), f"round({column}::DOUBLE / dwell_s, 3)", f"NOT isnan({column}) AND {watched}"
            )
            for name, column in self.time_columns().items()
            if name != EXIT
        }
        return {name: counts for name, counts in distributions.items() if counts.total}

    def pairs(self) -> ActionPairs:
        """Run one query per action; a single query would have one aggregate per pair."""
        columns = [quote_identifier(f"at_{name}") for name in self.card.predicted_actions]
        counts = np.zeros((3, len(columns), len(columns)), np.int64)
        for index, a in enumerate(columns):
            # NaN, an unknown time, compares greater than all other values and equal to itself.
            parts = [
                *(f"count({b})" for b in columns),
                *(f"count(*) FILTER ({a} < {b} AND NOT isnan({b}))" for b in columns),
                *(f"count(*) FILTER ({a} = {b} AND NOT isnan({b}))" for b in columns),
            ]
            query = f"SELECT {', '.join(parts)} FROM {self.split_rows()} WHERE {a} IS NOT NULL"
            counts[:, index] = np.reshape(fetch_one(self.connection, query), (3, -1))
        both, before, simultaneous = counts
        np.fill_diagonal(simultaneous, 0)
        return ActionPairs(both, before, simultaneous)

    def sequences(self) -> list[tuple[list[int], int]]:
        query = f"SELECT action, count(*) AS n FROM {self.split_rows()} GROUP BY action ORDER BY n DESC, action"
        return self.connection.execute(f"{query} LIMIT {MAX_SEQUENCES}").fetchall()

    def distinct_sequences(self) -> int:
        return self.scalar("count(*)", self.counts_by("action"))

    def durations(self) -> list[DurationGroup] | None:
        """Return groups of neighbouring buckets of the duration feature with about equal numbers of targets."""
        if self.card.feedback is None or not has_durations(self.card):
            return None
        name = self.card.feedback.duration_feature
        boundaries = next(feature.boundaries for feature in self.card.features if feature.name == name)
        flags = [f"coalesce(sum(objective_{name}), 0), count(objective_{name})" for name in ("glance", "effective")]
        query = f"""
            SELECT duration_row, count(*), {", ".join(flags)},
                count(*) FILTER ({FEEDBACK} = {COMPLETE}), count(*) FILTER (NOT isnan(dwell_s))
            FROM {self.split_rows()} WHERE duration_row > 0 GROUP BY duration_row ORDER BY duration_row"""
        rows = np.array(self.connection.execute(query).fetchall(), np.float64).reshape(-1, 8)
        before = np.cumsum(rows[:, 1]) - rows[:, 1]
        group = (MAX_DURATION_GROUPS * before / max(rows[:, 1].sum(), 1)).astype(int)
        bounds = [None, *boundaries, None]
        groups = []
        for members in (rows[group == number] for number in np.unique(group)):
            first, last = int(members[0, 0]), int(members[-1, 0])
            sums = members.sum(axis=0)
            shares = _ratio(sums[2::2], sums[3::2])
            groups.append(DurationGroup(bounds[first - 1], bounds[last], int(sums[1]), *map(float, shares)))
        return groups

    def gaps(self) -> ValueCounts | None:
        return (
            self.value_counts(self.with_gaps(), round_significant("gap_s"), "gap_s IS NOT NULL")
            if self.has_elapsed_time()
            else None
        )

    def impressions_per_session(self) -> ValueCounts | None:
        """Count impressions per session; simultaneous impressions share one, since the sum's frame has all or none."""
        if not self.has_elapsed_time():
            return None
        starts = f"coalesce(gap_s > {self.card.session_gap_s}, true)::INT"
        numbered = f"SELECT user, sum({starts}) OVER (PARTITION BY user ORDER BY ts_ms) AS session"
        sizes = f"SELECT count(*) AS n FROM ({numbered} FROM {self.with_gaps()}) GROUP BY user, session"
        return self.value_counts(f"({sizes})", "n")

    def with_gaps(self) -> str:
        """Return training targets with the seconds since the user's previous target, NULL for the first."""
        previous = "lag(ts_ms) OVER (PARTITION BY user ORDER BY ts_ms)"
        return f"(SELECT user, ts_ms, (ts_ms - {previous}) / 1000 AS gap_s FROM {self.split_rows()})"

    def has_elapsed_time(self) -> bool:
        """Return whether the log has elapsed time between a user's impressions, not only their order."""
        return bool(self.card.features_at("session"))


def _ratio(part: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Return part / total; NaN where the total is 0."""
    return np.divide(part, total, out=np.full(np.shape(part), math.nan), where=np.asarray(total) != 0)
