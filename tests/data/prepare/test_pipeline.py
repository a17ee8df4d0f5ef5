"""Raw logs to datasets: contents of the card and tables, and cleanup after errors."""

import hashlib
import math
from dataclasses import replace

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

from a2gen_rec.config import PrepareConfig
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.features.sessions import GAP_EDGES_S, POSITION_EDGES
from a2gen_rec.data.prepare.pipeline import prepare
from a2gen_rec.data.prepare.splits import boundary_ms
from a2gen_rec.data.schema import SPLITS, Feature, FeedbackRule
from a2gen_rec.data.sources.base import SourceInfo
from a2gen_rec.data.time_zone import TimeZone
from a2gen_rec.errors import ConfigError, DataError, UserError
from a2gen_rec.reporting.console.dataset import summary_tables
from tests.helpers import SAMPLES

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
EPOCH_MS = 1_767_225_600_000
"""Thursday, 1 January 2026: zero of the times below."""
CONFIG = PrepareConfig(num_partitions=3, threads=2, memory_limit_gb=0.5, max_history=3, max_targets=2)

SPEC = {
    "kind": "impressions",
    "columns": {"user": "user", "item": "item", "time": "ts", "dwell_s": "dwell"},
    "actions": {"like": {"flag": "like"}, "comment": {"offset_s": "comment"}},
    "labels": {"click": "click"},
    "features": [
        {"name": "item_id", "level": "item"},
        {"name": "author", "level": "item", "min_count": 2},
        {"name": "length", "level": "item", "kind": "buckets", "edges": [10, 20]},
        {"name": "shop", "level": "item", "kind": "hash", "size": 5},
        {"name": "city", "level": "user", "size": 1},
    ],
    "split": {"valid_start": "8", "test_start": "10"},
}
COLUMNS = ("user", "item", "ts", "dwell", "like", "comment", "click", "author", "length", "shop", "city")
# Users a, b and c; training before 8 ms, test from 10 ms. The second row duplicates the first one.
ROWS = [
    ("a", "i", 1, 5.0, 1, None, 1, "x", 9.0, "s", "k"),
    ("a", "i", 1, 5.0, 1, None, 1, "x", 9.0, "s", "k"),
    ("a", "j", 2, 5.0, 0, 7.0, 0, "y", 10.0, "t", "k"),
    ("a", "i", 5, 1.0, 0, 3.0, None, "x", 25.0, "s", "k"),
    ("b", "i", 3, None, 0, None, 0, "x", 25.0, None, "l"),
    ("b", "new", 8, 2.0, 1, 1.0, 1, "z", math.nan, "s", "l"),
    ("a", "j", 9, 2.0, 0, None, 1, "y", 10.0, "t", "k"),
    ("a", "new", 11, 2.0, 1, None, 0, "x", None, "u", "k"),
    ("c", "i", 12, 2.0, 0, None, 0, "x", 5.0, "s", "m"),
]


def write_log(folder, rows=ROWS, columns=COLUMNS):
    folder.mkdir(exist_ok=True)
    values = dict(zip(columns, zip(*rows, strict=True), strict=True))
    shifts = {"ts": EPOCH_MS, "at": EPOCH_MS // 1000}
    table = pa.table(
        {
            name: [None if x is None else x + shifts[name] for x in values[name]] if name in shifts else values[name]
            for name in values
        }
    )
    pq.write_table(table, folder / "log.parquet")
    return folder


def run(tmp_path, spec=SPEC, config=CONFIG, rows=ROWS, out="out", columns=COLUMNS):
    raw = write_log(tmp_path / "raw", rows, columns)
    split = spec.get("split", {})
    shifted = {key: str(int(value) + EPOCH_MS) if str(value).isdigit() else value for key, value in split.items()}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec | {"split": shifted}, sort_keys=False))
    card = prepare("generic", str(raw), str(tmp_path / out), config, str(tmp_path / "spec.yaml"), "a2gen prepare …")
    return card, tmp_path / out


