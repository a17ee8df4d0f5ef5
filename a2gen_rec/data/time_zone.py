"""Local time of a log: a fixed offset from UTC, or an IANA time zone with its daylight saving time.

``prepare`` and the service compute local time by the same SQL; DuckDB contains the rules of IANA time zones.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import duckdb

from a2gen_rec.data.sql import fetch_one, quote_literal

MIN_CALENDAR_MS = 946_684_800_000
"""Start of the year 2000: an earlier time in a log with a calendar indicates a wrong unit or a placeholder."""
MAX_TIMESTAMP_MS = 253_402_300_800_000
"""Start of the year 10000: a later time indicates a wrong unit, and its milliseconds may overflow."""
QUARTER_HOUR_MS = 900_000
"""Local time of every zone since 2000 differs from UTC by a multiple of this."""
UNIQUE_ABBREVIATIONS = frozenset(("UTC", "GMT", "UCT", "PRC", "ROC", "ROK", "EET", "MET", "WET"))
"""IANA names of three letters that mean one zone; CST is a zone of America, China and Cuba."""
_HOUR_MS = 3_600_000


@dataclass(frozen=True)
class TimeZone:
    """Time zone of a log.

    Attributes:
        name: IANA name such as ``Asia/Shanghai``; empty for a fixed offset.
        utc_offset_hours: fixed offset from UTC; 0 with a name.

    Raises:
        ValueError: the name is unknown, or the offset is not the offset of any place.
    """

    name: str = ""
    utc_offset_hours: float = 0.0

    def __post_init__(self) -> None:
        if self.name and self.utc_offset_hours:
            raise ValueError(f"time_zone {self.name} and utc_offset_hours {self.utc_offset_hours} exclude each other")
        if not (-12 <= self.utc_offset_hours <= 14 and self.utc_offset_hours * 4 % 1 == 0):
            raise ValueError(f"utc_offset_hours {self.utc_offset_hours} must be from -12 to 14, in quarters of an hour")
        if re.fullmatch("[A-Z]{3}", self.name) and self.name not in UNIQUE_ABBREVIATIONS:
            raise ValueError(f"time_zone {self.name!r} may be several zones; use an IANA name such as Asia/Shanghai")
        if self.name and not _query(
            f"SELECT count(*) FROM pg_timezone_names() WHERE name = {quote_literal(self.name)}"
        ):
            raise ValueError(f"unknown time_zone {self.name!r}; use an IANA name such as Asia/Shanghai")

    @property
    def is_utc(self) -> bool:
        return not self.name and not self.utc_offset_hours

    def local_ms_sql(self, utc_ms: str) -> str:
        """Return the SQL of local milliseconds (BIGINT) from milliseconds in UTC (BIGINT)."""
        if self.name:
            return f"epoch_ms(epoch_ms({utc_ms}) AT TIME ZONE 'UTC' AT TIME ZONE {quote_literal(self.name)})"
        return f"({utc_ms} + {self._offset_ms})"

    def utc_ms_sql(self, local: str) -> str:
        """Return the SQL of milliseconds in UTC (BIGINT) from a local TIMESTAMP of whole milliseconds.

        Where clocks go back, a local time that occurs twice is the second one; where they go forward, a local time
        that does not occur is as much later.
        """
        if self.name:
            return f"epoch_ms({local} AT TIME ZONE {quote_literal(self.name)})"
        return f"(epoch_ms({local}) - {self._offset_ms})"

    def to_utc_ms(self, time: datetime) -> int:
        """Return a datetime in milliseconds; it is local unless it contains a time zone."""
        if time.tzinfo is not None:
            return (time - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
        local_ms = (time - datetime(1970, 1, 1)) // timedelta(milliseconds=1)
        return _query(f"SELECT {self.utc_ms_sql(f'epoch_ms({local_ms}::BIGINT)')}")

    def start_of_day_ms(self, utc_ms: int, days_before: int) -> int:
        """Return the start of the local day that is ``days_before`` days before the day of ``utc_ms``."""
        day = f"date_trunc('day', epoch_ms({self.local_ms_sql(f'{utc_ms}::BIGINT')}))::TIMESTAMP"
        return _query(f"SELECT {self.utc_ms_sql(f'({day} - to_days({days_before}))')}")

    @property
    def _offset_ms(self) -> int:
        return round(self.utc_offset_hours * _HOUR_MS)


UTC_ZONE = TimeZone()


def _query(query: str) -> int:
    with duckdb.connect(":memory:") as connection:
        return int(fetch_one(connection, query)[0])
