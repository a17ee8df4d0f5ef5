"""Times: one millisecond per moment, for every unit, time zone and physical type, on every machine."""

import itertools
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2gen_rec.config import PrepareConfig
from a2gen_rec.data.prepare.pipeline import prepare
from a2gen_rec.data.sources.values import MAX_DURATION_S
from a2gen_rec.errors import ConfigError, DataError
from tests.helpers.properties import examples
from tests.helpers.raw_logs import SPEC, START_MS, machine_time_zone, read_log, write_files

PER_MS = {"s": 0.001, "ms": 1, "us": 1000, "ns": 1_000_000}
ZONES = ("UTC", "Asia/Shanghai", "America/St_Johns")
PLAIN = {"columns": {"user": "user", "item": "item", "time": "ts"}, "actions": {}}


def read_times(folder, *values, **spec):
    """Return the rows of one file per array or list of texts; an item is the index of its value."""
    files = {}
    for number, array in enumerate(values):
        count = len(array)
        if isinstance(array, pa.Array | pa.ChunkedArray):
            files[f"{number}.parquet"] = pa.table({"user": ["u"] * count, "item": range(count), "ts": array})
        else:
            rows = "".join(f"u,{index},{text}\n" for index, text in enumerate(array))
            files[f"{number}.csv"] = f"user,item,ts\n{rows}"
    return read_log(folder, files, **PLAIN, **spec)


def times(folder, *values, **spec):
    """Return the milliseconds of one file per array or list of texts."""
    return [row["ts_ms"] for row in read_times(folder, *values, **spec)]


def times_by_index(folder, *values, **spec):
    """Return the set of milliseconds of each index, in all arrays and lists of texts."""
    read = [set() for _ in values[0]]
    rows = read_times(folder, *values, **spec)
    assert len(rows) == len(values) * len(read)
    for row in rows:
        read[int(row["item_id"])].add(row["ts_ms"])
    return read


def moment(text):
    return round(datetime.fromisoformat(text).timestamp() * 1000)


@pytest.mark.parametrize("machine", ["UTC", "Asia/Shanghai", "America/New_York"])
def test_parquet_timestamps_with_a_zone(tmp_path, machine):
    arrays = [pa.array([int(START_MS * PER_MS[unit])], pa.timestamp(unit, zone)) for unit in PER_MS for zone in ZONES]
    with machine_time_zone(machine):
        for spec in ({}, {"utc_offset_hours": 8}, {"time_zone": "Europe/Berlin"}, {"zoneless_timestamps": "utc"}):
            folder = tmp_path / "-".join(map(str, spec.values()))
            assert set(times(folder, *arrays, time_unit="timestamp", **spec)) == {START_MS}
        assert set(times(tmp_path / "ms", *arrays)) == {START_MS}, "timestamps have their own unit"


@pytest.mark.parametrize("machine", ["UTC", "America/New_York"])
def test_zoneless_timestamps(tmp_path, machine):
    local = [int(START_MS * PER_MS[unit]) for unit in PER_MS]
    arrays = [pa.array([value], pa.timestamp(unit)) for unit, value in zip(PER_MS, local, strict=True)]
    arrays += [pa.array([datetime(2024, 5, 1).date()]), ["2024-05-01"], ["2024-05-01 00:00:00"], ["2024-05-01T00:00"]]
    hours_ms = 3_600_000
    with machine_time_zone(machine):
        for index, (spec, shift) in enumerate(
            (
                ({}, 0),
                ({"utc_offset_hours": 8}, 8 * hours_ms),
                ({"time_zone": "Asia/Shanghai"}, 8 * hours_ms),
                ({"time_zone": "America/New_York"}, -4 * hours_ms),
                ({"utc_offset_hours": 8, "zoneless_timestamps": "utc"}, 0),
            )
        ):
            read = times(tmp_path / str(index), *arrays, time_unit="timestamp", **spec)
            assert set(read) == {START_MS - shift}, spec


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2024-05-01T00:00:00Z", START_MS),
        ("2024-05-01T00:00:00z", START_MS),
        ("2024-05-01 00:00:00 UTC", START_MS),
        ("2024-05-01 08:00:00 GMT+8", START_MS),
        ("2024-05-01 08:00:00 UTC+08:00", START_MS),
        ("2024-05-01T08:00:00+08:00", START_MS),
        ("2024-05-01 08:00:00 +08", START_MS),
        ("2024-05-01 08:00+0800", START_MS),
        ("2024-05-01T05:30:00.25+05:30", START_MS + 250),
        ("2024-04-30T20:30:00-0330", START_MS),
        ("2024-05-01 08:00:00 Asia/Shanghai", START_MS),
        ("2023-10-29T02:20:00+02:00", moment("2023-10-29T02:20:00+02:00")),
        ("2023-10-29T02:20:00+01:00", moment("2023-10-29T02:20:00+01:00")),
        ("2024-05-01 08:00:00.9999999", START_MS + 999),
        ("2024-5-1 8:00:07", START_MS + 7000),
    ],
)
def test_offset_in_the_text_wins(tmp_path, text, expected):
    assert times(tmp_path, [text], time_unit="timestamp", utc_offset_hours=8) == [expected]


