"""What users do inside the impressions of a dataset, when, and in which order: the numbers.

Windows repeat impressions as history; every impression is a target once. The targets are written out flat, once,
in the columns that ``prepare`` stages; everything else is DuckDB aggregates over them whose results are small, so
memory is bounded by ``MEMORY_GB`` however long the log is.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
from rich.progress import Progress

from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.prepare.statistics import SplitCounts, count_splits
from a2gen_rec.data.schema import COMPLETE, EXIT, FEEDBACK, ITEM_ID, SPLITS, DatasetCard
from a2gen_rec.data.sql import connect, fetch_one, quote_identifier, quote_literal, read_parquet_sql, translate_errors
from a2gen_rec.errors import DataError
from a2gen_rec.reporting.pages.dataset.value_counts import ValueCounts
from a2gen_rec.utils import paths

MEMORY_GB = 2.0
SEQUENCES = 20
LENGTH_GROUPS = 12


@dataclass(frozen=True)
class SplitNumbers:
    """One split.

    Attributes:
        counts: of targets, and of those with each action, label and objective.
        items: rows of the item table that occur, without row 0, which stands for all unknown ones.
        new_users: targets of users without a training target.
        unknown_items: targets whose item is not in the training vocabulary.
        happened: actions of all targets, without ``start`` and ``exit``.
        watch: seconds watched.
    """

    counts: SplitCounts
    users: int
    items: int
    new_users: int
    unknown_items: int
    action_counts: int
    watch: ValueCounts


@dataclass(frozen=True)
class ActionPairs:
    """Pairs of actions inside one impression; all [actions, actions] counts of targets.

    Attributes:
        both: with both actions; on the diagonal, with the action.
        before: with the row's action at an earlier time than the column's.
        together: with both at the same recorded time.
    """

    both: np.ndarray
    before: np.ndarray
    together: np.ndarray

    def order(self) -> np.ndarray:
        """Share of targets, of those whose two times differ, with the row's action first; NaN where there are none."""
        return _ratio(self.before, self.before + self.before.T)

    def lift(self, targets: int) -> np.ndarray:
        """P(a, b) / (P(a) P(b)): 1 where two actions know nothing of each other; NaN on the diagonal."""
        single = self.both.diagonal().astype(np.float64)
        lift = _ratio(self.both * float(targets), np.outer(single, single))
        np.fill_diagonal(lift, np.nan)
        return lift


@dataclass(frozen=True)
class LengthGroup:
    """Targets of videos of similar length.

    Attributes:
        from_s, to_s: lengths at least the first and less than the second; None for no bound.
        glance, effective, complete: share of the targets with known watch time; NaN where there are none.
    """

    from_s: float | None
    to_s: float | None
    targets: int
    glance: float
    effective: float
    complete: float


@dataclass(frozen=True)
class DataStatistics:
    """Of a dataset; all but ``splits`` is of its training targets. Times in seconds, to four digits.

    Attributes:
        per_user, per_item: impressions of each user and of each known item.
        per_impression: actions of each impression, without ``start`` and ``exit``.
        times: when each timed action, and ``exit``, happened.
        positions: the same as a share of the watch time, where that is known.
        sequences: the most frequent ones, as action codes without ``start`` and ``exit``, and their counts.
        distinct_sequences: how many there are.
        lengths: None where the log does not tell how long videos are or are watched.
        gaps, sessions: seconds between the begins of a user's successive impressions, and impressions per session;
            None where the log tells the order of impressions only.
    """

    card: DatasetCard
    splits: dict[str, SplitNumbers]
    per_user: ValueCounts
    per_item: ValueCounts
    per_impression: ValueCounts
    times: dict[str, ValueCounts]
    positions: dict[str, ValueCounts]
    pairs: ActionPairs
    sequences: list[tuple[list[int], int]]
    distinct_sequences: int
    lengths: list[LengthGroup] | None
    gaps: ValueCounts | None
    sessions: ValueCounts | None

    @property
    def train(self) -> SplitCounts:
        return self.splits["train"].counts

    @property
    def ordered(self) -> bool:
        """Whether the log tells the times of two actions or more, and so their order."""
        return len(self.times.keys() - {EXIT}) > 1


