"""Columns of raw files as canonical values: text, numbers, durations and flags, with the checks of their rows.

A value comes from the first of one or several columns that is not missing. NULL, NaN and empty text are missing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from a2gen_rec.data.text import EXACT_INTEGERS, is_nested, is_present_sql, text_sql
from a2gen_rec.errors import DataError

MAX_DURATION_S = 10**9
"""Longer durations (30 years) indicate a wrong unit, and the end of their impression may overflow."""
_INEXACT_FLOAT = r"-?[0-9]+\.[0-9]*[eE][+-]?[0-9]+|-?[0-9]{16,}\.0+"
"""Text of a float in scientific notation (spreadsheets, Spark), or beyond the exact whole numbers."""


@dataclass(frozen=True)
class Column:
    """One column in some files of a log with equal columns.

    Attributes:
        name: name in the files.
        sql: SQL of the column.
        type_name: DuckDB type.
        file: first of the files.
        is_utc_by_format: whether zoneless timestamps of the column's Parquet type are in UTC (INT96).
    """

    name: str
    sql: str
    type_name: str
    file: str
    is_utc_by_format: bool = False

    @property
    def is_text(self) -> bool:
        """Whether values are text; a BLOB is text that its writer did not declare as text."""
        return self.type_name in ("VARCHAR", "BLOB")

    @property
    def plain_sql(self) -> str:
        """SQL of the column; a BLOB is decoded, and NULL if it is not UTF-8."""
        return f"TRY(decode({self.sql}))" if self.type_name == "BLOB" else self.sql

    def error(self, reason: str) -> DataError:
        return DataError(reason, file=self.file, field=self.name)


@dataclass(frozen=True)
class Check:
    """Check of rows.

    Attributes:
        field: checked column.
        violation_sql: condition of an invalid row; NULL is valid.
        value_sql: SQL of the value in the error.
        reason: text of the error after the value, or a function of the value's text.
    """

    field: str
    violation_sql: str
    value_sql: str
    reason: str | Callable[[str], str]

    def message(self, value: str | None) -> str:
        if callable(self.reason):
            return self.reason(str(value))
        return f"{value!r} {self.reason}" if value is not None else "is missing"


@dataclass(frozen=True)
class Value:
    """SQL of a canonical value, and the checks of its columns."""

    sql: str
    checks: tuple[Check, ...] = ()


def text(columns: Sequence[Column]) -> Value:
    """Return categories: VARCHAR, NULL if missing; checks that no type merges values."""
    return Value(coalesce([text_sql(x.plain_sql, x.type_name) for x in columns]), column_checks(columns, _exact_text))


def identifier(columns: Sequence[Column]) -> Value:
    """Return identifiers: VARCHAR; checks that they are present, and that numbers are whole."""
    sql = coalesce([text_sql(x.plain_sql, x.type_name) for x in columns])
    return Value(sql, (*column_checks(columns, _exact_text, _is_integral), missing(columns, sql)))


def number(columns: Sequence[Column], max_value: float | None = None) -> Value:
    """Return numbers: DOUBLE, NULL or NaN if missing; true and false are 1 and 0."""

    def not_larger(column: Column) -> Check | None:
        if max_value is None:
            return None
        violation = f"NOT isnan({_number_sql(column)}) AND {_number_sql(column)} > {max_value}"
        return Check(column.name, violation, column.sql, f"is more than {max_value}")

    return Value(coalesce([_number_sql(x) for x in columns]), column_checks(columns, _is_number, not_larger))


def finite_number(columns: Sequence[Column]) -> Value:
    """Return numbers as :func:`number` does; checks that they are finite."""

    def is_finite(column: Column) -> Check:
        return Check(column.name, f"isinf({_number_sql(column)})", column.sql, "is not finite")

    return Value(coalesce([_number_sql(x) for x in columns]), column_checks(columns, _is_number, is_finite))


def duration(columns: Sequence[Column], unit: str) -> Value:
    """Return seconds: DOUBLE, NULL or NaN if missing; checks that they are from 0 to ``MAX_DURATION_S``."""
    units_per_s = {"s": 1, "ms": 1000}[unit]

    def not_negative(column: Column) -> Check:
        valid = f"coalesce({_number_sql(column)} >= 0 AND {_number_sql(column)} <> 'inf'::DOUBLE, false)"
        violation = f"{_is_present(column)} AND NOT {valid}"
        return Check(column.name, violation, column.sql, "must be a number of at least 0")

    def not_longer(column: Column) -> Check:
        seconds = f"{_number_sql(column)} / {units_per_s}"
        violation = f"NOT isnan({seconds}) AND {seconds} > {MAX_DURATION_S}"
        return Check(column.name, violation, column.sql, f"{unit} is more than {MAX_DURATION_S} seconds")

    sql = coalesce([_number_sql(x) for x in columns])
    return Value(
        f"({sql} / {units_per_s})" if units_per_s > 1 else sql, column_checks(columns, not_negative, not_longer)
    )


def flag(columns: Sequence[Column]) -> Value:
    """Return flags: DOUBLE 0 or 1, NULL if missing."""

    def is_flag(column: Column) -> Check:
        violation = f"{_is_present(column)} AND NOT coalesce({_number_sql(column)} IN (0, 1), false)"
        return Check(column.name, violation, column.sql, "must be 0 or 1")

    numbers = [f"CASE WHEN NOT isnan({_number_sql(x)}) THEN {_number_sql(x)} END" for x in columns]
    return Value(coalesce(numbers), column_checks(columns, is_flag))


def count(columns: Sequence[Column]) -> Value:
    """Return counts: DOUBLE whole numbers from 0, NULL if missing."""

    def is_count(column: Column) -> Check:
        value = f"TRY_CAST({column.plain_sql} AS DOUBLE)"
        valid = f"coalesce({value} >= 0 AND {value} < 1e9 AND {value} = trunc({value}), false)"
        return Check(column.name, f"{_is_present(column)} AND NOT {valid}", column.sql, "must be a whole number from 0")

    return Value(coalesce([_number_sql(x) for x in columns]), column_checks(columns, is_count))


def missing(columns: Sequence[Column], sql: str) -> Check:
    """Return the check that the value ``sql`` of columns is present."""
    return Check(" or ".join(column.name for column in columns), f"{sql} IS NULL", "NULL", "is missing")


def coalesce(values: Sequence[str]) -> str:
    return f"coalesce({', '.join(values)})" if len(values) > 1 else values[0]


def column_checks(columns: Sequence[Column], *checks: Callable[[Column], Check | None]) -> tuple[Check, ...]:
    """Return the checks of every column.

    Raises:
        DataError: a column has a nested type.
    """
    for column in columns:
        if is_nested(column.type_name):
            raise column.error(f"has the nested type {column.type_name}")
    built = [check(column) for column in columns for check in (_is_utf8, *checks)]
    return tuple(check for check in built if check is not None)


def _is_utf8(column: Column) -> Check | None:
    if column.type_name != "BLOB":
        return None
    return Check(column.name, f"{column.sql} IS NOT NULL AND {column.plain_sql} IS NULL", column.sql, "is not UTF-8")


def _exact_text(column: Column) -> Check | None:
    limit = EXACT_INTEGERS.get(column.type_name)
    if limit is None:
        return None
    violation = f"NOT isnan({column.sql}) AND abs({column.sql}) >= {limit}"
    reason = f"is a {column.type_name}, which merges whole numbers from {limit}; store integers or text"
    return Check(column.name, violation, column.sql, reason)


def _is_integral(column: Column) -> Check | None:
    if column.is_text:
        x = column.plain_sql
        violation = f"contains({x}, '.') AND regexp_full_match({x}, '{_INEXACT_FLOAT}')"
        return Check(column.name, violation, column.sql, "is the text of a float, which may merge whole numbers")
    if column.type_name not in EXACT_INTEGERS and not column.type_name.startswith("DECIMAL"):
        return None
    return Check(column.name, f"{column.sql} <> trunc({column.sql})", column.sql, "must be a whole number or text")


def _is_number(column: Column) -> Check:
    return Check(column.name, f"{_is_present(column)} AND {_number_sql(column)} IS NULL", column.sql, "is not a number")


def _is_present(column: Column) -> str:
    return is_present_sql(column.plain_sql, column.type_name)


def _number_sql(column: Column) -> str:
    """Return the SQL of a column as DOUBLE; true and false are 1 and 0; NULL for other values."""
    if column.type_name == "FLOAT":
        # Via text: the shortest decimal that identifies a FLOAT; a plain cast would add digits of its rounding error.
        return f"{column.sql}::VARCHAR::DOUBLE"
    if not column.is_text:
        return f"TRY_CAST({column.sql} AS DOUBLE)"
    return (
        f"coalesce(TRY_CAST({column.plain_sql} AS DOUBLE), TRY_CAST(TRY_CAST({column.plain_sql} AS BOOLEAN) AS DOUBLE))"
    )