def windows(out, split):
    files = sorted((out / split).glob("part-*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    for row in rows:
        row["ts_ms"] = [ts_ms - EPOCH_MS for ts_ms in row["ts_ms"]]
    return sorted(rows, key=lambda row: (row["user"], row["ts_ms"][row["first_target"]]))


def digest(out):
    return {
        file.relative_to(out).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(out.rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return run(tmp_path_factory.mktemp("prepared"))


# --- the card ---------------------------------------------------------------------------------------------------


def test_card_counts(prepared):
    card, out = prepared
    assert card == DatasetCard.load(str(out))
    assert card.actions == ["start", "like", "comment", "exit"]
    assert card.timed_actions == ["comment", "exit"]
    assert card.dropped_rows == {"duplicate": 1}
    assert card.command == "a2gen prepare …"
    train, valid, test = (card.splits[name] for name in SPLITS)
    assert (train.windows, train.targets) == (3, 4)
    assert (train.first_ms, train.last_ms) == (EPOCH_MS + 1, EPOCH_MS + 5)
    assert train.positives == {"like": 1, "comment": 2, "click": 1, "glance": 0, "effective": 2}
    assert (valid.windows, valid.targets, test.windows, test.targets) == (2, 2, 2, 2)
    assert valid.positives == {"like": 1, "comment": 1, "click": 2, "glance": 2, "effective": 0}
    assert test.positives == {"like": 1, "comment": 0, "click": 0, "glance": 2, "effective": 0}
    # One click and one watch time in training are unknown.
    assert card.base_rate == {"like": 0.25, "comment": 0.5, "click": 1 / 3, "glance": 0.0, "effective": 2 / 3}
    assert card.median_time_s == {"comment": 5.0, "exit": 5.0}  # exits at 5, 7 (raised by the comment) and 3 s


def test_features_are_learned_from_training_only(prepared):
    card, out = prepared
    assert {feature.name: feature for feature in card.features} == {
        "user_id": Feature("user_id", "user", "vocabulary", 2),  # min_count 2 keeps user a only
        "item_id": Feature("item_id", "item", "vocabulary", 3),
        "author": Feature("author", "item", "vocabulary", 2),
        "length": Feature("length", "item", "buckets", 4, [10.0, 20.0]),
        "shop": Feature("shop", "item", "hash", 5),
        "city": Feature("city", "user", "vocabulary", 2),
        "hour_of_day": Feature("hour_of_day", "context", "vocabulary", 25),
        "day_of_week": Feature("day_of_week", "context", "vocabulary", 8),
        "session_position": Feature("session_position", "session", "buckets", 10, list(POSITION_EDGES)),
        "session_gap": Feature("session_gap", "session", "buckets", 14, list(GAP_EDGES_S)),
        "previous_feedback": Feature("previous_feedback", "session", "code", 6),
        "feedback": Feature("feedback", "outcome", "code", 6),
    }
    vocabulary = pq.read_table(out / "vocabulary" / "item_id.parquet")
    new = {"admitted": 0, "reused": False}
    assert vocabulary.to_pylist() == [
        {"value": "i", "row": 1, "count": 3, "last_ms": EPOCH_MS + 12, **new},
        {"value": "j", "row": 2, "count": 1, "last_ms": EPOCH_MS + 9, **new},
    ]
    assert vocabulary.schema.types == [pa.string(), *[pa.int64()] * 4, pa.bool_()]
    assert pq.read_table(out / "vocabulary" / "city.parquet")["value"].to_pylist() == ["k"]
    assert pq.read_table(out / "vocabulary" / "day_of_week.parquet")["value"].to_pylist() == ["3"]  # a Thursday


def test_items_users_and_statistics(prepared):
    _, out = prepared
    items = {row["item"]: row for row in pq.read_table(out / "items.parquet").to_pylist()}
    assert sorted(items) == ["i", "j", "new"]
    assert [items["i"][name] for name in ("item_id", "author", "length")] == [1, 1, 1]  # latest length is 5.0
    assert [items["new"][name] for name in ("item_id", "author", "length")] == [0, 1, 0]
    users = pq.read_table(out / "users.parquet").to_pylist()
    assert [(row["user"], row["user_id"], row["city"]) for row in users] == [("a", 1, 1), ("b", 0, 0), ("c", 0, 0)]
    assert {row["user"]: row["user_key"] for row in users} == {
        row["user"]: row["user_key"] for name in SPLITS for row in windows(out, name)
    }
    assert pq.read_table(out / "item_statistics.parquet").to_pylist() == [
        {"item_id": 1, "impressions": 3, "like": 1, "comment": 1, "click": 1, "glance": 0, "effective": 1},
        {"item_id": 2, "impressions": 1, "like": 0, "comment": 1, "click": 0, "glance": 0, "effective": 1},
    ]


def test_items_and_users_have_the_latest_known_values(tmp_path):
    nan = math.nan
    #        user item ts dwell like comment click author length shop city
    rows = [
        ("a", "i", 1, 1.0, 0, None, 0, "x", 15.0, "s", "k"),
        ("a", "j", 2, 1.0, 0, None, 0, "x", nan, None, "k"),
        ("a", "i", 3, 1.0, 0, None, 0, "y", nan, None, None),
        ("a", "i", 9, 1.0, 0, None, 0, None, None, None, None),
        ("a", "j", 11, 1.0, 0, None, 0, None, 25.0, None, None),
        ("b", "j", 11, 2.0, 0, None, 0, None, None, None, None),
        ("b", "i", 4, 1.0, 0, None, 0, "y", nan, None, None),
        ("b", "j", 5, 1.0, 0, None, 0, "x", nan, None, None),
    ]
    spec = SPEC | {"features": [*SPEC["features"][:1], *({**x, "min_count": 1} for x in SPEC["features"][1:4]),
                                {"name": "city", "level": "user"}]}  # fmt: skip
    _, out = run(tmp_path, spec, rows=rows)
    items = {row["item"]: row for row in pq.read_table(out / "items.parquet").to_pylist()}
    authors = {row["value"]: row["row"] for row in pq.read_table(out / "vocabulary" / "author.parquet").to_pylist()}
    assert (items["i"]["author"], items["j"]["author"]) == (authors["y"], authors["x"])
    assert (items["i"]["length"], items["j"]["length"]) == (2, 3)
    assert items["i"]["shop"] > 0
    assert items["j"]["shop"] == 0, "no value is known"
    users = {row["user"]: row["city"] for row in pq.read_table(out / "users.parquet").to_pylist()}
    assert users == {"a": 1, "b": 0}


def test_windows_by_hand(prepared):
    _, out = prepared
    first, second, third = windows(out, "train")
    assert (first["user"], first["item_id"], first["first_target"]) == ("a", [1, 2], 0)
    assert first["action"] == [[0, 1, 3], [0, 2, 3]]
    assert repr(first["action_offset_s"]) == "[[0.0, nan, 5.0], [0.0, 7.0, 7.0]]"
    assert first["dwell_s"] == [5.0, 7.0]
    assert first["length"] == [1, 2]
    assert (second["ts_ms"], second["first_target"]) == ([1, 2, 5], 2)
    assert repr(second["label_click"]) == "[1.0, 0.0, nan]"
    assert (third["user"], third["city"], third["shop"]) == ("b", 0, [0])
    assert repr(third["dwell_s"]) == "[nan]"
    valid = windows(out, "valid")
    assert [(row["user"], row["ts_ms"], row["first_target"]) for row in valid] == [
        ("a", [1, 2, 5, 9], 3),
        ("b", [3, 8], 1),
    ]
    assert valid[1]["item_id"] == [1, 0]  # "new" was not in training
    test = windows(out, "test")
    assert [(row["user"], row["ts_ms"], row["first_target"]) for row in test] == [
        ("a", [1, 2, 5, 9, 11], 4),  # history of 3 and the impression before it
        ("c", [12], 0),
    ]


def render_summary(card):
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in summary_tables(card):
        console.print(table)
    return console.export_text()


def test_summary_shows_counts(prepared):
    text = render_summary(prepared[0])
    for part in ("dropped: duplicate", "kept as impressions", "33.33%", "item_id", "vocabulary"):
        assert part in text
    levels = [line.split() for line in text[text.index("feedback levels") : text.index("features")].splitlines()]
    assert ["unknown", "25.00%", "0.00%", "0.00%"] in levels
    assert ["glance", "0.00%", "100.00%", "100.00%"] in levels
    assert not any(line[:1] == ["complete"] for line in levels)  # requires durations


# --- feedback and sessions ---------------------------------------------------------------------------------------

WATCHED = {
    "kind": "impressions",
    "time_unit": "s",
    "columns": {"user": "user", "item": "item", "time": "at", "dwell_s": "dwell"},
    "actions": {"like": {"flag": "like"}, "hate": {"flag": "hate"}},
    "features": [{"name": "length", "level": "item", "kind": "buckets"}],
    "duration_feature": "length",
    "negative_actions": ["hate"],
    "split": {"valid_start": "10000000", "test_start": "20000000"},
}
WATCHED_COLUMNS = ("user", "item", "at", "dwell", "like", "hate", "length")
# Training watch times are 10, 1, 8 and 4 s, all for videos of 10 s; the median is 6 s.
WATCHED_ROWS = [
    ("u", "a", 0, 10.0, 0, 0, 10.0),  # complete
    ("u", "b", 20, 1.0, 0, 0, 10.0),
    ("u", "c", 21, 8.0, 0, 1, 10.0),  # effective watch time, but hated
    ("u", "d", 25, 4.0, 0, 0, 10.0),  # starts before c ends
    ("u", "e", 3000, None, 1, 0, 10.0),  # new session
    ("u", "f", 10_000, 6.0, 0, 0, None),
    ("u", "g", 20_000, 2.0, 0, 0, 1.9),
]


def run_watched(tmp_path, rows=WATCHED_ROWS, out="out", **change):
    return run(tmp_path, WATCHED | change, PrepareConfig(num_partitions=2), rows, out, WATCHED_COLUMNS)


def test_feedback_by_hand(tmp_path):
    card, out = run_watched(tmp_path)
    assert card == DatasetCard.load(str(out))
    assert card.feedback == FeedbackRule(3.0, ["hate"], "length", [10.0], [6.0, 6.0, 6.0])
    assert card.negative_actions == ["hate"]
    assert (card.objectives, card.session_gap_s) == (["glance", "effective", "negative"], 1800.0)
    assert card.base_rate == {"like": 0.2, "hate": 0.2, "glance": 0.25, "effective": 0.5, "negative": 0.2}
    names = ("unknown", "negative", "glance", "partial", "effective", "complete")
    levels = [card.splits[name].feedback for name in SPLITS]
    counted = ((1, 1, 1, 1, 0, 1), (0, 0, 0, 0, 1, 0), (0, 0, 0, 0, 0, 1))
    assert levels == [dict(zip(names, counts, strict=True)) for counts in counted]
    (window,) = windows(out, "test")
    assert window["first_target"] == 6
    assert window["feedback"] == [5, 2, 1, 3, 0, 4, 5]
    assert window["watch_ratio"] == [11, 2, 9, 5, 0, 0, 11]
    assert repr(window["objective_glance"]) == "[0.0, 1.0, 0.0, 0.0, nan, 0.0, 0.0]"
    assert repr(window["objective_effective"]) == "[1.0, 0.0, 1.0, 0.0, nan, 1.0, 1.0]"
    assert window["objective_negative"] == [0, 0, 1, 0, 0, 0, 0]
    # Sessions continue across splits; gaps over half an hour end them. Gaps: 20, 1, 4, 2975 s.
    assert window["session_position"] == [1, 2, 3, 4, 1, 1, 1]
    assert window["session_gap"] == [0, 4, 2, 3, 9, 10, 10]
    assert window["previous_feedback"] == [0, 5, 2, 0, 3, 0, 4]


def test_thresholds_use_training_targets_only(tmp_path):
    card, _ = run_watched(tmp_path)
    later = [(*row[:3], 0.5 * row[2], 1, 1, 30.0) if row[2] >= 10_000 else row for row in WATCHED_ROWS]
    other, _ = run_watched(tmp_path, [*later, ("v", "a", 15_000, 3.0, 1, 1, 5.0)], "other")
    assert other.splits["valid"].feedback != card.splits["valid"].feedback
    for name in ("feedback", "features", "base_rate", "median_time_s"):
        assert getattr(other, name) == getattr(card, name)
    changed = [(*row[:3], 9.0, *row[4:]) if row[1] == "b" else row for row in WATCHED_ROWS]
    assert run_watched(tmp_path, changed, "changed")[0].feedback.median_watch_s == [8.5] * 3


def test_feedback_without_durations_or_negative_actions(tmp_path):
    card, out = run_watched(tmp_path, duration_feature="", negative_actions=[])
    assert card.feedback == FeedbackRule(3.0, [], "", [], [6.0])
    assert card.objectives == ["glance", "effective"]
    assert [feature.name for feature in card.features_at("outcome")] == ["feedback"]
    assert windows(out, "test")[0]["feedback"] == [4, 2, 4, 3, 0, 4, 2]


def test_no_feedback_levels_without_watch_times(tmp_path):
    card, _ = run(tmp_path, BARE, rows=log_of(7, 20), columns=BARE_COLUMNS)
    assert (card.feedback, card.objectives, card.features_at("outcome")) == (None, [], [])
    assert [feature.name for feature in card.features_at("session")] == ["session_position", "session_gap"]
    assert {name: split.feedback for name, split in card.splits.items()} == {name: {} for name in SPLITS}
    assert "the log records no watch times" in render_summary(card)


def test_keeps_negative_actions_without_watch_times(tmp_path):
    columns = {name: column for name, column in WATCHED["columns"].items() if name != "dwell_s"}
    card, out = run_watched(tmp_path, columns=columns)
    assert (card.feedback, card.objectives, card.negative_actions) == (None, [], ["hate"])
    assert DatasetCard.load(str(out)) == card


def test_rejects_cards_with_unknown_negative_actions(tmp_path):
    card, _ = run_watched(tmp_path)
    raw = card.to_dict()
    with pytest.raises(DataError, match="field 'negative_actions': must be among the actions"):
        DatasetCard.from_dict(raw | {"negative_actions": ["loathe"]})
    del raw["negative_actions"]
    with pytest.raises(DataError, match="invalid dataset card"):
        DatasetCard.from_dict(raw)


def test_no_session_features_without_elapsed_time(tmp_path):
    card, out = run_watched(tmp_path, has_calendar_time=False)
    assert card.features_at("session") == []
    assert "session_gap" not in windows(out, "test")[0]
    assert windows(out, "test")[0]["feedback"] == [5, 2, 1, 3, 0, 4, 5]


# --- splits -----------------------------------------------------------------------------------------------------


def log_of(users, impressions):
    """Return rows of a minimal log: every user has an impression of item ``n`` at time ``10 n``."""
    return [(f"u{user}", f"i{n}", 10 * n) for user in range(users) for n in range(impressions)]


BARE = {"kind": "impressions", "columns": {"user": "user", "item": "item", "time": "ts"}}
BARE_COLUMNS = ("user", "item", "ts")


def target_times(out, split):
    return {
        user: [ts for row in windows(out, split) if row["user"] == user for ts in row["ts_ms"][row["first_target"] :]]
        for user in {row["user"] for row in windows(out, split)}
    }


def test_time_split_by_fraction_does_not_overlap(tmp_path):
    spec = BARE | {"split": {"valid_fraction": 0.2, "test_fraction": 0.1}}
    card, out = run(tmp_path, spec, rows=log_of(7, 20), columns=BARE_COLUMNS)
    train, valid, test = (card.splits[name] for name in SPLITS)
    assert (train.targets, valid.targets, test.targets) == (7 * 14, 7 * 4, 7 * 2)
    assert train.last_ms < valid.first_ms <= valid.last_ms < test.first_ms
    times = [target_times(out, name) for name in SPLITS]
    assert [times[0]["u3"] + times[1]["u3"] + times[2]["u3"]] == [[10 * n for n in range(20)]]


def test_ties_at_a_boundary_share_a_split(tmp_path):
    rows = [("u", f"i{n}", 0 if n < 3 else 50 if n < 8 else 60) for n in range(10)]
    card, _ = run(
        tmp_path, BARE | {"split": {"valid_fraction": 0.2, "test_fraction": 0.2}}, rows=rows, columns=BARE_COLUMNS
    )
    assert [card.splits[name].targets for name in SPLITS] == [3, 5, 2]


DAYS = [("u", f"i{n}", day * DAY_MS) for n, day in enumerate([0] * 3 + [1] * 7)]
FAR = [*((f"u{n % 3}", f"i{n}", n * DAY_MS) for n in range(9)), ("u", "i", 47_700 * DAY_MS)]


@pytest.mark.parametrize(
    ("rows", "split", "reason"),
    [
        (DAYS, {"valid_fraction": 0.2, "test_fraction": 0.2}, "no impressions in split valid: impressions start from "
         "2026-01-01T00:00:00.00:00 to 2026-01-02T00:00:00.00:00, validation begins at .*"
         "too many at one time; set --valid-start and --test-start"),
        (FAR, {"valid_start": "-2d", "test_start": "-1d"}, "in split valid: .* to 2156-.*; set other --valid-start"),
        (FAR, {"valid_start": "2200-01-01", "test_start": "2201-01-01"}, "in split valid and test: .* begins at 2200-"),
        ([("a", "i", 1), ("b", "i", 2), ("b", "j", 3)], {"method": "last"}, "no user has the 3 impressions .* set --v"),
        ([("u", f"i{n}", n) for n in range(4)], {}, "in split valid and test: .*too few"),
    ],
)  # fmt: skip
def test_rejects_empty_splits(tmp_path, rows, split, reason):
    with pytest.raises(DataError, match=reason):
        run(tmp_path, BARE | {"split": split}, rows=rows, columns=BARE_COLUMNS)
    assert not (tmp_path / "out").exists()


def test_a_fraction_of_0_may_leave_a_split_empty(tmp_path):
    spec = BARE | {"split": {"valid_fraction": 0.5, "test_fraction": 0.0}}
    card, _ = run(tmp_path, spec, rows=[("u", f"i{n}", n) for n in range(4)], columns=BARE_COLUMNS)
    assert [card.splits[name].targets for name in SPLITS] == [2, 2, 0]


def test_last_split_takes_last_impressions_per_user(tmp_path):
    spec = BARE | {"split": {"method": "last", "valid_fraction": 0.1, "test_fraction": 0.25}}
    rows = [*log_of(1, 10), ("few", "i", 1), ("few", "j", 2), ("three", "i", 1), ("three", "j", 2), ("three", "k", 3)]
    _, out = run(tmp_path, spec, rows=rows, columns=BARE_COLUMNS)
    train, valid, test = (target_times(out, name) for name in SPLITS)
    assert train == {"u0": [0, 10, 20, 30, 40, 50], "few": [1, 2], "three": [1]}
    assert valid == {"u0": [60], "three": [2]}
    assert test == {"u0": [70, 80, 90], "three": [3]}


def test_settings_override_the_source_s_split(tmp_path):
    rows = [("u", f"i{day}", day * DAY_MS + 20 * HOUR_MS) for day in range(10)]
    spec = BARE | {"utc_offset_hours": 8}
    dates = PrepareConfig(num_partitions=1, valid_start="2026-01-04", test_start="2026-01-06 04:00")
    card, _ = run(tmp_path, spec, dates, rows, "dates", BARE_COLUMNS)
    # The impression of day n is at 04:00 of the local day n + 2.
    assert [card.splits[name].targets for name in SPLITS] == [2, 2, 6]
    last_days = PrepareConfig(num_partitions=1, valid_start="-3d", test_start="-1d")
    card, _ = run(tmp_path, spec, last_days, rows, "last", BARE_COLUMNS)
    assert [card.splits[name].targets for name in SPLITS] == [7, 2, 1]
    fractions = PrepareConfig(num_partitions=1, valid_fraction=0.3, test_fraction=0.2)
    card, _ = run(tmp_path, spec, fractions, rows, "fractions", BARE_COLUMNS)
    assert [card.splits[name].targets for name in SPLITS] == [5, 3, 2]


def test_reads_a_part_of_the_log(tmp_path):
    """Days are those of the log's time zone; the end is excluded; the part equals a log of these rows only."""
    rows = [("u", f"i{day}", day * DAY_MS + 20 * HOUR_MS) for day in range(10)]
    spec = BARE | {"utc_offset_hours": 8}
    part = PrepareConfig(num_partitions=1, start="2026-01-04", end="2026-01-08", train_only=True)
    card, out = run(tmp_path, spec, part, rows, "part", BARE_COLUMNS)
    # The impression of day n is at 04:00 of the local day n + 2.
    assert target_times(out, "train") == {"u": [rows[n][2] for n in (2, 3, 4, 5)]}
    assert [card.splits[name].targets for name in SPLITS] == [4, 0, 0]
    whole = PrepareConfig(num_partitions=1, train_only=True)
    alone, _ = run(tmp_path, spec, whole, rows[2:6], "alone", BARE_COLUMNS)
    assert card.identity.data_digest == alone.identity.data_digest
    for limits, times in (({"start": "2026-01-10"}, rows[8:]), ({"end": str(EPOCH_MS + rows[1][2])}, rows[:1])):
        _, out = run(tmp_path, spec, replace(whole, **limits), rows, str(limits), BARE_COLUMNS)
        assert target_times(out, "train") == {"u": [row[2] for row in times]}


@pytest.mark.parametrize(
    ("change", "spec", "error", "message"),
    [
        ({"start": "2027-01-01"}, {}, DataError, "no usable impression in 0 rows from 2027-01-01"),
        ({"end": "soon"}, {}, ConfigError, "end 'soon' is not an ISO datetime"),
        ({"start": "-2d"}, {}, ConfigError, "start '-2d' is not an ISO datetime"),
        ({"start": "5"}, {"has_calendar_time": False}, ConfigError, "start '5', but generic has no calendar time"),
        (
            {"train_only": True, "valid_fraction": 0.1},
            {},
            ConfigError,
            "train_only and valid_fraction exclude each other",
        ),
    ],
)
def test_rejects_invalid_parts(tmp_path, change, spec, error, message):
    rows = [("u", f"i{day}", day * DAY_MS) for day in range(10)]
    with pytest.raises(error, match=message):
        run(tmp_path, BARE | spec, PrepareConfig(num_partitions=1, **change), rows, columns=BARE_COLUMNS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "offset_hours", "expected"),
    [
        ("2026-01-02", 0, DAY_MS),
        ("2026-01-02 08:00", 8, DAY_MS),
        ("2026-01-02T00:00:00+00:00", 8, DAY_MS),
        (str(EPOCH_MS + 123), 8, 123),
        ("20260103", 8, 2 * DAY_MS - 8 * HOUR_MS),
        ("-1d", 0, 4 * DAY_MS),
        ("-2d", 8, 3 * DAY_MS - 8 * HOUR_MS),
    ],
)
def test_boundaries(value, offset_hours, expected):
    info = SourceInfo("log", (), (), time_zone=TimeZone(utc_offset_hours=offset_hours))
    end_ms = EPOCH_MS + 4 * DAY_MS + HOUR_MS
    assert boundary_ms("test_start", value, info, end_ms) == EPOCH_MS + expected


def test_digits_are_no_date_without_calendar_time():
    info = SourceInfo("log", (), (), has_calendar_time=False)
    assert boundary_ms("test_start", "20240520", info, end_ms=0) == 20_240_520


@pytest.mark.parametrize("value", ["20241350", "0", "1714521600"])
def test_boundaries_of_a_calendar_are_not_before_2000(value):
    with pytest.raises(ConfigError, match=rf"test_start '{value}' is a number of milliseconds before the year 2000"):
        boundary_ms("test_start", value, SourceInfo("log", (), ()), end_ms=0)


def test_boundaries_in_microseconds():
    with pytest.raises(
        ConfigError, match="valid_start '1714694400000000' is after the year 9999; expected milliseconds"
    ):
        boundary_ms("valid_start", "1714694400000000", SourceInfo("log", (), ()), end_ms=0)
    order = SourceInfo("log", (), (), has_calendar_time=False)
    assert boundary_ms("valid_start", "1714694400000000", order, end_ms=0) == 1_714_694_400_000_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"valid_start": "5"}, "must be set together"),
        ({"valid_start": "2026-01-09", "test_start": "2026-01-05"}, "must not be after test_start"),
        ({"valid_start": "soon", "test_start": "later"}, "'soon' is not an ISO datetime"),
        ({"valid_fraction": 0.6, "test_fraction": 0.5}, "must be at least 0 and sum to less than 1"),
        ({"num_partitions": 0}, "num_partitions 0 must be at least 1"),
        ({"memory_limit_gb": 0.0}, "memory_limit_gb 0.0 must be positive"),
    ],
)
def test_rejects_invalid_settings(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, config=PrepareConfig(**({"num_partitions": 2} | change)))
    assert sorted(path.name for path in tmp_path.iterdir()) in ([], ["raw", "spec.yaml"])


