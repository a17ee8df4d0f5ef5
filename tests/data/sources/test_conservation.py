"""Properties of raw files: no row is lost, and equal values give equal datasets however they are stored."""

import csv
import gzip
import io
import random
import re

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2gen_rec.config import PrepareConfig
from a2gen_rec.data.prepare.pipeline import prepare
from a2gen_rec.data.sources.kuairand import FLAGS, USER_COLUMNS, USER_NUMBERS, VIDEO_COLUMNS
from a2gen_rec.errors import DataError, UserError
from tests.helpers.properties import examples
from tests.helpers.raw_logs import START_MS, read_log, write_files
from tests.helpers.stored import MACHINE_ZONES, file_digests, prepare_stored, stored_files, total_rows

COLUMNS = ("user", "item", "ts", "dwell", "like", "shop")
SPEC = {
    "kind": "impressions",
    "files": "**/*",
    "columns": {"user": "user", "item": "item", "time": "ts", "dwell_s": "dwell"},
    "actions": {"like": {"flag": "like"}},
    "features": [
        {"name": "user_id", "level": "user", "min_count": 1},
        {"name": "item_id", "level": "item", "min_count": 1},
        {"name": "shop", "level": "item"},
    ],
    "split": {"valid_fraction": 0.2, "test_fraction": 0.2},
}
# --- conservation -------------------------------------------------------------------------------------------------

VALUES = st.text(st.sampled_from("ab1,;\"'#\\ \t\n|é="), min_size=1, max_size=6)
RECORDS = st.lists(
    st.tuples(VALUES, VALUES, st.integers(0, 10**9), st.sampled_from(["", "0", "1.5"]), st.sampled_from("01")),
    min_size=1,
    max_size=12,
)


@given(
    records=RECORDS,
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    newline=st.sampled_from(["\n", "\r\n"]),
    delimiter=st.sampled_from(",;\t|"),
    compress=st.booleans(),
)
@examples(30, thorough=400)
def test_valid_csv_is_read_completely(tmp_path_factory, records, quoting, newline, delimiter, compress):
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, quoting=quoting, lineterminator=newline, delimiter=delimiter)
    rows = [(user, item, START_MS + ts, dwell, like) for user, item, ts, dwell, like in records]
    writer.writerows([("user", "item", "ts", "dwell", "like"), *rows])
    content = stream.getvalue().encode()
    files = {"log.csv": gzip.compress(content) if compress else content}
    read = read_log(tmp_path_factory.mktemp("csv"), files, delimiter=delimiter)
    actual = [(row["user_id"], row["item_id"], row["ts_ms"], row["dwell_s"], row["at_like"]) for row in read]
    expected = [(u, i, ts, float(d) if d else None, "nan" if like == "1" else None) for u, i, ts, d, like in rows]
    assert sorted(actual, key=repr) == sorted(expected, key=repr)


LINES = st.lists(
    st.sampled_from(
        [
            f"u,v,{START_MS},1.5,1",
            f'"u","v",{START_MS},,0',
            f"'u',v,{START_MS},1.5,1",
            "user,item,ts,dwell,like",
            "user,item,ts,dwell,like,scene",
            f"u,v,{START_MS},1.5,1,feed",
            f"u,v,{START_MS}",
            f'u,"v,{START_MS},1.5,1',
            f'u,v",{START_MS},1.5,1',
            f'u,"v"x,{START_MS},1.5,1',
            f"#u,v,{START_MS},1.5,1",
            f"u;v;{START_MS};1.5;1",
            f"u,v,{START_MS},1.5,1,",
            "u",
        ]
    ).flatmap(lambda line: st.sampled_from(["\n"] * 8 + ["\r\n", "\r"]).map(lambda end: line + end)),
    min_size=1,
    max_size=8,
)


@given(LINES)
@examples(40, thorough=600)
def test_every_line_is_read_or_named(tmp_path_factory, lines):
    text = "user,item,ts,dwell,like\n" + "".join(lines)
    try:
        rows = read_log(tmp_path_factory.mktemp("csv"), {"log.csv": text})
    except DataError as error:
        reason = str(error)
    else:
        assert len(rows) == len(list(csv.reader(io.StringIO(text, newline="")))) - 1
        return
    assert re.search(r"log.csv, row \d+", reason)
    assert "\n" not in reason


