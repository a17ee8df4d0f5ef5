"""Columns of raw files as lists of values: Parquet lists, or text with a delimiter."""

import re
from collections.abc import Callable, Sequence

from a2gen_rec.data.bag_sql import values_sql
from a2gen_rec.data.sources.values import Check, Column, Value, coalesce
from a2gen_rec.data.sql import quote_literal
from a2gen_rec.data.text import EXACT_INTEGERS, is_nested, text_sql

Split = Callable[[Column], str]


def value_lists(columns: Sequence[Column], delimiter: str, weights: Sequence[Column] = ()) -> Value:
    """Return lists of values (``bag_sql.VALUES_TYPE``).

    Args:
        columns: columns of the values, of which the first that is not missing counts.
        delimiter: text between the values of a text column; empty if the columns are lists.
        weights: columns of the weights, in the form of the values; without any, all weights are 1.

    Raises:
        DataError: a column is neither a list of scalars nor text with a delimiter.
    """
    values = coalesce([text_lists(column, delimiter) for column in columns])
    checks = [check for column in columns for check in _exact(column)]
    if not weights:
        return Value(values_sql(values), tuple(checks))
    texts = coalesce([text_lists(column, delimiter) for column in weights])
    numbers = f"list_transform({texts}, lambda x: TRY_CAST(x AS DOUBLE))"
    name, value = weights[0].name, weights[0].sql
    invalid = f"len(list_filter({numbers}, lambda x: coalesce(x < 0 OR NOT isfinite(x), true))) > 0"
    checks.append(Check(name, invalid, value, "must be numbers of at least 0"))
    differs = f"coalesce(len({values}), 0) <> coalesce(len({texts}), 0)"
    checks.append(Check(name, differs, f"coalesce({value}::VARCHAR, '')", "must have one weight per value"))
    return Value(values_sql(values, numbers), tuple(checks))


def text_lists(column: Column, delimiter: str) -> str:
    """Return the SQL of a column as list of text; NULL if it is missing."""
    element = re.fullmatch(r"(.*)\[\d*\]", column.type_name)
    if element:
        if is_nested(element[1]):
            raise column.error(f"has the nested type {column.type_name}")
        return f"list_transform({column.sql}, lambda x: {text_sql('x', element[1])})"
    if not column.is_text or is_nested(column.type_name):
        raise column.error(f"is {column.type_name}, expected a list or text with a delimiter")
    if not delimiter:
        raise column.error("is text: set the delimiter of its values")
    parts = f"string_split(nullif({column.plain_sql}, ''), {quote_literal(delimiter)})"
    return f"list_transform({parts}, lambda x: {text_sql('trim(x)', 'VARCHAR')})"


def _exact(column: Column) -> list[Check]:
    """Return the checks that no type merges values, and that text is UTF-8."""
    if column.type_name == "BLOB":
        violation = f"{column.sql} IS NOT NULL AND {column.plain_sql} IS NULL"
        return [Check(column.name, violation, column.sql, "is not UTF-8")]
    element = column.type_name.removesuffix("[]")
    limit = EXACT_INTEGERS.get(element)
    if limit is None or element == column.type_name:
        return []
    violation = f"len(list_filter({column.sql}, lambda x: NOT isnan(x) AND abs(x) >= {limit})) > 0"
    return [Check(column.name, violation, column.sql, f"has a {element}, which merges whole numbers from {limit}")]
