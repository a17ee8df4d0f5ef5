"""Session features of an impression, known at its start [ours].

A gap longer than the session gap ends a session. The next impression starts a new session.
"""

from collections.abc import Sequence
from functools import reduce

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from a2gen_rec.data.schema import (
    FEEDBACK,
    FEEDBACK_LEVELS,
    PREVIOUS_FEEDBACK,
    SESSION_GAP,
    SESSION_POSITION,
    UNKNOWN,
    Feature,
)
from a2gen_rec.data.sql import ROW_COLUMN, IntArray, is_first_of_user

SESSION_GAP_S = 1800.0
SESSION_COUNT = "position in session"
"""Column of the position of an impression in its session, from 1."""
POSITION_EDGES = (2.0, 3.0, 4.0, 6.0, 11.0, 21.0, 51.0, 101.0)
GAP_EDGES_S = (1.0, 3.0, 10.0, 30.0, 60.0, 180.0, 600.0, 1800.0, 3600.0, 21_600.0, 86_400.0, 259_200.0)


def session_features(with_feedback: bool) -> list[Feature]:
    """Return the session features of a log with or without feedback levels."""
    edges = {SESSION_POSITION: list(POSITION_EDGES), SESSION_GAP: list(GAP_EDGES_S)}
    features = [Feature(name, "session", "buckets", len(edges[name]) + 2, edges[name]) for name in edges]
    previous = Feature(PREVIOUS_FEEDBACK, "session", "code", len(FEEDBACK_LEVELS))
    return [*features, previous] if with_feedback else features


def impression_end_ms(ts_ms: IntArray, last_offset_s: npt.NDArray[np.floating]) -> IntArray:
    """Return ``(impressions,)`` end times.

    Args:
        ts_ms: ``(impressions,)`` start times.
        last_offset_s: ``(impressions,)`` seconds to the last recorded action or exit; NaN if none is recorded, which
            makes the end equal to the start.
    """
    return ts_ms + np.rint(1000.0 * np.nan_to_num(last_offset_s, nan=0.0)).astype(np.int64)


def session_feature_rows(
    features: Sequence[Feature],
    new_user: npt.NDArray[np.bool_],
    ts_ms: IntArray,
    end_ms: IntArray,
    feedback: IntArray,
    session_gap_s: float,
    first_position: int | IntArray = 1,
) -> dict[str, IntArray]:
    """Return the table rows of session features, for impressions sorted by user and time.

    The position counts from 1. The feedback of the previous impression is known only if that impression has ended.

    Args:
        features: session features to compute.
        new_user: ``(impressions,)`` whether each is its user's first impression.
        ts_ms: ``(impressions,)`` start times.
        end_ms: ``(impressions,)`` end times.
        feedback: ``(impressions,)`` feedback levels; unused without the feature ``previous_feedback``.
        session_gap_s: maximum seconds between the starts of two impressions of one session.
        first_position: position in its session of the first impression, or ``(impressions,)`` positions, of which those
            of the first impressions of users count.

    Returns:
        Feature -> ``(impressions,)`` rows.
    """
    if not features:
        return {}
    edges = {feature.name: feature.boundaries for feature in features}
    previous = np.maximum(np.arange(len(ts_ms)) - 1, 0)
    gap_s = (ts_ms - ts_ms[previous]) / 1000
    position = session_positions(new_user, ts_ms, session_gap_s, first_position)
    has_ended = ~new_user & (gap_s > 0) & (end_ms[previous] <= ts_ms)
    rows = {
        SESSION_POSITION: 1 + np.searchsorted(edges[SESSION_POSITION], position, side="right"),
        SESSION_GAP: np.where(new_user, 0, 1 + np.searchsorted(edges[SESSION_GAP], gap_s, side="right")),
        PREVIOUS_FEEDBACK: np.where(has_ended, feedback[previous], UNKNOWN),
    }
    return {feature.name: rows[feature.name] for feature in features}


def session_positions(
    new_user: npt.NDArray[np.bool_], ts_ms: IntArray, session_gap_s: float, first_position: int | IntArray = 1
) -> IntArray:
    """Return ``(impressions,)`` positions in the session, from 1; arguments as in :func:`session_feature_rows`."""
    index = np.arange(len(ts_ms))
    is_start = new_user.copy()
    is_start[1:] |= np.diff(ts_ms) / 1000 > session_gap_s
    session_start = np.maximum.accumulate(np.where(is_start, index, 0))
    if isinstance(first_position, int):
        return index - session_start + np.where(session_start == 0, first_position, 1)
    return index - session_start + np.where(new_user, first_position, 1)[session_start]


def add_session_columns(impressions: pa.Table, features: Sequence[Feature], session_gap_s: float) -> pa.Table:
    """Add ``row of <feature>`` columns.

    Args:
        impressions: impressions sorted by user and time. The column ``SESSION_COUNT``, which is dropped, has the
            position of each user's first impression, NULL for 1. Without it, all users are complete.
        features: session features.
        session_gap_s: maximum seconds between the starts of two impressions of one session.
    """
    first_position: int | IntArray = 1
    if SESSION_COUNT in impressions.column_names:
        first_position = pc.fill_null(impressions[SESSION_COUNT], 1).to_numpy()
        impressions = impressions.drop_columns([SESSION_COUNT])
    ts_ms = impressions["ts_ms"].to_numpy()
    times = [impressions[name].to_numpy() for name in impressions.column_names if name.startswith("at_")]
    last_offset_s = reduce(np.fmax, times, impressions["dwell_s"].to_numpy())
    level = ROW_COLUMN + FEEDBACK
    feedback = impressions[level].to_numpy() if level in impressions.column_names else np.zeros_like(ts_ms)
    rows = session_feature_rows(
        features,
        is_first_of_user(impressions),
        ts_ms,
        impression_end_ms(ts_ms, last_offset_s),
        feedback,
        session_gap_s,
        first_position,
    )
    for name, values in rows.items():
        impressions = impressions.append_column(ROW_COLUMN + name, pa.array(values))
    return impressions
