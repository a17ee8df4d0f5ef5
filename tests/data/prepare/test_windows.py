"""Windows against a per-user reference with Python loops."""

import math

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from a2gen_rec.data.prepare.windows import WindowSpec, action_lists, build_windows, window_bounds
from a2gen_rec.data.schema import Feature
from tests.helpers.properties import examples

ACTIONS = ("like", "comment", "follow")
FEATURES = (
    Feature("country", "user", "vocabulary", 9),
    Feature("item_id", "item", "vocabulary", 99),
    Feature("tab", "context", "vocabulary", 9),
)

offsets = st.one_of(st.none(), st.just(math.nan), st.integers(0, 5).map(float))
impression = st.fixed_dictionaries(
    {
        **{f"at_{name}": offsets for name in ACTIONS},
        "wait": st.integers(0, 9),
        "extra_s": st.one_of(st.just(math.nan), st.integers(0, 9).map(float)),
        "label_click": st.one_of(st.none(), st.sampled_from([0.0, 1.0])),
        "objective_glance": st.one_of(st.none(), st.sampled_from([0.0, 1.0])),
        "split": st.integers(0, 2),
        "row of item_id": st.integers(0, 98),
        "row of tab": st.integers(0, 8),
        "row of country": st.integers(0, 8),
    }
)
users = st.lists(st.lists(impression, min_size=1, max_size=12), max_size=6)


def rows_of(drawn):
    """Return the drawn users as sorted staged impressions."""
    rows = []
    for user, impressions in enumerate(drawn):
        splits = sorted(one["split"] for one in impressions)
        ts_ms = 0
        for one, split in zip(impressions, splits, strict=True):
            ts_ms += one["wait"]
            known = [one[f"at_{name}"] for name in ACTIONS]
            latest = max([at for at in known if at is not None and not math.isnan(at)], default=0.0)
            row = {name: value for name, value in one.items() if name not in ("wait", "extra_s")}
            dwell = {"dwell_s": latest + one["extra_s"]}
            rows.append(row | dwell | {"user_id": f"u{user}", "user_key": user, "ts_ms": ts_ms, "split": split})
    return rows


def table_of(rows):
    floats = ["dwell_s", "label_click", "objective_glance", *(f"at_{name}" for name in ACTIONS)]
    integers = ["user_key", "ts_ms", "row of item_id", "row of tab", "row of country"]
    schema = pa.schema(
        [("user_id", pa.string()), ("split", pa.int8())]
        + [(name, pa.float32()) for name in floats]
        + [(name, pa.int64()) for name in integers]
    )
    return pa.Table.from_pylist(rows, schema=schema)


def sequence(row):
    """Return the ordered actions of one impression (reference)."""
    timed, untimed = [], []
    for code, name in enumerate(ACTIONS, start=1):
        at = row[f"at_{name}"]
        if at is not None:
            (untimed if math.isnan(at) else timed).append((at, code))
    ordered = sorted(timed) + untimed
    return [0, *(code for _, code in ordered), len(ACTIONS) + 1], [0.0, *(at for at, _ in ordered), row["dwell_s"]]


def reference_windows(rows, split, max_history, max_targets):
    windows = []
    for user in sorted({row["user_id"] for row in rows}):
        user_rows = [row for row in rows if row["user_id"] == user]
        indices = [index for index, row in enumerate(user_rows) if row["split"] == split]
        for start in range(0, len(indices), max_targets):
            first, last = indices[start], indices[min(start + max_targets, len(indices)) - 1]
            window_start = max(0, first - max_history)
            inside = user_rows[window_start : last + 1]
            windows.append(
                {
                    "user": user,
                    "user_key": user_rows[0]["user_key"],
                    "country": user_rows[first]["row of country"],
                    "item_id": [row["row of item_id"] for row in inside],
                    "tab": [row["row of tab"] for row in inside],
                    "ts_ms": [row["ts_ms"] for row in inside],
                    "dwell_s": [row["dwell_s"] for row in inside],
                    "action": [sequence(row)[0] for row in inside],
                    "action_offset_s": [sequence(row)[1] for row in inside],
                    **{
                        name: [math.nan if row[name] is None else row[name] for row in inside]
                        for name in ("label_click", "objective_glance")
                    },
                    "first_target": first - window_start,
                }
            )
    return windows


