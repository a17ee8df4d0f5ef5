"""Properties of JD sessions: every event belongs to one impression, and storage changes no byte."""

import gzip
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2gen_rec.config import PrepareConfig
from a2gen_rec.data.sources.jd import ACTIONS, CHANNELS, JD
from a2gen_rec.data.sql import connect
from tests.helpers.properties import examples
from tests.helpers.stored import MACHINE_ZONES, compressed, file_digests, prepare_stored, total_rows

CONFIG = PrepareConfig(num_partitions=2, threads=1, memory_limit_gb=0.5, min_count=1)
EVENTS = st.tuples(
    st.integers(1, 3), st.integers(1, 10), st.integers(5, 6), st.integers(0, 50), st.sampled_from([0, 3, 40])
)
SESSIONS = st.lists(st.lists(EVENTS, max_size=8), min_size=1, max_size=8)


def text_of(sessions, newline="\n", separator=" "):
    return newline.join(separator.join("+".join(map(str, event)) for event in events) for events in sessions) + newline


def reference_impressions(sessions):
    """Return the impressions of sessions: runs of events on one product."""
    rows = []
    for session, events in enumerate(sessions, 1):
        start_s = 0
        for run, (sku, group) in enumerate(itertools.groupby(events, key=lambda event: event[0]), 1):
            first_s, times, members = start_s, {}, list(group)
            for _, behavior, _, interval_s, _ in members:
                times.setdefault(behavior, start_s - first_s)
                start_s += interval_s
            rows.append(
                {
                    "user_id": str(session),
                    "item_id": str(sku),
                    "ts_ms": first_s * 1000 + run,
                    "dwell_s": max(event[4] for event in members),
                    **{f"at_{name}": times.get(code) for code, name in ACTIONS.items()},
                    "category": str(members[0][2]),
                    "channel": CHANNELS.get(members[0][1]),
                    "position": run,
                    "drop_reason": None,
                }
            )
    return rows


@given(SESSIONS, st.sampled_from(["\n", "\r\n"]))
@examples(25)
def test_every_event_is_in_one_impression(tmp_path_factory, sessions, newline):
    folder = tmp_path_factory.mktemp("jd")
    file = folder / "log"
    file.write_bytes(text_of(sessions, newline).encode())
    with connect(0.5, 1, folder / "spill") as connection:
        query = f"SELECT * FROM ({JD(str(file)).impressions(connection)}) ORDER BY user_id::INT, ts_ms"
        assert connection.sql(query).to_arrow_table().to_pylist() == reference_impressions(sessions)


LOG = [[(number % 5 + step % 2, (number + step) % 10 + 1, 7, step, 9) for step in range(20)] for number in range(12)]


@pytest.fixture(scope="module")
def expected_digests(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected")
    (folder / "log").write_text(text_of(LOG))
    card = prepare_stored(folder, "jd", folder / "log", config=CONFIG)
    assert total_rows(card) == len(reference_impressions(LOG))
    return file_digests(folder / "out")


@given(
    name=st.sampled_from(["log", "user_id=1/a[1]", "line=x/log.csv", "b?.gz", "c.zst", "d*.parquet"]),
    content=st.sampled_from(["\n", "\r\n"]).flatmap(
        lambda newline: st.sampled_from([" ", "  ", "\t"]).map(lambda space: text_of(LOG, newline, space).encode())
    ),
    as_folder=st.booleans(),
    machine=MACHINE_ZONES,
    data=st.data(),
)
@examples(4, thorough=32)
def test_storage_changes_no_byte(tmp_path_factory, expected_digests, name, content, as_folder, machine, data):
    folder = tmp_path_factory.mktemp("stored")
    file = folder / "raw" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(data.draw(compressed(content)))
    prepare_stored(folder, "jd", file.parent if as_folder else file, machine=machine, config=CONFIG)
    assert file_digests(folder / "out") == expected_digests


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_content_decides_compression(tmp_path, mark, pack):
    sessions = [[(1, 6, 7, 2, 3), (2, 1, 7, 2, 3)]]
    (tmp_path / "log").write_bytes(pack((mark + text_of(sessions)).encode()))
    with connect(0.5, 1, tmp_path / "spill") as connection:
        query = f"SELECT * FROM ({JD(str(tmp_path / 'log')).impressions(connection)}) ORDER BY ts_ms"
        assert connection.sql(query).to_arrow_table().to_pylist() == reference_impressions(sessions)
