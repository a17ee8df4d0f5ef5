"""Text of identifiers and categories: one value has one text, whatever its physical type.

Logs store the number 500 as an integer, a float (pandas, where another row has no value), a decimal (Spark) or text,
in CSV also as the text of a float ("500.0"). :func:`text_sql` converts columns of a log, :func:`value_text` values of
a request; both return "500".
"""

import re

EXACT_INTEGERS = {"FLOAT": 1 << 24, "DOUBLE": 1 << 53}
"""Floating-point type -> start of the integers that it cannot distinguish."""

WHOLE_FLOAT = r"(0|-?[1-9][0-9]{0,14})\.0"
"""Text of a whole number as a float, as pandas writes it to CSV; larger ones are not exact."""


def is_nested(type_name: str) -> bool:
    """Return whether a DuckDB type is a list, a struct or another nested type."""
    return re.match(r"(STRUCT|MAP|UNION|VARIANT|GEOMETRY)\b", type_name) is not None or type_name.endswith("]")


def is_present_sql(column: str, type_name: str) -> str:
    """Return the SQL of whether a column is neither NULL, NaN nor empty text."""
    if type_name in EXACT_INTEGERS:
        return f"({column} IS NOT NULL AND NOT isnan({column}))"
    if type_name in ("VARCHAR", "BLOB"):
        return f"({column} IS NOT NULL AND {column} <> '')"
    return f"({column} IS NOT NULL)"


def text_sql(column: str, type_name: str) -> str:
    """Return the SQL of a column as text; NULL for NULL, NaN and empty text."""
    if type_name in EXACT_INTEGERS:
        # TRY_CAST: DuckDB 2.0.1 computes a cast that occurs several times outside of the CASE that guards it.
        is_integer = f"{column} = trunc({column}) AND abs({column}) < {EXACT_INTEGERS[type_name]}"
        text = f"CASE WHEN {is_integer} THEN TRY_CAST({column} AS BIGINT)::VARCHAR ELSE {column}::VARCHAR END"
        return f"CASE WHEN NOT isnan({column}) THEN {text} END"
    if type_name.startswith("DECIMAL"):
        text = f"{column}::VARCHAR"
        return text if type_name.endswith(",0)") else f"regexp_replace({text}, '\\.?0*$', '')"
    if type_name not in ("VARCHAR", "BLOB"):
        return f"{column}::VARCHAR"
    is_whole = f"ends_with({column}, '.0') AND regexp_full_match({column}, '{WHOLE_FLOAT}')"
    return f"CASE WHEN {is_whole} THEN {column}[:-3] ELSE nullif({column}, '') END"


def value_text(value: str | float) -> str | None:
    """Return one value as text, by the rules of :func:`text_sql`."""
    if isinstance(value, float):
        if value != value:
            return None
        if value.is_integer() and abs(value) < EXACT_INTEGERS["DOUBLE"]:
            return str(int(value))
    text = str(value)
    return (text[:-2] if re.fullmatch(WHOLE_FLOAT, text) else text) or None
