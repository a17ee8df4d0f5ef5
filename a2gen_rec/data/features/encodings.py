"""How raw feature values become table rows, learned from training impressions only. Row 0 is "unknown".

Every mapping is a piece of SQL on a relation called ``raw``: :func:`encoded` puts the pieces together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb

from a2gen_rec.data.schema import Feature, FeatureSpec, Level
from a2gen_rec.data.sql import STABLE_HASH, identifier, literal, one_row, order_statistics, parquet, write_sorted
from a2gen_rec.errors import ConfigError

DEFAULT_BUCKETS = 16


@dataclass(frozen=True)
class Encoding:
    """A feature and the SQL of its rows: ``row`` is an expression on ``raw`` after ``join``."""

    feature: Feature
    row: str
    join: str = ""


def fit(connection: duckdb.DuckDBPyConnection, train: str, spec: FeatureSpec, min_count: int, folder: Path) -> Encoding:
    """Learn a feature's rows from the relation ``train``; a vocabulary is written to ``folder``/NAME.parquet.

    Raises:
        ConfigError: a hash feature without room for a row besides "unknown".
    """
    if spec.kind == "hash":
        return hashed(spec)
    if spec.kind == "buckets":
        return bucketed(connection, train, spec)
    return vocabulary(connection, train, spec, min_count or spec.min_count, folder / f"{spec.name}.parquet")


def hashed(spec: FeatureSpec) -> Encoding:
    """Rows ``1 + hash % (size - 1)``: unbounded identifiers in a bounded table, with collisions."""
    if spec.size < 2:
        raise ConfigError(f"hash feature {spec.name!r} needs a size of at least 2, not {spec.size}")
    raw = f"raw.{identifier(spec.name)}"
    row = f"coalesce(1 + {STABLE_HASH.format(raw)} % {spec.size - 1}, 0)"
    return Encoding(Feature(spec.name, spec.level, "hash", spec.size), row)


def bucketed(connection: duckdb.DuckDBPyConnection, train: str, spec: FeatureSpec) -> Encoding:
    """Row ``1 + number of edges <= value``; edges as given, or the distinct training quantiles."""
    column = identifier(spec.name)
    edges = sorted({float(edge) for edge in spec.edges})
    if not edges:
        size = spec.size or DEFAULT_BUCKETS
        (count,) = one_row(connection, f"SELECT count(*) FROM {train} WHERE NOT isnan({column})")
        places = [max(1, -(-count * part // size)) for part in range(1, size)] if count else []
        edges = sorted(set(order_statistics(connection, train, column, places))) if places else []
    return between(spec.name, spec.level, edges)


def between(name: str, level: Level, edges: list[float]) -> Encoding:
    """Row ``1 + number of edges <= value`` of sorted edges; row 0 of NULL and NaN."""
    value = f"raw.{identifier(name)}"
    above = "".join(f" + ({value} >= {literal(repr(edge))}::DOUBLE)::INT" for edge in edges)
    row = f"(CASE WHEN {value} IS NULL OR isnan({value}) THEN 0 ELSE 1{above} END)::BIGINT"
    return Encoding(Feature(name, level, "buckets", len(edges) + 2, edges), row)


def vocabulary(
    connection: duckdb.DuckDBPyConnection, train: str, spec: FeatureSpec, min_count: int, file: Path
) -> Encoding:
    """Dense rows from 1 by falling training count, then by value; rare values share row 0."""
    column, table = identifier(spec.name), identifier(f"vocabulary of {spec.name}")
    bound = f"LIMIT {spec.size}" if spec.size else ""
    kept = write_sorted(
        connection,
        f"""SELECT value, row_number() OVER (ORDER BY count DESC, value) AS row, count
        FROM (SELECT {column} AS value, count(*) AS count FROM {train} WHERE {column} IS NOT NULL
              GROUP BY ALL HAVING count(*) >= {min_count} ORDER BY count DESC, value {bound})
        ORDER BY row""",
        file,
    )
    join = f"LEFT JOIN (SELECT value, row FROM {parquet(file)}) AS {table} ON raw.{column} = {table}.value"
    return found(Feature(spec.name, spec.level, "vocabulary", kept + 1), f"{table}.row", join)


def found(feature: Feature, row: str, join: str = "") -> Encoding:
    """What a vocabulary has: SQL of the value's ``row``, NULL where it is unknown."""
    return Encoding(feature, f"coalesce({row}, 0)", join)


def encoding_of(feature: Feature, row: str) -> Encoding:
    """The encoding that a feature of a dataset card was learned as; ``row``: as :func:`found` takes."""
    if feature.kind == "hash":
        return hashed(FeatureSpec(feature.name, feature.level, "hash", feature.cardinality))
    if feature.kind == "buckets":
        return between(feature.name, feature.level, feature.boundaries)
    return found(feature, row)


def encoded(relation: str, encodings: Sequence[Encoding], columns: Sequence[str], prefix: str = "") -> str:
    """SQL of ``columns`` of ``relation`` (by its alias ``raw``) and every feature's row, named prefix + feature."""
    rows = [f"{coding.row} AS {identifier(prefix + coding.feature.name)}" for coding in encodings]
    joins = " ".join(coding.join for coding in encodings if coding.join)
    return f"SELECT {', '.join([*columns, *rows])} FROM {relation} AS raw {joins}"
