"""The session an impression falls into, as far as it is known when the impression begins [ours].

A silence ends a session: the next impression opens another one.
"""

from collections.abc import Sequence
from functools import reduce

import numpy as np
import numpy.typing as npt
import pyarrow as pa

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
POSITION_EDGES = (2.0, 3.0, 4.0, 6.0, 11.0, 21.0, 51.0, 101.0)
GAP_EDGES_S = (1.0, 3.0, 10.0, 30.0, 60.0, 180.0, 600.0, 1800.0, 3600.0, 21_600.0, 86_400.0, 259_200.0)


def session_features(with_feedback: bool) -> list[Feature]:
    """Session features of a log with or without feedback ``levels``."""
    edges = {SESSION_POSITION: list(POSITION_EDGES), SESSION_GAP: list(GAP_EDGES_S)}
    features = [Feature(name, "session", "buckets", len(edges[name]) + 2, edges[name]) for name in edges]
    previous = Feature(PREVIOUS_FEEDBACK, "session", "code", len(FEEDBACK_LEVELS))
    return [*features, previous] if with_feedback else features


def impression_end_ms(ts_ms: IntArray, last_offset_s: npt.NDArray[np.floating]) -> IntArray:
    """``(impressions,)`` ends of impressions that began at ``ts_ms``.

    Args:
        latest_s: seconds to the latest thing known of each; NaN when nothing is, which makes the begin its end.
    """
    return ts_ms + np.rint(1000.0 * np.nan_to_num(last_offset_s, nan=0.0)).astype(np.int64)


def session_feature_rows(
    features: Sequence[Feature],
    new_user: npt.NDArray[np.bool_],
    ts_ms: IntArray,
    end_ms: IntArray,
    feedback: IntArray,
    session_gap_s: float,
    first_position: int = 1,
) -> dict[str, IntArray]:
    """Table rows of session features, for impressions in order of user and time; all arrays ``(impressions,)``.

    The position counts from 1. The impression before tells its level only if it had ended.

    Args:
        new_user: whether a user's first impression.
        feedback: levels of the impressions themselves; of no account where no feature tells the level before.
        session_gap_s: seconds between two begins beyond which a session ends.
        first_position: of the first impression in its session.
    """
    if not features:
        return {}
    edges = {feature.name: feature.boundaries for feature in features}
    place = np.arange(len(ts_ms))
    before = np.maximum(place - 1, 0)
    gap_s = (ts_ms - ts_ms[before]) / 1000
    position = session_positions(new_user, ts_ms, session_gap_s, first_position)
    ended = ~new_user & (gap_s > 0) & (end_ms[before] <= ts_ms)
    rows = {
        SESSION_POSITION: 1 + np.searchsorted(edges[SESSION_POSITION], position, side="right"),
        SESSION_GAP: np.where(new_user, 0, 1 + np.searchsorted(edges[SESSION_GAP], gap_s, side="right")),
        PREVIOUS_FEEDBACK: np.where(ended, feedback[before], UNKNOWN),
    }
    return {feature.name: rows[feature.name] for feature in features}


def session_positions(
    new_user: npt.NDArray[np.bool_], ts_ms: IntArray, session_gap_s: float, first_position: int = 1
) -> IntArray:
    """``(impressions,)`` places in their sessions, from 1; arguments as :func:`session_rows` takes."""
    place = np.arange(len(ts_ms))
    opens = new_user.copy()
    opens[1:] |= np.diff(ts_ms) / 1000 > session_gap_s
    opened = np.maximum.accumulate(np.where(opens, place, 0))
    return place - opened + np.where(opened == 0, first_position, 1)


def add_session_columns(impressions: pa.Table, features: Sequence[Feature], session_gap_s: float) -> pa.Table:
    """Add ``row_<feature>`` columns to all impressions of some users, sorted by user and time (see ``windows.cut``)."""
    ts_ms = impressions["ts_ms"].to_numpy()
    times = [impressions[name].to_numpy() for name in impressions.column_names if name.startswith("at_")]
    latest_s = reduce(np.fmax, times, impressions["dwell_s"].to_numpy())
    level = ROW_COLUMN + FEEDBACK
    feedback = impressions[level].to_numpy() if level in impressions.column_names else np.zeros_like(ts_ms)
    rows = session_feature_rows(
        features, is_first_of_user(impressions), ts_ms, impression_end_ms(ts_ms, latest_s), feedback, session_gap_s
    )
    for name, values in rows.items():
        impressions = impressions.append_column(ROW_COLUMN + name, pa.array(values))
    return impressions