@pytest.mark.parametrize(
    "text",
    [
        "2024-05-01 00:00:00 AM",
        "2024-05-01 00:00:00 XYZ",
        "2024-05-01T00:00:00+8",
        "2024-13-01",
        "05/01/2024",
        "infinity",
        "1714521600",
        "2024-05-01 (BC)",
        "1999-12-31 23:59:59",
        "1970-01-01",
    ],
)
def test_texts_that_are_no_times_of_this_century(tmp_path, text):
    reason = r"(is not a time in timestamp|is before the year 2000)"
    with pytest.raises(DataError, match=rf"0.csv, row 3, field 'ts': .*{reason}"):
        times(tmp_path, ["2024-05-01", text], time_unit="timestamp")


@pytest.mark.parametrize("zone", ["CST", "EST", "PST", "IST", "cst", "EDT", "JST"])
def test_abbreviations_of_several_zones(tmp_path, zone):
    reason = rf"is not a time in timestamp; {zone} may be several time zones, write an offset such as \+08:00"
    with pytest.raises(DataError, match=rf"0.csv, row 2, field 'ts': .*{reason}"):
        times(tmp_path, [f"2024-05-01 00:00:00 {zone}"], time_unit="timestamp")
    with pytest.raises(ConfigError, match=f"time_zone '{zone}' may be several zones|unknown time_zone '{zone}'"):
        times(tmp_path, ["2024-05-01"], time_unit="timestamp", time_zone=zone)


def int96(folder, name="log.parquet"):
    table = pa.table({"user": ["u"], "item": ["v"], "ts": pa.array([START_MS * 1_000_000], pa.timestamp("ns"))})
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / name, use_deprecated_int96_timestamps=True)
    return {name: (folder / name).read_bytes()}


def test_int96_of_spark(tmp_path):
    files = int96(tmp_path / "spark")
    with pytest.raises(
        DataError, match=r"log.parquet, field 'ts': has the Parquet type INT96, which Spark writes in UTC"
    ):
        read_log(tmp_path, files, **PLAIN, time_unit="timestamp", utc_offset_hours=8)
    for index, (spec, expected) in enumerate(
        (
            ({"utc_offset_hours": 8, "zoneless_timestamps": "utc"}, START_MS),
            ({"time_zone": "Asia/Shanghai", "zoneless_timestamps": "utc"}, START_MS),
            ({"utc_offset_hours": 8, "zoneless_timestamps": "local"}, START_MS - 8 * 3_600_000),
            ({}, START_MS),
        )
    ):
        (row,) = read_log(tmp_path / str(index), files, **PLAIN, time_unit="timestamp", **spec)
        assert row["ts_ms"] == expected, spec


INTEGERS = (pa.int64(), pa.uint64(), pa.decimal128(20, 0))
REALS = (pa.float64(), pa.decimal128(38, 6))


MOMENTS_MS = st.integers(946_684_800_000, 4_102_444_800_000)


