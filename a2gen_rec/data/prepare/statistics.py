"""Counts, rates and medians of the dataset card."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import duckdb

from a2gen_rec.data.prepare.point_in_time import action_time_column
from a2gen_rec.data.schema import EXIT, SPLITS, SplitSummary
from a2gen_rec.data.sql import fetch_one, order_statistics


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
