"""How raw feature values become table rows, learned from training impressions only. Row 0 is "unknown".

Every mapping is a piece of SQL on a relation called ``raw``: :func:`encoded` puts the pieces together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb

from a2gen_rec.data.schema import Feature, FeatureLevel, FeatureSpec
from a2gen_rec.data.sql import (
    STABLE_HASH_SQL,
    fetch_one,
    order_statistics,
    quote_identifier,
    quote_literal,
    read_parquet_sql,
    write_sorted,
)
from a2gen_rec.errors import ConfigError

DEFAULT_BUCKETS = 16


@dataclass(frozen=True)
class FeatureEncoding:
    """A feature and the SQL of its rows: ``row`` is an expression on ``raw`` after ``join``."""

    feature: Feature
    row_sql: str
    join_sql: str = ""


def fit_encoding(
    connection: duckdb.DuckDBPyConnection, train: str, spec: FeatureSpec, min_count: int, folder: Path
) -> FeatureEncoding:
    """Learn a feature's rows from the relation ``train``; a vocabulary is written to ``folder``/NAME.parquet.

    Raises:
        ConfigError: a hash feature without room for a row besides "unknown".
    """
    if spec.kind == "hash":
        return hash_encoding(spec)
    if spec.kind == "buckets":
        return bucket_encoding(connection, train, spec)
    return vocabulary_encoding(connection, train, spec, min_count or spec.min_count, folder / f"{spec.name}.parquet")


def hash_encoding(spec: FeatureSpec) -> FeatureEncoding:
    """Rows ``1 + hash % (size - 1)``: unbounded identifiers in a bounded table, with collisions."""
    if spec.size < 2:
        raise ConfigError(f"hash feature {spec.name!r} needs a size of at least 2, not {spec.size}")
    raw = f"raw.{quote_identifier(spec.name)}"
    row = f"coalesce(1 + {STABLE_HASH_SQL.format(raw)} % {spec.size - 1}, 0)"
    return FeatureEncoding(Feature(spec.name, spec.level, "hash", spec.size), row)


def bucket_encoding(connection: duckdb.DuckDBPyConnection, train: str, spec: FeatureSpec) -> FeatureEncoding:
    """Row ``1 + number of edges <= value``; edges as given, or the distinct training quantiles."""
    column = quote_identifier(spec.name)
    edges = sorted({float(edge) for edge in spec.edges})
    if not edges:
        size = spec.size or DEFAULT_BUCKETS
        (count,) = fetch_one(connection, f"SELECT count(*) FROM {train} WHERE NOT isnan({column})")
        places = [max(1, -(-count * part // size)) for part in range(1, size)] if count else []
        edges = sorted(set(order_statistics(connection, train, column, places))) if places else []
    return bucketize(spec.name, spec.level, edges)


def bucketize(name: str, level: FeatureLevel, edges: list[float]) -> FeatureEncoding:
    """Row ``1 + number of edges <= value`` of sorted edges; row 0 of NULL and NaN."""
    value = f"raw.{quote_identifier(name)}"
    above = "".join(f" + ({value} >= {quote_literal(repr(edge))}::DOUBLE)::INT" for edge in edges)
    row = f"(CASE WHEN {value} IS NULL OR isnan({value}) THEN 0 ELSE 1{above} END)::BIGINT"
    return FeatureEncoding(Feature(name, level, "buckets", len(edges) + 2, edges), row)


def vocabulary_encoding(
    connection: duckdb.DuckDBPyConnection, train: str, spec: FeatureSpec, min_count: int, file: Path
) -> FeatureEncoding:
    """Dense rows from 1 by falling training count, then by value; rare values share row 0."""
    column, table = quote_identifier(spec.name), quote_identifier(f"vocabulary of {spec.name}")
    bound = f"LIMIT {spec.size}" if spec.size else ""
    kept = write_sorted(
        connection,
        f"""SELECT value, row_number() OVER (ORDER BY count DESC, value) AS row, count
        FROM (SELECT {column} AS value, count(*) AS count FROM {train} WHERE {column} IS NOT NULL
              GROUP BY ALL HAVING count(*) >= {min_count} ORDER BY count DESC, value {bound})
        ORDER BY row""",
        file,
    )
    join = f"LEFT JOIN (SELECT value, row FROM {read_parquet_sql(file)}) AS {table} ON raw.{column} = {table}.value"
    return vocabulary_lookup(Feature(spec.name, spec.level, "vocabulary", kept + 1), f"{table}.row", join)


def vocabulary_lookup(feature: Feature, row: str, join: str = "") -> FeatureEncoding:
    """What a vocabulary has: SQL of the value's ``row``, NULL where it is unknown."""
    return FeatureEncoding(feature, f"coalesce({row}, 0)", join)


def encoding_from_card(feature: Feature, row: str) -> FeatureEncoding:
    """The encoding that a feature of a dataset card was learned as; ``row``: as :func:`found` takes."""
    if feature.kind == "hash":
        return hash_encoding(FeatureSpec(feature.name, feature.level, "hash", feature.cardinality))
    if feature.kind == "buckets":
        return bucketize(feature.name, feature.level, feature.boundaries)
    return vocabulary_lookup(feature, row)


def encode_relation(
    relation: str, encodings: Sequence[FeatureEncoding], columns: Sequence[str], prefix: str = ""
) -> str:
    """SQL of ``columns`` of ``relation`` (by its alias ``raw``) and every feature's row, named prefix + feature."""
    rows = [f"{coding.row_sql} AS {quote_identifier(prefix + coding.feature.name)}" for coding in encodings]
    joins = " ".join(coding.join_sql for coding in encodings if coding.join_sql)
    return f"SELECT {', '.join([*columns, *rows])} FROM {relation} AS raw {joins}"