@given(
    moments=st.lists(MOMENTS_MS, min_size=5, max_size=15),
    unit=st.sampled_from(sorted(PER_MS)),
    spec=st.sampled_from([{}, {"utc_offset_hours": -3.5}, {"time_zone": "Europe/Berlin"}]),
)
@examples(20)
def test_numbers_of_every_unit_and_type(tmp_path_factory, moments, unit, spec):
    folder = tmp_path_factory.mktemp("times")
    if unit == "s":
        moments = [ms - ms % 1000 for ms in moments]
    numbers = [int(ms * PER_MS[unit]) if unit != "s" else ms // 1000 for ms in moments]
    arrays = [pa.array(numbers).cast(kind, safe=False) for kind in (*INTEGERS, pa.float64())] + [
        [str(number) for number in numbers],
        [f"{number}.0" for number in numbers],
    ]
    assert times_by_index(folder, *arrays, time_unit=unit, **spec) == [{ms} for ms in moments]


@given(st.lists(st.tuples(MOMENTS_MS, st.integers(0, 999)), min_size=10, max_size=30))
@examples(10)
def test_fractions_of_a_millisecond(tmp_path_factory, moments):
    folder = tmp_path_factory.mktemp("times")
    expected = [{ms} for ms, _ in moments]
    us = [ms * 1000 + micros for ms, micros in moments]
    ns = [value * 1000 for value in us]
    stamp = pa.array(us, pa.timestamp("us"))
    exact = [pa.array(ns, pa.timestamp("ns")), pa.array([value + 999 for value in ns], pa.timestamp("ns", "UTC"))]
    texts = [(datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=value)).isoformat() for value in us]
    assert times_by_index(folder / "timestamp", stamp, *exact, texts, time_unit="timestamp") == expected
    seconds = [f"{value // 10**6}.{value % 10**6:06}" for value in us]
    assert times_by_index(folder / "s", seconds, pa.array([value / 1e6 for value in us]), time_unit="s") == expected
    arrays = [[str(value) for value in us], pa.array(us), pa.array([float(value) for value in us])]
    assert times_by_index(folder / "us", *arrays, time_unit="us") == expected
    assert times_by_index(folder / "ns", [str(value) for value in ns], pa.array(ns), time_unit="ns") == expected


@pytest.mark.parametrize(
    ("unit", "value", "reason"),
    [
        ("ms", 1796060043, r"'1796060043' is before the year 2000; in s it is 2026-11-30 17:34:03 UTC"),
        ("us", START_MS, r"is before the year 2000; in ms it is 2024-05-01 00:00:00 UTC"),
        ("s", START_MS, r"is not a time in s; in ms it is 2024-05-01 00:00:00 UTC"),
        ("ms", START_MS * 1000, r"is not a time in ms; in us it is 2024-05-01 00:00:00 UTC"),
        ("us", START_MS * 10**6, r"is not a time in us; in ns it is 2024-05-01 00:00:00 UTC"),
        ("ms", 0, r"'0' is before the year 2000$"),
        ("ms", -1, r"'-1' is before the year 2000$"),
    ],
)
def test_suggests_the_unit(tmp_path, unit, value, reason):
    for array in ([str(value)], pa.array([value]), pa.array([float(value)])):
        with pytest.raises(
            DataError, match=rf"row \d, field 'ts': .*{reason.replace(str(value), str(value) + '(.0)?')}"
        ):
            times(tmp_path / type(array).__name__ / str(getattr(array, "type", "")), array, time_unit=unit)


def test_order_only_times_have_no_first_year(tmp_path):
    read = times(tmp_path, ["0", "1", "2.5", "253402300799999"], has_calendar_time=False)
    assert read == [0, 1, 2, 253_402_300_799_999]


