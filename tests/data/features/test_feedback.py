"""Feedback levels, watch ratios and objectives against a Python reference, thresholds against numpy."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from a2gen_rec.data.features import feedback
from a2gen_rec.data.features.encodings import encode_relation
from a2gen_rec.data.schema import (
    COMPLETE,
    EFFECTIVE,
    FEEDBACK_LEVELS,
    GLANCE,
    NEGATIVE,
    PARTIAL,
    SPLITS,
    UNKNOWN,
    FeedbackRule,
)
from a2gen_rec.data.sources.base import SourceInfo
from tests.helpers.properties import examples

NAN, INF = math.nan, math.inf
RULE = FeedbackRule(3.0, ["hate", "report"], "long", [10.0, 20.5], [6.0, 2.0, 8.0, 12.5])


@contextmanager
def log_of(rows: list[tuple]) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open a connection with a relation ``log`` of staged impressions with the columns of the feedback rule."""
    names = ("dwell_s", "long", "at_hate", "at_report", "split")
    kinds = (pa.float32(), pa.float64(), pa.float32(), pa.float32(), pa.int8())
    columns = zip(names, zip(*rows, strict=True), kinds, strict=True)
    with duckdb.connect() as connection:
        connection.register("log", pa.table({name: pa.array(list(values), kind) for name, values, kind in columns}))
        yield connection


def level(dwell: float, long: float | None, rule: FeedbackRule) -> int:
    """Return the reference level from watch time."""
    if math.isnan(dwell):
        return UNKNOWN
    dwell = float(np.float32(dwell))
    known = bool(rule.duration_feature) and long is not None and 0 < long < INF
    if known and dwell >= np.float32(long):
        return COMPLETE
    if dwell < rule.glance_s:
        return GLANCE
    bucket = 1 + sum(edge <= long for edge in rule.duration_edges_s) if known else 0
    return EFFECTIVE if dwell >= rule.median_watch_s[bucket] else PARTIAL


def ratio_row(dwell: float, long: float | None) -> int:
    if math.isnan(dwell) or long is None or not 0 < long < INF:
        return 0
    ratio = float(np.float32(dwell) / np.float32(long))
    return 1 + sum(edge <= ratio for edge in feedback.WATCH_RATIO_EDGES)


seconds = st.sampled_from([0.0, 1.9, 2.0, 2.999, 3.0, 5.1, 6.0, 7.9, 8.0, 10.0, 12.5, 20.5, 40.0, NAN])
durations = st.sampled_from([None, NAN, INF, 0.0, -1.0, 1.9, 5.1, 9.99, 10.0, 20.5, 20.6, 100.0])
occurrences = st.sampled_from([None, None, None, NAN, 0.0, 4.0])


@examples(40)
@given(
    st.lists(st.tuples(seconds, durations, occurrences, occurrences, st.integers(0, 2)), min_size=1, max_size=30),
    st.booleans(),
    st.booleans(),
)
@example([(5.1, 5.1, None, None, 0), (1.9, 1.9, 0.0, None, 0)], True, True)  # float32 and float64 differ
def test_levels_equal_the_reference(rows: list[tuple], with_negatives: bool, with_durations: bool) -> None:
    rule = RULE if with_durations else FeedbackRule(3.0, RULE.negative_actions, "", [], [6.0])
    rule = rule if with_negatives else FeedbackRule(**(vars(rule) | {"negative_actions": []}))
    relation = feedback.add_feedback_columns("log", rule)
    columns = [f"raw.objective_{name}" for name in feedback.derived_objectives(rule)]
    query = encode_relation(relation, feedback.feedback_encodings(rule), [*columns, "raw.feedback AS level"], "row_")
    with log_of(rows) as connection:
        actual = connection.sql(query).to_arrow_table().to_pylist()
        counted = feedback.count_levels(connection, relation, rule)
    for row, (dwell, long, hate, report, _) in zip(actual, rows, strict=True):
        watched = level(dwell, long, rule)
        is_negative = with_negatives and (hate is not None or report is not None)
        expected = {"level": NEGATIVE if is_negative else watched, "row_feedback": NEGATIVE if is_negative else watched}
        known = watched != UNKNOWN
        expected["objective_glance"] = float(watched == GLANCE) if known else None
        expected["objective_effective"] = float(watched >= EFFECTIVE) if known else None
        expected |= {"objective_negative": float(is_negative)} if with_negatives else {}
        expected |= {"row_watch_ratio": ratio_row(dwell, long)} if with_durations else {}
        assert row == expected
    for code, split in enumerate(SPLITS):
        levels = [row["level"] for row, drawn in zip(actual, rows, strict=True) if drawn[-1] == code]
        assert counted[split] == {name: levels.count(code) for code, name in enumerate(FEEDBACK_LEVELS)}


def test_thresholds_equal_numpy() -> None:
    rng = np.random.default_rng(0)
    long = np.round(rng.lognormal(3, 1, 999), 1)
    long[::50] = 0  # unknown
    dwell = (rng.random(999) * np.maximum(long, 5)).astype(np.float32)
    dwell[::40] = NAN
    info = SourceInfo("x", ("hate",), (), duration_feature="long", negative_actions=("hate",))
    overall = float(np.nanmedian(dwell))
    with log_of([(d, s, None, None, 0) for d, s in zip(dwell, long, strict=True)]) as connection:
        rule = feedback.fit_feedback_rule(connection, "log", info, overall)
    assert rule is not None
    watched = ~np.isnan(dwell)
    ranks = [math.ceil((watched & (long > 0)).sum() * part / feedback.DURATION_BUCKETS) for part in range(1, 8)]
    edges = np.sort(long[watched & (long > 0)])[np.array(ranks) - 1]
    assert rule.duration_edges_s == edges.tolist()
    bucket = np.where(long > 0, 1 + np.searchsorted(edges, long, side="right"), 0)
    medians = [np.median(dwell[watched & (bucket == row)].astype(float)) for row in range(1, 9)]
    assert rule.median_watch_s == pytest.approx([overall, *medians])
    assert (rule.glance_s, rule.negative_actions, rule.duration_feature) == (3.0, ["hate"], "long")


def test_all_impressions_share_a_median_without_durations() -> None:
    info = SourceInfo("x", (), ())
    with log_of([(2.0, None, None, None, 0), (8.0, None, None, None, 0)]) as connection:
        assert feedback.fit_feedback_rule(connection, "log", info, 5.0) == FeedbackRule(3.0, [], "", [], [5.0])
        assert feedback.fit_feedback_rule(connection, "log", info, None) is None


def test_empty_duration_bucket_uses_the_overall_median() -> None:
    rows = [(float(dwell), 15.0, None, None, 0) for dwell in range(9)] + [(50.0, NAN, None, None, 0)]
    with log_of(rows) as connection:
        rule = feedback.fit_feedback_rule(connection, "log", SourceInfo("x", (), (), duration_feature="long"), 4.5)
    assert rule == FeedbackRule(3.0, [], "long", [15.0], [4.5, 4.5, 4.0])
