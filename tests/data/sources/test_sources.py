"""Every source on a small log with hand-computed rows."""

import gzip
import math
import re
from datetime import UTC, datetime

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from a2gen_rec.data.sources import SOURCE_NAMES, open_source
from a2gen_rec.data.sources.jd import JD
from a2gen_rec.data.sources.kuairand import ACTIONS as KUAIRAND_ACTIONS
from a2gen_rec.data.sources.kuairand import USER_COLUMNS, USER_NUMBERS, KuaiRand
from a2gen_rec.data.sources.rec_tmall import RecTmall
from a2gen_rec.data.sources.tenrec import Tenrec
from a2gen_rec.data.time_zone import TimeZone
from a2gen_rec.errors import ConfigError, DataError
from tests.helpers import CONFIGS, SAMPLES
from tests.helpers.raw_logs import read_log

needs_samples = pytest.mark.skipif(not SAMPLES.exists(), reason="public samples not found")


def rows_of(source, tmp_path, order="user_id, ts_ms, item_id"):
    """Return the rows of a source's relation as dicts; NaN becomes the string "nan" for comparison."""
    with duckdb.connect(config={"temp_directory": str(tmp_path / "spill")}) as connection:
        table = connection.sql(f"SELECT * FROM ({source.impressions(connection)}) ORDER BY {order}").to_arrow_table()
    rows = table.to_pylist()
    return [
        {name: "nan" if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
        for row in rows
    ]


def select(rows, *names):
    return [tuple(row[name] for name in names) for row in rows]


def utc_ms(*time):
    return round(datetime(*time, tzinfo=UTC).timestamp() * 1000)


# --- kuairand ---------------------------------------------------------------------------------------------------

KUAIRAND_LOG = """user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,\
long_view,play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab
1,10,20220425,1800,1650880801000,1,1,0,0,0,0,0,1500,20000,0,0,1,0,4
1,11,20220425,1800,1650880802000,0,0,0,0,0,1,1,0,-1,0,0,0,0,1
2,10,20220425,1800,1650880803000,0,0,0,0,0,0,0,-5,20000,0,0,0,0,1
"""


@pytest.fixture
def kuairand(tmp_path):
    data = tmp_path / "KuaiRand-27K" / "data"
    data.mkdir(parents=True)
    header, *lines = KUAIRAND_LOG.splitlines()
    (data / "log_standard_4_08_to_4_21_27k_part1.csv").write_text("\n".join([header, *lines[:2]]) + "\n")
    (data / "log_standard_4_08_to_4_21_27k_part2.csv").write_text("\n".join([header, *lines[2:]]) + "\n")
    (data / "log_random_4_22_to_5_08_27k.csv").write_text(KUAIRAND_LOG)
    values = ",".join("full_active" if name == "user_active_degree" else "0" for name in USER_COLUMNS)
    header = ",".join(("user_id", *USER_COLUMNS, *USER_NUMBERS))
    (data / "user_features_27k.csv").write_text(f"{header}\n1,{values},514,150,,799\n")
    (data / "video_features_basic_27k.csv").write_text(
        "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,"
        "server_height,music_id,music_type,tag\n"
        '10,77,NORMAL,2022-04-10,Kmovie,0,20000,720,1280,5,9.0,"39,68"\n11,78,AD,2022-04-11,Web,0,,720,1280,5,,\n'
    )
    return data.parent


def test_kuairand_by_hand(kuairand, tmp_path):
    rows = rows_of(KuaiRand(str(kuairand)), tmp_path)
    names = ("user_id", "item_id", "ts_ms", "dwell_s", "at_profile_enter", "at_like", "at_hate", "label_click")
    assert select(rows, *names, "label_long_view", "duration", "tab", "drop_reason") == [
        ("1", "10", 1650880801000, 1.5, "nan", "nan", None, 1.0, 0.0, 20.0, "4", None),
        ("1", "11", 1650880802000, 0.0, None, None, "nan", 0.0, 1.0, None, "1", None),
        ("2", "10", 1650880803000, -0.005, None, None, None, 0.0, 0.0, 20.0, "1", "negative play time"),
    ]
    tags = [{"value": "39", "weight": 1.0}, {"value": "68", "weight": 1.0}]
    assert select(rows, "author_id", "tag", "upload_week", "music_type", "user_active_degree") == [
        ("77", tags, "2022-04-04", "9", "full_active"),
        ("78", None, "2022-04-11", None, "full_active"),
        ("77", tags, "2022-04-04", "9", None),
    ]
    assert select(rows, *USER_NUMBERS, "duration_s") == [
        (514.0, 150.0, None, 799.0, 20.0),
        (514.0, 150.0, None, 799.0, None),
        (None, None, None, None, 20.0),
    ]


def test_kuairand_root_or_data_directory(kuairand, tmp_path):
    root, data = KuaiRand(str(kuairand)), KuaiRand(str(kuairand / "data"))
    assert rows_of(root, tmp_path) == rows_of(data, tmp_path)
    assert root.describe().actions == KUAIRAND_ACTIONS
    assert root.describe().time_zone == TimeZone(utc_offset_hours=8)


def test_kuairand_reports_missing_files_and_columns(kuairand):
    log = kuairand / "data" / "log_standard_4_08_to_4_21_27k_part2.csv"
    log.write_text(log.read_text().replace("play_time_ms", "played"))
    with pytest.raises(DataError, match=r"part2.csv, field 'play_time_ms': column is missing"):
        KuaiRand(str(kuairand))
    (kuairand / "data" / "user_features_27k.csv").unlink()
    with pytest.raises(DataError, match=r"no file matching user_features_"):
        KuaiRand(str(kuairand))


# --- jd ---------------------------------------------------------------------------------------------------------


def test_jd_by_hand(tmp_path):
    file = tmp_path / "log"
    file.write_text("1+5+7+10+40 1+6+7+5+40 1+2+7+5+40 1+6+7+9+40 2+9+8+0+3 1+1+7+4+4\n\n3+10+8+2+2\n")
    rows = rows_of(JD(str(tmp_path)), tmp_path)
    # Session 1: pages of product 1 (10+5+5+9 s), product 2 (0 s) and product 1 again; line 2 is empty.
    assert select(rows, "user_id", "item_id", "ts_ms", "dwell_s", "channel", "position", "category") == [
        ("1", "1", 1, 40.0, "search", 1.0, "7"),
        ("1", "2", 29_002, 3.0, None, 2.0, "8"),
        ("1", "1", 29_003, 4.0, "home", 3.0, "7"),
        ("3", "3", 1, 2.0, None, 1.0, "8"),
    ]
    assert select(rows, "at_comments", "at_cart", "at_order", "drop_reason") == [
        (10, None, None, None),
        (None, 0, None, None),
        (None, None, None, None),
        (None, None, 0, None),
    ]


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ("2+11+8+0+3", "field 'behavior': event 2 has invalid value '11'"),
        ("2+5+8+x+3", "field 'interval': event 2 has invalid value 'x'"),
        ("2+5+8+0", r"field 'event': event 2 '2\+5\+8\+0' has 4 fields, expected 5"),
    ],
)
def test_jd_rejects_invalid_events(tmp_path, event, message):
    file = tmp_path / "log"
    file.write_text(f"1+5+7+10+40\n1+5+7+10+40 {event}\n")
    with pytest.raises(DataError, match=f"log, row 2, {message}"):
        rows_of(JD(str(file)), tmp_path)


