"""Identifiers: one value has one text, whatever its physical type in a log or a request."""

import math
import uuid
from decimal import Decimal

import duckdb
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2gen_rec.data.text import text_sql, value_text
from a2gen_rec.errors import ConfigError, DataError
from tests.helpers.raw_logs import START_MS, read_log

SPEC = {
    "columns": {"user": "user", "item": "item", "time": "ts"},
    "actions": {},
    "features": [{"name": "shop", "level": "item", "kind": "hash", "size": 9}],
}
LARGE = 9_007_199_254_740_993


def table(user, item=None, shop=None):
    count = len(user)
    columns = {"user": user, "item": item or list(map(str, range(count))), "shop": shop or [None] * count}
    return pa.table({**columns, "ts": [START_MS] * count})


def ids(folder, *users, **spec):
    rows = read_log(folder, {f"{number}.parquet": table(user) for number, user in enumerate(users)}, **{**SPEC, **spec})
    return [row["user_id"] for row in rows]


@pytest.mark.parametrize(
    "array",
    [
        pa.array([500.0]),
        pa.array([500.0], pa.float32()),
        pa.array([500.0], pa.float16()),
        pa.array([500], pa.int16()),
        pa.array([500], pa.uint64()),
        pa.array([Decimal("500.00")], pa.decimal128(10, 2)),
        pa.array([Decimal(500)], pa.decimal128(38, 0)),
        pa.array(["500"]),
        pa.array([b"500"]),
        pa.array(["500"], pa.large_string()),
        pa.array(["500"]).dictionary_encode(),
        pa.array(["500.0"]),
        pa.array([b"500.0"]),
    ],
)
def test_whole_numbers_of_every_type(tmp_path, array):
    assert ids(tmp_path, array, pa.array(["500"])) == ["500", "500"]


def test_other_texts(tmp_path):
    assert ids(tmp_path / "bool", pa.array([True])) == ["true"]
    assert ids(
        tmp_path / "text",
        pa.array(["007", "1.50", "1e3", "nan", "a b", "é", "'", "00.0", "v2.0", "1.2.0", "-0.0", "12e45"]),
    ) == sorted(["007", "1.50", "1e3", "nan", "a b", "é", "'", "00.0", "v2.0", "1.2.0", "-0.0", "12e45"])
    assert ids(tmp_path / "zero", pa.array([-0.0, 0.0])) == ["0", "0"]


def test_integers_beyond_the_floats(tmp_path):
    users = [LARGE + number for number in range(6)]
    assert ids(tmp_path, pa.array(users), pa.array([str(user) for user in users])) == sorted(map(str, users * 2))
    with pytest.raises(DataError, match=r"1.parquet, row 1, field 'user': '9007199254740992.0' is a DOUBLE, which"):
        ids(tmp_path / "mixed", pa.array(users), pa.array([float(user) for user in users]))


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (pa.array([1.0, 1.5]), r"row 2, field 'user': '1.5' must be a whole number or text"),
        (pa.array([Decimal("1.0"), Decimal("1.5")]), r"row 2, field 'user': '1.5' must be a whole number or text"),
        (pa.array([1.0, math.nan]), r"row 2, field 'user': is missing"),
        (pa.array([1.0, None]), r"row 2, field 'user': is missing"),
        (pa.array(["1", ""]), r"row 2, field 'user': is missing"),
        (pa.array([1.0, math.inf]), r"row 2, field 'user': 'inf' is a DOUBLE"),
        (pa.array([1.0, -math.inf]), r"row 2, field 'user': '-inf' is a DOUBLE"),
        (pa.array([1.0, 2.0**53]), r"row 2, field 'user': '9007199254740992.0' is a DOUBLE, which merges"),
        (pa.array([1.0, 2.0**24], pa.float32()), r"row 2, field 'user': '16777216.0' is a FLOAT, which merges"),
        (
            pa.array(["1", "1.23456789012346E+18"]),
            r"row 2, field 'user': '1.23456789012346E.18' is the text of a float",
        ),
        (pa.array(["1", "1.2345678E7"]), r"row 2, field 'user': '1.2345678E7' is the text of a float, which may merge"),
        (pa.array(["1", "9007199254740992.0"]), r"row 2, field 'user': '9007199254740992.0' is the text of a float"),
        (pa.array([b"1", b"\xff"]), r"row 2, field 'user': '.+xFF' is not UTF-8"),
        (pa.array([[0], [1]]), r"field 'user': has the nested type BIGINT\[\]"),
        (pa.array([{"id": 1}] * 2), r"field 'user': has the nested type STRUCT"),
        (pa.array([[("a", 1)]] * 2, pa.map_(pa.string(), pa.int64())), r"field 'user': has the nested type MAP"),
        (pa.nulls(2), r"row 1, field 'user': is missing"),
    ],
)
def test_values_that_are_no_identifiers(tmp_path, array, reason):
    with pytest.raises(DataError, match=rf"0.parquet, {reason}"):
        ids(tmp_path, array)