def compute_statistics(data: str, scratch: Path, bars: Progress) -> DataStatistics:
    """Read a prepared dataset.

    Args:
        data: its folder, local or remote; scratch: an empty folder for the targets and for what memory does not hold.
        bars: shows what is being done.

    Raises:
        DataError: it is not a dataset, a file breaks the contract, or there are no training targets.
        UserError: memory or disk ran out.
    """
    dataset = Dataset.open(data)
    connection = connect(MEMORY_GB, 0, scratch / "spill")
    try:
        with translate_errors(data):
            flat = flatten(connection, dataset, scratch, bars)
            return StatisticsQueries(connection, dataset.card, flat, bars).run()
    finally:
        connection.close()


def flatten(connection: duckdb.DuckDBPyConnection, dataset: Dataset, scratch: Path, bars: Progress) -> str:
    """Write the targets of all splits to ``scratch``, a row each; returns their relation.

    Raises:
        DataError: the dataset has no training impressions, or a file breaks the contract.
    """
    files = [(code, file) for code, split in enumerate(SPLITS) for file in dataset.files(split)]
    for place, (code, file) in enumerate(bars.track(files, description="reading windows")):
        query = targets_relation(read_parquet_sql(paths.to_local_path(file)), code, dataset.card)
        with translate_errors(file):
            connection.execute(f"COPY ({query}) TO {quote_literal(scratch / f'{place}.parquet')} (FORMAT parquet)")
    flat = read_parquet_sql(scratch / "*.parquet")
    if not files or not fetch_one(connection, f"SELECT count(*) FROM {flat} WHERE split = 0")[0]:
        raise DataError("has no training impressions", file=dataset.path)
    return flat


def targets_relation(windows: str, split: int, card: DatasetCard) -> str:
    """SQL of the targets of some windows of a split, in the columns of ``data/sources/base.py``, and two more.

    ``action`` holds codes without ``start`` and ``exit``, ``length_row`` that of the feature with the video's length.
    """
    flags = [*(f"label_{name}" for name in card.labels), *(f"objective_{name}" for name in card.objectives)]
    columns = {name: name for name in ("ts_ms", "dwell_s", "action", "action_offset_s", *flags)} | {"item": ITEM_ID}
    extra = ["NULL AS length_row"]
    if card.feedback is not None and has_lengths(card):
        columns |= {"length_row": card.feedback.duration_feature, FEEDBACK: FEEDBACK}
        extra = ["length_row", FEEDBACK]
    listed = [
        f"unnest({quote_identifier(old)}[first_target + 1:]) AS {quote_identifier(new)}" for new, old in columns.items()
    ]
    at = [
        f"action_offset_s[list_position(action, {code})] AS {quote_identifier(f'at_{name}')}"
        for code, name in enumerate(card.predicted_actions, start=1)
    ]
    known = [f"nullif({quote_identifier(name)}, 'nan'::FLOAT) AS {quote_identifier(name)}" for name in flags]
    select = [f"{split} AS split", "user", "item", "ts_ms", "dwell_s", "action[2:-2] AS action", *at, *known, *extra]
    return f"SELECT {', '.join(select)} FROM (SELECT user_key AS user, {', '.join(listed)} FROM {windows})"


def has_lengths(card: DatasetCard) -> bool:
    """Whether the dataset tells how long videos are, and how much of them was watched."""
    named = [feature.name for feature in card.features]
    return card.feedback is not None and card.feedback.duration_feature in named and FEEDBACK in named


def round_significant(column: str) -> str:
    """SQL of a number rounded to four digits, of which there are few whatever the number of rows."""
    number = f"{column}::DOUBLE"
    return f"(CASE WHEN {number} = 0 THEN 0.0 ELSE round({number}, (3 - floor(log10(abs({number}))))::INT) END)"


