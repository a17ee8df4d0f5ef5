"""Feedback levels, watch ratio and objectives of impressions, in SQL [ours].

Inaction is implicit negative feedback: a user who leaves within three seconds rejects the video. Watch times depend on
the duration of the video. They are therefore compared with the duration and with the median watch time of training
impressions of similar duration.
"""

import duckdb

from a2gen_rec.data.features.encodings import FeatureEncoding, bucket_encoding, bucketize
from a2gen_rec.data.schema import (
    COMPLETE,
    EFFECTIVE,
    FEEDBACK,
    FEEDBACK_LEVELS,
    GLANCE,
    NEGATIVE,
    OBJECTIVES,
    PARTIAL,
    SPLITS,
    UNKNOWN,
    WATCH_RATIO,
    Feature,
    FeatureSpec,
    FeedbackRule,
)
from a2gen_rec.data.sources.base import SourceInfo
from a2gen_rec.data.sql import medians, quote_identifier

GLANCE_S = 3.0
DURATION_BUCKETS = 8
DURATION_SQL, WATCH_LEVEL_SQL = '"duration of the video"', '"level of watch time"'
WATCH_RATIO_EDGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.5, 2.0, 3.0)


def fit_feedback_rule(
    connection: duckdb.DuckDBPyConnection, train: str, info: SourceInfo, median_watch_s: float | None
) -> FeedbackRule | None:
    """Fit the rule on the relation ``train``.

    Args:
        connection: DuckDB connection.
        train: relation of training impressions.
        info: source of the impressions.
        median_watch_s: median watch time of ``train``; None if the log records no watch times.

    Returns:
        The rule; None without watch times.
    """
    if median_watch_s is None:
        return None
    if not info.duration_feature:
        return FeedbackRule(GLANCE_S, list(info.negative_actions), "", [], [median_watch_s])
    watched = (
        f"(SELECT dwell_s, {duration_sql(info.duration_feature)} AS duration_s FROM {train} WHERE NOT isnan(dwell_s))"
    )
    buckets = bucket_encoding(connection, watched, FeatureSpec("duration_s", "item", "buckets", size=DURATION_BUCKETS))
    edges = buckets.feature.boundaries
    bucket_medians = medians(
        connection, f"(SELECT dwell_s, {buckets.row_sql} AS bucket FROM {watched} AS raw)", "dwell_s", "bucket"
    )
    # If the lowest quantile is the minimum duration, the first bucket is empty.
    by_bucket = [bucket_medians.get(row, median_watch_s) for row in range(1, buckets.feature.cardinality)]
    return FeedbackRule(
        GLANCE_S, list(info.negative_actions), info.duration_feature, edges, [median_watch_s, *by_bucket]
    )


def duration_sql(duration: str) -> str:
    """Return the SQL of the video's duration in seconds, NULL if unknown."""
    if not duration:
        return "NULL::DOUBLE"
    name = quote_identifier(duration)
    return f"(CASE WHEN {name} > 0 AND {name} < 'inf'::DOUBLE THEN {name} END)"


def add_feedback_columns(relation: str, rule: FeedbackRule | None) -> str:
    """Return the SQL of the relation with the columns ``feedback``, ``watch_ratio`` and ``objective_*``.

    The objectives ``glance`` and ``effective`` depend on watch time only and ignore negative actions.
    """
    if rule is None:
        return relation
    negative_occurred = [f"{quote_identifier(f'at_{name}')} IS NOT NULL" for name in rule.negative_actions]
    is_negative = f"({' OR '.join(negative_occurred) or 'false'})"
    flags = {
        "glance": f"CASE {WATCH_LEVEL_SQL} WHEN {UNKNOWN} THEN NULL ELSE {WATCH_LEVEL_SQL} = {GLANCE} END",
        "effective": f"CASE {WATCH_LEVEL_SQL} WHEN {UNKNOWN} THEN NULL ELSE {WATCH_LEVEL_SQL} >= {EFFECTIVE} END",
        "negative": is_negative,
    }
    objectives = "".join(f", ({flags[name]})::FLOAT AS objective_{name}" for name in derived_objectives(rule))
    with_duration = f"(SELECT *, {duration_sql(rule.duration_feature)} AS {DURATION_SQL} FROM {relation})"
    return f"""(
        SELECT * EXCLUDE ({DURATION_SQL}, {WATCH_LEVEL_SQL}),
            dwell_s / {DURATION_SQL}::FLOAT AS {WATCH_RATIO}{objectives},
            (CASE WHEN {is_negative} THEN {NEGATIVE} ELSE {WATCH_LEVEL_SQL} END)::BIGINT AS {FEEDBACK}
        FROM (SELECT *, {watch_level_sql(rule)} AS {WATCH_LEVEL_SQL} FROM {with_duration}))"""


def watch_level_sql(rule: FeedbackRule) -> str:
    """Return the SQL of the feedback level from watch time only, given the column ``DURATION_SQL``."""
    edges = zip(rule.duration_edges_s, rule.median_watch_s[1:], strict=False)
    unknown_duration_s, last_bucket_s = rule.median_watch_s[0], rule.median_watch_s[-1]
    cases = " ".join(f"WHEN {DURATION_SQL} < {edge!r}::DOUBLE THEN {median!r}::DOUBLE" for edge, median in edges)
    fallback = f"WHEN {DURATION_SQL} IS NULL THEN {unknown_duration_s!r}::DOUBLE"
    median_sql = f"CASE {fallback} {cases} ELSE {last_bucket_s!r}::DOUBLE END"
    # Watch times are FLOAT; the duration must be FLOAT too for equality.
    return f"""(CASE WHEN isnan(dwell_s) THEN {UNKNOWN} WHEN dwell_s >= {DURATION_SQL}::FLOAT THEN {COMPLETE}
        WHEN dwell_s < {rule.glance_s!r}::DOUBLE THEN {GLANCE}
        WHEN dwell_s >= {median_sql} THEN {EFFECTIVE} ELSE {PARTIAL} END)"""


def derived_objectives(rule: FeedbackRule | None) -> list[str]:
    """Return the names of the rule's objectives in order."""
    if rule is None:
        return []
    return [name for name in OBJECTIVES if name != "negative" or rule.negative_actions]


def feedback_encodings(rule: FeedbackRule | None) -> list[FeatureEncoding]:
    """Return the outcome features of relations from :func:`add_feedback_columns`."""
    if rule is None:
        return []
    level = FeatureEncoding(Feature(FEEDBACK, "outcome", "code", len(FEEDBACK_LEVELS)), f"raw.{FEEDBACK}")
    return [level, bucketize(WATCH_RATIO, "outcome", list(WATCH_RATIO_EDGES))] if rule.duration_feature else [level]


def outcome_features() -> list[Feature]:
    """Return the outcome features of a log with watch times and durations."""
    return [encoding.feature for encoding in feedback_encodings(FeedbackRule(GLANCE_S, [], "duration", [], [0.0]))]


def count_levels(
    connection: duckdb.DuckDBPyConnection, impressions: str, rule: FeedbackRule | None
) -> dict[str, dict[str, int]]:
    """Count targets per split and level of a relation from :func:`add_feedback_columns`; no levels without a rule."""
    if rule is None:
        return {name: {} for name in SPLITS}
    query = f"SELECT split, {FEEDBACK}, count(*) FROM {impressions} GROUP BY ALL"
    counts = {(split, code): count for split, code, count in connection.execute(query).fetchall()}
    return {
        name: {level: counts.get((split, code), 0) for code, level in enumerate(FEEDBACK_LEVELS)}
        for split, name in enumerate(SPLITS)
    }
