"""Context features computed from the start time of an impression."""

CALENDAR_FEATURES = ("hour_of_day", "day_of_week")


def calendar_feature(name: str, utc_offset_hours: float) -> str:
    """Return the SQL of the local hour (0-23) or weekday (0 is Monday) of an impression's start."""
    local_ms = f"(ts_ms + {round(utc_offset_hours * 3_600_000)})"
    if name == "hour_of_day":
        return f"({local_ms} // 3600000 % 24)::VARCHAR"
    return f"(({local_ms} // 86400000 + 3) % 7)::VARCHAR"  # 1 January 1970 was a Thursday
