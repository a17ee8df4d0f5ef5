"""Statistics of a raw log's columns: one query of aggregates over all rows, in bounded memory.

Types come from all rows, not from a sample. Only the levels of features are measured on a sample of users or items.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import duckdb

from a2gen_rec.data.sources.files import RawFiles
from a2gen_rec.data.sources.lists import text_lists
from a2gen_rec.data.sources.times import INTEGER_TYPES, TimeFormat, has_zone_sql, time_ms
from a2gen_rec.data.sources.values import Column, Value, number, text
from a2gen_rec.data.sql import fetch_one, quote_literal, translate_errors
from a2gen_rec.data.text import is_nested

SAMPLE_ROWS = 500_000
"""Approximate number of rows from which the levels of features are measured."""
MAX_SAMPLE_ROWS = 4 * SAMPLE_ROWS
NUMBER_TYPES = (*INTEGER_TYPES, "FLOAT", "DOUBLE", "BOOLEAN", "VARCHAR", "BLOB")


@dataclass(frozen=True)
class ColumnProfile:
    """Statistics of a column over all rows.

    Attributes:
        index: position in the relation.
        name: name in the files.
        types: DuckDB types in the files; several if they differ.
        in_all_files: whether every file has the column.
        is_partition: whether the column is a folder ``name=value``.
        is_utc_by_format: whether its Parquet type suggests UTC (INT96).
        rows: number of rows.
        present: rows with a value.
        distinct: number of values, approximate.
        is_constant: whether there is at most one value.
        length: mean number of characters.
        numbers: values that are numbers.
        whole: values that are whole numbers.
        flags: values that are 0, 1, true or false.
        zeros: values that are 0.
        negative: values below 0.
        min: smallest number; None without numbers.
        median: median number, approximate.
        max: largest number.
        times: texts and timestamps that are times.
        zoned: texts with an offset or a time zone.
        first_ms: first of these times in ms, in UTC if they have no zone; None without times.
        last_ms: last of these times.
        example: some value.
    """

    index: int
    name: str
    types: tuple[str, ...]
    in_all_files: bool
    is_partition: bool
    is_utc_by_format: bool
    rows: int
    present: int
    distinct: int
    is_constant: bool
    length: float
    numbers: int
    whole: int
    flags: int
    zeros: int
    negative: int
    min: float | None
    median: float | None
    max: float | None
    times: int
    zoned: int
    first_ms: int | None
    last_ms: int | None
    example: str

    @property
    def missing(self) -> int:
        return self.rows - self.present

    @property
    def is_number(self) -> bool:
        return 0 < self.present == self.numbers

    @property
    def is_flag(self) -> bool:
        return 0 < self.present == self.flags

    @property
    def is_time(self) -> bool:
        """Whether at least 99% of the values are times with a date."""
        return 0 < self.present <= 1.01 * self.times

    @property
    def has_zone(self) -> bool:
        """Whether all times contain their time zone."""
        return all(_is_zoned(kind) for kind in self.types) or (self.zoned == self.present > 0)


@dataclass(frozen=True)
class ListProfile:
    """Statistics of a column of lists.

    Attributes:
        index: position among the list columns of the relation.
        name: name in the files.
        element: DuckDB type of the elements; of several, the first.
        in_all_files: whether every file has the column.
        min_length: smallest number of elements; 0 without lists.
        max_length: largest number of elements.
        is_constant: whether there is at most one list.
    """

    index: int
    name: str
    element: str
    in_all_files: bool
    min_length: int
    max_length: int
    is_constant: bool


@dataclass(frozen=True)
class Variation:
    """Number of items (or users) with several values of a column, and of those in which the values differ."""

    groups: int
    varying: int

    @property
    def is_constant(self) -> bool:
        """Whether the value differs in at most 1% of the items, of which there is at least one."""
        return self.groups > 0 and self.varying <= 0.01 * self.groups


class LogProfile:
    """Columns of a log.

    Args:
        connection: DuckDB connection; temporary tables are created on it.
        files: files of the log.
        partitions: names of folders ``name=value`` that are columns.

    Attributes:
        columns: single-valued columns by name.
        lists: columns of lists of single values.
        nested: names of columns of other nested types.

    Raises:
        DataError: a file cannot be parsed.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection, files: RawFiles, partitions: Sequence[str]) -> None:
        self.connection, self.files = connection, files
        names = dict.fromkeys(name for group in files.groups for name in group.columns)
        columns = {name: [group.columns[name] for group in files.groups if name in group.columns] for name in names}
        nested = [name for name in names if any(is_nested(column.type_name) for column in columns[name])]
        self.names = [name for name in names if name not in nested]
        self._lists = [name for name in nested if all(list_element(column.type_name) for column in columns[name])]
        self.nested = [name for name in nested if name not in self._lists]
        with translate_errors(files.files[0]):
            self.relation = f"({files.relation(connection, self._values)})"
            queries = ", ".join(part for index in range(len(self.names)) for part in _aggregates(index))
            self.rows, *numbers = fetch_one(connection, f"SELECT count(*), {queries} FROM {self.relation}")
            self.lists = self._list_profiles(columns)
        size = len(_aggregates(0))
        self.columns = {
            name: ColumnProfile(
                index,
                name,
                tuple(dict.fromkeys(column.type_name for column in columns[name])),
                len(columns[name]) == len(files.groups),
                name in partitions,
                any(column.is_utc_by_format for column in columns[name]),
                self.rows,
                *numbers[index * size : (index + 1) * size],
            )
            for index, name in enumerate(self.names)
        }

    def count(self, condition: str) -> int:
        """Return the number of rows that satisfy an SQL condition on the relation."""
        return int(fetch_one(self.connection, f"SELECT count_if({condition}) FROM {self.relation}")[0])

    def values(self, columns: Sequence[ColumnProfile]) -> dict[str, list[str]]:
        """Return the values of columns with few values, in one query: binding a wide log takes longer than reading."""
        if not columns:
            return {}
        lists = ", ".join(f"list(DISTINCT t{column.index})" for column in columns)
        rows = fetch_one(self.connection, f"SELECT {lists} FROM {self.relation}")
        return {column.name: sorted(values or []) for column, values in zip(columns, rows, strict=True)}

    def value_counts(self, column: ColumnProfile, user: str, item: str, order: str) -> dict[str, tuple[int, int]]:
        """Return value -> number of rows, and of pairs of user and item that start with it; most frequent first.

        The second number is from a sample of the users.

        Args:
            column: column of the values.
            user: SQL of users.
            item: SQL of items.
            order: SQL of the order of a pair's rows.
        """
        value = f"t{column.index}"
        totals = self.connection.execute(
            f"SELECT {value}, count(*) FROM {self.relation} WHERE {value} IS NOT NULL GROUP BY ALL ORDER BY 2 DESC, 1"
        ).fetchall()
        firsts = dict(
            self.connection.execute(
                f"SELECT first, count(*) FROM (SELECT arg_min({value}, ({order}, {value})) AS first"
                f" FROM {self.sample_sql(user)} GROUP BY {user}, {item}) GROUP BY first"
            ).fetchall()
        )
        return {value: (count, firsts.get(value, 0)) for value, count in totals}

    def variations(self, key: str, columns: Sequence[ColumnProfile]) -> dict[str, Variation]:
        """Return how columns vary within the values of ``key``, in a sample of these values."""
        if not columns:
            return {}
        groups = ", ".join(
            f"count({x}) > 1 AS s{x}, count({x}) > 1 AND min({x}) <> max({x}) AS v{x}"
            for x in (f"t{column.index}" for column in columns)
        )
        counts = ", ".join(f"count_if(st{column.index}), count_if(vt{column.index})" for column in columns)
        query = f"SELECT {counts} FROM (SELECT {groups} FROM {self.sample_sql(key)} GROUP BY {key})"
        numbers = fetch_one(self.connection, query)
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        return {column.name: Variation(*pair) for column, pair in zip(columns, pairs, strict=True)}

    def list_variation(self, key: str, column: ListProfile) -> Variation:
        """Return how a column of lists varies within the values of ``key``, in a sample of these values."""
        x = f"l{column.index}"
        groups = f"SELECT count({x}) > 1 AS s, count({x}) > 1 AND min({x}) <> max({x}) AS v"
        query = f"SELECT count_if(s), count_if(v) FROM ({groups} FROM {self.sample_sql(key)} GROUP BY {key})"
        return Variation(*fetch_one(self.connection, query))

    def _list_profiles(self, columns: Mapping[str, Sequence[Column]]) -> list[ListProfile]:
        if not self._lists:
            return []
        lengths = ", ".join(
            f"coalesce(min(len({x})), 0), coalesce(max(len({x})), 0), coalesce(min({x}) = max({x}), true)"
            for x in (f"l{index}" for index in range(len(self._lists)))
        )
        numbers = fetch_one(self.connection, f"SELECT {lengths} FROM {self.relation}")
        return [
            ListProfile(
                index,
                name,
                list_element(columns[name][0].type_name),
                len(columns[name]) == len(self.files.groups),
                *numbers[3 * index : 3 * index + 3],
            )
            for index, name in enumerate(self._lists)
        ]

    def sample_sql(self, key: str) -> str:
        """Return the SQL of all rows of a share of the values of ``key``."""
        share = max(1, self.rows // SAMPLE_ROWS)
        chosen = f"{key} IS NOT NULL AND hash({key}) % {share} = 0"
        return f"(SELECT * FROM {self.relation} WHERE {chosen} LIMIT {MAX_SAMPLE_ROWS})"

    def _values(self, columns: Mapping[str, Column]) -> dict[str, Value]:
        """Return text ``t``, number ``n`` and time ``m`` (ms) of every column by its index, without checks."""
        values = {}
        for index, name in enumerate(self.names):
            column = columns.get(name)
            values[f"t{index}"] = Value(text([column]).sql if column else "NULL::VARCHAR")
            values[f"n{index}"] = Value(_number_sql(column) if column else "NULL::DOUBLE")
            values[f"m{index}"] = Value(_time_sql(column) if column else "NULL::BIGINT")
        for index, name in enumerate(self._lists):
            column = columns.get(name)
            values[f"l{index}"] = Value(text_lists(column, "") if column else "NULL::VARCHAR[]")
        return values


def list_element(type_name: str) -> str:
    """Return the type of the elements of a DuckDB type; empty for other types than lists of single values."""
    element = re.fullmatch(r"(.*)\[\d*\]", type_name)
    return "" if element is None or is_nested(element[1]) else element[1]


def _number_sql(column: Column) -> str:
    if column.type_name not in NUMBER_TYPES and not column.type_name.startswith("DECIMAL"):
        return "NULL::DOUBLE"
    value = number([column]).sql
    return f"CASE WHEN isfinite({value}) THEN {value} END"


def _time_sql(column: Column) -> str:
    if column.is_text or column.type_name.startswith("TIMESTAMP") or column.type_name == "DATE":
        return time_ms([column], TimeFormat("timestamp", has_calendar=False)).sql
    return "NULL::BIGINT"


def _aggregates(index: int) -> list[str]:
    """Return the SQL of the last attributes of ``ColumnProfile``, in their order."""
    t, n, m = f"t{index}", f"n{index}", f"m{index}"
    return [
        f"count({t})",
        f"approx_count_distinct({t})",
        f"coalesce(min({t}) = max({t}), true)",
        f"coalesce(avg(length({t})), 0)",
        f"count({n})",
        f"count_if({n} = trunc({n}))",
        f"count_if({n} IN (0, 1))",
        f"count_if({n} = 0)",
        f"count_if({n} < 0)",
        f"min({n})",
        f"approx_quantile({n}, 0.5)",
        f"max({n})",
        f"count({m})",
        f"count_if({has_zone_sql(t)})",
        f"min({m})",
        f"max({m})",
        f"coalesce(min({t}), {quote_literal('')})",
    ]


def _is_zoned(type_name: str) -> bool:
    return type_name.startswith("TIMESTAMP") and ("TIME ZONE" in type_name or "TZ" in type_name)
