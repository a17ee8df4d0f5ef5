"""Mappings of raw feature values to table rows, fitted on training impressions only. Row 0 is "unknown".

Every mapping is an SQL expression on a relation with alias ``raw``; :func:`encode_relation` combines them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import duckdb

from a2gen_rec.data import bag_sql
from a2gen_rec.data.features.numbers import NumberEncoding
from a2gen_rec.data.schema import Feature, FeatureLevel, FeatureSpec
from a2gen_rec.data.sql import (
    STABLE_HASH_SQL,
    fetch_one,
    order_statistics,
    quote_identifier,
    quote_literal,
    read_parquet_sql,
)
from a2gen_rec.errors import ConfigError

DEFAULT_BUCKETS = 16
RELATION = '"relation of the encoding"'
"""Placeholder of the encoded relation in the SQL of a join."""


@dataclass(frozen=True)
class FeatureEncoding:
    """A feature and the SQL of its rows.

    Attributes:
        feature: encoded feature.
        row_sql: expression of the row on ``raw`` after ``join_sql``; for multi-valued features ``bag_sql.ROWS_TYPE``.
        join_sql: join of the vocabulary, with the placeholder ``RELATION``; empty if unused.
    """

    feature: Feature
    row_sql: str
    join_sql: str = ""


def fit_encoding(connection: duckdb.DuckDBPyConnection, train: str, spec: FeatureSpec) -> FeatureEncoding:
    """Fit the rows of a feature of kind ``hash`` or ``buckets`` on the relation ``train``.

    Raises:
        ConfigError: the size of a hash feature is below 2.
    """
    if spec.kind == "buckets":
        return bucket_encoding(connection, train, spec)
    encoding = hash_encoding(spec)
    if not spec.multi_valued:
        return encoding
    return replace(encoding, feature=replace(encoding.feature, mean_values=mean_values(connection, train, spec)))


def hash_encoding(spec: FeatureSpec) -> FeatureEncoding:
    """Return rows ``1 + hash % (size - 1)``: unbounded identifiers in a fixed-size table, with collisions."""
    if spec.size < 2:
        raise ConfigError(f"hash feature {spec.name!r}: size {spec.size} must be at least 2")
    raw = f"raw.{quote_identifier(spec.name)}"
    if spec.multi_valued:
        feature = Feature(spec.name, spec.level, "hash", spec.size, multi_valued=True, weighted=spec.weighted)
        return FeatureEncoding(feature, bag_sql.hashed_rows_sql(raw, spec.size))
    row = f"coalesce(1 + {STABLE_HASH_SQL.format(raw)} % {spec.size - 1}, 0)"
    return FeatureEncoding(Feature(spec.name, spec.level, "hash", spec.size), row)


def bucket_encoding(connection: duckdb.DuckDBPyConnection, train: str, spec: FeatureSpec) -> FeatureEncoding:
    """Return rows ``1 + number of edges <= value`` with the edges of ``spec``, or distinct training quantiles."""
    column = quote_identifier(spec.name)
    edges = sorted({float(edge) for edge in spec.edges})
    if not edges:
        size = spec.size or DEFAULT_BUCKETS
        (count,) = fetch_one(connection, f"SELECT count(*) FROM {train} WHERE NOT isnan({column})")
        ranks = [max(1, -(-count * part // size)) for part in range(1, size)] if count else []
        edges = sorted(set(order_statistics(connection, train, column, ranks))) if ranks else []
    return bucketize(spec.name, spec.level, edges)


def bucketize(name: str, level: FeatureLevel, edges: list[float]) -> FeatureEncoding:
    """Return rows ``1 + number of edges <= value`` for sorted edges; row 0 for NULL and NaN."""
    value = f"raw.{quote_identifier(name)}"
    edges_sql = "".join(f" + ({value} >= {quote_literal(repr(edge))}::DOUBLE)::INT" for edge in edges)
    row = f"(CASE WHEN {value} IS NULL OR isnan({value}) THEN 0 ELSE 1{edges_sql} END)::BIGINT"
    return FeatureEncoding(Feature(name, level, "buckets", len(edges) + 2, edges), row)


def vocabulary_encoding(feature: Feature, file: Path) -> FeatureEncoding:
    """Return the rows of a vocabulary file."""
    column, table = quote_identifier(feature.name), quote_identifier(f"vocabulary of {feature.name}")
    if feature.multi_valued:
        join = bag_sql.vocabulary_join_sql(column, RELATION, read_parquet_sql(file), table)
        return vocabulary_lookup(feature, f"{table}.entries", join)
    join = f'LEFT JOIN (SELECT value, "row" FROM {read_parquet_sql(file)}) AS {table} ON raw.{column} = {table}.value'
    return vocabulary_lookup(feature, f'{table}."row"', join)


def vocabulary_lookup(feature: Feature, row: str, join: str = "") -> FeatureEncoding:
    """Return the row of a vocabulary lookup; ``row`` is the SQL of the value's row, NULL if unknown.

    For a multi-valued feature, ``row`` is the SQL of known rows (``bag_sql.ROWS_TYPE``), which may be NULL or empty.
    """
    if feature.multi_valued:
        return FeatureEncoding(feature, bag_sql.known_rows_sql(row), join)
    return FeatureEncoding(feature, f"coalesce({row}, 0)", join)


def encoding_from_card(feature: Feature, row: str) -> FeatureEncoding:
    """Return the fitted encoding of a feature of a dataset card; ``row`` as in :func:`vocabulary_lookup`."""
    if feature.kind == "hash":
        return hash_encoding(_hash_spec(feature))
    if feature.kind == "buckets":
        return bucketize(feature.name, feature.level, feature.boundaries)
    return vocabulary_lookup(feature, row)


def _hash_spec(feature: Feature) -> FeatureSpec:
    return FeatureSpec(
        feature.name,
        feature.level,
        "hash",
        feature.cardinality,
        multi_valued=feature.multi_valued,
        weighted=feature.weighted,
    )


def mean_values(connection: duckdb.DuckDBPyConnection, train: str, spec: FeatureSpec) -> float:
    """Return the mean number of values of a multi-valued feature, at least 1: an unknown value counts."""
    length = f"greatest(1, coalesce(len({quote_identifier(spec.name)}), 0))"
    total, count = fetch_one(connection, f"SELECT coalesce(sum({length}), 0)::BIGINT, count(*) FROM {train}")
    return float(total / count) if count else 1.0


def encode_relation(
    relation: str,
    encodings: Sequence[FeatureEncoding],
    columns: Sequence[str],
    prefix: str = "",
    joins: Sequence[str] = (),
    numbers: Sequence[NumberEncoding] = (),
) -> str:
    """Return the SQL of ``columns`` of ``relation`` (alias ``raw``), every feature's row and every number's value.

    Args:
        relation: relation with raw values.
        encodings: encodings of features.
        columns: further columns, on ``raw``.
        prefix: prefix of the names of rows and values.
        joins: further joins that ``columns`` need.
        numbers: encodings of numbers.
    """
    rows = []
    for encoding in encodings:
        feature, row = encoding.feature, encoding.row_sql
        if feature.multi_valued:
            rows += bag_sql.columns_sql(row, feature.name, prefix, feature.weighted)
        else:
            rows.append(f"{row} AS {quote_identifier(prefix + feature.name)}")
    rows += [f"{encoding.value_sql} AS {quote_identifier(prefix + encoding.number.name)}" for encoding in numbers]
    lookups = (encoding.join_sql.replace(RELATION, relation) for encoding in encodings if encoding.join_sql)
    all_joins = [*lookups, *joins]
    return f"SELECT {', '.join([*columns, *rows])} FROM {relation} AS raw {' '.join(all_joins)}"
