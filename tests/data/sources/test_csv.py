"""CSV files: every line is read by the rules of the spec, or an error names file and row."""

import gzip
import random

import pyarrow as pa
import pytest

from a2gen_rec.data.sources.kuairand import FLAGS, USER_COLUMNS, USER_NUMBERS, VIDEO_COLUMNS, KuaiRand
from a2gen_rec.data.sources.spec import load_spec
from a2gen_rec.data.sources.tenrec import Tenrec
from a2gen_rec.data.sql import connect, translate_errors
from a2gen_rec.errors import ConfigError, DataError
from tests.helpers.raw_logs import HOUR_MS, START_MS, read_log, write_files

HEADER = "user,item,ts,dwell,like\n"
TABLE = pa.table(
    {"user": ["u0"], "item": ["v3"], "ts": [START_MS], "dwell": [1.5], "like": [1]},
)


def line(number, user="u0", item="v3", quote=""):
    return ",".join(f"{quote}{value}{quote}" for value in (user, item, START_MS + number * HOUR_MS, "12.5", number % 2))


def lines(count, **values):
    return "".join(line(number, **values) + "\n" for number in range(count))


def test_header_of_a_restarted_writer_with_another_width(tmp_path):
    text = HEADER + lines(2) + "user,item,ts,dwell,like,scene\n" + line(3) + ",feed\n"
    with pytest.raises(DataError, match=r"log.csv, row 4: Expected Number of Columns: 5 Found: 6") as caught:
        read_log(tmp_path, {"log.csv": text})
    assert "\n" not in str(caught.value)


def test_header_of_a_restarted_writer_with_equal_width(tmp_path):
    with pytest.raises(DataError, match=r"log.csv, row 4, field 'ts': 'ts' is not a time in ms"):
        read_log(tmp_path, {"log.csv": HEADER + lines(2) + HEADER + lines(3)})


def test_tenrec_with_a_header_of_another_width(tmp_path):
    header = "user_id,item_id,click,follow,like,share,video_category,watching_times,gender,age"
    file = tmp_path / "QB-video.csv"
    file.write_text(f"{header}\n" + "7,3,1,0,1,0,2,9,1,4\n" * 800 + f"{header},x\n" + "7,3,1,0,1,0,2,9,1,4,0\n" * 200)
    connection = connect(0.5, 1, tmp_path / "spill")
    with connection, translate_errors(file), pytest.raises(DataError, match=r"QB-video.csv, row 802: "):
        Tenrec(str(file)).impressions(connection)


def test_quotes_after_the_sample_of_a_sniffer(tmp_path):
    users = [f"u{number % 200}" for number in range(25_000)]
    rows = [line(number, user, quote='"' if number >= 21_000 else "") for number, user in enumerate(users)]
    read = read_log(tmp_path, {"log.csv": HEADER + "\n".join(rows)})
    assert len(read) == 25_000
    assert {row["user_id"] for row in read} == set(users)
    assert {row["item_id"] for row in read} == {"v3"}


def test_quoted_commas_and_newlines_after_the_sample_of_a_sniffer(tmp_path):
    text = HEADER + lines(21_000) + line(21_000, item='"a,""b""\nc"')
    assert {row["item_id"] for row in read_log(tmp_path, {"log.csv": text})} == {"v3", 'a,"b"\nc'}


def test_values_keep_single_quotes_and_hashes(tmp_path):
    text = HEADER + "#" + line(0, quote="'").replace(f"'{START_MS}'", str(START_MS)).replace("'12.5','0'", "12.5,0")
    (row,) = read_log(tmp_path, {"log.csv": text})
    assert (row["user_id"], row["item_id"]) == ("#'u0'", "'v3'")


