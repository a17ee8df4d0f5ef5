"""Statistics of item values against an oracle that loops over the raw rows."""

import csv
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from a2gen_rec.config import PrepareConfig
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.dataset import ITEMS_FILE
from a2gen_rec.data.features.encodings import hash_encoding
from a2gen_rec.data.prepare.pipeline import prepare
from a2gen_rec.data.prepare.point_in_time import NUM_FOLDS, PERIOD, PRIOR_WEIGHT, PointInTime, period_sql
from a2gen_rec.data.schema import SPLITS, FeatureSpec
from a2gen_rec.data.sql import connect
from a2gen_rec.data.time_zone import TimeZone

DAY_MS, ZONE_MS = 86_400_000, 8 * 3_600_000
FIRST_MS = 1_700_006_400_000 - ZONE_MS  # midnight of the log's time zone
EDGES = [20.0, 40.0]
SPEC: dict[str, Any] = {
    "kind": "impressions",
    "time_unit": "ms",
    "utc_offset_hours": 8,
    "columns": {"user": "user", "item": "item", "time": "time", "dwell_s": "watched"},
    "actions": {"like": {"offset_s": "like_at"}, "share": {"flag": "shared"}},
    "labels": {"finished": "finished"},
    "features": [
        {"name": "author", "level": "item", "min_count": 3},
        {"name": "duration", "level": "item", "kind": "buckets", "edges": EDGES},
    ],
    "duration_feature": "duration",
}
Row = dict[str, Any]


