"""Feedback levels, watch ratio and objectives of impressions, in SQL [ours].

What a user did not do is feedback too: a video left within three seconds was shown in vain. How long is long depends
on the video, so watch times are compared with its length and with what is usual for that length in the training data.
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
DURATION_SQL, WATCH_LEVEL_SQL = '"length of the video"', '"level of watch time"'
WATCH_RATIO_EDGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.5, 2.0, 3.0)


def fit_feedback_rule(
    connection: duckdb.DuckDBPyConnection, train: str, info: SourceInfo, median_watch_s: float | None
) -> FeedbackRule | None:
    """Learn the rule from the relation ``train``.

    Args:
        median_s: median watch time of all of ``train``; without one there is no rule.
    """
    if median_watch_s is None:
        return None
    if not info.duration_feature:
        return FeedbackRule(GLANCE_S, list(info.negative_actions), "", [], [median_watch_s])
    watched = (
        f"(SELECT dwell_s, {duration_sql(info.duration_feature)} AS length_s FROM {train} WHERE NOT isnan(dwell_s))"
    )
    buckets = bucket_encoding(connection, watched, FeatureSpec("length_s", "item", "buckets", size=DURATION_BUCKETS))
    edges = buckets.feature.boundaries
    found = medians(
        connection, f"(SELECT dwell_s, {buckets.row_sql} AS bucket FROM {watched} AS raw)", "dwell_s", "bucket"
    )
    # The lowest quantile may be the shortest length of all: then no video is shorter.
    usual = [found.get(row, median_watch_s) for row in range(1, buckets.feature.cardinality)]
    return FeedbackRule(GLANCE_S, list(info.negative_actions), info.duration_feature, edges, [median_watch_s, *usual])


def duration_sql(duration: str) -> str:
    """SQL of the video's length in seconds, NULL when unknown."""
    if not duration:
        return "NULL::DOUBLE"
    name = quote_identifier(duration)
    return f"(CASE WHEN {name} > 0 AND {name} < 'inf'::DOUBLE THEN {name} END)"


def add_feedback_columns(relation: str, rule: FeedbackRule | None) -> str:
    """SQL of the relation with the columns ``feedback``, ``watch_ratio`` and ``objective_*`` that the rule gives.

    Whether a video was watched at a glance or effectively does not depend on what else the user did: those objectives
    know no negative action.
    """
    if rule is None:
        return relation
    happened = [f"{quote_identifier(f'at_{name}')} IS NOT NULL" for name in rule.negative_actions]
    disliked = f"({' OR '.join(happened) or 'false'})"
    flags = {
        "glance": f"CASE {WATCH_LEVEL_SQL} WHEN {UNKNOWN} THEN NULL ELSE {WATCH_LEVEL_SQL} = {GLANCE} END",
        "effective": f"CASE {WATCH_LEVEL_SQL} WHEN {UNKNOWN} THEN NULL ELSE {WATCH_LEVEL_SQL} >= {EFFECTIVE} END",
        "negative": disliked,
    }
    made = "".join(f", ({flags[name]})::FLOAT AS objective_{name}" for name in derived_objectives(rule))
    measured = f"(SELECT *, {duration_sql(rule.duration_feature)} AS {DURATION_SQL} FROM {relation})"
    return f"""(
        SELECT * EXCLUDE ({DURATION_SQL}, {WATCH_LEVEL_SQL}), dwell_s / {DURATION_SQL}::FLOAT AS {WATCH_RATIO}{made},
            (CASE WHEN {disliked} THEN {NEGATIVE} ELSE {WATCH_LEVEL_SQL} END)::BIGINT AS {FEEDBACK}
        FROM (SELECT *, {watch_level_sql(rule)} AS {WATCH_LEVEL_SQL} FROM {measured}))"""


def watch_level_sql(rule: FeedbackRule) -> str:
    """SQL of the level that watch time alone makes of a video of the column ``LENGTH``."""
    shorter = zip(rule.duration_edges_s, rule.median_watch_s[1:], strict=False)
    unknown_length, longest = rule.median_watch_s[0], rule.median_watch_s[-1]
    usual = " ".join(f"WHEN {DURATION_SQL} < {edge!r}::DOUBLE THEN {median!r}::DOUBLE" for edge, median in shorter)
    usual = f"CASE WHEN {DURATION_SQL} IS NULL THEN {unknown_length!r}::DOUBLE {usual} ELSE {longest!r}::DOUBLE END"
    # Watch times are FLOAT, and so must the length be for the two to be equal.
    return f"""(CASE WHEN isnan(dwell_s) THEN {UNKNOWN} WHEN dwell_s >= {DURATION_SQL}::FLOAT THEN {COMPLETE}
        WHEN dwell_s < {rule.glance_s!r}::DOUBLE THEN {GLANCE}
        WHEN dwell_s >= {usual} THEN {EFFECTIVE} ELSE {PARTIAL} END)"""


def derived_objectives(rule: FeedbackRule | None) -> list[str]:
    """Names of the objectives that the rule gives, in order."""
    if rule is None:
        return []
    return [name for name in OBJECTIVES if name != "negative" or rule.negative_actions]


def feedback_encodings(rule: FeedbackRule | None) -> list[FeatureEncoding]:
    """Outcome features of relations :func:`with_feedback`."""
    if rule is None:
        return []
    level = FeatureEncoding(Feature(FEEDBACK, "outcome", "code", len(FEEDBACK_LEVELS)), f"raw.{FEEDBACK}")
    return [level, bucketize(WATCH_RATIO, "outcome", list(WATCH_RATIO_EDGES))] if rule.duration_feature else [level]


def outcome_features() -> list[Feature]:
    """Outcome features of a log that records watch times and lengths."""
    return [coding.feature for coding in feedback_encodings(FeedbackRule(GLANCE_S, [], "length", [], [0.0]))]


def count_levels(
    connection: duckdb.DuckDBPyConnection, impressions: str, rule: FeedbackRule | None
) -> dict[str, dict[str, int]]:
    """Targets per split and level of a relation :func:`with_feedback`; no levels without a rule."""
    if rule is None:
        return {name: {} for name in SPLITS}
    query = f"SELECT split, {FEEDBACK}, count(*) FROM {impressions} GROUP BY ALL"
    found = {(split, code): count for split, code, count in connection.execute(query).fetchall()}
    return {
        name: {level: found.get((split, code), 0) for code, level in enumerate(FEEDBACK_LEVELS)}
        for split, name in enumerate(SPLITS)
    }