def test_names_of_folders_do_not_matter(tmp_path):
    text = "user,item,date,dwell,like\n" + lines(200)
    columns = {"user": "user", "item": "item", "time": "date", "dwell_s": "dwell"}
    expected = read_log(tmp_path / "plain", {"log.csv": text}, columns=columns)
    assert len(expected) == 200
    names = ("date=2024-05-01/part.csv", "user=x/item=y/like=0/part.csv", "a[1]/b*?/part.csv", "date=/'/part.csv")
    for number, name in enumerate(names):
        assert read_log(tmp_path / str(number), {name: text}, columns=columns) == expected


def test_a_pattern_in_a_name_reads_this_file_only(tmp_path):
    files = {"a[1].csv": HEADER + line(0, user="x"), "a1.csv": HEADER + line(0, user="y")}
    assert [row["user_id"] for row in read_log(tmp_path, files)] == ["x", "y"]
    assert [row["user_id"] for row in read_log(tmp_path, {}, files="a1*")] == ["y"]


def test_partition_columns(tmp_path):
    files = {
        "day=1/hour=08/a.csv": HEADER + line(0, user="a"),
        "day=1/hour=a%20b%2Fc/b.csv": HEADER + line(0, user="b"),
        "day=__HIVE_DEFAULT_PARTITION__/hour=1/c.parquet": TABLE,
    }
    features = [{"name": "day", "level": "context"}, {"name": "hour", "level": "context"}]
    rows = read_log(tmp_path, files, features=features, partition_columns=["day", "hour"])
    assert [(row["user_id"], row["day"], row["hour"]) for row in rows] == [
        ("a", "1", "08"),
        ("b", "1", "a b/c"),
        ("u0", None, "1"),
    ]
    with pytest.raises(DataError, match=r"x.csv, field 'day': is not in a folder day=…"):
        read_log(tmp_path, {"x.csv": HEADER + line(0)}, features=features, partition_columns=["day"])
    with pytest.raises(DataError, match=r"field 'like': is a column of the file and one of partition_columns"):
        read_log(tmp_path / "like", {"like=1/a.csv": HEADER + line(0)}, partition_columns=["like"])


def test_dialects(tmp_path):
    text = HEADER.replace(",", ";") + line(0, item="'a\\'b;c'").replace(",", ";")
    (row,) = read_log(tmp_path, {"log.csv": text}, delimiter=";", quote="'", escape="\\")
    assert row["item_id"] == "a'b;c"
    text = (HEADER + line(0, item='"a')).replace(",", "\t")
    (row,) = read_log(tmp_path / "tab", {"log.tsv": text}, delimiter="\t", quote="", escape="")
    assert row["item_id"] == '"a'
    for change in ({"delimiter": ""}, {"delimiter": "ab"}, {"quote": "é"}, {"delimiter": '"'}, {"escape": "\n"}):
        with pytest.raises(ConfigError, match="must"):
            read_log(tmp_path, {}, **change)


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_endings_and_byte_order_marks(tmp_path, newline, end, mark):
    text = mark + HEADER + lines(3).rstrip("\n") + end
    assert len(read_log(tmp_path, {"log.csv": text.replace("\n", newline)})) == 3