def test_jd_reads_unix_and_dos_line_endings(tmp_path):
    unix, dos = tmp_path / "unix", tmp_path / "dos"
    unix.write_bytes(b"1+5+7+10+40\n\n2+5+7+1+1\n")
    dos.write_bytes(b"1+5+7+10+40\r\n\r\n2+5+7+1+1\r\n")
    assert rows_of(JD(str(unix)), tmp_path) == rows_of(JD(str(dos)), tmp_path)


# --- rec_tmall --------------------------------------------------------------------------------------------------

TMALL = """item_id,user_id,action,vtime
i1,u1,cart,2014/9/18 9:00
i1,u1,click,2014/9/18 15:03
i1,u1,click,2014/9/18 15:20
i1,u1,cart,2014/9/18 15:40
i1,u1,collect,2014/9/18 15:40:30
i1,u1,click,2014/9/18 16:11
i2,u1,click,2014/9/18 15:05
i2,u1,alipay,2014/9/18 15:36
"""


def test_rec_tmall_by_hand(tmp_path):
    (tmp_path / "x_rec_tmall_log.csv").write_text(TMALL)
    (tmp_path / "x_rec_tmall_product.csv").write_bytes(
        "item_id,title,pict_url,category,brand_id,seller_id\n1,连衣裙,http,2-7,null,s1\n".encode("gb18030")
    )
    rows = rows_of(RecTmall(str(tmp_path)), tmp_path)
    names = ("item_id", "ts_ms", "at_collect", "at_cart", "at_alipay", "drop_reason")
    assert select(rows, *names) == [
        ("i1", utc_ms(2014, 9, 18, 1), None, None, None, "cart with no open impression"),
        ("i1", utc_ms(2014, 9, 18, 7, 3), 2250.0, 2220.0, None, None),
        ("i2", utc_ms(2014, 9, 18, 7, 5), None, None, None, None),
        ("i2", utc_ms(2014, 9, 18, 7, 36), None, None, None, "alipay with no open impression"),
        ("i1", utc_ms(2014, 9, 18, 8, 11), None, None, None, None),
    ]
    assert {row["dwell_s"] for row in rows} == {"nan"}
    assert select(rows, "category", "brand", "seller")[1] == ("2-7", None, "s1")
    assert select(rows, "category", "brand", "seller")[2] == (None, None, None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("i1,u1,buy,2014/9/18 9:00", "row 10, field 'action': 'buy' is an unknown action"),
        ("i1,u1,click,yesterday", "row 10, field 'vtime': 'yesterday' is not a time such as 2014/9/18 15:03"),
    ],
)
def test_rec_tmall_reports_the_row(tmp_path, line, message):
    file = tmp_path / "log.csv"
    file.write_text(TMALL + line + "\n")
    with pytest.raises(DataError, match=message):
        rows_of(RecTmall(str(file)), tmp_path)


