"""Context features computed from the start time of an impression."""

from a2gen_rec.data.time_zone import TimeZone

CALENDAR_FEATURES = {"hour_of_day": 24, "day_of_week": 7}
"""Name -> number of values. A log of one day has rows for all of them, which later days need."""


def calendar_feature(name: str, zone: TimeZone) -> str:
    """Return the SQL of the local hour (0-23) or weekday (0 is Monday) of an impression's start."""
    local_ms = zone.local_ms_sql("ts_ms")
    if name == "hour_of_day":
        return f"({local_ms} // 3600000 % 24)::VARCHAR"
    return f"(({local_ms} // 86400000 + 3) % 7)::VARCHAR"  # 1 January 1970 was a Thursday