# --- full datasets --------------------------------------------------------------------------------------------------


def many_rows():
    rows = []
    for n in range(1500):
        user, item = f"u{n * 7 % 41}", f"i{n * 13 % 97}"
        extra = (n % 9 * 1.5, n % 5 == 0, n % 7 / 2 if n % 3 == 0 else None, n % 2, f"au{n % 11}", float(n % 50))
        rows.append((user, item, n * 1000 % 70_000, *extra, f"s{n % 23}", f"c{n % 4}"))
    return rows


def test_same_input_gives_same_bytes(tmp_path):
    spec = SPEC | {"split": {"valid_fraction": 0.1, "test_fraction": 0.1}}
    rows = many_rows()
    run(tmp_path, spec, rows=rows, out="first")
    run(tmp_path, spec, rows=rows[::-1], out="second", config=PrepareConfig(**(vars(CONFIG) | {"threads": 1})))
    first, second = digest(tmp_path / "first"), digest(tmp_path / "second")
    assert first == second
    assert len(first) > 10


def test_all_columns_but_statistics_have_a_dictionary(prepared):
    file = next((prepared[1] / "train").glob("*.parquet"))
    group = pq.read_metadata(file).row_group(0)
    without = [
        column.path_in_schema
        for column in map(group.column, range(group.num_columns))
        if "RLE_DICTIONARY" not in column.encodings
    ]
    assert without == ["statistics.list.element"]