@pytest.mark.parametrize(
    ("products", "message"),
    [
        (b"1,t,5,6,7\n2,t\n", "row 3: Expected Number of Columns: 5 Found: 2"),
        (gzip.compress(b"1,t,5,6,7\n" * 99, mtime=0)[:-9], "cannot be read"),
    ],
)
def test_rec_tmall_names_the_file_of_products(tmp_path, products, message):
    (tmp_path / "x_rec_tmall_log.csv").write_text(TMALL)
    header = b"" if products.startswith(b"\x1f") else b"item_id,title,category,brand_id,seller_id\n"
    file = tmp_path / "x_rec_tmall_product.csv"
    file.write_bytes(header + products)
    with pytest.raises(DataError, match=re.escape(str(file)) + f".*{message}"):
        rows_of(RecTmall(str(tmp_path)), tmp_path)


def test_rec_tmall_reads_compressed_products(tmp_path):
    (tmp_path / "x_rec_tmall_log.csv").write_text(TMALL)
    text = "item_id,title,category,brand_id,seller_id\ni1,连衣裙,5,6.0,s1\n"
    (tmp_path / "x_rec_tmall_product.csv.gz").write_bytes(gzip.compress(text.encode("gb18030"), mtime=0))
    rows = rows_of(RecTmall(str(tmp_path)), tmp_path)
    assert select(rows, "category", "brand", "seller")[1] == ("5", "6", "s1")


# --- tenrec -----------------------------------------------------------------------------------------------------


