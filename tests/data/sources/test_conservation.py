"""Properties of raw files: no row is lost, and equal values give equal datasets however they are stored."""

import csv
import gzip
import hashlib
import io
import random
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from a2gen_rec.config import PrepareConfig
from a2gen_rec.data.prepare.pipeline import prepare
from a2gen_rec.data.sources.kuairand import FLAGS, USER_COLUMNS, VIDEO_COLUMNS
from a2gen_rec.errors import DataError, UserError
from tests.helpers.raw_logs import START_MS, machine_time_zone, read_log, write_files

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
CONFIG = PrepareConfig(num_partitions=2, threads=1, memory_limit_gb=0.5)
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
@settings(max_examples=150)
def test_every_line_is_read_or_named(tmp_path_factory, lines):
    text = "user,item,ts,dwell,like\n" + "".join(lines)
    try:
        rows = read_log(tmp_path_factory.mktemp("csv"), {"log.csv": text})
    except DataError as error:
        reason = str(error)
    else:
        assert len(rows) == len(list(csv.reader(io.StringIO(text, newline="")))) - 1
        return
    assert "log.csv" in reason
    assert "\n" not in reason


def total_rows(folder, source, raw, spec=None):
    """Return the rows of a dataset: impressions, dropped rows and duplicates."""
    card = prepare(source, str(raw), str(folder / "out"), CONFIG, spec and str(spec))
    return sum(split.targets for split in card.splits.values()) + sum(card.dropped_rows.values())


@given(st.randoms(use_true_random=False), st.integers(20, 60))
@settings(max_examples=8)
def test_sources_conserve_rows(tmp_path_factory, rng, count):
    folder = tmp_path_factory.mktemp("sources")
    ids = [(rng.randrange(4), rng.randrange(6), rng.randrange(9)) for _ in range(count)]
    tenrec = "user_id,item_id,click,follow,like,share,video_category,watching_times,gender,age\n"
    tenrec += "".join(f"{user},{item},1,0,{item % 2},0,2,9,1,4\n" for user, item, _ in ids)
    raw = write_files(folder / "tenrec", {"QB-video.csv": tenrec})
    assert total_rows(folder / "a", "tenrec", raw) == count
    header = ["user_id", "video_id", "tab", "time_ms", "play_time_ms", "duration_ms", *FLAGS]
    log = [
        [str(x) for x in (user, item, 1, START_MS + time, 100 - time * 15, 2000, *[0] * len(FLAGS))]
        for user, item, time in ids
    ]
    files = {f"log_standard_{part}.csv": "\n".join(map(",".join, [header, *log[part::2]])) + "\n" for part in range(2)}
    users = [["user_id", *USER_COLUMNS], *([str(user), *["x"] * len(USER_COLUMNS)] for user in range(3))]
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
        assert sum(split.targets for split in card.splits.values()) + sum(card.dropped_rows.values()) == count
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


def array(values, kind):
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind):
        return pa.array([None if value is None else str(value) for value in values], pa.string()).cast(kind)
    if pa.types.is_decimal(kind):
        return pa.array([None if value is None else Decimal(str(value)) for value in values], kind)
    plain = pa.array(values)
    return plain.cast(kind) if not pa.types.is_timestamp(kind) else plain.cast(pa.timestamp("ms", "UTC")).cast(kind)


def digest(folder, files, machine="UTC"):
    """Return the digest of the dataset of some files."""
    raw = write_files(folder / "raw", files)
    (folder / "spec.yaml").write_text(yaml.safe_dump(SPEC))
    with machine_time_zone(machine):
        prepare("generic", str(raw), str(folder / "out"), CONFIG, str(folder / "spec.yaml"))
    return {
        file.relative_to(folder / "out").as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted((folder / "out").rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="module")
def expected_digest(tmp_path_factory):
    values = dict(zip(COLUMNS, zip(*log_rows(), strict=True), strict=True))
    return digest(
        tmp_path_factory.mktemp("expected"), {"log.parquet": pa.table({k: list(v) for k, v in values.items()})}
    )


@st.composite
def stored_files(draw):
    """Draw files that store the rows of the log."""
    rows = draw(st.permutations(log_rows()))
    cuts = sorted(draw(st.lists(st.integers(0, len(rows)), max_size=4)))
    files = {}
    for number, (start, end) in enumerate(zip([0, *cuts], [*cuts, len(rows)], strict=True)):
        part = rows[start:end]
        order = draw(st.permutations(COLUMNS))
        columns = dict(zip(COLUMNS, zip(*part, strict=True), strict=True)) if part else dict.fromkeys(COLUMNS, ())
        folder = draw(st.sampled_from(["", "user=9/", "ts=2020-01-01/", "a[1]/", "z/like=5/"]))
        name = (
            f"{folder}{draw(st.sampled_from('abcxyz'))}{number}{draw(st.sampled_from(['', '.csv', '.parquet', '.gz']))}"
        )
        if draw(st.booleans()):
            table = pa.table({name: array(columns[name], draw(st.sampled_from(TYPES[name]))) for name in order})
            sink = pa.BufferOutputStream()
            pq.write_table(table, sink, compression=draw(st.sampled_from(["none", "snappy", "zstd", "gzip"])))
            files[name] = sink.getvalue().to_pybytes()
        else:
            stream = io.StringIO(newline="")
            writer = csv.writer(stream, quoting=draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])))
            writer.writerow(order)
            writer.writerows(
                ["" if value is None else value for value in row]
                for row in zip(*(columns[name] for name in order), strict=True)
            )
            content = stream.getvalue().encode()
            files[name] = gzip.compress(content) if draw(st.booleans()) else content
    return files


@given(files=stored_files(), machine=st.sampled_from(["UTC", "Asia/Shanghai", "America/New_York"]))
@settings(max_examples=25)
def test_storage_changes_no_byte(tmp_path_factory, expected_digest, files, machine):
    assert digest(tmp_path_factory.mktemp("stored"), files, machine) == expected_digest
