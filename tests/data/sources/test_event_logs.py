"""Properties of logs with one row per event: every event is counted once, and storage changes no byte."""

import math
from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2gen_rec.config import PrepareConfig
from a2gen_rec.data.sources.rec_tmall import RecTmall
from a2gen_rec.data.sql import connect
from tests.helpers.properties import examples
from tests.helpers.raw_logs import START_MS, read_log, write_files
from tests.helpers.stored import MACHINE_ZONES, file_digests, prepare_stored, stored_files, total_rows

EVENT_COLUMNS = ("user", "item", "ts", "action", "scene")
SPEC = {
    "kind": "events",
    "files": "**/*",
    "columns": {"user": "user", "item": "item", "time": "ts", "action": "action"},
    "open_event": "open",
    "close_event": "leave",
    "idle_gap_s": 10,
    "actions": {"like": "like", "buy": "purchase"},
    "ignored_events": ["scroll"],
    "features": [
        {"name": "user_id", "level": "user", "min_count": 1},
        {"name": "item_id", "level": "item", "min_count": 1},
        {"name": "scene", "level": "context", "min_count": 1},
    ],
    "split": {"valid_fraction": 0.2, "test_fraction": 0.2},
}
ACTION_RANKS = {"open": 0, "like": 1, "purchase": 2, "leave": 3}
TMALL_COLUMNS = ("item_id", "user_id", "action", "vtime")
TMALL_ACTIONS = {name: name for name in ("collect", "cart", "alipay")}
TMALL_RANKS = {"click": 0, "collect": 1, "cart": 2, "alipay": 3}


def reference_impressions(events, ranks, actions, gap_ms, close=""):
    """Return counts of (user, item, start in ms, dwell in s, action times in s, drop reason).

    A state machine reads one event after the other. Unknown times are None.

    Args:
        events: User, item, time in ms and value of the action column.
        ranks: Value -> order of simultaneous events; the first value opens an impression, others are ignored.
        actions: Action -> value.
        gap_ms: Maximum milliseconds between two events of one impression.
        close: Value that ends an impression.
    """
    threads = defaultdict(list)
    for user, item, ms, value in events:
        if value in ranks:
            threads[user, item].append((ms, ranks[value], value))
    impressions, rows = [], []
    for (user, item), thread in threads.items():
        current = previous = None
        for ms, rank, value in sorted(thread):
            if previous is not None and (previous[1] == close or ms - previous[0] > gap_ms):
                current = None
            previous = ms, value
            if current is None and rank == 0:
                current = user, item, ms, {}
                impressions.append(current)
            elif current is None:
                rows.append((user, item, ms, None, (None,) * len(actions), f"{value} with no open impression"))
            else:
                current[3].setdefault(value, (ms - current[2]) / 1000)
    for user, item, ms, times in impressions:
        rows.append((user, item, ms, times.get(close), tuple(map(times.get, actions.values())), None))
    return Counter(rows)


def actual_impressions(rows, actions):
    """Return the counts of a relation's rows, as :func:`reference_impressions` does."""

    def known(value):
        return None if value is None or math.isnan(float(value)) else value

    return Counter(
        (
            *(row[name] for name in ("user_id", "item_id", "ts_ms")),
            known(row["dwell_s"]),
            tuple(known(row[f"at_{name}"]) for name in actions),
            row["drop_reason"],
        )
        for row in rows
    )


def reference_events(events):
    return reference_impressions(events, ACTION_RANKS, SPEC["actions"], 10_000, "leave")


EVENTS = st.lists(
    st.tuples(
        st.sampled_from("ab"),
        st.sampled_from("vw"),
        st.integers(0, 40).map(lambda number: START_MS + number * 2500),
        st.sampled_from(["open", "open", "like", "purchase", "leave", "scroll"]),
    ),
    min_size=1,
    max_size=25,
)


@given(EVENTS)
@examples(10, thorough=100)
def test_every_event_is_in_one_impression_or_dropped(tmp_path_factory, events):
    table = pa.table(dict(zip(EVENT_COLUMNS, [*zip(*events, strict=True), ["x"] * len(events)], strict=True)))
    rows = read_log(tmp_path_factory.mktemp("events"), {"log": table}, **SPEC)
    assert actual_impressions(rows, SPEC["actions"]) == reference_events(events)


def reference_tmall(events):
    return reference_impressions(events, TMALL_RANKS, TMALL_ACTIONS, 1_800_000)


