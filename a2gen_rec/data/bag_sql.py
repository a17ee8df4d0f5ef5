"""SQL of multi-valued features: lists of raw values, and their table rows.

A list of raw values is ``VALUES_TYPE``: distinct values in ascending order with positive weights; NULL if empty. Its
rows are ``ROWS_TYPE``: known rows in ascending order; a list without known values has row 0.
"""

from a2gen_rec.data.sql import STABLE_HASH_SQL, quote_identifier

VALUES_TYPE = "STRUCT(value VARCHAR, weight FLOAT)[]"
ROWS_TYPE = 'STRUCT("row" BIGINT, weight FLOAT)[]'
WEIGHTS_COLUMN = "weights of "
"""Prefix of the columns of weights."""


def values_sql(values: str, weights: str = "") -> str:
    """Return ``VALUES_TYPE`` of a list of text, and of its list of weights; the weights of equal values add up."""
    distinct = f"list_sort(list_distinct(list_filter({values}, lambda v: v IS NOT NULL AND v <> '')))"
    weight = "1"
    if weights:
        pairs = f"list_filter(list_zip({values}, {weights}), lambda pair: pair[1] = v)"
        weight = f"coalesce(list_sum(list_transform({pairs}, lambda pair: pair[2])), 0)"
    entries = f"list_transform({distinct}, lambda v: {{'value': v, 'weight': ({weight})::FLOAT}})"
    if weights:
        entries = f"list_filter({entries}, lambda entry: entry.weight > 0)"
    return f"(CASE WHEN len({entries}) > 0 THEN {entries} END)"


def hashed_rows_sql(raw: str, size: int) -> str:
    """Return ``ROWS_TYPE`` of a list of values in a hashed table."""
    row = f"1 + {STABLE_HASH_SQL.format('entry.value')} % {size - 1}"
    return known_rows_sql(f"list_transform({raw}, lambda entry: {{'row': {row}, 'weight': entry.weight}})")


def known_rows_sql(entries: str) -> str:
    """Return ``ROWS_TYPE`` of known rows, which may be NULL or empty."""
    unknown = "[{'row': 0::BIGINT, 'weight': 1::FLOAT}]"
    return f"(CASE WHEN len({entries}) > 0 THEN list_sort({entries}) ELSE {unknown} END)"


def vocabulary_join_sql(column: str, relation: str, vocabulary: str, alias: str) -> str:
    """Return the join of the rows of the distinct lists in a column of ``relation``; its column is ``entries``."""
    lists = f"SELECT DISTINCT {column} AS key FROM {relation} WHERE {column} IS NOT NULL"
    return (
        f"LEFT JOIN (SELECT key, list({{'row': known.\"row\", 'weight': entry.weight}}) AS entries"
        f" FROM (SELECT key, unnest(key) AS entry FROM ({lists}))"
        f' JOIN (SELECT value, "row" FROM {vocabulary}) AS known ON entry.value = known.value GROUP BY key)'
        f" AS {alias} ON raw.{column} = {alias}.key"
    )


def columns_sql(rows: str, name: str, prefix: str, is_weighted: bool) -> list[str]:
    """Return the columns of a list of rows and, if weighted, of their weights."""
    columns = [f'list_transform({rows}, lambda entry: entry."row") AS {quote_identifier(prefix + name)}']
    if is_weighted:
        weights = quote_identifier(prefix + WEIGHTS_COLUMN + name)
        columns.append(f"list_transform({rows}, lambda entry: entry.weight) AS {weights}")
    return columns