def test_mended_labels_with_the_same_counts_change_only_the_digest(tmp_path):
    spec = SPEC | {"split": {"valid_fraction": 0.1, "test_fraction": 0.1}}
    rows = [list(row) for row in many_rows()]
    first, _ = run(tmp_path, spec, rows=rows, out="first")
    click = COLUMNS.index("click")
    one, zero = (next(row for row in rows if row[2] < 30_000 and row[click] == value) for value in (1, 0))
    one[click], zero[click] = 0, 1
    second, _ = run(tmp_path, spec, rows=rows, out="second")
    assert replace(second, identity=first.identity) == first
    assert second.identity.lineage != first.identity.lineage
    again, _ = run(tmp_path, spec, rows=rows[::-1], out="elsewhere")
    assert again == second


def test_every_impression_is_a_target_once_for_any_number_of_partitions(tmp_path):
    spec = SPEC | {"split": {"valid_fraction": 0.1, "test_fraction": 0.1}}
    rows = many_rows()
    expected = sorted({(row[0], row[2]) for row in rows for _ in [row[1]]})
    cards = []
    for partitions in (1, 7):
        config = PrepareConfig(num_partitions=partitions, max_history=5, max_targets=4)
        card, out = run(tmp_path, spec, config, rows, f"out{partitions}")
        cards.append(card)
        targets = [
            (row["user"], ts, item)
            for name in SPLITS
            for row in windows(out, name)
            for ts, item in list(zip(row["ts_ms"], row["item_id"], strict=True))[row["first_target"] :]
        ]
        assert len(targets) == len({(row[0], row[1], row[2]) for row in rows})
        assert sorted({(user, ts) for user, ts, _ in targets}) == expected
    assert cards[0].splits == cards[1].splits
    assert cards[0].features == cards[1].features


