"""A user's own log, Parquet or CSV, told by a YAML spec: a row per impression, or a row per action."""

from dataclasses import dataclass
from pathlib import Path

import duckdb

from a2gen_rec.data.sources import events
from a2gen_rec.data.sources.base import Source, SourceInfo
from a2gen_rec.data.sources.files import find_files, read_csv_sql, require_columns
from a2gen_rec.data.sources.spec import EventsSpec, FeatureColumn, ImpressionsSpec, LogSpec, load_spec
from a2gen_rec.data.sql import fetch_one, quote_identifier, quote_literal, translate_errors
from a2gen_rec.errors import ConfigError, DataError

# Beyond the year 9999 a number is a unit mistaken, and its milliseconds may overflow.
MAX_TIMESTAMP_MS = 253_402_300_800_000


@dataclass(frozen=True)
class ColumnCheck:
    """A condition (SQL) that makes a row unusable, the column it is about, and what to say."""

    column: str
    violation_sql: str
    reason: str


def open_generic(raw: str, spec_file: str) -> Source:
    """The log at ``raw`` described by the YAML file ``spec_file``.

    Raises:
        ConfigError: the spec is not valid.
        DataError: files or columns are missing, or a file's header cannot be read.
    """
    spec = load_spec(spec_file)
    if isinstance(spec, ImpressionsSpec):
        return ImpressionsLog(raw, spec)
    return EventsLog(raw, spec)


class LogFiles:
    """The files of a log and what is checked in every one of them."""

    def __init__(self, raw: str, spec: LogSpec, required: list[str]) -> None:
        path = Path(raw)
        self.files = [path] if path.is_file() else find_files(path, spec.files)
        parquet = {file.suffix == ".parquet" for file in self.files}
        if len(parquet) > 1:
            raise ConfigError(f"{raw}: files {spec.files!r} are partly Parquet and partly CSV; name a pattern")
        self.is_parquet = parquet.pop()
        for file in self.files:
            require_columns(file, self.relation([file]), required)

    def relation(self, files: list[Path]) -> str:
        """SQL of the raw rows with ``row``, their number in the file: from 1, and a CSV's header is 1."""
        if self.is_parquet:
            listed = ", ".join(quote_literal(file) for file in files)
            return (
                f"(SELECT * EXCLUDE (file_row_number), file_row_number + 1 AS row FROM"
                f" read_parquet([{listed}], union_by_name = true, hive_partitioning = false, file_row_number = true))"
            )
        return read_csv_sql(files)

    def with_row_numbers(self, file: Path) -> str:
        if self.is_parquet:
            return self.relation([file])
        return f"(SELECT *, row_number() OVER () + 1 AS row FROM {read_csv_sql([file])})"

    def check(self, connection: duckdb.DuckDBPyConnection, checks: list[ColumnCheck]) -> None:
        """Raise DataError for the first row of the first file that breaks a check."""
        broken = " ".join(f"WHEN {check.violation_sql} THEN {place}" for place, check in enumerate(checks))
        values = ", ".join(f"{quote_identifier(check.column)}::VARCHAR" for check in checks)
        connection.execute("SET preserve_insertion_order = true")
        for file in self.files:
            with translate_errors(file):
                found = connection.execute(
                    f"""SELECT row, broken, [{values}] FROM (
                        SELECT *, CASE {broken} END AS broken FROM {self.with_row_numbers(file)})
                    WHERE broken IS NOT NULL ORDER BY row LIMIT 1"""
                ).fetchall()
            for row, place, shown in found:
                reason = f"{shown[place]!r} {checks[place].reason}" if shown[place] is not None else "is missing"
                raise DataError(reason, file=file, row=row, field=checks[place].column)
        connection.execute("SET preserve_insertion_order = false")

    def time_ms(self, connection: duckdb.DuckDBPyConnection, column: str, spec: LogSpec) -> str:
        """SQL of a time column as epoch milliseconds; NULL when it cannot be read."""
        name = quote_identifier(column)
        factor = {"ms": "", "s": " * 1000", "us": " / 1000"}
        if spec.time_unit != "timestamp":
            number = f"TRY_CAST({name} AS DOUBLE){factor[spec.time_unit]}"
            # Integers of microseconds exceed a DOUBLE's 53 bits only after the year 2255.
            return f"(CASE WHEN abs({number}) < {MAX_TIMESTAMP_MS} THEN TRY_CAST(round({number}) AS BIGINT) END)"
        (kind,) = fetch_one(connection, f"SELECT any_value(typeof({name})) FROM {self.relation(self.files[:1])}")
        if kind == "TIMESTAMP WITH TIME ZONE":
            return f"epoch_ms({name})"
        return f"(epoch_ms(TRY_CAST({name} AS TIMESTAMP)) - {round(spec.utc_offset_hours * 3_600_000)})"


def cast_number_sql(column: str) -> str:
    """SQL of a column as DOUBLE; true and false are 1 and 0; NULL when it is neither."""
    name = quote_identifier(column)
    return f"coalesce(TRY_CAST({name} AS DOUBLE), TRY_CAST(TRY_CAST({name}::VARCHAR AS BOOLEAN) AS DOUBLE))"


def check_flag(column: str) -> ColumnCheck:
    name = quote_identifier(column)
    bad = f"{name} IS NOT NULL AND NOT coalesce({cast_number_sql(column)} IN (0, 1), false)"
    return ColumnCheck(column, bad, "is neither 0 nor 1")


def check_duration(column: str) -> ColumnCheck:
    """A number that is not negative; NULL and NaN are allowed: not recorded."""
    name = quote_identifier(column)
    bad = f"{name} IS NOT NULL AND NOT coalesce({cast_number_sql(column)} >= 0 AND {cast_number_sql(column)} <> 'inf'::DOUBLE, false)"
    return ColumnCheck(column, bad, "is not a duration: a number of at least 0")


