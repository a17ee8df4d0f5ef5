"""Time columns of raw files as milliseconds since 1970, the same on every machine.

A moment has one millisecond, the one it lies in, whatever unit, time zone and physical type the log stores it in.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from a2gen_rec.data.sources.values import Check, Column, Value, coalesce, column_checks, missing
from a2gen_rec.data.text import EXACT_INTEGERS, is_present_sql
from a2gen_rec.data.time_zone import MAX_TIMESTAMP_MS, MIN_CALENDAR_MS, UTC_ZONE, TimeZone

TimeUnit = Literal["s", "ms", "us", "ns", "timestamp"]
UNITS_PER_S = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
INTEGER_TYPES = tuple(
    f"{sign}{size}" for sign in ("", "U") for size in ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT")
)
# Letters after the time of day that name several zones: CST is a zone of America, China and Cuba.
_ABBREVIATION = r"[\s\d]([A-Za-z]{2,5})$"
_UTC_NAMES = ("UTC", "GMT")
# Text after the time of day: an offset, or the name of a zone.
_ZONE_PATTERN = r"^[^:]*\d:\d{1,2}(?::\d{1,2}(?:\.\d*)?)?\s*[^\s\d:.].*$"


@dataclass(frozen=True)
class TimeFormat:
    """Meaning of a time column's values.

    Attributes:
        unit: unit of numbers since 1970, or ``timestamp`` for text; timestamps of Parquet have their own unit.
        zone: time zone of timestamps without a zone.
        zoneless: whether timestamps without a zone are local or in UTC; None means local, and refuses a Parquet type
            that suggests UTC.
        has_calendar: whether times are wall-clock times, and not only an order.
    """

    unit: TimeUnit
    zone: TimeZone = UTC_ZONE
    zoneless: Literal["local", "utc"] | None = None
    has_calendar: bool = True


def time_ms(columns: Sequence[Column], style: TimeFormat) -> Value:
    """Return times: BIGINT milliseconds; checks that they are present, valid and, with a calendar, not before 2000.

    Raises:
        DataError: a column's type cannot be a time of this format.
    """
    milliseconds = [_milliseconds(column, style) for column in columns]
    return checked_time(columns, milliseconds, f"is not a time in {style.unit}", style.has_calendar)


def checked_time(
    columns: Sequence[Column], milliseconds: Sequence[str], reason: str, has_calendar: bool = True
) -> Value:
    """Return times from the SQL of each column's milliseconds, which is NULL for an invalid time."""
    in_range = [f"(CASE WHEN abs({ms}) < {MAX_TIMESTAMP_MS} THEN TRY_CAST({ms} AS BIGINT) END)" for ms in milliseconds]
    ms_of = dict(zip(columns, in_range, strict=True))

    def is_time(column: Column) -> Check:
        violation = f"{is_present_sql(column.plain_sql, column.type_name)} AND {ms_of[column]} IS NULL"
        if column.type_name in EXACT_INTEGERS:
            violation = f"isnan({column.sql}) OR {violation}"
        return Check(
            column.name,
            violation,
            column.sql,
            lambda value: f"{value!r} {reason}{_ambiguity(value) or _suggestion(value)}",
        )

    def is_recent(column: Column) -> Check | None:
        violation = f"{ms_of[column]} < {MIN_CALENDAR_MS}"
        before = "is before the year 2000"
        check = Check(column.name, violation, column.sql, lambda value: f"{value!r} {before}{_suggestion(value)}")
        return check if has_calendar else None

    checks = column_checks(columns, is_time, is_recent)
    sql = coalesce(in_range)
    return Value(sql, (*checks, missing(columns, sql)))


def _milliseconds(column: Column, style: TimeFormat) -> str:
    """Return the SQL of a column's milliseconds: an integer type, NULL for an invalid time."""
    kind, x = column.type_name, column.plain_sql
    if kind.startswith("TIMESTAMP") and ("TIME ZONE" in kind or "TZ" in kind):
        return _timestamp_ms(x, kind)
    if kind.startswith("TIMESTAMP") or kind == "DATE":
        if column.is_utc_by_format and style.zoneless is None and not style.zone.is_utc:
            reason = (
                "has the Parquet type INT96, which Spark writes in UTC; set zoneless_timestamps to utc, or to local"
            )
            raise column.error(reason)
        return _zoneless_ms(_timestamp_ms(x, kind), style)
    if column.is_text:
        return _text_ms(x, style) if style.unit == "timestamp" else _number_text_ms(x, style.unit)
    is_integer = kind in INTEGER_TYPES or (kind.startswith("DECIMAL") and kind.endswith(",0)"))
    if not is_integer and kind not in ("FLOAT", "DOUBLE", '"NULL"') and not kind.startswith("DECIMAL"):
        raise column.error(f"has the type {kind}, which is not a time")
    if style.unit == "timestamp":
        raise column.error(f"has the type {kind}; time_unit must be its unit (s, ms, us or ns) instead of timestamp")
    if kind == "FLOAT" and style.has_calendar:
        raise column.error("has the type FLOAT, whose 24 bits cannot store a time to the second; store integers")
    return _integer_ms(x, style.unit) if is_integer else _float_ms(x, style.unit)


