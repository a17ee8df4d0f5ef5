"""Times of queries and impressions, and candidate files.

A request becomes one window whose targets are alternatives at the same query time. The history is encoded once, and the
factorized attention (METHODS §2.1) evaluates all candidates together.
"""

import io
import time
from numbers import Integral
from typing import TYPE_CHECKING

from a2gen_rec.data.time_zone import MAX_TIMESTAMP_MS, MIN_CALENDAR_MS
from a2gen_rec.errors import UserError
from a2gen_rec.ranking.checks import describe_value
from a2gen_rec.utils import paths

if TYPE_CHECKING:
    from a2gen_rec.data.columns import WindowColumns


def read_candidates(file: str) -> list[str]:
    """Return the distinct raw item identifiers of a file, one per line, in order.

    Raises:
        UserError: The file cannot be read or contains no identifier.
    """
    lines = (line.strip() for line in io.StringIO(paths.read_text(file), newline=None))
    candidates = list(dict.fromkeys(line for line in lines if line))
    if not candidates:
        raise UserError(f"{file}: no candidates; expected one raw item identifier per line")
    return candidates


def next_timestamp(history: "WindowColumns") -> int:
    """Return one second after the last end of one window's impressions, or the current time without any."""
    return int(history.end_ms.max()) + 1000 if len(history.ts_ms) else now_ms()


def check_time(ts_ms: int, name: str, has_calendar_time: bool) -> None:
    """Check that a time is in milliseconds, not in another unit.

    With a calendar, no moment from 2000 to 9999 passes in seconds or microseconds.

    Args:
        ts_ms: The time.
        name: Its name in error messages.
        has_calendar_time: Whether times are milliseconds since 1970; otherwise their origin is arbitrary.

    Raises:
        UserError: The time is no integer, later than the year 9999, or with a calendar earlier than the year 2000.
    """
    if not isinstance(ts_ms, Integral) or isinstance(ts_ms, bool):
        raise UserError(f"{name} must be an integer, not {describe_value(ts_ms)}")
    if ts_ms >= MAX_TIMESTAMP_MS:
        raise UserError(f"{name} {ts_ms} is after the year 9999; expected milliseconds, not microseconds")
    if has_calendar_time and ts_ms < MIN_CALENDAR_MS:
        unit = ", not seconds" if 1000 * ts_ms >= MIN_CALENDAR_MS else ""
        raise UserError(f"{name} {ts_ms} is before the year 2000; expected milliseconds since 1970{unit}")


def now_ms() -> int:
    """Return the current time in milliseconds since 1970."""
    return int(time.time() * 1000)