def check_present(column: str) -> ColumnCheck:
    return ColumnCheck(column, f"{quote_identifier(column)} IS NULL", "is missing")


def feature_expressions(features: list[FeatureColumn]) -> dict[str, str]:
    """Feature name to the SQL of its raw value, identifiers left out."""
    select = {}
    for feature in features:
        column = feature.column or feature.name
        if feature.name not in ("user_id", "item_id"):
            bucketed = feature.kind == "buckets"
            select[feature.name] = cast_number_sql(column) if bucketed else f"{quote_identifier(column)}::VARCHAR"
    return select


def feature_columns(features: list[FeatureColumn]) -> list[str]:
    return [x.column or x.name for x in features if x.name not in ("user_id", "item_id")]


def feature_checks(features: list[FeatureColumn]) -> list[ColumnCheck]:
    """Bucketed features must be numbers."""
    columns = [x.column or x.name for x in features if x.kind == "buckets"]
    return [
        ColumnCheck(
            name, f"{quote_identifier(name)} IS NOT NULL AND {cast_number_sql(name)} IS NULL", "is not a number"
        )
        for name in columns
    ]


class ImpressionsLog:
    """A log of one row per exposure."""

    def __init__(self, raw: str, spec: ImpressionsSpec) -> None:
        self.spec = spec
        at = spec.columns
        acts = [name for action in spec.actions.values() for name in (action.flag, action.offset_s) if name]
        dwell = [at.dwell_s] if at.dwell_s else []
        needed = [at.user, at.item, at.time, *dwell, *acts, *spec.labels.values(), *feature_columns(spec.features)]
        self.files = LogFiles(raw, spec, needed)

    def describe(self) -> SourceInfo:
        return self.spec.describe(list(self.spec.actions), list(self.spec.labels))

    def impressions(self, connection: duckdb.DuckDBPyConnection) -> str:
        spec, at = self.spec, self.spec.columns
        time = self.files.time_ms(connection, at.time, spec)
        checks = [check_present(at.user), check_present(at.item)]
        checks += [ColumnCheck(at.time, f"{time} IS NULL", f"is no time in {spec.time_unit}")]
        checks += [check_duration(at.dwell_s)] if at.dwell_s else []
        scale = "" if spec.duration_unit == "s" else " / 1000"
        select = {"dwell_s": f"{cast_number_sql(at.dwell_s)}{scale}" if at.dwell_s else "'nan'::DOUBLE"}
        for name, action in spec.actions.items():
            checks += [check_flag(action.flag)] if action.flag else []
            checks += [check_duration(action.offset_s)] if action.offset_s else []
            offset = f"({cast_number_sql(action.offset_s)}{scale})" if action.offset_s else "NULL"
            if action.flag:
                select[f"at_{name}"] = (
                    f"CASE WHEN {cast_number_sql(action.flag)} = 1 THEN coalesce({offset}, 'nan'::DOUBLE) END"
                )
            else:
                select[f"at_{name}"] = f"CASE WHEN NOT isnan({offset}) THEN {offset} END"
        for name, column in spec.labels.items():
            checks.append(check_flag(column))
            select[f"label_{name}"] = cast_number_sql(column)
        self.files.check(connection, checks + feature_checks(spec.features))
        select |= feature_expressions(spec.features)
        if spec.duration_feature:
            select[spec.duration_feature] += scale
        columns = "".join(f", {value} AS {quote_identifier(name)}" for name, value in select.items())
        return f"""SELECT {quote_identifier(at.user)}::VARCHAR AS user_id, {quote_identifier(at.item)}::VARCHAR AS item_id,
            {time} AS ts_ms{columns}, NULL AS drop_reason FROM {self.files.relation(self.files.files)}"""


class EventsLog:
    """A log of one row per action, each with its own time."""

    def __init__(self, raw: str, spec: EventsSpec) -> None:
        self.spec = spec
        at = spec.columns
        self.files = LogFiles(raw, spec, [at.user, at.item, at.time, at.action, *feature_columns(spec.features)])

    def describe(self) -> SourceInfo:
        return self.spec.describe(list(self.spec.actions), [])

    def impressions(self, connection: duckdb.DuckDBPyConnection) -> str:
        spec, at = self.spec, self.spec.columns
        action = f"{quote_identifier(at.action)}::VARCHAR"
        meant = [spec.open_event, *spec.actions.values(), *([spec.close_event] if spec.close_event else [])]
        known = ", ".join(quote_literal(value) for value in [*meant, *spec.ignored_events])
        time = self.files.time_ms(connection, at.time, spec)
        checks = [check_present(name) for name in (at.user, at.item, at.action)]
        checks += [ColumnCheck(at.time, f"{time} IS NULL", f"is no time in {spec.time_unit}")]
        checks += [ColumnCheck(at.action, f"{action} NOT IN ({known})", "is an unknown action")]
        self.files.check(connection, checks + feature_checks(spec.features))
        select = feature_expressions(spec.features)
        columns = "".join(f", {value} AS {quote_identifier(name)}" for name, value in select.items())
        log = f"""(SELECT {quote_identifier(at.user)}::VARCHAR AS user_id, {quote_identifier(at.item)}::VARCHAR AS item_id,
            {action} AS action, {time} AS t_ms{columns} FROM {self.files.relation(self.files.files)}
            WHERE {action} IN ({", ".join(quote_literal(value) for value in meant)}))"""
        rules = events.SessionizationRules(spec.open_event, spec.actions, spec.idle_gap_s, spec.close_event)
        return events.impressions_from_events(log, rules, list(select))
