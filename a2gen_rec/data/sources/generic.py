"""Generic log in Parquet or CSV, described by a YAML spec: one row per impression or one row per event."""

from dataclasses import dataclass
from pathlib import Path

import duckdb

from a2gen_rec.data.sources import events
from a2gen_rec.data.sources.base import Source, SourceInfo
from a2gen_rec.data.sources.files import find_files, read_csv_sql, require_columns
from a2gen_rec.data.sources.spec import EventsSpec, FeatureColumn, ImpressionsSpec, LogSpec, load_spec
from a2gen_rec.data.sql import fetch_one, quote_identifier, quote_literal, translate_errors
from a2gen_rec.errors import ConfigError, DataError

# A time after the year 9999 indicates a wrong unit, and its milliseconds may overflow.
MAX_TIMESTAMP_MS = 253_402_300_800_000


@dataclass(frozen=True)
class ColumnCheck:
    """Check of one column.

    Attributes:
        column: checked column.
        violation_sql: condition of an invalid row.
        reason: text of the error.
    """

    column: str
    violation_sql: str
    reason: str


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


class LogFiles:
    """Files of a log with checks of their rows."""

    def __init__(self, raw: str, spec: LogSpec, required: list[str]) -> None:
        path = Path(raw)
        self.files = [path] if path.is_file() else find_files(path, spec.files)
        parquet = {file.suffix == ".parquet" for file in self.files}
        if len(parquet) > 1:
            raise ConfigError(f"{raw}: files {spec.files!r} match both Parquet and CSV; use a pattern for one format")
        self.is_parquet = parquet.pop()
        for file in self.files:
            require_columns(file, self.relation([file]), required)

    def relation(self, files: list[Path]) -> str:
        """Return the SQL of the raw rows. Parquet rows have a column ``row``, their 1-based number in the file."""
        if self.is_parquet:
            file_list = ", ".join(quote_literal(file) for file in files)
            options = "union_by_name = true, hive_partitioning = false, file_row_number = true"
            return (
                f"(SELECT * EXCLUDE (file_row_number), file_row_number + 1 AS row"
                f" FROM read_parquet([{file_list}], {options}))"
            )
        return read_csv_sql(files)

    def with_row_numbers(self, file: Path) -> str:
        """Return the SQL of the raw rows with ``row``, their 1-based line in a CSV file or row in a Parquet file."""
        if self.is_parquet:
            return self.relation([file])
        return f"(SELECT *, row_number() OVER () + 1 AS row FROM {read_csv_sql([file])})"

    def check(self, connection: duckdb.DuckDBPyConnection, checks: list[ColumnCheck]) -> None:
        """Check all files.

        Raises:
            DataError: for the first row of the first file with a violation.
        """
        violations = " ".join(f"WHEN {check.violation_sql} THEN {index}" for index, check in enumerate(checks))
        values = ", ".join(f"{quote_identifier(check.column)}::VARCHAR" for check in checks)
        connection.execute("SET preserve_insertion_order = true")
        for file in self.files:
            with translate_errors(file):
                rows = connection.execute(
                    f"""SELECT row, violation, [{values}] FROM (
                        SELECT *, CASE {violations} END AS violation FROM {self.with_row_numbers(file)})
                    WHERE violation IS NOT NULL ORDER BY row LIMIT 1"""
                ).fetchall()
            for row, index, row_values in rows:
                value, check = row_values[index], checks[index]
                reason = f"{value!r} {check.reason}" if value is not None else "is missing"
                raise DataError(reason, file=file, row=row, field=check.column)
        connection.execute("SET preserve_insertion_order = false")

    def time_ms(self, connection: duckdb.DuckDBPyConnection, column: str, spec: LogSpec) -> str:
        """Return the SQL of a time column in epoch milliseconds; NULL for an invalid time."""
        name = quote_identifier(column)
        factor = {"ms": "", "s": " * 1000", "us": " / 1000"}
        if spec.time_unit != "timestamp":
            number = f"TRY_CAST({name} AS DOUBLE){factor[spec.time_unit]}"
            # Integer microseconds exceed the 53 bits of a DOUBLE only after the year 2255.
            return f"(CASE WHEN abs({number}) < {MAX_TIMESTAMP_MS} THEN TRY_CAST(round({number}) AS BIGINT) END)"
        (type_name,) = fetch_one(connection, f"SELECT any_value(typeof({name})) FROM {self.relation(self.files[:1])}")
        if type_name == "TIMESTAMP WITH TIME ZONE":
            return f"epoch_ms({name})"
        return f"(epoch_ms(TRY_CAST({name} AS TIMESTAMP)) - {round(spec.utc_offset_hours * 3_600_000)})"


def cast_number_sql(column: str) -> str:
    """Return the SQL of a column as DOUBLE; true and false are 1 and 0; NULL for other values."""
    name = quote_identifier(column)
    return f"coalesce(TRY_CAST({name} AS DOUBLE), TRY_CAST(TRY_CAST({name}::VARCHAR AS BOOLEAN) AS DOUBLE))"


def check_flag(column: str) -> ColumnCheck:
    name = quote_identifier(column)
    violation = f"{name} IS NOT NULL AND NOT coalesce({cast_number_sql(column)} IN (0, 1), false)"
    return ColumnCheck(column, violation, "must be 0 or 1")