def random_rows(seed: int, count: int = 400, days: int = 6) -> list[Row]:
    """Return impressions with missing authors, watch times and labels; each user has distinct times."""
    rng = random.Random(seed)
    authors = {f"v{number}": rng.choice([None, "a", "b", "rare"]) for number in range(25)}
    durations = {item: rng.choice([10.0, 20.0, 33.0, 90.0]) for item in authors}
    rows = []
    for number in range(count):
        item = rng.choice(list(authors))
        liked = rng.random() < 0.3
        rows.append(
            {
                "user": f"u{rng.randrange(20)}",
                "item": item,
                "time": FIRST_MS + number * (days * DAY_MS // count) + rng.randrange(1000),
                "watched": rng.choice([None, 1.5, 12.0, 95.0]),
                "like_at": rng.choice([0.5, 3.0]) if liked else None,
                "shared": int(rng.random() < 0.1),
                "finished": rng.choice([None, 0, 1]),
                "author": authors[item],
                "duration": durations[item],
            }
        )
    return rows


def prepare_rows(folder: Path, rows: list[Row], **spec: Any) -> Path:
    folder.mkdir()
    with (folder / "log.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    (folder / "spec.yaml").write_text(yaml.safe_dump(SPEC | {"files": "log.csv"} | spec))
    config = PrepareConfig(max_history=5, max_targets=3, num_partitions=2, threads=2)
    prepare("generic", str(folder), str(folder / "data"), config, str(folder / "spec.yaml"))
    return folder / "data"


def read_statistics(data: Path) -> dict[tuple[str, int], tuple[str, np.ndarray]]:
    """Return (user, time) -> (split, statistics) of every target."""
    targets = {}
    count = len(DatasetCard.load(str(data)).statistics)
    for split in SPLITS:
        for file in sorted((data / split).glob("*.parquet")):
            for window in pq.read_table(file).to_pylist():
                times = window["ts_ms"][window["first_target"] :]
                values = np.array(window["statistics"], np.float32).reshape(len(times), count)
                for ts_ms, value in zip(times, values, strict=True):
                    targets[window["user"], ts_ms] = split, value
    return targets


def value_of(row: Row, feature: str) -> Any:
    """Return the value that impressions share: the bucket of a duration, the raw value of the others."""
    if feature == "duration":
        return sum(edge <= row["duration"] for edge in EDGES)
    return row["item" if feature == "item_id" else feature]


def watch_s(row: Row) -> float | None:
    return None if row["watched"] is None else max(row["watched"], row["like_at"] or 0.0)


def outcome_of(row: Row, outcome: str) -> float | None:
    """Return an outcome of a raw row; None if unknown."""
    if outcome == "like":
        return float(row["like_at"] is not None)
    if outcome == "share":
        return float(row["shared"])
    if outcome == "finished":
        return row["finished"]
    seconds = watch_s(row) if outcome == "watch_time" else row["like_at"]
    return None if seconds is None else math.log1p(seconds)


def expected(card: DatasetCard, target: Row, visible: list[Row]) -> dict[str, float]:
    """Return the statistics of a target by feature and outcome, from the impressions it may read."""
    values = {}
    for statistic in card.statistics:
        if statistic.outcome in ("glance", "effective", "negative"):
            continue  # defined by medians of the log; tests of feedback cover them
        value = value_of(target, statistic.feature)
        rows = [] if value is None else [row for row in visible if value_of(row, statistic.feature) == value]
        known = (
            [x for x in (outcome_of(row, statistic.outcome) for row in rows) if x is not None]
            if (statistic.kind != "count")
            else []
        )
        prior, weight = statistic.prior, PRIOR_WEIGHT
        if statistic.kind == "count":
            result = math.log1p(len(rows))
        elif statistic.kind == "rate":
            result = math.log((sum(known) + weight * prior) / ((len(known) + weight) * prior))
        else:
            result = (sum(known) - len(known) * prior) / (len(known) + weight)
        values[f"{statistic.feature} {statistic.outcome}"] = result
    return values


def local_day(row: Row) -> int:
    return (row["time"] + ZONE_MS) // DAY_MS


def check(card: DatasetCard, actual: np.ndarray, target: Row, visible: list[Row]) -> None:
    names = [f"{statistic.feature} {statistic.outcome}" for statistic in card.statistics]
    by_name = dict(zip(names, actual.tolist(), strict=True))
    wanted = expected(card, target, visible)
    assert {name: by_name[name] for name in wanted} == pytest.approx(wanted, abs=2e-3, rel=1e-3)


def test_daily_statistics_equal_the_oracle(tmp_path):
    rows = random_rows(seed=0)
    data = prepare_rows(tmp_path / "log", rows)
    card, targets = DatasetCard.load(str(data)), read_statistics(data)
    assert {(s.feature, s.outcome) for s in card.statistics} >= {
        ("item_id", "impressions"), ("author", "like"), ("duration", "time_like"), ("item_id", "watch_time"),
    }  # fmt: skip
    assert len(targets) == len(rows)
    for row in rows:
        _, actual = targets[row["user"], row["time"]]
        check(card, actual, row, [other for other in rows if local_day(other) < local_day(row)])


def test_priors_are_training_means(tmp_path):
    rows = random_rows(seed=1)
    data = prepare_rows(tmp_path / "log", rows)
    card, targets = DatasetCard.load(str(data)), read_statistics(data)
    train = [row for row in rows if targets[row["user"], row["time"]][0] == "train"]
    for statistic in card.statistics:
        if statistic.kind != "count" and statistic.outcome not in ("glance", "effective", "negative"):
            known = [x for x in (outcome_of(row, statistic.outcome) for row in train) if x is not None]
            assert statistic.prior == pytest.approx(sum(known) / len(known), abs=1e-4)


def test_folds_of_users_without_a_calendar(tmp_path):
    rows = random_rows(seed=2)
    data = prepare_rows(tmp_path / "log", rows, has_calendar_time=False)
    card, targets = DatasetCard.load(str(data)), read_statistics(data)
    users = pq.read_table(data / "users.parquet").to_pylist()
    fold = {user["user"]: user["user_key"] % NUM_FOLDS for user in users}
    train = [row for row in rows if targets[row["user"], row["time"]][0] == "train"]
    for row in rows:
        split, actual = targets[row["user"], row["time"]]
        others = train if split != "train" else [x for x in train if fold[x["user"]] != fold[row["user"]]]
        check(card, actual, row, others)


def test_no_statistic_reads_its_own_or_a_later_day(tmp_path):
    """Changing every outcome of the validation day changes statistics of the test day only."""
    rows = random_rows(seed=3)
    changed_day = local_day(rows[-1]) - 1
    changed = [
        row | {"like_at": None if row["like_at"] else 1.0, "watched": 30.0} if local_day(row) == changed_day else row
        for row in rows
    ]
    split = {"split": {"valid_start": "-2d", "test_start": "-1d"}}
    before = read_statistics(prepare_rows(tmp_path / "before", rows, **split))
    after = read_statistics(prepare_rows(tmp_path / "after", changed, **split))
    for row in rows:
        key = row["user"], row["time"]
        is_equal = np.array_equal(before[key][1], after[key][1])
        assert is_equal == (local_day(row) <= changed_day)


def test_items_have_the_statistics_after_the_log(tmp_path):
    """The statistics of items for ranking equal those of a target on the day after the log."""
    rows = random_rows(seed=4)
    data = prepare_rows(tmp_path / "log", rows)
    card = DatasetCard.load(str(data))
    latest = {row["item"]: row for row in rows}
    for item in pq.read_table(data / ITEMS_FILE).to_pylist():
        check(card, np.array(item["statistics"], np.float16).astype(np.float32), latest[item["item"]], rows)


def test_no_statistics_on_request(tmp_path):
    folder = tmp_path / "log"
    prepare_rows(folder, random_rows(seed=5, count=60))
    config = PrepareConfig(num_partitions=2, statistics=False)
    prepare("generic", str(folder), str(tmp_path / "without"), config, str(folder / "spec.yaml"))
    assert DatasetCard.load(str(tmp_path / "without")).statistics == []
    assert "statistics" not in pq.read_table(tmp_path / "without" / ITEMS_FILE).column_names


def test_positions_across_row_groups(tmp_path):
    """Each impression reads its item's row of a table that is longer than one row group."""
    days = "SELECT item, 0 AS day FROM items, range(item % 7) UNION ALL SELECT item, 1 AS day FROM items"
    connection = connect(1.0, 2, tmp_path / "spill")
    connection.execute(
        f"""CREATE TABLE log AS WITH items AS (SELECT range AS item FROM range(150000))
        SELECT item::VARCHAR AS item_id, day * {DAY_MS} AS ts_ms FROM ({days})"""
    )
    encoding = hash_encoding(FeatureSpec("item_id", "item", "hash", size=2))
    period = period_sql(has_calendar_time=True, zone=TimeZone())
    statistics = PointInTime(connection, "log", [encoding], [], period, True, tmp_path / "statistics")
    with_period = f'(SELECT *, {period} AS "{PERIOD}" FROM log)'
    (position,), (join,) = statistics.positions, statistics.joins()
    rows = connection.sql(f"SELECT item_id, ts_ms, {position} FROM {with_period} AS raw {join}").to_arrow_table()
    assert pq.ParquetFile(tmp_path / "statistics" / "0.parquet").num_row_groups > 1
    table = statistics.append_values(rows)
    earlier = np.where(table["ts_ms"].to_numpy() > 0, table["item_id"].cast(pa.int64()).to_numpy() % 7, 0)
    values = table["statistics"].combine_chunks().flatten().to_numpy()
    np.testing.assert_array_equal(values, np.log1p(earlier.astype(np.float32)).astype(np.float16))