def test_windows_of_a_user_are_in_one_partition(tmp_path):
    _, out = run(tmp_path, SPEC | {"split": {"valid_fraction": 0.1, "test_fraction": 0.1}}, rows=many_rows())
    for name in SPLITS:
        for file in (out / name).glob("*.parquet"):
            table = ds.dataset(file).to_table(columns=["user_key"])
            assert {key % CONFIG.num_partitions for key in table["user_key"].to_pylist()} == {int(file.stem[-5:])}


def test_simultaneous_impressions_are_sorted_by_item(tmp_path):
    rows = [*(("u", f"i{n * 7 % 40:02d}", 1) for n in range(40)), ("u", "j", 8), ("u", "j", 9)]
    spec = BARE | {"features": [{"name": "item_id", "level": "item"}], "split": {"valid_start": "8", "test_start": "9"}}
    config = PrepareConfig(num_partitions=1)
    _, out = run(tmp_path, spec, config, rows, columns=BARE_COLUMNS)
    assert windows(out, "train")[0]["item_id"] == list(range(1, 41))


def test_keeps_the_longest_duplicate(tmp_path):
    columns = ("user", "item", "ts", "dwell")
    spec = BARE | {"columns": BARE["columns"] | {"dwell_s": "dwell"}, "split": {"valid_start": "8", "test_start": "9"}}
    rows = [("u", "i", 1, None), ("u", "i", 1, 2.0), ("u", "i", 1, 4.0), ("u", "j", 1, 3.0)]
    rows += [("u", "j", 8, 1.0), ("u", "j", 9, 1.0)]
    card, out = run(tmp_path, spec, rows=rows, columns=columns)
    assert card.dropped_rows == {"duplicate": 2}
    assert windows(out, "train")[0]["dwell_s"] == [4.0, 3.0]