def tmall_time(ms):
    return f"{datetime.fromtimestamp(ms / 1000, UTC) + timedelta(hours=8):%Y/%m/%d %H:%M:%S}"


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["u1", "u2"]),
            st.sampled_from(["i1", "i2"]),
            st.integers(0, 30).map(lambda number: START_MS + number * 600_000),
            st.sampled_from(["click", "click", "collect", "cart", "alipay"]),
        ),
        min_size=1,
        max_size=25,
    )
)
@examples(10, thorough=80)
def test_every_event_of_rec_tmall_is_in_one_impression_or_dropped(tmp_path_factory, events):
    folder = tmp_path_factory.mktemp("tmall")
    lines = [f"{item},{user},{action},{tmall_time(ms)}\n" for user, item, ms, action in events]
    # Rows of one product and of an unknown one: a join may neither drop nor multiply impressions.
    products = "item_id,title,category,brand_id,seller_id\n" + "1,连衣裙,2-7,null,s1\n" * 2 + "9,x,1,b,s2\n"
    write_files(
        folder,
        {
            "x_rec_tmall_log_1.csv": ",".join(TMALL_COLUMNS) + "\n" + "".join(lines[::2]),
            "x_rec_tmall_log_2.csv": ",".join(TMALL_COLUMNS) + "\n" + "".join(lines[1::2]),
            "x_rec_tmall_product.csv": products.encode("gb18030"),
        },
    )
    with connect(0.5, 1, folder / "spill") as connection:
        relation = RecTmall(str(folder)).impressions(connection)
        rows = connection.sql(relation).to_arrow_table().to_pylist()
    assert actual_impressions(rows, TMALL_ACTIONS) == reference_tmall(events)
    assert {row["category"] for row in rows} <= {"2-7", None}


# --- invariance ---------------------------------------------------------------------------------------------------


def event_rows(count=120):
    """Return events at different times, in sessions of one user and item."""
    rows = []
    for number in range(count // 3):
        start = START_MS + number * 4_000_000
        user, item, scene = number % 7 + 1, number * 5 % 17 + 1, ["1", None, "2.5"][number % 3]
        rows.append((user, item, start, "open", scene))
        rows.append((user, item, start + 3000, ["like", "scroll", "purchase"][number % 3], None))
        rows.append((user, item, start + 5500, ["leave", "leave", "like"][number // 3 % 3], "7"))
    return rows


EVENT_TYPES = {
    "user": [pa.int64(), pa.int16(), pa.float64(), pa.string(), pa.decimal128(12, 2), pa.binary()],
    "item": [pa.int64(), pa.float32(), pa.large_string()],
    "ts": [pa.int64(), pa.float64(), pa.string(), pa.timestamp("ms", "UTC"), pa.timestamp("ns", "Asia/Tokyo")],
    "action": [pa.string(), pa.large_string(), pa.binary()],
    "scene": [pa.string(), pa.binary(), pa.large_string()],
}


@pytest.fixture(scope="module")
def expected_events(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected")
    columns = zip(EVENT_COLUMNS, zip(*event_rows(), strict=True), strict=True)
    raw = write_files(folder / "raw", {"log": pa.table({name: list(values) for name, values in columns})})
    card = prepare_stored(folder, "generic", raw, SPEC)
    assert total_rows(card) == reference_events([row[:4] for row in event_rows()]).total()
    return file_digests(folder / "out")


@given(files=stored_files(event_rows(), EVENT_TYPES), machine=MACHINE_ZONES)
@examples(5, thorough=40)
def test_storage_of_events_changes_no_byte(tmp_path_factory, expected_events, files, machine):
    folder = tmp_path_factory.mktemp("stored")
    prepare_stored(folder, "generic", write_files(folder / "raw", files), SPEC, machine)
    assert file_digests(folder / "out") == expected_events


def tmall_rows(count=120):
    rows = []
    for number in range(count // 2):
        start = START_MS + number * 4_000_000
        item, user = f"i{number * 5 % 17 + 1}", f"u{number % 7 + 1}"
        rows.append((item, user, "click", tmall_time(start)))
        rows.append((item, user, ["cart", "collect", "alipay"][number % 3], tmall_time(start + 60_000)))
    # A cart without an impression.
    return [*rows, ("i1", "u2", "cart", tmall_time(START_MS - 1000))]


TEXT = [pa.string(), pa.large_string(), pa.binary()]
PRODUCTS = "item_id,title,category,brand_id,seller_id\n" + "".join(
    f"{number},衣,{number % 3},{number % 2},s{number % 4}\n" for number in range(1, 12)
)
TMALL_CONFIG = PrepareConfig(num_partitions=2, threads=1, memory_limit_gb=0.5, min_count=1)


@pytest.fixture(scope="module")
def expected_tmall(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected")
    log = "\n".join([",".join(TMALL_COLUMNS), *map(",".join, tmall_rows())])
    files = {"rec_tmall_log": log, "rec_tmall_product.csv": PRODUCTS.encode("gb18030")}
    card = prepare_stored(folder, "rec_tmall", write_files(folder / "raw", files), config=TMALL_CONFIG)
    assert total_rows(card) == 60 + 1
    return file_digests(folder / "out")


@given(
    files=stored_files(tmall_rows(), dict.fromkeys(TMALL_COLUMNS, TEXT), folders=("",), stem="rec_tmall_log"),
    products=st.permutations(PRODUCTS.splitlines()[1:]),
    machine=MACHINE_ZONES,
)
@examples(4, thorough=32)
def test_storage_of_rec_tmall_changes_no_byte(tmp_path_factory, expected_tmall, files, products, machine):
    folder = tmp_path_factory.mktemp("user_id=3")
    text = "\n".join([PRODUCTS.splitlines()[0], *products])
    raw = write_files(folder / "item_id=4", {**files, "y_rec_tmall_product": text.encode("gb18030")})
    prepare_stored(folder, "rec_tmall", raw, machine=machine, config=TMALL_CONFIG)
    assert file_digests(folder / "out") == expected_tmall