def test_mixed_line_endings_name_the_row(tmp_path):
    text = HEADER + lines(2) + line(2) + "\r\n" + line(3) + "\r\n"
    with pytest.raises(DataError, match=r"log.csv, row 4: ends with \\r\\n, unlike the rows before it"):
        read_log(tmp_path, {"log.csv": text})
    with pytest.raises(DataError, match=r"log.csv, row 2: ends with \\n, unlike the rows before it"):
        read_log(tmp_path, {"log.csv": HEADER.replace("\n", "\r\n") + lines(2)})
    with pytest.raises(DataError, match=r"log.csv, row 4: ends with \\r, unlike the rows before it"):
        read_log(tmp_path, {"log.csv": HEADER + lines(2) + line(2) + "\r"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"log.csv: is empty"),
        (b"\n\n", r"log.csv, row 1: the first line must contain the names of the columns"),
        ((HEADER + lines(2) + line(2, item="café")).encode("latin-1"), r"log.csv, row 4: is not UTF-8"),
        ("usér,item,ts,dwell,like\n".encode("latin-1"), r"log.csv, row 1: is not UTF-8"),
        ((HEADER + lines(1)).encode("utf-16"), r"log.csv: is UTF-16 text"),
        ((HEADER + lines(1)).encode("utf-16-le"), r"log.csv, row 1: is not UTF-8"),
        ((HEADER + lines(2) + "u,v,1\n").encode(), r"log.csv, row 4: Expected Number of Columns: 5 Found: 3"),
        ((HEADER + lines(2) + "u\n").encode(), r"log.csv, row 4: Expected Number of Columns: 5 Found: 1"),
        ((HEADER + lines(2) + '"u,v\n').encode(), r"log.csv, row 4: Value with unterminated quote found"),
        ((HEADER + lines(2) + '"u"x,v,1,2,0\n').encode(), r"log.csv, row 4: Value with unterminated quote found"),
        (b"\xfd7zXZ\x00abc", r"log.csv: is xz; logs are Parquet, or CSV in UTF-8"),
        (b"\x04\x22\x4d\x18abcd", r"log.csv: is LZ4; logs are"),
        (b'{"user": "u"}\n', r"log.csv: is JSON; logs are"),
        (b'[{"user": "u"}]\n', r"log.csv: is JSON; logs are"),
        (b"PK\x03\x04abcdef", r"log.csv: is ZIP; logs are Parquet, or CSV in UTF-8"),
        (b"PAR1abcdef", r"log.csv: is not a complete Parquet file"),
        (gzip.compress(HEADER.encode(), mtime=0)[:-9], r"log.csv: cannot be read"),
        (b"user,item,ts,dwell,like,user\n", r"log.csv, field 'user': names several columns"),
        (b"user,item,ts,dwell\n", r"log.csv, field 'like': column is missing; found user, item, ts, dwell"),
    ],
)
def test_unreadable_files(tmp_path, content, message):
    with pytest.raises(DataError, match=message) as caught:
        read_log(tmp_path, {"log.csv": content})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        ("zstd", r"cannot be read \(Truncated compressed stream"),
        ("gzip", "Unexpected end of GZIP stream|cannot be read"),
    ],
)
@pytest.mark.parametrize("fraction", [0.3, 0.999])
def test_incomplete_compressed_files(tmp_path, codec, message, fraction):
    rng = random.Random(1)
    text = HEADER + "".join(line(number, user=f"u{rng.random()}") + "\n" for number in range(30_000))
    content = pa.compress(text.encode(), codec=codec, asbytes=True)
    with pytest.raises(DataError, match=message) as caught:
        read_log(tmp_path, {"log.csv": content[: int(len(content) * fraction)]})
    assert "log.csv" in str(caught.value)


def test_format_by_content(tmp_path):
    text = HEADER + lines(3)
    names = {
        "part-0.pq": TABLE,
        "A.PARQUET": TABLE,
        "log.csv": TABLE,
        "part-1.parquet": text,
        "noname": text,
        "b.gz": text,
        "b.csv": gzip.compress(text.encode()),
        "c.csv.zst": pa.compress(text.encode(), codec="zstd", asbytes=True),
    }
    read = read_log(tmp_path, {**names, "_SUCCESS": b"", ".part-0.crc": b"x", "_delta_log/0.json": b"{}"})
    assert len(read) == 3 + 5 * 3