def test_tenrec_by_hand(tmp_path):
    file = tmp_path / "QB-video.csv"
    file.write_text(
        "user_id,item_id,click,follow,like,share,video_category,watching_times,gender,age,hist_1\n"
        "7,3,1,0,1,0,2,9,1,4,0\n7,2,0,0,0,0,1,0,1,4,0\n6,3,1,1,0,1,2,5,2,3,0\n"
    )
    rows = rows_of(Tenrec(str(file)), tmp_path, order="ts_ms")
    names = ("user_id", "item_id", "ts_ms", "at_like", "at_share", "at_follow", "label_click")
    assert select(rows, *names, "dwell_s", "video_category", "age") == [
        ("7", "3", 1000, "nan", None, None, 1.0, "nan", "2", "4"),
        ("7", "2", 2000, None, None, None, 0.0, "nan", "1", "4"),
        ("6", "3", 3000, None, "nan", "nan", 1.0, "nan", "2", "3"),
    ]
    assert "watching_times" not in rows[0]


def test_tenrec_reports_row_and_field(tmp_path):
    file = tmp_path / "QB-video.csv"
    header = "user_id,item_id,click,follow,like,share,video_category,watching_times,gender,age\n"
    file.write_text(header + "7,3,1,0,1,0,2,9,1,4\n7,3,yes,0,1,0,2,9,1,4\n")
    with pytest.raises(DataError, match=r"QB-video.csv, row 3, field 'click': 'yes' must be a whole number from 0"):
        rows_of(Tenrec(str(file)), tmp_path)


# --- generic ----------------------------------------------------------------------------------------------------

IMPRESSIONS = {
    "kind": "impressions",
    "time_unit": "s",
    "columns": {"user": "who", "item": "what", "time": "at", "dwell_s": "watched"},
    "actions": {
        "like": {"flag": "liked"},
        "comment": {"offset_s": "comment_s"},
        "follow": {"flag": "followed", "offset_s": "follow_s"},
    },
    "labels": {"click": "clicked"},
    "features": [
        {"name": "author", "column": "by", "level": "item"},
        {"name": "length", "level": "item", "kind": "buckets", "size": 4},
    ],
}
HEADER = "who,what,at,watched,liked,comment_s,followed,follow_s,clicked,by,length\n"
LINES = """u,v,1714521601.5,4,1,,0,2,1,bob,10
u,w,1714521602,,0,3.5,1,,,,
u,x,1714521603,1,false,,true,0.5,0,eve,nan
"""
START_MS = 1_714_521_600_000


def generic(tmp_path, spec, content, name="log.csv"):
    (tmp_path / "spec.yaml").write_text(spec if isinstance(spec, str) else yaml.safe_dump(spec, sort_keys=False))
    file = tmp_path / name
    if isinstance(content, pa.Table):
        pq.write_table(content, file)
    else:
        file.write_text(content)
    return open_source("generic", str(file), str(tmp_path / "spec.yaml"))


def test_generic_impressions_by_hand(tmp_path):
    source = generic(tmp_path, IMPRESSIONS, HEADER + LINES)
    rows = rows_of(source, tmp_path)
    names = ("user_id", "item_id", "ts_ms", "dwell_s", "at_like", "at_comment", "at_follow", "label_click")
    assert select(rows, *names, "author", "length") == [
        ("u", "v", START_MS + 1500, 4.0, "nan", None, None, 1.0, "bob", 10.0),
        ("u", "w", START_MS + 2000, None, None, 3.5, "nan", None, None, None),
        ("u", "x", START_MS + 3000, 1.0, None, None, 0.5, 0.0, "eve", "nan"),
    ]
    facts = source.describe()
    assert facts.actions == ("like", "comment", "follow")
    assert [feature.name for feature in facts.features] == ["user_id", "item_id", "author", "length"]


