"""Context features computed from the time of an impression."""

from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.errors import DataError

CALENDAR = ("hour_of_day", "day_of_week")


def calendar_feature(name: str, utc_offset_hours: float) -> str:
    """SQL of the local hour (0-23) or weekday (0 is Monday) an impression began at."""
    local_ms = f"(ts_ms + {round(utc_offset_hours * 3_600_000)})"
    if name == "hour_of_day":
        return f"({local_ms} // 3600000 % 24)::VARCHAR"
    return f"(({local_ms} // 86400000 + 3) % 7)::VARCHAR"  # 1 January 1970 was a Thursday


def features_from_time(card: DatasetCard) -> list[str]:
    """Context features that are computed from the time of an impression.

    Raises:
        DataError: the card is too old to tell.
    """
    if card.time_features is not None:
        return card.time_features
    for feature in card.features_at("context"):
        if feature.name in CALENDAR:
            raise DataError(
                f"the dataset {card.name!r} was prepared before datasets told their time zone; prepare it again",
                field=feature.name,
            )
    return []