def test_columns_are_joined_by_name(tmp_path):
    shuffled = "like,x,ts,dwell,item,user\n" + f"1,y,{START_MS},2.5,v9,u9\n"
    case = pa.table(
        {"User": ["no"], "like": [0], "Like": [1], **{name: TABLE[name] for name in ("user", "item", "ts", "dwell")}}
    )
    rows = read_log(tmp_path, {"a.csv": HEADER + line(0), "b.csv": shuffled, "c.parquet": case})
    assert [(row["user_id"], row["item_id"], row["dwell_s"], row["at_like"]) for row in rows] == [
        ("u0", "v3", 12.5, None),
        ("u0", "v3", 1.5, None),
        ("u9", "v9", 2.5, "nan"),
    ]


def test_first_column_that_is_not_missing(tmp_path):
    columns = {"user": ["id", "user"], "item": ["item", "video"], "time": ["ts", "at"]}
    features = [{"name": "shop", "level": "item", "column": ["shop", "seller"]}]
    files = {
        "a.csv": f"id,user,item,video,ts,at,shop,seller\n1,,,v,,{START_MS},,s\n,2,w,x,{START_MS},{START_MS}1,t,s\n",
        "b.parquet": pa.table(
            {"id": [3.0, None], "user": ["x", "y"], "item": [1, 2], "ts": [START_MS] * 2, "seller": [5.0, None]}
        ),
    }
    rows = read_log(tmp_path, files, columns=columns, actions={}, features=features)
    assert [(row["user_id"], row["item_id"], row["ts_ms"] - START_MS, row["shop"]) for row in rows] == [
        ("1", "v", 0, "s"),
        ("2", "w", 0, "t"),
        ("3", "1", 0, "5"),
        ("y", "2", 0, None),
    ]
    bad = f"id,user,item,ts,shop\n1,,v,{START_MS},\n,,v,{START_MS},\n"
    with pytest.raises(DataError, match=r"c.csv, row 3, field 'id or user': is missing"):
        read_log(tmp_path / "c", {"c.csv": bad}, columns=columns, actions={}, features=features)
    with pytest.raises(DataError, match=r"d.csv, field 'ts or at': column is missing; found id, item, shop"):
        read_log(tmp_path / "d", {"d.csv": "id,item,shop\n"}, columns=columns, actions={}, features=features)


def test_names_of_helper_columns(tmp_path):
    names = ["filename", "Filename_", "row", "number", "violation", "file_row_number", "c0", "texts"]
    extra = pa.table({**{name: TABLE[name] for name in TABLE.column_names}, **{name: ["x"] for name in names}})
    text = HEADER.strip() + "," + ",".join(names) + "\n" + line(0) + "," + ",".join("x" for _ in names) + "\n"
    features = [
        {"name": name.lower().strip("_"), "column": name, "level": "context"} for name in names if name != "Filename_"
    ]
    rows = read_log(tmp_path, {"a.parquet": extra, "b.csv": text}, features=features)
    assert [row["violation"] for row in rows] == ["x", "x"]
    invalid = pa.table({**{name: extra[name] for name in extra.column_names if name != "dwell"}, "dwell": [-1.0]})
    with pytest.raises(DataError, match=r"c.parquet, row 1, field 'dwell': '-1.0' must be a number of at least 0"):
        read_log(tmp_path, {"c.parquet": invalid}, features=features)


def test_first_invalid_file_and_row(tmp_path):
    bad = HEADER + lines(2) + line(2).replace("12.5", "x") + "\n" + line(3).replace("12.5", "y")
    with pytest.raises(DataError, match=r"b.csv, row 4, field 'dwell': 'x' must be a number of at least 0"):
        read_log(tmp_path, {"a.csv": HEADER + lines(2), "b.csv": bad, "c.csv": bad.replace("x", "z")})


@pytest.mark.parametrize("value", ["1e39", "1e16", "1e10", "inf"])
def test_durations_are_bounded(tmp_path, value):
    with pytest.raises(DataError, match=rf"a.csv, row 2, field 'dwell': '{value}' "):
        read_log(tmp_path, {"a.csv": HEADER + line(0).replace("12.5", value)})