def test_generic_durations_in_milliseconds(tmp_path):
    lines = (
        LINES.replace(".5,4,1,,0,2,", ".5,4000,1,,0,2000,")
        .replace("3.5", "3500")
        .replace(",1,false,,true,0.5", ",1000,false,,true,500")
    )
    spec = IMPRESSIONS | {
        "duration_unit": "ms",
        "columns": {"user": "who", "item": "what", "time": "at", "dwell": "watched"},
        "actions": {
            "like": {"flag": "liked"},
            "comment": {"offset": "comment_s"},
            "follow": {"flag": "followed", "offset": "follow_s"},
        },
    }
    in_ms = rows_of(generic(tmp_path, spec, HEADER + lines), tmp_path)
    names = ("ts_ms", "dwell_s", "at_like", "at_comment", "at_follow")
    assert select(in_ms, *names) == [
        (START_MS + 1500, 4.0, "nan", None, None),
        (START_MS + 2000, None, None, 3.5, "nan"),
        (START_MS + 3000, 1.0, None, None, 0.5),
    ]
    assert select(in_ms, "length") == [(10.0,), (None,), ("nan",)], "without duration_feature the unit is unchanged"
    source = generic(tmp_path, spec | {"duration_feature": "length", "negative_actions": ["follow"]}, HEADER + lines)
    assert select(rows_of(source, tmp_path), "length") == [(0.01,), (None,), ("nan",)]
    assert (source.describe().duration_feature, source.describe().negative_actions) == ("length", ("follow",))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("u,v,,4,1,,0,2,1,bob,10", "row 5, field 'at': is missing"),
        ("u,v,nan,4,1,,0,2,1,bob,10", "row 5, field 'at': 'nan' is not a time in s"),
        ("u,v,1e300,4,1,,0,2,1,bob,10", "row 5, field 'at': '1e300' is not a time in s"),
        (",v,1714521604,4,1,,0,2,1,bob,10", "row 5, field 'who': is missing"),
        ("u,v,1714521604,-4,1,,0,2,1,bob,10", "row 5, field 'watched': '-4' must be a number of at least 0"),
        ("u,v,1714521604,4,2,,0,2,1,bob,10", "row 5, field 'liked': '2' must be 0 or 1"),
        ("u,v,1714521604,4,1,soon,0,2,1,bob,10", "row 5, field 'comment_s': 'soon' must be a number of at least 0"),
        ("u,v,1714521604,4,1,,0,2,maybe,bob,10", "row 5, field 'clicked': 'maybe' must be 0 or 1"),
        ("u,v,1714521604,4,1,,0,2,1,bob,long", "row 5, field 'length': 'long' is not a number"),
    ],
)
def test_generic_reports_file_row_and_field(tmp_path, line, message):
    source = generic(tmp_path, IMPRESSIONS, HEADER + LINES + line + "\n")
    with pytest.raises(DataError, match=f"log.csv, {message}"):
        rows_of(source, tmp_path)


def test_generic_parquet_row_numbers_and_nan_times(tmp_path):
    spec = {"kind": "impressions", "columns": {"user": "who", "item": "what", "time": "at"}}
    table = pa.table({"who": ["u"] * 3, "what": [1, 2, 3], "at": [START_MS + 1.0, math.nan, START_MS + 3.0]})
    with pytest.raises(DataError, match=r"log.parquet, row 2, field 'at': 'nan' is not a time in ms"):
        rows_of(generic(tmp_path, spec, table, "log.parquet"), tmp_path)


def test_nan_without_null_is_missing(tmp_path):
    """A Parquet column with NaN and without NULL: its statistics do not reveal the NaN."""
    nan = math.nan
    columns = {"dwell": [1.0, nan, 7.0], "comment": [nan, 2.0, 0.5], "length": [3.0, 9.0, nan]}
    assert not any(pa.array(values).null_count for values in columns.values())
    times = {"user": ["a", "b", "c"], "item": ["i"] * 3, "ts": [START_MS, START_MS + 1, START_MS + 2]}
    length = {"name": "length", "level": "item", "kind": "buckets", "edges": [5]}
    rows = read_log(
        tmp_path,
        {"log.parquet": pa.table(times | columns)},
        actions={"comment": {"offset_s": "comment"}},
        features=[{"name": "item_id", "level": "item"}, length],
    )
    assert [row["at_comment"] for row in rows] == [None, 2.0, 0.5]
    assert [row["dwell_s"] for row in rows] == [1.0, "nan", 7.0]


