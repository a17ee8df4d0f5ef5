"""Generic log in Parquet or CSV, described by a YAML spec: one row per impression or one row per event."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import duckdb

from a2gen_rec.data.sources import events
from a2gen_rec.data.sources.base import Source, SourceInfo
from a2gen_rec.data.sources.files import RawFiles, find_files
from a2gen_rec.data.sources.lists import value_lists
from a2gen_rec.data.sources.spec import (
    ActionColumns,
    ColumnNames,
    EventsSpec,
    FeatureColumn,
    ImpressionsSpec,
    LogSpec,
    as_list,
    load_spec,
)
from a2gen_rec.data.sources.times import time_ms
from a2gen_rec.data.sources.values import (
    Check,
    Column,
    Value,
    duration,
    finite_number,
    flag,
    identifier,
    missing,
    number,
    text,
)
from a2gen_rec.data.sources.vectors import side_files, vector_sources
from a2gen_rec.data.sql import quote_literal
from a2gen_rec.errors import DataError

IDENTIFIERS = ("user_id", "item_id")


def open_generic(raw: str, spec_file: str) -> Source:
    """Open the log at ``raw`` described by the YAML file ``spec_file``.

    Raises:
        ConfigError: the spec is invalid.
        DataError: a file or column is missing, or a header cannot be read.
    """
    spec = load_spec(spec_file)
    if isinstance(spec, ImpressionsSpec):
        return ImpressionsLog(raw, spec)
    return EventsLog(raw, spec)


def open_files(raw: str, spec: LogSpec, required: Sequence[ColumnNames]) -> RawFiles:
    """Return the files of a log, which have the ``required`` columns and those of features."""
    path = Path(raw)
    side = {file for files in side_files(path, spec).values() for file in files}
    files = [path] if path.is_file() else [file for file in find_files(path, spec.files) if file not in side]
    if not files:
        raise DataError(f"no file matching {spec.files} other than vectors", file=path)
    columns = [vector.columns for vector in spec.vectors if not vector.file]
    columns += [as_list(names) for names in required if names]
    columns += [feature.columns for feature in spec.features if feature.name not in IDENTIFIERS]
    columns += [as_list(feature.weights) for feature in spec.features if feature.weights]
    return RawFiles(files, columns, spec.dialect, spec.partition_columns)


def pick(columns: Mapping[str, Column], names: ColumnNames) -> list[Column]:
    """Return the columns that the files have, in the spec's order."""
    return [columns[name] for name in as_list(names) if name in columns]


def feature_values(columns: Mapping[str, Column], spec: LogSpec) -> dict[str, Value]:
    """Return feature -> raw value, without identifiers."""
    return {
        feature.name: _feature_value(columns, feature, spec)
        for feature in spec.features
        if feature.name not in IDENTIFIERS
    }


def _feature_value(raw: Mapping[str, Column], feature: FeatureColumn, spec: LogSpec) -> Value:
    columns = pick(raw, feature.columns)
    if feature.multi_valued:
        return value_lists(columns, feature.delimiter, pick(raw, feature.weights))
    if feature.kind == "number":
        return finite_number(columns)
    if feature.kind != "buckets":
        return text(columns)
    return duration(columns, spec.duration_unit) if feature.name == spec.duration_feature else number(columns)


class ImpressionsLog:
    """A log with one row per impression."""

    def __init__(self, raw: str, spec: ImpressionsSpec) -> None:
        self.spec = spec
        columns = spec.columns
        required = [columns.user, columns.item, columns.time, columns.dwell, columns.dwell_s, *spec.labels.values()]
        for action in spec.actions.values():
            required += [action.flag, action.offset, action.offset_s]
        self.files = open_files(raw, spec, required)
        self.vectors = vector_sources(Path(raw), spec, self.files, columns.item, columns.time)

    def describe(self) -> SourceInfo:
        info = self.spec.describe(list(self.spec.actions), list(self.spec.labels))
        return replace(info, vectors=self.vectors)

    def impressions(self, connection: duckdb.DuckDBPyConnection) -> str:
        return self.files.relation(connection, self._values)

    def _values(self, columns: Mapping[str, Column]) -> dict[str, Value]:
        spec, names = self.spec, self.spec.columns
        dwell = pick(columns, names.dwell or names.dwell_s)
        return {
            "user_id": identifier(pick(columns, names.user)),
            "item_id": identifier(pick(columns, names.item)),
            "ts_ms": time_ms(pick(columns, names.time), spec.time_format),
            "dwell_s": duration(dwell, spec.duration_unit) if dwell else Value("'nan'::DOUBLE"),
            **{f"at_{name}": self._action_value(columns, action) for name, action in spec.actions.items()},
            **{f"label_{name}": flag(pick(columns, label)) for name, label in spec.labels.items()},
            **feature_values(columns, spec),
            "drop_reason": Value("NULL::VARCHAR"),
        }

    def _action_value(self, columns: Mapping[str, Column], action: ActionColumns) -> Value:
        offset = pick(columns, action.offset or action.offset_s)
        time_s = duration(offset, self.spec.duration_unit) if offset else Value("NULL::DOUBLE")
        if not action.flag:
            return replace(time_s, sql=f"CASE WHEN NOT isnan({time_s.sql}) THEN {time_s.sql} END")
        occurred = flag(pick(columns, action.flag))
        sql = f"CASE WHEN {occurred.sql} = 1 THEN coalesce({time_s.sql}, 'nan'::DOUBLE) END"
        return Value(sql, (*occurred.checks, *time_s.checks))


class EventsLog:
    """A log with one row per event."""

    def __init__(self, raw: str, spec: EventsSpec) -> None:
        self.spec = spec
        columns = spec.columns
        self.files = open_files(raw, spec, [columns.user, columns.item, columns.time, columns.action])
        self.vectors = vector_sources(Path(raw), spec, self.files, columns.item, columns.time)

    def describe(self) -> SourceInfo:
        return replace(self.spec.describe(list(self.spec.actions), []), vectors=self.vectors)

    def impressions(self, connection: duckdb.DuckDBPyConnection) -> str:
        spec = self.spec
        used_events = [spec.open_event, *spec.actions.values(), *([spec.close_event] if spec.close_event else [])]
        used = ", ".join(quote_literal(value) for value in used_events)
        log = f"(SELECT * FROM ({self.files.relation(connection, self._values)}) WHERE action IN ({used}))"
        rules = events.SessionizationRules(spec.open_event, spec.actions, spec.idle_gap_s, spec.close_event)
        features = [feature.name for feature in spec.features if feature.name not in IDENTIFIERS]
        return events.impressions_from_events(log, rules, features)

    def _values(self, columns: Mapping[str, Column]) -> dict[str, Value]:
        spec, names = self.spec, self.spec.columns
        return {
            "user_id": identifier(pick(columns, names.user)),
            "item_id": identifier(pick(columns, names.item)),
            "action": self._action_value(pick(columns, names.action)),
            "t_ms": time_ms(pick(columns, names.time), spec.time_format),
            **feature_values(columns, spec),
        }

    def _action_value(self, columns: list[Column]) -> Value:
        spec = self.spec
        known = [spec.open_event, *spec.actions.values(), spec.close_event, *spec.ignored_events]
        action = text(columns)
        is_unknown = f"{action.sql} NOT IN ({', '.join(quote_literal(value) for value in known if value)})"
        name = columns[0].name
        reason = "is an unknown action; add it to actions or ignored_events"
        checks = (missing(columns, action.sql), Check(name, is_unknown, action.sql, reason))
        return replace(action, checks=(*action.checks, *checks))
