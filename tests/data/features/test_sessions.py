"""Session features against a reference with a loop over each user's impressions."""

import math
from bisect import bisect_right

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from a2gen_rec.data.features.sessions import (
    GAP_EDGES_S,
    POSITION_EDGES,
    add_session_columns,
    impression_end_ms,
    session_feature_rows,
    session_features,
)
from a2gen_rec.data.schema import PREVIOUS_FEEDBACK, SESSION_GAP, SESSION_POSITION, UNKNOWN
from a2gen_rec.data.sql import ROW_COLUMN

SESSION_GAP_S = 5.0
FEATURES = session_features(with_feedback=True)

impression = st.tuples(
    st.sampled_from([0, 1, 999, 1000, 4999, 5000, 5001, 60_000]),  # ms since the previous start
    st.sampled_from([0, 1, 1000, 4999, 5000, 70_000]),  # ms until its end
    st.integers(0, 5),
)
users = st.lists(st.lists(impression, min_size=1, max_size=12), max_size=5)


def reference_rows(drawn: list[list[tuple[int, int, int]]]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {feature.name: [] for feature in FEATURES}
    for impressions in drawn:
        position, previous = 0, None
        for wait, duration, level in impressions:
            position = 1 if previous is None or wait > 1000 * SESSION_GAP_S else position + 1
            rows[SESSION_POSITION].append(1 + bisect_right(POSITION_EDGES, position))
            rows[SESSION_GAP].append(0 if previous is None else 1 + bisect_right(GAP_EDGES_S, wait / 1000))
            known = previous is not None and wait > 0 and previous[0] <= wait
            rows[PREVIOUS_FEEDBACK].append(previous[1] if known else UNKNOWN)
            previous = (duration, level)
    return rows


@given(users)
def test_rows_equal_the_reference(drawn: list[list[tuple[int, int, int]]]) -> None:
    waits, durations, levels = (np.array([one[i] for user in drawn for one in user], np.int64) for i in range(3))
    new_user = np.array([index == 0 for user in drawn for index in range(len(user))], bool)
    # Users overlap in time: no value may leak from one user to another.
    starts = [sum(one[0] for one in user[: index + 1]) for user in drawn for index in range(len(user))]
    ts_ms = np.array(starts, np.int64)
    actual = session_feature_rows(FEATURES, new_user, ts_ms, ts_ms + durations, levels, SESSION_GAP_S)
    assert {name: values.tolist() for name, values in actual.items()} == reference_rows(drawn)
    assert {values.dtype for values in actual.values()} == {np.dtype(np.int64)}
    assert (waits >= 0).all()


def test_all_table_rows_are_reachable() -> None:
    drawn = [[(2 ** (n % 30) * 100, 1, n % 6) for n in range(120)], [(1, 1, 0)] * 120]
    rows = reference_rows(drawn)
    for feature in FEATURES:
        assert set(rows[feature.name]) <= set(range(feature.cardinality))
        assert max(rows[feature.name]) == feature.cardinality - 1


def test_no_previous_feedback_without_levels() -> None:
    assert [feature.name for feature in session_features(with_feedback=False)] == [SESSION_POSITION, SESSION_GAP]
    assert session_feature_rows([], np.ones(1, bool), *[np.ones(1, np.int64)] * 3, SESSION_GAP_S) == {}


def test_end_is_the_last_recorded_time() -> None:
    """Same rule as the reader of windows: watch time, else the last timed action, else the start."""
    nan = math.nan
    rows = {"dwell_s": [2.0, nan, nan, 2.0], "at_like": [None, 3.5, nan, 1.0], "at_hate": [nan, 1.0, None, None]}
    table = pa.table({name: pa.array(values, pa.float32()) for name, values in rows.items()})
    # One user with a start after one second: only impressions of at most one second have ended.
    ts_ms = np.array([0, 1000, 5000, 5001], np.int64)
    table = table.append_column("user_id", pa.array(["u"] * 4)).append_column("ts_ms", pa.array(ts_ms))
    table = table.append_column(ROW_COLUMN + "feedback", pa.array([2, 3, 4, 5], pa.int64()))
    actual = add_session_columns(table, FEATURES, SESSION_GAP_S)
    assert actual[ROW_COLUMN + "previous_feedback"].to_pylist() == [0, 0, 3, 4]
    assert actual[ROW_COLUMN + "session_position"].to_pylist() == [1, 2, 3, 4]
    assert actual.column_names[:-3] == table.column_names
    assert impression_end_ms(ts_ms, np.array([2.0, 3.5, nan, 2.0], np.float32)).tolist() == [2000, 4500, 5000, 7001]