def test_generic_missing_column_and_truncated_parquet(tmp_path):
    spec = {"kind": "impressions", "columns": {"user": "who", "item": "what", "time": "when"}}
    table = pa.table({"who": ["u"], "what": [1], "at": [1]})
    with pytest.raises(DataError, match=r"log.parquet, field 'when': column is missing; found who, what, at"):
        generic(tmp_path, spec, table, "log.parquet")
    file = tmp_path / "log.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"log.parquet: ") as caught:
        open_source("generic", str(file), str(tmp_path / "spec.yaml"))
    assert "\n" not in str(caught.value)


def test_generic_local_and_zoned_timestamps(tmp_path):
    spec = {"kind": "impressions", "columns": {"user": "who", "item": "what", "time": "at"}}
    spec |= {"time_unit": "timestamp", "utc_offset_hours": 8}
    text = "who,what,at\nu,v,2024-05-01 08:00:00\nu,w,2024-05-01 08:00:00.250\n"
    start = utc_ms(2024, 5, 1)
    assert select(rows_of(generic(tmp_path, spec, text), tmp_path), "ts_ms") == [(start,), (start + 250,)]
    zoned = pa.table({"who": ["u"], "what": ["v"], "at": pa.array([start], pa.timestamp("ms", "UTC"))})
    assert select(rows_of(generic(tmp_path, spec, zoned, "log.parquet"), tmp_path), "ts_ms") == [(start,)]


EVENTS = {
    "kind": "events",
    "columns": {"user": "who", "item": "what", "time": "at", "action": "did"},
    "open_event": "open",
    "close_event": "leave",
    "idle_gap_s": 10,
    "actions": {"like": "like", "buy": "purchase"},
    "ignored_events": ["scroll"],
    "features": [{"name": "scene", "level": "context"}],
}
EVENT_LINES = """who,what,at,did,scene
u,v,1714521601000,open,home
u,v,1714521603000,like,x
u,v,1714521603000,like,x
u,v,1714521604000,open,x
u,v,1714521606000,leave,x
u,v,1714521607000,like,x
u,v,1714521608000,open,list
u,v,1714521618001,purchase,x
u,w,1714521608000,purchase,x
u,w,1714521608000,open,list
u,w,1714521609000,scroll,x
"""


def test_generic_events_by_hand(tmp_path):
    rows = rows_of(generic(tmp_path, EVENTS, EVENT_LINES), tmp_path)
    assert select(rows, "item_id", "ts_ms", "dwell_s", "at_like", "at_buy", "scene", "drop_reason") == [
        ("v", START_MS + 1000, 5.0, 2.0, None, "home", None),
        ("v", START_MS + 7000, "nan", None, None, "x", "like with no open impression"),
        ("v", START_MS + 8000, "nan", None, None, "list", None),
        ("w", START_MS + 8000, "nan", None, 0.0, "list", None),
        ("v", START_MS + 18001, "nan", None, None, "x", "purchase with no open impression"),
    ]


def test_generic_events_within_the_idle_gap_stay_open(tmp_path):
    lines = "who,what,at,did,scene\nu,v,1714521600000,open,\nu,v,1714521610000,like,\nu,v,1714521620001,purchase,\n"
    rows = rows_of(generic(tmp_path, EVENTS, lines), tmp_path)
    assert select(rows, "ts_ms", "at_like", "drop_reason") == [
        (START_MS, 10.0, None),
        (START_MS + 20001, None, "purchase with no open impression"),
    ]