def test_categories_of_every_type(tmp_path):
    shops = [pa.array([7.0, None, math.nan]), pa.array([7, None, None]), pa.array(["7", "", None])]
    files = {f"{number}.parquet": table(["a", "b", "c"], None, shop) for number, shop in enumerate(shops)}
    files["3.csv"] = f"user,item,shop,ts\na,0,7,{START_MS}\nb,1,,{START_MS}\nc,2,,{START_MS}\n"
    rows = read_log(tmp_path, files, **SPEC)
    assert [row["shop"] for row in rows] == ["7"] * 4 + [None] * 8
    half = read_log(tmp_path / "half", {"a.parquet": table(["a"], None, pa.array([4.5]))}, **SPEC)
    assert half[0]["shop"] == "4.5"
    for array in (pa.array([[1]]), pa.array([{"a": 1}])):
        with pytest.raises(DataError, match="field 'shop': has the nested type"):
            read_log(tmp_path / str(array.type), {"a.parquet": table(["a"], None, array)}, **SPEC)
    with pytest.raises(DataError, match=r"row 1, field 'shop': '1e.300' is a DOUBLE, which merges"):
        read_log(tmp_path / "large", {"a.parquet": table(["a"], None, pa.array([1e300]))}, **SPEC)


def test_floats_of_pandas_in_csv(tmp_path):
    header = "user,item,shop,ts\n"
    files = {
        "a.csv": f"{header}500,7,3,{START_MS}\n",
        "b.csv": f"{header}500.0,7.0,3.0,{START_MS + 1}\n500.0,7.0,,{START_MS + 2}\n",
        "c.parquet": table(pa.array([500.0]), pa.array([7]), pa.array([3.0])),
    }
    rows = read_log(tmp_path, files, **SPEC)
    assert [(row["user_id"], row["item_id"]) for row in rows] == [("500", "7")] * 4
    assert sorted(str(row["shop"]) for row in rows) == ["3", "3", "3", "None"]


def test_actions_that_are_numbers(tmp_path):
    rows = "".join(
        f"1,2,{START_MS + 1000 * second},{action}\n" for second, action in ((0, "1.0"), (2, "2"), (3, "3.0"))
    )
    spec = {
        "kind": "events",
        "columns": {"user": "user", "item": "item", "time": "ts", "action": "action"},
        "open_event": "1",
        "actions": {"like": "2.0"},
        "ignored_events": ["3"],
    }
    (row,) = read_log(tmp_path, {"a.csv": f"user,item,ts,action\n{rows}"}, **spec)
    assert row["at_like"] == 2
    for change, reason in (
        ({"open_event": "2"}, "duplicate action value '2'"),
        ({"open_event": ""}, "open_event is empty"),
    ):
        with pytest.raises(ConfigError, match=reason):
            read_log(tmp_path, {}, **{**spec, **change})


def test_uuids_are_text(tmp_path):
    value = uuid.uuid4()
    duckdb.sql(f"SELECT '{value}'::UUID AS user, 1 AS item, NULL::INT AS shop, {START_MS} AS ts").write_parquet(
        str(tmp_path / "uuid.parquet")
    )
    (row,) = read_log(tmp_path, {"a.parquet": (tmp_path / "uuid.parquet").read_bytes()}, **SPEC)
    assert row["user_id"] == str(value)


@given(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
        st.from_regex(r"-?[0-9]{1,17}\.[0-9]{1,2}", fullmatch=True),
        st.integers(-(2**63), 2**63 - 1),
        st.floats(-(2.0**53) + 1, 2.0**53 - 1),
        st.integers(-1000, 1000).map(float),
        st.just(math.nan),
    )
)
def test_requests_and_logs_agree(value):
    type_name = {str: "VARCHAR", int: "BIGINT", float: "DOUBLE"}[type(value)]
    with duckdb.connect() as connection:
        query = f"SELECT {text_sql('x', type_name)} FROM (SELECT $1::{type_name} AS x)"
        assert connection.execute(query, [value]).fetchone() == (value_text(value),)
