"""Time zones: DuckDB's rules against those of zoneinfo."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import duckdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.features.calendar import calendar_feature
from a2gen_rec.data.time_zone import QUARTER_HOUR_MS, TimeZone
from a2gen_rec.errors import DataError
from tests.helpers.cards import make_card
from tests.helpers.properties import examples
from tests.helpers.raw_logs import machine_time_zone

NAMES = (
    "Europe/Berlin",
    "America/New_York",
    "Asia/Shanghai",
    "Australia/Lord_Howe",
    "Asia/Kathmandu",
    "America/Sao_Paulo",
)
MOMENTS = st.datetimes(datetime(2000, 1, 2), datetime(2030, 1, 1), timezones=st.just(UTC))


def to_ms(moment):
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)


@given(MOMENTS, st.sampled_from(NAMES), st.sampled_from(["UTC", "America/Los_Angeles"]))
@examples(30, thorough=400)
def test_calendar_features_of_named_zones(moment, name, machine):
    local = moment.astimezone(ZoneInfo(name))
    zone, ts_ms = TimeZone(name), to_ms(moment)
    with machine_time_zone(machine), duckdb.connect() as connection:
        hour, day = (calendar_feature(feature, zone) for feature in ("hour_of_day", "day_of_week"))
        for ms in (ts_ms, ts_ms // QUARTER_HOUR_MS * QUARTER_HOUR_MS):
            row = connection.execute(f"SELECT {hour}, {day} FROM (SELECT {ms}::BIGINT AS ts_ms)").fetchone()
            assert row == (str(local.hour), str(local.weekday()))


@given(MOMENTS, st.sampled_from(NAMES))
@examples(30, thorough=400)
def test_local_times_of_named_zones(moment, name):
    local = moment.astimezone(ZoneInfo(name)).replace(tzinfo=None)
    first, second = (local.replace(tzinfo=ZoneInfo(name), fold=fold) for fold in (0, 1))
    assert TimeZone(name).to_utc_ms(local) in {to_ms(first.astimezone(UTC)), to_ms(second.astimezone(UTC))}
    assert TimeZone(name).to_utc_ms(moment) == to_ms(moment)


def test_ambiguous_and_missing_local_times():
    zone = TimeZone("Europe/Berlin")
    assert zone.to_utc_ms(datetime(2024, 10, 27, 2, 30)) == to_ms(datetime(2024, 10, 27, 1, 30, tzinfo=UTC))
    assert zone.to_utc_ms(datetime(2024, 3, 31, 2, 30)) == to_ms(datetime(2024, 3, 31, 1, 30, tzinfo=UTC))


@pytest.mark.parametrize(("name", "offset"), [("Moon/Tycho", 0), ("x'; DROP", 0), ("UTC", 1), ("", 15), ("", 0.1)])
def test_rejects_unknown_zones(name, offset):
    with pytest.raises(ValueError, match=r"time_zone|utc_offset_hours"):
        TimeZone(name, offset)


def test_cards_with_unknown_zones_are_invalid():
    raw = make_card().to_dict()
    assert DatasetCard.from_dict(raw | {"time_zone": "Asia/Tokyo"}).zone == TimeZone("Asia/Tokyo")
    with pytest.raises(DataError, match=r"invalid dataset card .unknown time_zone 'Asia/Nowhere'"):
        DatasetCard.from_dict(raw | {"time_zone": "Asia/Nowhere"})