def _integer_ms(x: str, unit: str) -> str:
    per_s = UNITS_PER_S[unit]
    factor = f"* {1000 // per_s}" if per_s <= 1000 else f"// {per_s // 1000}"
    return f"(TRY_CAST({x} AS HUGEINT) {factor})"


def _float_ms(x: str, unit: str) -> str:
    """Round to microseconds, which a DOUBLE can distinguish until 2255, and down to milliseconds."""
    number = f"TRY_CAST({x} AS DOUBLE)"
    return f"TRY_CAST(floor(round({number} * {1_000_000 / UNITS_PER_S[unit]!r}) / 1000) AS HUGEINT)"


def _number_text_ms(x: str, unit: str) -> str:
    is_integer = f"regexp_full_match(trim({x}), '[+-]?[0-9]{{1,30}}')"
    return f"CASE WHEN {is_integer} THEN {_integer_ms(x, unit)} ELSE {_float_ms(x, unit)} END"


def _text_ms(x: str, style: TimeFormat) -> str:
    """Return the SQL of a text's time; an offset or zone in the text wins.

    DuckDB 2.0.1: a cast to TIMESTAMP ignores everything after the time of day.
    """
    spaceless = f"regexp_replace(trim({x}), '(:[0-9.]+)\\s+([+-])', '\\1\\2')"
    is_ambiguous = (
        f"upper(regexp_extract(trim({x}), '{_ABBREVIATION}', 1)) NOT IN ('', {', '.join(map(repr, _UTC_NAMES))})"
    )
    zoned = f"(CASE WHEN NOT {is_ambiguous} THEN TRY_CAST(regexp_replace({spaceless}, 'z$', 'Z') AS TIMESTAMPTZ) END)"
    zoneless = _zoneless_ms(_timestamp_ms(f"TRY_CAST({x} AS TIMESTAMP)"), style)
    return f"CASE WHEN {has_zone_sql(x)} THEN {_timestamp_ms(zoned)} ELSE {zoneless} END"


def has_zone_sql(x: str) -> str:
    """Return the SQL of whether a text contains an offset or a time zone after the time of day."""
    return f"regexp_matches(trim({x}), '{_ZONE_PATTERN}')"


def _timestamp_ms(timestamp: str, type_name: str = "TIMESTAMP") -> str:
    """Return the SQL of the millisecond in which a timestamp since 1970 lies; in local time if it has no zone.

    DuckDB 2.0.1: epoch_ms() and casts round to the nearest unit, and epoch_ms() does not accept TIMESTAMPTZ_NS.
    """
    if "_NS" in type_name:
        return f"(epoch_ns({timestamp}) // 1000000)"
    return f"(epoch_us({timestamp}{'::TIMESTAMP' if type_name == 'DATE' else ''}) // 1000)"


def _zoneless_ms(local_ms: str, style: TimeFormat) -> str:
    return local_ms if style.zoneless == "utc" else style.zone.utc_ms_sql(f"epoch_ms({local_ms})")


def _ambiguity(value: str) -> str:
    """Return that a text ends with an abbreviation of time zones, if it does."""
    match = re.search(_ABBREVIATION, value.strip())
    if match is None or match[1].upper() in (*_UTC_NAMES, "AM", "PM"):
        return ""
    return f"; {match[1]} may be several time zones, write an offset such as +08:00"


def _suggestion(value: str) -> str:
    """Return the unit in which a number is a time of this century, if there is one."""
    try:
        number = float(value)
    except ValueError:
        return ""
    for unit, per_s in UNITS_PER_S.items():
        if MIN_CALENDAR_MS / 1000 <= number / per_s < 4 * MIN_CALENDAR_MS / 1000:
            return f"; in {unit} it is {datetime.fromtimestamp(number / per_s, UTC):%Y-%m-%d %H:%M:%S} UTC"
    return ""
