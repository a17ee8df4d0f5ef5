"""Session features against a loop over each user's impressions."""

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

SESSION_GAP_S = 5.0
FEATURES = session_features(with_feedback=True)

impression = st.tuples(
    st.sampled_from([0, 1, 999, 1000, 4999, 5000, 5001, 60_000]),  # ms since the one before
    st.sampled_from([0, 1, 1000, 4999, 5000, 70_000]),  # ms to its end
    st.integers(0, 5),
)
users = st.lists(st.lists(impression, min_size=1, max_size=12), max_size=5)


def oracle(drawn: list[list[tuple[int, int, int]]]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {feature.name: [] for feature in FEATURES}
    for impressions in drawn:
        position, before = 0, None
        for wait, lasts, level in impressions:
            position = 1 if before is None or wait > 1000 * SESSION_GAP_S else position + 1
            rows[SESSION_POSITION].append(1 + bisect_right(POSITION_EDGES, position))
            rows[SESSION_GAP].append(0 if before is None else 1 + bisect_right(GAP_EDGES_S, wait / 1000))
            known = before is not None and wait > 0 and before[0] <= wait
            rows[PREVIOUS_FEEDBACK].append(before[1] if known else UNKNOWN)
            before = (lasts, level)
    return rows


@given(users)
def test_rows_equal_a_loop(drawn: list[list[tuple[int, int, int]]]) -> None:
    waits, lasts, levels = (np.array([one[i] for user in drawn for one in user], np.int64) for i in range(3))
    new_user = np.array([place == 0 for user in drawn for place in range(len(user))], bool)
    # A user begins before the one before had ended: nothing of one may reach the other.
    begins = [sum(one[0] for one in user[: place + 1]) for user in drawn for place in range(len(user))]
    ts_ms = np.array(begins, np.int64)
    found = session_feature_rows(FEATURES, new_user, ts_ms, ts_ms + lasts, levels, SESSION_GAP_S)
    assert {name: values.tolist() for name, values in found.items()} == oracle(drawn)
    assert {values.dtype for values in found.values()} == {np.dtype(np.int64)}
    assert (waits >= 0).all()


def test_every_row_of_the_tables_can_be_reached() -> None:
    drawn = [[(2 ** (n % 30) * 100, 1, n % 6) for n in range(120)], [(1, 1, 0)] * 120]
    rows = oracle(drawn)
    for feature in FEATURES:
        assert set(rows[feature.name]) <= set(range(feature.cardinality))
        assert max(rows[feature.name]) == feature.cardinality - 1


def test_without_levels_there_is_no_previous_one() -> None:
    assert [feature.name for feature in session_features(with_feedback=False)] == [SESSION_POSITION, SESSION_GAP]
    assert session_feature_rows([], np.ones(1, bool), *[np.ones(1, np.int64)] * 3, SESSION_GAP_S) == {}


def test_the_end_is_the_latest_thing_known() -> None:
    """As the reader of windows has it: watch time, else the last timed action, else the begin."""
    nan = math.nan
    rows = {"dwell_s": [2.0, nan, nan, 2.0], "at_like": [None, 3.5, nan, 1.0], "at_hate": [nan, 1.0, None, None]}
    table = pa.table({name: pa.array(values, pa.float32()) for name, values in rows.items()})
    # All of one user, a second before the next: only impressions that lasted a second or less had ended.
    ts_ms = np.array([0, 1000, 5000, 5001], np.int64)
    table = table.append_column("user_id", pa.array(["u"] * 4)).append_column("ts_ms", pa.array(ts_ms))
    table = table.append_column("row_feedback", pa.array([2, 3, 4, 5], pa.int64()))
    found = add_session_columns(table, FEATURES, SESSION_GAP_S)
    assert found["row_previous_feedback"].to_pylist() == [0, 0, 3, 4]
    assert found["row_session_position"].to_pylist() == [1, 2, 3, 4]
    assert found.column_names[:-3] == table.column_names
    assert impression_end_ms(ts_ms, np.array([2.0, 3.5, nan, 2.0], np.float32)).tolist() == [2000, 4500, 5000, 7001]