@dataclass
class StatisticsQueries:
    """One reading of the relation ``flat`` of :func:`flatten`."""

    connection: duckdb.DuckDBPyConnection
    card: DatasetCard
    flat: str
    bars: Progress

    def run(self) -> DataStatistics:
        parts: dict[str, Any] = {
            "splits": self.splits,
            "per_user": lambda: self.counted(self.grouped("user"), "n"),
            "per_item": lambda: self.counted(self.grouped("item"), "n", "item > 0"),
            "per_impression": lambda: self.counted(self.of(), "len(action)"),
            "times": self.times,
            "positions": self.positions,
            "pairs": self.pairs,
            "sequences": self.sequences,
            "distinct_sequences": self.distinct_sequences,
            "lengths": self.lengths,
            "gaps": self.gaps,
            "sessions": self.sessions,
        }
        found = {name: part() for name, part in self.bars.track(list(parts.items()), description="counting")}
        return DataStatistics(self.card, **found)

    def of(self, split: str = "train") -> str:
        return f"(SELECT * FROM {self.flat} WHERE split = {SPLITS.index(split)})"

    def grouped(self, by: str, split: str = "train") -> str:
        return f"(SELECT {by}, count(*) AS n FROM {self.of(split)} GROUP BY {by})"

    def number(self, what: str, relation: str) -> int:
        return int(fetch_one(self.connection, f"SELECT {what} FROM {relation}")[0])

    def counted(self, relation: str, value: str, where: str = "true") -> ValueCounts:
        """The distribution of an expression, without NULL and NaN."""
        rows = f"(SELECT ({value})::DOUBLE AS value FROM {relation} WHERE {where})"
        query = f"SELECT value, count(*) AS count FROM {rows} WHERE NOT isnan(value) GROUP BY value ORDER BY value"
        found = self.connection.execute(query).fetchnumpy()
        return ValueCounts(np.asarray(found["value"], np.float64), np.asarray(found["count"], np.int64))

    def splits(self) -> dict[str, SplitNumbers]:
        flags = {name: quote_identifier(f"label_{name}") for name in self.card.labels}
        flags |= {name: quote_identifier(f"objective_{name}") for name in self.card.objectives}
        counts = count_splits(self.connection, self.flat, self.card.predicted_actions, flags)
        return {split: self.split(split, counts[split]) for split in SPLITS}

    def split(self, split: str, counts: SplitCounts) -> SplitNumbers:
        old = f"(SELECT DISTINCT user FROM {self.of()})"
        return SplitNumbers(
            counts,
            users=self.number("count(*)", self.grouped("user", split)),
            items=self.number("count(*)", f"{self.grouped('item', split)} WHERE item > 0"),
            new_users=self.number("count(*)", f"{self.of(split)} ANTI JOIN {old} USING (user)"),
            unknown_items=self.number("count(*)", f"{self.of(split)} WHERE item = 0"),
            action_counts=self.number("coalesce(sum(len(action)), 0)", self.of(split)),
            watch=self.counted(self.of(split), round_significant("dwell_s"), "NOT isnan(dwell_s)"),
        )

    def time_columns(self) -> dict[str, str]:
        columns = {name: quote_identifier(f"at_{name}") for name in self.card.predicted_actions} | {EXIT: "dwell_s"}
        return {name: column for name, column in columns.items() if name in self.card.timed_actions}

    def times(self) -> dict[str, ValueCounts]:
        found = {
            name: self.counted(self.of(), round_significant(column), f"NOT isnan({column})")
            for name, column in self.time_columns().items()
        }
        return {name: counted for name, counted in found.items() if counted.total}

    def positions(self) -> dict[str, ValueCounts]:
        watched = "dwell_s > 0 AND NOT isnan(dwell_s)"
        found = {
            name: self.counted(self.of(), f"round({column}::DOUBLE / dwell_s, 3)", f"NOT isnan({column}) AND {watched}")
            for name, column in self.time_columns().items()
            if name != EXIT
        }
        return {name: counted for name, counted in found.items() if counted.total}

    def pairs(self) -> ActionPairs:
        """An action a query: all at once would be as many aggregates as there are pairs."""
        columns = [quote_identifier(f"at_{name}") for name in self.card.predicted_actions]
        found = np.zeros((3, len(columns), len(columns)), np.int64)
        for place, a in enumerate(columns):
            # NaN, an unknown time, would be greater than all others and equal to itself.
            parts = [
                *(f"count({b})" for b in columns),
                *(f"count(*) FILTER ({a} < {b} AND NOT isnan({b}))" for b in columns),
                *(f"count(*) FILTER ({a} = {b} AND NOT isnan({b}))" for b in columns),
            ]
            query = f"SELECT {', '.join(parts)} FROM {self.of()} WHERE {a} IS NOT NULL"
            found[:, place] = np.reshape(fetch_one(self.connection, query), (3, -1))
        both, before, together = found
        np.fill_diagonal(together, 0)
        return ActionPairs(both, before, together)

    def sequences(self) -> list[tuple[list[int], int]]:
        query = f"SELECT action, count(*) AS n FROM {self.of()} GROUP BY action ORDER BY n DESC, action"
        return self.connection.execute(f"{query} LIMIT {SEQUENCES}").fetchall()

    def distinct_sequences(self) -> int:
        return self.number("count(*)", self.grouped("action"))

    def lengths(self) -> list[LengthGroup] | None:
        """Groups of neighbouring buckets of the length's feature, about as many targets in each."""
        if self.card.feedback is None or not has_lengths(self.card):
            return None
        name = self.card.feedback.duration_feature
        edges = next(feature.boundaries for feature in self.card.features if feature.name == name)
        flags = [f"coalesce(sum(objective_{each}), 0), count(objective_{each})" for each in ("glance", "effective")]
        query = f"""
            SELECT length_row, count(*), {", ".join(flags)},
                count(*) FILTER ({FEEDBACK} = {COMPLETE}), count(*) FILTER (NOT isnan(dwell_s))
            FROM {self.of()} WHERE length_row > 0 GROUP BY length_row ORDER BY length_row"""
        rows = np.array(self.connection.execute(query).fetchall(), np.float64).reshape(-1, 8)
        before = np.cumsum(rows[:, 1]) - rows[:, 1]
        group = (LENGTH_GROUPS * before / max(rows[:, 1].sum(), 1)).astype(int)
        bounds = [None, *edges, None]
        found = []
        for members in (rows[group == number] for number in np.unique(group)):
            first, last = int(members[0, 0]), int(members[-1, 0])
            sums = members.sum(axis=0)
            shares = _ratio(sums[2::2], sums[3::2])
            found.append(LengthGroup(bounds[first - 1], bounds[last], int(sums[1]), *map(float, shares)))
        return found

    def gaps(self) -> ValueCounts | None:
        return (
            self.counted(self.with_gaps(), round_significant("gap_s"), "gap_s IS NOT NULL") if self.elapsed() else None
        )

    def sessions(self) -> ValueCounts | None:
        """Impressions of one moment are of one session: the frame of the sum takes all of them or none."""
        if not self.elapsed():
            return None
        opens = f"coalesce(gap_s > {self.card.session_gap_s}, true)::INT"
        numbered = f"SELECT user, sum({opens}) OVER (PARTITION BY user ORDER BY ts_ms) AS session"
        lengths = f"SELECT count(*) AS n FROM ({numbered} FROM {self.with_gaps()}) GROUP BY user, session"
        return self.counted(f"({lengths})", "n")

    def with_gaps(self) -> str:
        """Training targets with the seconds since the user's target before, NULL of the first."""
        before = "lag(ts_ms) OVER (PARTITION BY user ORDER BY ts_ms)"
        return f"(SELECT user, ts_ms, (ts_ms - {before}) / 1000 AS gap_s FROM {self.of()})"

    def elapsed(self) -> bool:
        """Whether moments of a user's impressions differ by elapsed time, not order alone."""
        return bool(self.card.features_at("session"))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """NaN where the whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(part), math.nan), where=np.asarray(whole) != 0)