@given(st.randoms(use_true_random=False), st.integers(20, 60))
@examples(3, thorough=32)
def test_sources_conserve_rows(tmp_path_factory, rng, count):
    folder = tmp_path_factory.mktemp("sources")
    ids = [(rng.randrange(4), rng.randrange(6), rng.randrange(9)) for _ in range(count)]
    tenrec = "user_id,item_id,click,follow,like,share,video_category,watching_times,gender,age\n"
    tenrec += "".join(f"{user},{item},1,0,{item % 2},0,2,9,1,4\n" for user, item, _ in ids)
    raw = write_files(folder / "tenrec", {"QB-video.csv": tenrec})
    assert total_rows(prepare_stored(folder / "a", "tenrec", raw)) == count
    header = ["user_id", "video_id", "tab", "time_ms", "play_time_ms", "duration_ms", *FLAGS]
    log = [
        [str(x) for x in (user, item, 1, START_MS + time, 100 - time * 15, 2000, *[0] * len(FLAGS))]
        for user, item, time in ids
    ]
    files = {f"log_standard_{part}.csv": "\n".join(map(",".join, [header, *log[part::2]])) + "\n" for part in range(2)}
    users = [["user_id", *USER_COLUMNS, *USER_NUMBERS]]
    users += [[str(user), *["x"] * len(USER_COLUMNS), *["7"] * len(USER_NUMBERS)] for user in range(3)]
    videos = [["video_id", *VIDEO_COLUMNS, "upload_dt", "tag"]]
    videos += [[str(item), *["x"] * len(VIDEO_COLUMNS), "2022-04-01", "1"] for item in range(5)]
    files["user_features_x.csv"] = "\n".join(map(",".join, users))
    files["video_features_basic_x.csv"] = "\n".join(map(",".join, videos))
    raw = write_files(folder / "kuairand", files)
    config = PrepareConfig(num_partitions=2, valid_fraction=0.2, test_fraction=0.2)
    try:
        card = prepare("kuairand", str(raw), str(folder / "b"), config)
    except UserError as error:
        reason = str(error)
    else:
        assert total_rows(card) == count
        return
    assert "split" in reason or "no training impressions" in reason


# --- invariance ---------------------------------------------------------------------------------------------------


def log_rows(count=90):
    """Return impressions at different times."""
    rng = random.Random(5)
    return [
        (
            rng.randrange(1, 8),
            rng.randrange(1, 20),
            START_MS + number * 1_000_000,
            rng.choice([None, 0.5, 3.0, 12.25]),
            rng.randrange(2),
            rng.choice([None, 7, 1000]),
        )
        for number in range(count)
    ]


TYPES = {
    "user": [pa.int64(), pa.int16(), pa.float64(), pa.string(), pa.decimal128(12, 2), pa.binary(), pa.uint8()],
    "item": [pa.int64(), pa.float32(), pa.large_string(), pa.int32()],
    "ts": [pa.int64(), pa.float64(), pa.string(), pa.timestamp("ms", "UTC"), pa.timestamp("ns", "Asia/Tokyo")],
    "dwell": [pa.float64(), pa.float32(), pa.string(), pa.decimal128(9, 3)],
    "like": [pa.int64(), pa.bool_(), pa.float64(), pa.string()],
    "shop": [pa.int64(), pa.float64(), pa.string(), pa.int16()],
}


def digest(folder, files, machine="UTC"):
    """Return the digest of the dataset of some files."""
    prepare_stored(folder, "generic", write_files(folder / "raw", files), SPEC, machine)
    return file_digests(folder / "out")


@pytest.fixture(scope="module")
def expected_digest(tmp_path_factory):
    values = dict(zip(COLUMNS, zip(*log_rows(), strict=True), strict=True))
    return digest(
        tmp_path_factory.mktemp("expected"), {"log.parquet": pa.table({k: list(v) for k, v in values.items()})}
    )


@given(files=stored_files(log_rows(), TYPES), machine=MACHINE_ZONES)
@examples(8, thorough=100)
def test_storage_changes_no_byte(tmp_path_factory, expected_digest, files, machine):
    assert digest(tmp_path_factory.mktemp("stored"), files, machine) == expected_digest