def test_min_count_overrides_the_source(tmp_path):
    card, _ = run(tmp_path, config=PrepareConfig(num_partitions=1, min_count=3))
    cardinality = {feature.name: feature.cardinality for feature in card.features}
    assert (cardinality["item_id"], cardinality["user_id"]) == (2, 2)
    assert card.vocabularies["hour_of_day"].values == 1


# --- errors -----------------------------------------------------------------------------------------------------


def test_rejects_a_non_empty_directory(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "existing").write_text("keep")
    with pytest.raises(UserError, match="out: output directory is not empty"):
        run(tmp_path)
    assert (tmp_path / "out" / "existing").read_text() == "keep"


def test_writes_to_an_empty_directory(tmp_path):
    (tmp_path / "out").mkdir()
    _, out = run(tmp_path)
    assert DatasetCard.load(str(out)).name == "generic"


def test_errors_leave_nothing_behind(tmp_path):
    invalid_rows = [*ROWS, ("a", "i", None, 5.0, 1, None, 1, "x", 9.0, "s", "k")]
    with pytest.raises(DataError, match=r"log.parquet, row 10, field 'ts': is missing"):
        run(tmp_path, rows=invalid_rows, out="new/deep/out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw", "spec.yaml"]


def test_damaged_parquet_leaves_nothing_behind(tmp_path):
    raw = write_log(tmp_path / "raw", many_rows())
    file = raw / "log.parquet"
    content = bytearray(file.read_bytes())
    content[100:2000] = bytes(1900)
    file.write_bytes(bytes(content))
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(SPEC | {"split": {"method": "last"}}))
    with pytest.raises(DataError, match=r"log.parquet") as caught:
        prepare("generic", str(raw), str(tmp_path / "out"), CONFIG, str(tmp_path / "spec.yaml"))
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw", "spec.yaml"]