def test_units_are_stated_once(tmp_path):
    columns = {"user": "user", "item": "item", "time": "ts"}
    with pytest.raises(ConfigError, match="dwell_s is in seconds, but duration_unit is ms; write dwell instead"):
        read_log(tmp_path, {}, duration_unit="ms")
    with pytest.raises(ConfigError, match="'like': offset_s is in seconds, but duration_unit is ms"):
        read_log(tmp_path, {}, duration_unit="ms", columns=columns, actions={"like": {"offset_s": "dwell"}})
    with pytest.raises(ConfigError, match="dwell and dwell_s exclude each other"):
        read_log(tmp_path, {}, columns={**columns, "dwell": "dwell", "dwell_s": "dwell"})
    (row,) = read_log(tmp_path, {"a.csv": HEADER + line(0)}, duration_unit="ms", columns={**columns, "dwell": "dwell"})
    assert row["dwell_s"] == 0.0125


@pytest.mark.parametrize(
    ("feature", "reason"),
    [
        ({"size": -1}, "size and min_count must be at least 0"),
        ({"min_count": -1}, "size and min_count must be at least 0"),
        ({"edges": [1.0]}, "edges require kind buckets"),
        ({"kind": "buckets", "edges": [2.0, 1.0]}, r"edges \[2.0, 1.0\] must be finite and ascending"),
        ({"kind": "buckets", "edges": [1.0, 1.0]}, "must be finite and ascending"),
        ({"kind": "buckets", "edges": [float("nan")]}, "must be"),
    ],
)
def test_settings_of_features(tmp_path, feature, reason):
    with pytest.raises(ConfigError, match=rf"spec.yaml: .*{reason}"):
        read_log(tmp_path, {}, features=[{"name": "q", "level": "item", **feature}])


def test_yaml_words_and_numbers_are_text(tmp_path):
    (tmp_path / "spec.yaml").write_text(
        "kind: impressions\nfiles: '*'\ncolumns: {user: user, item: item, time: ts}\n"
        "actions: {yes: {flag: 1}, on: {flag: no}}\nsplit: {valid_start: 2024-05-01, test_start: 2024-05-02 12:00:00}\n"
        "has_calendar_time: yes\nutc_offset_hours: 08\nfeatures: [{name: 2024, column: 0x1, level: item}]\n"
    )
    spec = load_spec(str(tmp_path / "spec.yaml"))
    assert list(spec.actions) == ["yes", "on"]
    assert [action.flag for action in spec.actions.values()] == ["1", "no"]
    assert (spec.split.valid_start, spec.split.test_start) == ("2024-05-01", "2024-05-02 12:00:00")
    assert (spec.has_calendar_time, spec.utc_offset_hours) == (True, 8.0)
    assert (spec.features[0].name, spec.features[0].column) == ("2024", "0x1")


def test_kuairand_users_in_several_rows(tmp_path):
    log = ",".join(("user_id", "video_id", "tab", "time_ms", "play_time_ms", "duration_ms", *FLAGS))
    zeros = ",".join("0" for _ in FLAGS)
    users = ",".join(("user_id", *USER_COLUMNS, *USER_NUMBERS))
    user = ",".join("1" for _ in range(len(USER_COLUMNS) + len(USER_NUMBERS) + 1))
    videos = ",".join(("video_id", *VIDEO_COLUMNS, "upload_dt", "tag"))
    write_files(
        tmp_path,
        {
            "log_standard_a.csv": f"{log}\n1,2,1,{START_MS},1500,2000,{zeros}\n",
            "user_features_a.csv": f"{users}\n{user}\n{user}\n",
            "video_features_basic_a.csv": f"{videos}\n",
        },
    )
    connection = connect(0.5, 1, tmp_path / "spill")
    with (
        connection,
        pytest.raises(DataError, match=r"user_features_a.csv, field 'user_id': '1' occurs in several rows"),
    ):
        KuaiRand(str(tmp_path)).impressions(connection)