def test_generic_events_unknown_action(tmp_path):
    source = generic(tmp_path, EVENTS, EVENT_LINES + "u,w,1714521609000,dance,x\n")
    with pytest.raises(
        DataError,
        match=r"log.csv, row 13, field 'did': 'dance' is an unknown action; add it to actions or ignored_events",
    ):
        rows_of(source, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "sessions"}, "unknown kind 'sessions'; choose one of impressions, events"),
        ({"colour": 1}, "colour"),
        ({"columns": {"user": "who", "item": "what"}}, "columns.time"),
        ({"columns": {"user": "who", "item": "what", "time": "at", "size": "x"}}, "size"),
        ({"utc_offset_hours": "east"}, "utc_offset_hours"),
        ({"features": [{"name": "a", "level": "shop"}]}, "level"),
        ({"features": [{"name": "item_id", "level": "user"}]}, "must have level 'item'"),
        ({"actions": {"like": {}}}, "action 'like' requires flag"),
        ({"split": {"method": "coin"}}, "method"),
        ({"duration_feature": "age"}, "duration_feature 'age' must be a feature of kind buckets"),
        ({"duration_feature": "author"}, "duration_feature 'author' must be a feature of kind buckets"),
        ({"negative_actions": ["like", "hate"]}, "negative_actions 'hate' must be one of the actions"),
        ({"features": [{"name": "a", "level": "outcome"}]}, "level"),
    ],
)
def test_generic_spec_errors_are_one_line(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        generic(tmp_path, IMPRESSIONS | change, HEADER + LINES)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "spec.yaml"))


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", ""])
def test_generic_rejects_specs_that_are_not_mappings(tmp_path, text):
    with pytest.raises(ConfigError, match=r"spec.yaml: "):
        generic(tmp_path, text, HEADER + LINES)


@pytest.mark.parametrize("kind", ["impressions", "events"])
def test_shipped_examples_are_valid_and_run(tmp_path, kind):
    example = CONFIGS / "sources" / f"{kind}.yaml"
    if kind == "impressions":
        table = pa.table(
            {"user_id": [1], "video_id": [2], "begin_ms": [START_MS], "watch_seconds": [4.0], "is_like": [True]}
            | {"comment_after_s": [2.5], "is_follow": [1], "follow_after_s": [math.nan], "is_click": [0]}
            | {"author_id": [7], "duration_s": [9.5], "screen_height": [720], "scene": ["a"], "country": ["b"]}
            | {"likes_so_far": [3], "tags": ["x|y"], "tag_weights": ["1|2"]}
        )
        pq.write_table(table, tmp_path / "log.parquet")
        expected = ("1", "2", START_MS, "nan", 2.5, "nan")
        names = ("user_id", "item_id", "ts_ms", "at_like", "at_comment", "at_follow")
    else:
        (tmp_path / "log.csv").write_text(
            "visitor,product,happened_at,event,category,channel\na,b,2024-05-01 01:00:05,view,c,d\n"
            "a,b,2024-05-01 01:00:07,purchase,c,d\na,b,2024-05-01 01:00:09,leave,c,d\n"
        )
        expected = ("a", "b", START_MS + 5000, None, 2.0, 4.0)
        names = ("user_id", "item_id", "ts_ms", "at_cart", "at_order", "dwell_s")
    source = open_source("generic", str(tmp_path), str(example))
    assert select(rows_of(source, tmp_path), *names) == [expected]


# --- open_source ----------------------------------------------------------------------------------------------------


def test_open_source_rejects_unknown_sources_and_wrong_specs(tmp_path):
    with pytest.raises(ConfigError, match="unknown source 'movielens'; choose one of kuairand, jd"):
        open_source("movielens", str(tmp_path))
    with pytest.raises(ConfigError, match="requires --spec"):
        open_source("generic", str(tmp_path))
    with pytest.raises(ConfigError, match="applies to the source 'generic' only"):
        open_source("jd", str(tmp_path), "spec.yaml")
    for name in set(SOURCE_NAMES) - {"generic", "simulated"}:
        with pytest.raises(DataError, match="no file matching"):
            open_source(name, str(tmp_path))


@needs_samples
@pytest.mark.parametrize(
    ("name", "folder", "usable", "dropped"),
    [
        ("kuairand", "KuaiRand-Pure", 171_671, 0),
        ("jd", "jd-micro-behaviors", 46_529, 0),
        ("rec_tmall", "rec-tmall", 4_001, 17),
    ],
)
def test_public_samples(tmp_path, name, folder, usable, dropped):
    source = open_source(name, str(SAMPLES / folder))
    with duckdb.connect(config={"temp_directory": str(tmp_path / "spill")}) as connection:
        relation = source.impressions(connection)
        counts = connection.execute(
            f"SELECT count(*) - count(drop_reason), count(drop_reason) FROM ({relation})"
        ).fetchone()
    assert counts == (usable, dropped)