def check_duration(column: str) -> ColumnCheck:
    """Check for a non-negative number; NULL and NaN (not recorded) are allowed."""
    name = quote_identifier(column)
    number = cast_number_sql(column)
    is_duration = f"coalesce({number} >= 0 AND {number} <> 'inf'::DOUBLE, false)"
    return ColumnCheck(column, f"{name} IS NOT NULL AND NOT {is_duration}", "must be a number of at least 0")


def check_present(column: str) -> ColumnCheck:
    return ColumnCheck(column, f"{quote_identifier(column)} IS NULL", "is missing")


def feature_expressions(features: list[FeatureColumn]) -> dict[str, str]:
    """Return feature name -> SQL of its raw value, without identifiers."""
    select = {}
    for feature in features:
        column = feature.column or feature.name
        if feature.name not in ("user_id", "item_id"):
            is_number = feature.kind == "buckets"
            select[feature.name] = cast_number_sql(column) if is_number else f"{quote_identifier(column)}::VARCHAR"
    return select


def feature_columns(features: list[FeatureColumn]) -> list[str]:
    return [x.column or x.name for x in features if x.name not in ("user_id", "item_id")]


def feature_checks(features: list[FeatureColumn]) -> list[ColumnCheck]:
    """Return checks that bucketed features are numbers."""
    columns = [x.column or x.name for x in features if x.kind == "buckets"]
    return [
        ColumnCheck(
            name, f"{quote_identifier(name)} IS NOT NULL AND {cast_number_sql(name)} IS NULL", "is not a number"
        )
        for name in columns
    ]


class ImpressionsLog:
    """A log with one row per impression."""

    def __init__(self, raw: str, spec: ImpressionsSpec) -> None:
        self.spec = spec
        columns = spec.columns
        action_columns = [name for action in spec.actions.values() for name in (action.flag, action.offset_s) if name]
        required = [columns.user, columns.item, columns.time, *([columns.dwell_s] if columns.dwell_s else [])]
        required += [*action_columns, *spec.labels.values(), *feature_columns(spec.features)]
        self.files = LogFiles(raw, spec, required)

    def describe(self) -> SourceInfo:
        return self.spec.describe(list(self.spec.actions), list(self.spec.labels))

    def impressions(self, connection: duckdb.DuckDBPyConnection) -> str:
        spec, columns = self.spec, self.spec.columns
        time = self.files.time_ms(connection, columns.time, spec)
        checks = [check_present(columns.user), check_present(columns.item)]
        checks += [ColumnCheck(columns.time, f"{time} IS NULL", f"is not a time in {spec.time_unit}")]
        checks += [check_duration(columns.dwell_s)] if columns.dwell_s else []
        scale = "" if spec.duration_unit == "s" else " / 1000"
        select = {"dwell_s": f"{cast_number_sql(columns.dwell_s)}{scale}" if columns.dwell_s else "'nan'::DOUBLE"}
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
        expressions = "".join(f", {value} AS {quote_identifier(name)}" for name, value in select.items())
        return f"""SELECT {quote_identifier(columns.user)}::VARCHAR AS user_id,
            {quote_identifier(columns.item)}::VARCHAR AS item_id, {time} AS ts_ms{expressions}, NULL AS drop_reason
            FROM {self.files.relation(self.files.files)}"""


class EventsLog:
    """A log with one row per event."""

    def __init__(self, raw: str, spec: EventsSpec) -> None:
        self.spec = spec
        columns = spec.columns
        required = [columns.user, columns.item, columns.time, columns.action, *feature_columns(spec.features)]
        self.files = LogFiles(raw, spec, required)

    def describe(self) -> SourceInfo:
        return self.spec.describe(list(self.spec.actions), [])

    def impressions(self, connection: duckdb.DuckDBPyConnection) -> str:
        spec, columns = self.spec, self.spec.columns
        action = f"{quote_identifier(columns.action)}::VARCHAR"
        used_events = [spec.open_event, *spec.actions.values(), *([spec.close_event] if spec.close_event else [])]
        known = ", ".join(quote_literal(value) for value in [*used_events, *spec.ignored_events])
        time = self.files.time_ms(connection, columns.time, spec)
        checks = [check_present(name) for name in (columns.user, columns.item, columns.action)]
        checks += [ColumnCheck(columns.time, f"{time} IS NULL", f"is not a time in {spec.time_unit}")]
        checks += [ColumnCheck(columns.action, f"{action} NOT IN ({known})", "is an unknown action")]
        self.files.check(connection, checks + feature_checks(spec.features))
        select = feature_expressions(spec.features)
        expressions = "".join(f", {value} AS {quote_identifier(name)}" for name, value in select.items())
        log = f"""(SELECT {quote_identifier(columns.user)}::VARCHAR AS user_id,
            {quote_identifier(columns.item)}::VARCHAR AS item_id,
            {action} AS action, {time} AS t_ms{expressions} FROM {self.files.relation(self.files.files)}
            WHERE {action} IN ({", ".join(quote_literal(value) for value in used_events)}))"""
        rules = events.SessionizationRules(spec.open_event, spec.actions, spec.idle_gap_s, spec.close_event)
        return events.impressions_from_events(log, rules, list(select))