def test_rejects_logs_without_training_impressions(tmp_path):
    with pytest.raises(DataError, match=r"no training impressions before \d+ ms"):
        run(tmp_path, config=PrepareConfig(valid_start="2025-12-01", test_start="2025-12-02"))
    with pytest.raises(UserError, match="not found"):
        prepare("jd", str(tmp_path / "nowhere"), str(tmp_path / "out"), CONFIG)


def test_rejects_logs_without_usable_rows(tmp_path):
    (tmp_path / "x_rec_tmall_log.csv").write_text("item_id,user_id,action,vtime\ni,u,cart,2014/9/18 9:00\n")
    with pytest.raises(DataError, match=r"no usable impression in 1 rows .*cart with no open impression"):
        prepare("rec_tmall", str(tmp_path), str(tmp_path / "out"), CONFIG)
    assert not (tmp_path / "out").exists()


def test_rejects_empty_logs(tmp_path):
    header = "item_id,user_id,action,vtime\n"
    (tmp_path / "x_rec_tmall_log.csv").write_text(header)
    with pytest.raises(DataError, match="no usable impression in 0 rows"):
        prepare("rec_tmall", str(tmp_path), str(tmp_path / "out"), CONFIG)


def test_rejects_reserved_and_duplicate_names(tmp_path):
    duplicate = SPEC | {"features": [*SPEC["features"], {"name": "author", "level": "item"}]}
    with pytest.raises(DataError, match="duplicate name 'author'"):
        run(tmp_path, duplicate)
    reserved = SPEC | {"features": [{"name": "ts_ms", "level": "context", "column": "shop"}]}
    with pytest.raises(DataError, match="reserved name 'ts_ms'"):
        run(tmp_path, reserved)
    for name in ("glance", "effective", "negative", "watch_time", "watch", "ensemble"):
        for kind, column in (("labels", "click"), ("actions", {"flag": "like"})):
            with pytest.raises(DataError, match=f"reserved name '{name}'"):
                run(tmp_path, SPEC | {kind: {name: column}})
    only_case = SPEC | {"actions": {"like": {"flag": "like"}, "Like": {"offset_s": "comment"}}}
    with pytest.raises(DataError, match="duplicate name 'Like': differs from 'like' only in case"):
        run(tmp_path, only_case)
    calendar = SPEC | {"features": [*SPEC["features"], {"name": "Hour_of_day", "level": "context", "column": "shop"}]}
    with pytest.raises(DataError, match="differs from 'Hour_of_day' only in case"):
        run(tmp_path, calendar)


