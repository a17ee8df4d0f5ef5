"""Measurements of clean impressions that reveal mistakes in a log or its spec; the summary warns of them."""

from collections.abc import Sequence

import duckdb

from a2gen_rec.data.names import IDENTIFIERS
from a2gen_rec.data.schema import ITEM_ID, NUMERIC_KINDS, DataQuality, EntityShare, FeatureSpec
from a2gen_rec.data.sql import fetch_one, order_statistics, quote_identifier


def measure_quality(
    connection: duckdb.DuckDBPyConnection, impressions: str, features: Sequence[FeatureSpec], duration_feature: str
) -> DataQuality:
    """Measure a relation of at least one clean impression.

    Args:
        connection: DuckDB connection.
        impressions: relation of impressions of all splits.
        features: features of the log.
        duration_feature: feature that contains the video's duration in seconds; empty for none.
    """
    columns = {
        feature.name: known_sql(quote_identifier(feature.name), feature.kind)
        for feature in features
        if feature.name not in IDENTIFIERS
    }
    counts = ", ".join(["count(*)", *(f"count(*) FILTER ({known})" for known in columns.values())])
    total, *known_counts = fetch_one(connection, f"SELECT {counts} FROM {impressions}")
    median = None
    if duration_feature:
        name = quote_identifier(duration_feature)
        known = f"(SELECT {name} FROM {impressions} WHERE {name} > 0 AND {name} < 'inf'::DOUBLE)"
        (count,) = fetch_one(connection, f"SELECT count(*) FROM {known}")
        if count:
            median = float(order_statistics(connection, known, name, [(count + 1) // 2])[0])
    return DataQuality(
        most_frequent_user=most_frequent(connection, impressions, "user_id", total),
        most_frequent_item=most_frequent(connection, impressions, ITEM_ID, total),
        missing_share={name: 1 - count / total for name, count in zip(columns, known_counts, strict=True)},
        median_duration_s=median,
    )


def known_sql(column: str, kind: str) -> str:
    """Return the condition that a feature's raw value is known."""
    return f"{column} IS NOT NULL" + (f" AND NOT isnan({column})" if kind in NUMERIC_KINDS else "")


def most_frequent(connection: duckdb.DuckDBPyConnection, impressions: str, column: str, total: int) -> EntityShare:
    per_entity = f"(SELECT {column} AS entity, count(*) AS number FROM {impressions} GROUP BY {column})"
    entity, number = fetch_one(
        connection, f"SELECT entity, number FROM {per_entity} ORDER BY number DESC, entity LIMIT 1"
    )
    (distinct,) = fetch_one(connection, f"SELECT count(*) FROM {per_entity}")
    return EntityShare(entity, number / total, distinct)