@examples(60)
@given(users, st.integers(0, 5), st.integers(1, 4), st.integers(1, 3))
def test_windows_equal_the_reference(drawn, max_history, max_targets, windows_per_table):
    rows = rows_of(drawn)
    spec = WindowSpec(FEATURES, ACTIONS, ("click",), ("glance",), (), max_history, max_targets, windows_per_table)
    targets = 0
    for split in range(3):
        tables = list(build_windows(table_of(rows), spec, split))
        assert all(0 < table.num_rows <= windows_per_table for table in tables)
        windows = [window for table in tables for window in table.to_pylist()]
        assert repr(windows) == repr(reference_windows(rows, split, max_history, max_targets))  # repr: nan equals nan
        targets += sum(len(window["item_id"]) - window["first_target"] for window in windows)
    assert targets == len(rows)


def test_columns_have_the_types_of_the_format():
    row = {"user_id": "u", "user_key": 1, "split": 0, "ts_ms": 5, "dwell_s": 2.0, "row of item_id": 1}
    row |= {"row of tab": 2, "row of country": 3, "label_click": None, "objective_glance": None} | {
        f"at_{name}": None for name in ACTIONS
    }
    spec = WindowSpec(FEATURES, ACTIONS, ("click",), ("glance",), (), 10, 10)
    (table,) = build_windows(table_of([row]), spec, 0)
    assert table.schema == pa.schema(
        [
            ("user", pa.string()),
            ("user_key", pa.int64()),
            ("country", pa.int64()),
            ("item_id", pa.list_(pa.int64())),
            ("tab", pa.list_(pa.int64())),
            ("ts_ms", pa.list_(pa.int64())),
            ("dwell_s", pa.list_(pa.float32())),
            ("action", pa.list_(pa.list_(pa.int8()))),
            ("action_offset_s", pa.list_(pa.list_(pa.float32()))),
            ("label_click", pa.list_(pa.float32())),
            ("objective_glance", pa.list_(pa.float32())),
            ("first_target", pa.int32()),
        ]
    )


def test_bounds_of_one_user_across_splits():
    split = np.array([0, 0, 0, 0, 0, 1, 1, 2])
    new_user = np.array([True, False, False, False, False, False, False, False])
    train = window_bounds(new_user, split, 0, max_history=2, max_targets=2)
    assert list(zip(train.start, train.target, train.end, strict=True)) == [(0, 0, 2), (0, 2, 4), (2, 4, 5)]
    test = window_bounds(new_user, split, 2, max_history=2, max_targets=2)
    assert list(zip(test.start, test.target, test.end, strict=True)) == [(5, 7, 8)]


def test_timed_actions_precede_untimed_actions_in_vocabulary_order():
    nan = math.nan
    times = np.array([[nan, 7.0, 3.0, nan], [2.0, 2.0, nan, nan], [nan, nan, nan, nan]], np.float32)
    occurred = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
    codes, offset = action_lists(times, occurred, pa.array([9.0, nan, 4.0], pa.float32()))
    assert codes.to_pylist() == [[0, 3, 2, 1, 5], [0, 1, 2, 5], [0, 5]]
    assert repr(offset.to_pylist()) == repr([[0.0, 3.0, 7.0, nan, 9.0], [0.0, 2.0, 2.0, nan], [0.0, 4.0]])


def test_no_windows_without_impressions():
    spec = WindowSpec(FEATURES, ACTIONS, ("click",), ("glance",), (), 10, 10)
    assert list(build_windows(table_of([]), spec, 0)) == []
