"""What the dataset card and the tables beside the windows tell: counts, rates and medians."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb

from a2gen_rec.data.schema import EXIT, ITEM, SPLITS, SplitSummary
from a2gen_rec.data.sql import identifier, order_statistics, write_sorted
from a2gen_rec.data.staging import Columns
from a2gen_rec.data.vocabulary import Encoding, encoded

# Few enough for a row group of several list columns to stay small, many enough to compress well.
ROWS = 100_000


@dataclass(frozen=True)
class Counts:
    """Targets of one split; ``known`` are targets whose label is known, ``timed`` those of a recorded time."""

    targets: int
    first_ms: int | None
    last_ms: int | None
    positives: dict[str, int]
    known: dict[str, int]
    timed: dict[str, int]

    def summary(self, windows: int) -> SplitSummary:
        return SplitSummary(windows, self.targets, self.first_ms, self.last_ms, self.positives)

    def rates(self) -> dict[str, float]:
        """Share of targets with each action, and of those with a known label that have it."""
        return {
            name: positives / self.known[name] if self.known[name] else 0.0
            for name, positives in self.positives.items()
        }


def time_column(action: str) -> str:
    return "dwell_s" if action == EXIT else identifier(f"at_{action}")


def count_splits(connection: duckdb.DuckDBPyConnection, impressions: str, columns: Columns) -> dict[str, Counts]:
    """Counts of every split of the relation ``impressions``, whose ``split`` is an index into ``SPLITS``."""
    actions, labels = list(columns.actions), list(columns.labels)
    ends = [*actions, EXIT]
    select = [f"count({time_column(name)})" for name in actions]
    select += [f"coalesce(sum({identifier(f'label_{name}')}), 0)::BIGINT" for name in labels]
    select += [f"count({identifier(f'label_{name}')})" for name in labels]
    select += [f"count(*) FILTER (NOT isnan({time_column(name)}))" for name in ends]
    rows = connection.execute(
        f"SELECT split, count(*), min(ts_ms), max(ts_ms), {', '.join(select)} FROM {impressions} GROUP BY split"
    ).fetchall()
    found = {}
    for split, targets, first_ms, last_ms, *numbers in rows:
        happened, numbers = numbers[: len(actions)], numbers[len(actions) :]
        positive, known, timed = numbers[: len(labels)], numbers[len(labels) : 2 * len(labels)], numbers[-len(ends) :]
        found[SPLITS[split]] = Counts(
            targets=targets,
            first_ms=first_ms,
            last_ms=last_ms,
            positives=dict(zip([*actions, *labels], [*happened, *positive], strict=True)),
            known={**dict.fromkeys(actions, targets), **dict(zip(labels, known, strict=True))},
            timed=dict(zip(ends, timed, strict=True)),
        )
    zeros = dict.fromkeys([*actions, *labels], 0)
    empty = Counts(0, None, None, zeros, zeros, dict.fromkeys(ends, 0))
    return {name: found.get(name, empty) for name in SPLITS}


def median_times(connection: duckdb.DuckDBPyConnection, train: str, timed: dict[str, int]) -> dict[str, float]:
    """Median offset (s) of every action with a recorded time on the relation ``train``."""
    medians = {}
    for action, count in timed.items():
        if count:
            middle = [(count + 1) // 2, count // 2 + 1]
            medians[action] = float(sum(order_statistics(connection, train, time_column(action), middle)) / 2)
    return medians


def write_entities(
    connection: duckdb.DuckDBPyConnection,
    impressions: str,
    encodings: Sequence[Encoding],
    level: str,
    file: Path,
) -> int:
    """Write every item (or user), one row each by raw identifier, with its latest features' rows; returns the count.

    Of several impressions at the latest moment each feature takes the greatest value, so the choice is total.
    """
    key, name, extra = (ITEM, "item", []) if level == "item" else ("user_id", "user", ["user_key"])
    own = [coding for coding in encodings if coding.feature.level == level]
    features = [identifier(coding.feature.name) for coding in own if coding.feature.name != key]
    latest = "".join(f", max({column}) AS {column}" for column in [*extra, *features])
    relation = f"""(
        SELECT {key}{latest} FROM {impressions}
        JOIN (SELECT {key}, max(ts_ms) AS ts_ms FROM {impressions} GROUP BY ALL) USING ({key}, ts_ms)
        GROUP BY {key})"""
    chosen = [f"raw.{key} AS {identifier(name)}", *(f"raw.{column}" for column in extra)]
    return write_sorted(connection, f"{encoded(relation, own, chosen)} ORDER BY raw.{key}", file, ROWS)


def write_item_statistics(
    connection: duckdb.DuckDBPyConnection, train: str, item: Encoding, columns: Columns, file: Path
) -> None:
    """Write training targets and positives per row of the item table, row 0 included where it occurs."""
    counted = [f"count({time_column(name)}) AS {identifier(name)}" for name in columns.actions]
    counted += [
        f"coalesce(sum({identifier(f'label_{name}')}), 0)::BIGINT AS {identifier(name)}" for name in columns.labels
    ]
    totals = "".join(f", {count}" for count in counted)
    per_item = f"(SELECT {ITEM}, count(*) AS impressions{totals} FROM {train} GROUP BY {ITEM})"
    names = ["impressions", *(identifier(name) for name in [*columns.actions, *columns.labels])]
    rows = encoded(per_item, [item], [f"raw.{name}" for name in names], prefix="row_")
    summed = ", ".join(f"sum({name})::BIGINT AS {name}" for name in names)
    query = f"SELECT row_{ITEM} AS {ITEM}, {summed} FROM ({rows}) GROUP BY ALL ORDER BY {ITEM}"
    write_sorted(connection, query, file, ROWS)