@pytest.mark.parametrize(
    ("column", "meaning"),
    [("dwell", "watch time"), ("Dwell", "watch time"), ("like", "action 'like'"), ("comment", "action 'comment'"),
     ("CLICK", "label 'click'")],
)  # fmt: skip
def test_rejects_features_that_read_an_outcome(tmp_path, column, meaning):
    spec = SPEC | {"features": [*SPEC["features"], {"name": "x", "level": "context", "column": column}]}
    with pytest.raises(DataError, match=f"spec.yaml, field 'x': column '{column}' is the {meaning} of the same"):
        run(tmp_path, spec)
    assert not (tmp_path / "out").exists()


# --- public samples ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SAMPLES.exists(), reason="public samples not found")
def test_jd_sample(tmp_path):
    card = prepare("jd", str(SAMPLES / "jd-micro-behaviors"), str(tmp_path / "out"), PrepareConfig(num_partitions=2))
    assert [card.splits[name].targets for name in SPLITS] == [37_045, 4_742, 4_742]
    assert card.splits["train"].positives["comments"] == 6_404
    assert card.timed_actions == ["comments", "specification", "page_bottom", "cart", "order", "exit"]
    assert not card.has_calendar_time


@pytest.mark.skipif(not SAMPLES.exists(), reason="public samples not found")
def test_kuairand_sample(tmp_path):
    card = prepare("kuairand", str(SAMPLES / "KuaiRand-Pure"), str(tmp_path / "out"), PrepareConfig(num_partitions=2))
    assert card.dropped_rows == {"duplicate": 4_739}
    assert [card.splits[name].targets for name in SPLITS] == [131_352, 18_536, 17_044]
    assert card.timed_actions == ["exit"]
    assert card.objectives == ["glance", "effective", "negative"]
    assert card.splits["train"].positives["negative"] == card.splits["train"].positives["hate"] == 105
