"""Vectors of items in a generic log: a column of the log, or side files by item."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import duckdb

from a2gen_rec.data.sources.base import VectorSource
from a2gen_rec.data.sources.files import RawFiles, check_unique, find_files
from a2gen_rec.data.sources.lists import text_lists
from a2gen_rec.data.sources.spec import ColumnNames, LogSpec, VectorSpec, as_list
from a2gen_rec.data.sources.times import time_ms
from a2gen_rec.data.sources.values import Check, Column, Value, identifier
from a2gen_rec.data.vectors import MAX_MAGNITUDE


def side_files(raw: Path, spec: LogSpec) -> dict[str, list[Path]]:
    """Return vector -> its side files, for the vectors with any.

    Raises:
        DataError: no file matches.
    """
    folder = raw.parent if raw.is_file() else raw
    return {vector.name: find_files(folder, vector.file) for vector in spec.vectors if vector.file}


def vector_sources(
    raw: Path, spec: LogSpec, log: RawFiles, item: ColumnNames, time: ColumnNames
) -> tuple[VectorSource, ...]:
    """Return the vectors of a generic log.

    Args:
        raw: file or directory of the log.
        spec: spec of the log.
        log: files of the log.
        item: columns of the item in the log.
        time: columns of the time in the log; of several rows, an item has the vector of the latest.

    Raises:
        DataError: a side file is missing, not readable, or lacks a column.
    """
    files = side_files(raw, spec)
    sources = []
    for vector in spec.vectors:
        if vector.name in files:
            side = RawFiles(files[vector.name], [vector.item, vector.columns], spec.dialect)
            sources.append(_side_source(side, vector))
        else:
            sources.append(_log_source(log, spec, vector, item, time))
    return tuple(sources)


def _side_source(side: RawFiles, vector: VectorSpec) -> VectorSource:
    def values(columns: Mapping[str, Column]) -> dict[str, Value]:
        return {
            "item_id": identifier([columns[vector.item]]),
            "vector": _vector(_pick(columns, vector.columns), vector),
        }

    def relation(connection: duckdb.DuckDBPyConnection) -> str:
        query = side.relation(connection, values)
        check_unique(connection, query, "item_id", side.files)
        return query

    return VectorSource(vector.name, vector.width, relation)


def _log_source(log: RawFiles, spec: LogSpec, vector: VectorSpec, item: ColumnNames, time: ColumnNames) -> VectorSource:
    def values(columns: Mapping[str, Column]) -> dict[str, Value]:
        return {
            "item_id": identifier(_pick(columns, as_list(item))),
            "ts_ms": time_ms(_pick(columns, as_list(time)), spec.time_format),
            "vector": _vector(_pick(columns, vector.columns), vector),
        }

    def relation(connection: duckdb.DuckDBPyConnection) -> str:
        latest = "max({'ts_ms': ts_ms, 'vector': vector}).vector"
        rows = log.relation(connection, values)
        return f"SELECT item_id, {latest} AS vector FROM ({rows}) WHERE vector IS NOT NULL GROUP BY item_id"

    return VectorSource(vector.name, vector.width, relation)


def _pick(columns: Mapping[str, Column], names: Sequence[str]) -> list[Column]:
    return [columns[name] for name in names if name in columns]


def _vector(columns: Sequence[Column], vector: VectorSpec) -> Value:
    """Return vectors: DOUBLE[], NULL if missing; checks their width and elements."""
    column = columns[0]
    if re.fullmatch(r"(FLOAT|DOUBLE)\[\d*\]", column.type_name):
        numbers = f"{column.sql}::DOUBLE[]"
    else:
        numbers = f"list_transform({text_lists(column, vector.delimiter)}, lambda x: TRY_CAST(x AS DOUBLE))"
    width = Check(column.name, f"len({numbers}) <> {vector.width}", f"len({numbers})", _width_reason(vector.width))
    invalid = f"len(list_filter({numbers}, lambda x: NOT coalesce(abs(x) <= {MAX_MAGNITUDE}, false))) > 0"
    reason = f"has an element that is missing, not finite or above {MAX_MAGNITUDE:.0f}"
    return Value(numbers, (width, Check(column.name, invalid, column.sql, reason)))


def _width_reason(width: int) -> str:
    return f"elements, expected {width}"
