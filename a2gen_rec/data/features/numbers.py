"""Numbers as model inputs: standardized on training data, by SQL that ``prepare`` and serving share [ours].

The sums of a fit are integers, so the result does not depend on the order of rows or threads.
"""

from dataclasses import dataclass

import duckdb

from a2gen_rec.data.inputs import Number, Transform
from a2gen_rec.data.schema import FeatureSpec
from a2gen_rec.data.sql import fetch_one, quote_identifier, quote_literal

LIMIT = 10.0
"""Maximum magnitude of a standardized value, in standard deviations."""
RESOLUTION = 2**30
"""Steps between the smallest and the largest training value in the sums of a fit; third powers fit into 128 bits."""


@dataclass(frozen=True)
class NumberEncoding:
    """A number and the SQL of its standardized values on ``raw``."""

    number: Number
    value_sql: str


@dataclass(frozen=True)
class _Moments:
    mean: float
    std: float
    skewness: float


def fit_number(connection: duckdb.DuckDBPyConnection, train: str, spec: FeatureSpec) -> NumberEncoding:
    """Standardize a number on the relation ``train``.

    Values are transformed by log1p if none is negative and log1p has the smaller absolute skewness.
    """
    column = quote_identifier(spec.name)
    known = f"(SELECT {column} AS value FROM {train} WHERE {column} IS NOT NULL AND isfinite({column}))"
    count, low = fetch_one(connection, f"SELECT count(*), min(value) FROM {known}")
    if not count:
        return number_encoding(Number(spec.name, spec.level, "none", 0.0, 1.0))
    transforms: list[Transform] = ["none", "log1p"] if low >= 0 else ["none"]
    moments = {transform: _moments(connection, known, transform, count) for transform in transforms}
    transform = min(transforms, key=lambda name: abs(moments[name].skewness))  # of equals, the first
    fitted = moments[transform]
    return number_encoding(Number(spec.name, spec.level, transform, fitted.mean, fitted.std))


def number_encoding(number: Number) -> NumberEncoding:
    """Return the SQL of a fitted number."""
    raw = f"raw.{quote_identifier(number.name)}"
    mean, std = (f"{quote_literal(repr(value))}::DOUBLE" for value in (number.mean, number.std))
    standardized = f"({_transform_sql(raw, number.transform)} - {mean}) / {std}"
    clipped = f"greatest(-{LIMIT}, least({LIMIT}, {standardized}))"
    # NaN is the largest value in SQL, and would be clipped.
    value = f"CASE WHEN {raw} IS NULL OR isnan({raw}) THEN 'nan'::FLOAT ELSE {clipped}::FLOAT END"
    return NumberEncoding(number, value)


def _transform_sql(value: str, transform: Transform) -> str:
    return f"ln(1 + greatest({value}, 0))" if transform == "log1p" else value


def _moments(connection: duckdb.DuckDBPyConnection, known: str, transform: Transform, count: int) -> _Moments:
    """Return the moments of ``count`` transformed values."""
    values = f"(SELECT {_transform_sql('value', transform)} AS value FROM {known})"
    low, high = fetch_one(connection, f"SELECT min(value), max(value) FROM {values}")
    if not high - low > 0:
        return _Moments(low, 1.0, 0.0)
    unit = (high - low) / RESOLUTION
    lowest, step = (f"{quote_literal(repr(number))}::DOUBLE" for number in (low, unit))
    steps = f"(SELECT round((value - {lowest}) / {step})::HUGEINT AS k FROM {values})"
    s1, s2, s3 = map(int, fetch_one(connection, f"SELECT sum(k), sum(k * k), sum(k * k * k) FROM {steps}"))
    variance = (count * s2 - s1 * s1) / count**2
    third = (count**2 * s3 - 3 * count * s1 * s2 + 2 * s1**3) / count**3
    if variance <= 0:
        return _Moments(low, 1.0, 0.0)
    return _Moments(low + unit * s1 / count, unit * variance**0.5, third / variance**1.5)