@pytest.mark.parametrize(
    ("array", "unit", "reason"),
    [
        (pa.array([1.7e9], pa.float32()), "s", "has the type FLOAT"),
        (pa.array([START_MS]), "timestamp", "has the type BIGINT; time_unit must be its unit"),
        (pa.array([[START_MS]]), "ms", r"has the type BIGINT\[\], which is not a time"),
        (pa.array([True]), "ms", "has the type BOOLEAN, which is not a time"),
        (pa.array([1], pa.time64("us")), "timestamp", "has the type TIME"),
        (pa.nulls(1), "ms", "is missing"),
    ],
)
def test_types_that_are_no_times(tmp_path, array, unit, reason):
    with pytest.raises(DataError, match=rf"0.parquet.* field 'ts': {reason}"):
        times(tmp_path, array, time_unit=unit)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"time_zone": "Asia/Shanghai", "utc_offset_hours": 8}, "time_zone and utc_offset_hours exclude each other"),
        ({"time_zone": "Asia/Shangai"}, "unknown time_zone 'Asia/Shangai'; use an IANA name such as Asia/Shanghai"),
        ({"utc_offset_hours": 28800}, "utc_offset_hours 28800.0 must be from -12 to 14"),
        ({"utc_offset_hours": 5.1}, "in quarters of an hour"),
        ({"utc_offset_hours": "nan"}, "utc_offset_hours"),
        ({"zoneless_timestamps": "berlin"}, "zoneless_timestamps"),
        ({"time_unit": "minutes"}, "time_unit"),
        ({"idle_gap_s": 5}, "idle_gap_s"),
    ],
)
def test_invalid_specs(tmp_path, change, reason):
    with pytest.raises(ConfigError, match=reason):
        read_log(tmp_path, {"a.csv": "user,item,ts\n"}, **{**PLAIN, **change})


# --- local time of prepare ----------------------------------------------------------------------------------------


def test_local_hours_through_daylight_saving(tmp_path):
    """A log in UTC with an impression every hour around both changes of the clocks."""
    zone = ZoneInfo("Europe/Berlin")
    starts = [datetime(2024, 3, 30, 12, tzinfo=UTC), datetime(2024, 10, 26, 12, tzinfo=UTC)]
    moments = [start + timedelta(hours=hour) for start, hour in itertools.product(starts, range(36))]
    rows = "".join(f"u,{moment.hour},{moment.isoformat()}\n" for moment in moments)
    raw = write_files(tmp_path / "raw", {"log.csv": f"user,item,ts\n{rows}"})
    (tmp_path / "spec.yaml").write_text(
        "kind: impressions\ntime_unit: timestamp\ntime_zone: Europe/Berlin\n"
        "columns: {user: user, item: item, time: ts}\nsplit: {valid_start: -2d, test_start: 2024-10-27 12:00}\n"
    )
    config = PrepareConfig(num_partitions=1, max_targets=100, max_history=100)
    card = prepare("generic", str(raw), str(tmp_path / "out"), config, str(tmp_path / "spec.yaml"))
    assert (card.time_zone, card.utc_offset_hours) == ("Europe/Berlin", 0)
    # The second to last local day begins at 22:00 UTC, and noon is at 11:00 UTC.
    first = [card.splits[name].first_ms for name in ("valid", "test")]
    assert first == [moment("2024-10-26T22:00:00+00:00"), moment("2024-10-27T11:00:00+00:00")]
    hours = pq.read_table(tmp_path / "out" / "vocabulary" / "hour_of_day.parquet")
    value_of = {row["row"]: row["value"] for row in hours.to_pylist()}
    window = pq.read_table(tmp_path / "out" / "train").to_pylist()[-1]
    expected = [str(datetime.fromtimestamp(ms / 1000, zone).hour) for ms in window["ts_ms"]]
    assert [value_of[row] for row in window["hour_of_day"]] == expected


def test_idle_gaps_are_bounded(tmp_path):
    spec = {**SPEC, "kind": "events", "open_event": "x", "idle_gap_s": MAX_DURATION_S + 1}
    spec["columns"] = {"user": "user", "item": "item", "time": "ts", "action": "a"}
    with pytest.raises(ConfigError, match=r"idle_gap_s .* must be positive and at most"):
        read_log(tmp_path, {}, **{**spec, "actions": {}})
