"""The rule of names: valid names are distinct as columns and files, whatever the case."""

import re

import duckdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2gen_rec.data.names import MAX_NAME_BYTES, check_names
from a2gen_rec.errors import DataError

SIMILAR = st.text(st.sampled_from("aAbBsSßſİıKK_-. /7é中"), max_size=4)
NAMES = st.one_of(st.text(max_size=8), SIMILAR, st.sampled_from(["ts_ms", "Dwell_s", "label_x", "AT_like", "exit"]))


@pytest.mark.parametrize(
    "name",
    [
        "type",
        "training",
        "forward",
        "to",
        "row",
        "broken",
        "partition",
        "place",
        "total",
        "position",
        "problem",
        "value",
        "count",
        "rank",
        "items",
        "like",
        "user_id",
        "item_id",
        "watch",
        "hour_of_day",
        "用户年龄",
        "größe",
        "7_days",
        "a-b",
        "_x",
        "yes",
        "null",
        "1e3",
    ],
)
def test_accepts_names_of_features(name: str) -> None:
    check_names([name])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "name is empty"),
        ("a.b", "invalid name 'a.b'"),
        ("a/b", "invalid name"),
        ("..", "invalid name"),
        ("../x", "invalid name"),
        ("a b", "invalid name"),
        (" a", "invalid name"),
        ("a\n", "invalid name"),
        ("-a", "not begin with '-'"),
        ("a\x00", "invalid name"),
        ("x" * 129, "name of 129 bytes"),
        ("Ts_Ms", "reserved name 'Ts_Ms'"),
        ("Dwell_s", "reserved name"),
        ("ITEM", "reserved name"),
        ("User_ID", "reserved name"),
        ("Time_bucket", "reserved name"),
        ("Label_click", "must not begin with 'label_'"),
        ("at_like", "must not begin with 'at_'"),
        ("Objective_glance", "must not begin"),
        ("oracle_like", "must not begin"),
    ],
)
def test_rejects_names(name: str, reason: str) -> None:
    with pytest.raises(DataError, match=re.escape(reason)):
        check_names([name])
    with pytest.raises(DataError):
        check_names([], [name])


@pytest.mark.parametrize("name", ["exit", "Start", "padding", "watch", "Watch_time", "ensemble", "item_id"])
def test_rejects_outcomes_named_like_predictions(name: str) -> None:
    with pytest.raises(DataError, match="reserved name"):
        check_names([], [name])


@given(st.lists(NAMES, max_size=6))
def test_valid_names_are_distinct_columns(names: list[str]) -> None:
    """DuckDB agrees that valid names are distinct, from each other and from the columns of relations."""
    try:
        check_names(names)
    except DataError:
        return
    assert all(len(name.encode()) <= MAX_NAME_BYTES for name in names)
    reserved = ["user", "ts_ms", "dwell_s", "at_like", "label_click", "row of x", "split"]
    columns = ", ".join(f'1 AS "{name}"' for name in [*names, *reserved])
    described = duckdb.sql(f"SELECT * FROM (SELECT * FROM (SELECT {columns}))").columns
    assert described == [*names, *reserved], "DuckDB renames duplicates"
