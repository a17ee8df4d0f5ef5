"""Datasets read back as written, and every breach of the contract named by file, row and field."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a2gen_rec.data.columns import WindowColumns, concat_ranges
from a2gen_rec.data.parquet_reader import RowGroup, read_columns, read_row_groups, read_user_windows
from a2gen_rec.data.schema import SPLITS
from a2gen_rec.errors import DataError
from tests.helpers.cards import make_card, make_columns, to_table, write_dataset

CARD = make_card()
LAST = len(CARD.actions) - 1


def concatenated(parts: list[WindowColumns]) -> dict[str, Any]:
    """The written columns one after another, in the words of :class:`WindowColumns`."""
    flat: dict[str, Any] = {}
    for name in ("user_key", "first_target", "lengths", "ts_ms", "end_ms", "labels", "action_lengths", "action"):
        flat[name] = np.concatenate([getattr(part, name) for part in parts])
    flat["offset_s"] = np.concatenate([part.offset_s for part in parts])
    flat["objectives"] = np.concatenate([part.objectives for part in parts])
    for name in ("user_ids", "impression_ids", "session", "outcome"):
        flat[name] = {key: np.concatenate([getattr(p, name)[key] for p in parts]) for key in getattr(parts[0], name)}
    flat["starts"] = np.array([flat["lengths"][:i].sum() for i in range(len(flat["lengths"]))])
    flat["action_starts"] = np.array([flat["action_lengths"][:i].sum() for i in range(len(flat["action_lengths"]))])
    return flat


def assert_equal(got: WindowColumns, expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        actual = getattr(got, name)
        if name == "end_ms":  # the written offsets are float32
            assert np.abs(actual - value).max(initial=0) <= 2
        elif isinstance(value, dict):
            assert actual.keys() == value.keys()
            for key in value:
                np.testing.assert_array_equal(actual[key], value[key])
        else:
            np.testing.assert_array_equal(actual, value)
            assert actual.dtype == (np.float32 if name in ("labels", "objectives", "offset_s") else np.int64)


def test_round_trip_of_a_dataset(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", CARD, windows=50, files=2, seed=5)
    rng = np.random.default_rng(5)
    for split in SPLITS:
        written = [make_columns(CARD, 50, rng) for _ in range(2)]
        files = sorted(str(path) for path in (tmp_path / "data" / split).iterdir())
        groups = read_row_groups(files)
        assert [(g.file, g.index, g.first_row, g.num_rows) for g in groups] == [
            (file, *place) for file in files for place in ((0, 0, 20), (1, 20, 20), (2, 40, 10))
        ]
        got = read_columns(groups, CARD)
        assert_equal(got, concatenated(written))
        assert got.oracle.shape == (len(got.ts_ms), 0)
        one = read_columns(groups[1:2], CARD)
        assert_equal(one, concatenated([written[0].take(np.arange(20, 40))]))


def test_any_order_of_row_groups_is_read(tmp_path: Path) -> None:
    columns = make_columns(CARD, 30, np.random.default_rng(0))
    write(tmp_path, columns)
    groups = read_row_groups([str(tmp_path / "part.parquet")])
    got = read_columns([groups[2], groups[0]], CARD)
    rows = np.concatenate([np.arange(20, 30), np.arange(10)])
    assert_equal(got, concatenated([columns.take(rows)]))


def test_take_equals_slicing_each(tmp_path: Path) -> None:
    columns = make_columns(CARD, 20, np.random.default_rng(1))
    rows = np.array([7, 0, 7, 19, 3])
    taken = columns.take(rows)
    assert len(taken) == 5
    for place, row in enumerate(rows):
        own = slice(taken.starts[place], taken.starts[place] + taken.lengths[place])
        was = slice(columns.starts[row], columns.starts[row] + columns.lengths[row])
        np.testing.assert_array_equal(taken.ts_ms[own], columns.ts_ms[was])
        np.testing.assert_array_equal(taken.labels[own], columns.labels[was])
        for now, before in zip(range(own.start, own.stop), range(was.start, was.stop), strict=True):
            for name in ("action", "offset_s"):
                begin, end = taken.action_starts[now], taken.action_starts[now] + taken.action_lengths[now]
                old = columns.action_starts[before]
                np.testing.assert_array_equal(
                    getattr(taken, name)[begin:end], getattr(columns, name)[old : old + end - begin]
                )


def test_oracle_columns_are_read_when_asked_for(tmp_path: Path) -> None:
    card = dataclasses.replace(CARD, oracle_columns=["like", "click"])
    columns = make_columns(CARD, 12, np.random.default_rng(2))
    table = to_table(columns, CARD)
    truth = np.random.default_rng(0).random((len(columns.ts_ms), 2)).astype(np.float32)
    for i, name in enumerate(card.oracle_columns):
        values = pa.ListArray.from_arrays(table["ts_ms"].chunk(0).offsets, pa.array(truth[:, i]))
        table = table.append_column(f"oracle_{name}", values)
    pq.write_table(table, tmp_path / "part.parquet")
    groups = read_row_groups([str(tmp_path / "part.parquet")])
    np.testing.assert_array_equal(read_columns(groups, card, with_oracle=True).oracle, truth)
    assert read_columns(groups, card).oracle.shape[1] == 0


def test_the_end_is_the_latest_thing_known(tmp_path: Path) -> None:
    """Dwell if recorded, else the last timed action, else the begin; whichever is later."""

    def change(rows: dict[str, list]) -> None:
        rows["dwell_s"][0] = [9.0, math.nan, math.nan, 2.0]
        rows["action"][0] = [[0, 1, LAST]] * 4
        rows["action_offset_s"][0] = [[0, 3.5, 9], [0, 3.5, math.nan], [0, math.nan, math.nan], [0, 3.5, math.nan]]

    columns = of_lengths([4, 2])
    write(tmp_path, columns, change)
    got = read_columns(read_row_groups([str(tmp_path / "part.parquet")]), CARD)
    assert (got.end_ms - got.ts_ms)[:4].tolist() == [9000, 3500, 0, 3500]


def test_wider_and_other_list_types_are_read_alike(tmp_path: Path) -> None:
    """The contract names values, not their storage width."""
    columns = make_columns(CARD, 15, np.random.default_rng(3))
    table = to_table(columns, CARD)
    for name, kind in (
        ("action", pa.list_(pa.list_(pa.int64()))),
        ("action_offset_s", pa.large_list(pa.large_list(pa.float64()))),
        ("ts_ms", pa.large_list(pa.int64())),
        ("first_target", pa.int64()),
        ("item_id", pa.list_(pa.int32())),
    ):
        table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(kind))
    pq.write_table(table, tmp_path / "part.parquet", row_group_size=4)
    got = read_columns(read_row_groups([str(tmp_path / "part.parquet")]), CARD)
    assert_equal(got, concatenated([columns]))


def test_read_user_takes_all_windows_of_one_user(tmp_path: Path) -> None:
    columns = make_columns(CARD, 40, np.random.default_rng(4))
    key = columns.user_key.copy()
    key[[3, 11, 38]] = 77
    columns = dataclasses.replace(columns, user_key=key)
    other = make_columns(CARD, 10, np.random.default_rng(5))
    write(tmp_path, other, name="a.parquet")
    write(tmp_path, columns, name="b.parquet")
    files = [str(tmp_path / name) for name in ("a.parquet", "b.parquet")]
    got = read_user_windows(files, CARD, "77")
    assert got is not None
    assert_equal(got, concatenated([columns.take(np.array([3, 11, 38]))]))
    assert read_user_windows(files, CARD, "nobody") is None


@given(st.lists(st.tuples(st.integers(-5, 50), st.integers(0, 4))))
@settings(deadline=None)
def test_ranges(pieces: list[tuple[int, int]]) -> None:
    starts, lengths = (np.array([piece[i] for piece in pieces], dtype=np.int64) for i in (0, 1))
    expected = [value for start, length in pieces for value in range(start, start + length)]
    assert concat_ranges(starts, lengths).tolist() == expected


# What breaks the contract -------------------------------------------------------------------------------------------

ROW = 13  # in the second row group of ten rows, so that its row in the file is not its row in the group
Change = Callable[[dict[str, list]], None]


def write(folder: Path, columns: WindowColumns, change: Change | None = None, name: str = "part.parquet") -> str:
    """The windows as one Parquet file of ten-row groups, after ``change`` of the rows as Python values."""
    table = to_table(columns, CARD)
    if change is not None:
        rows = table.to_pydict()
        change(rows)
        table = pa.table({key: pa.array(rows[key], table.schema.field(key).type) for key in rows})
    pq.write_table(table, folder / name, row_group_size=10)
    return str(folder / name)


def of_lengths(lengths: list[int]) -> WindowColumns:
    """Random windows of the given lengths."""
    found = []
    rng = np.random.default_rng(0)
    pool = make_columns(CARD, 400, rng, longest=max(lengths))
    for length in lengths:
        found.append(next(i for i in np.flatnonzero(pool.lengths == length) if i not in found))
    return pool.take(np.array(found))


def put(field: str, value: object, *path: int) -> Change:
    """Set ``rows[field][ROW][path...]``."""

    def change(rows: dict[str, list]) -> None:
        place, *inner = [ROW, *path]
        target = rows[field]
        for step in inner:
            target, place = target[place], step
        target[place] = value

    return change


def both(actions: list[int], offsets: list[float]) -> Change:
    """Set the actions of ROW's last impression and their times."""

    def change(rows: dict[str, list]) -> None:
        rows["action"][ROW][-1], rows["action_offset_s"][ROW][-1] = actions, offsets

    return change


NAN, INF = math.nan, math.inf
BREACHES: dict[str, tuple[Change, str, str]] = {
    "user id too large": (put("group", 4), "group", "id is not in"),
    "user id negative": (put("user_id", -1), "user_id", "id is not in"),
    "item id too large": (put("item_id", 40, -1), "item_id", "id is not in"),
    "item id negative": (put("author_id", -1, 0), "author_id", "id is not in"),
    "context id too large": (put("tab", 5, 1), "tab", "id is not in"),
    "session row too large": (put("session_gap", 5, 1), "session_gap", "id is not in"),
    "feedback level negative": (put("feedback", -1, 0), "feedback", "id is not in"),
    "null objective": (put("objective_glance", None, 0), "objective_glance", "null"),
    "null user id": (put("user_id", None), "user_id", "null"),
    "null user key": (put("user_key", None), "user_key", "null"),
    "null list": (put("ts_ms", None), "ts_ms", "null"),
    "null item id": (put("item_id", None, 0), "item_id", "null"),
    "null time": (put("ts_ms", None, 0), "ts_ms", "null"),
    "null label": (put("label_click", None, 0), "label_click", "null"),
    "null action list": (put("action", None, 0), "action", "exit"),
    "null action": (put("action", None, 0, 0), "action", "null"),
    "null action time": (put("action_offset_s", None, 0, 0), "action_offset_s", "null"),
    "unknown action": (both([0, LAST + 1, LAST], [0, 1, 2]), "action", "unknown action"),
    "negative action": (both([0, -1, LAST], [0, 1, 2]), "action", "unknown action"),
    "action twice": (both([0, 2, 1, 2, LAST], [0, 1, 2, 3, 4]), "action", "twice"),
    "no start": (both([1, 2, LAST], [0, 1, 2]), "action", "start"),
    "no exit": (both([0, 1, 2], [0, 1, 2]), "action", "exit"),
    "exit alone": (both([LAST], [0]), "action", "start"),
    "no action at all": (both([], []), "action", "start"),
    "start inside": (both([0, 1, 0, LAST], [0, 1, 2, 3]), "action", "twice"),
    "negative action time": (both([0, 1, LAST], [0, -0.5, 2]), "action_offset_s", "negative or infinite"),
    "infinite action time": (both([0, 1, LAST], [0, 1, INF]), "action_offset_s", "negative or infinite"),
    "unknown time of start": (both([0, 1, LAST], [NAN, 1, 2]), "action_offset_s", "start"),
    "late start": (both([0, 1, LAST], [1, 1, 2]), "action_offset_s", "start"),
    "fewer times than actions": (both([0, 1, LAST], [0, 1]), "action_offset_s", "differs in length"),
    "infinite dwell": (put("dwell_s", INF, 0), "dwell_s", "negative or infinite"),
    "negative dwell": (put("dwell_s", -1.0, 0), "dwell_s", "negative or infinite"),
    "more items than times": (put("item_id", [1] * 11), "item_id", "differs in length"),
    "more labels than times": (put("label_click", [1.0] * 11), "label_click", "differs in length"),
    "more dwells than times": (put("dwell_s", [1.0] * 11), "dwell_s", "differs in length"),
    "fewer action lists": (put("action", [[0, LAST]]), "action", "differs in length"),
    "fewer action time lists": (put("action_offset_s", [[0.0, 1.0]]), "action_offset_s", "differs in length"),
    "first target beyond the window": (put("first_target", 4), "first_target", "is not in the window"),
    "negative first target": (put("first_target", -1), "first_target", "is not in the window"),
}


@pytest.mark.parametrize("what", BREACHES)
def test_a_breach_is_named_by_file_row_and_field(what: str, tmp_path: Path) -> None:
    change, field, reason = BREACHES[what]
    columns = of_lengths([2, 3] * 5 + [2, 5, 1, 3, 4, 2])
    assert columns.lengths[ROW] == 3
    groups = read_row_groups([write(tmp_path, columns)])
    assert len(read_columns(groups, CARD)) == 16, "without the breach the file is read"
    file = write(tmp_path, columns, change)
    with pytest.raises(DataError, match=reason) as caught:
        read_columns(groups, CARD)
    assert str(caught.value).startswith(f"{file}, row {ROW}, field {field!r}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["user_key", "ts_ms", "dwell_s", "action", "tab", "group", "label_click", "feedback"])
def test_a_missing_column_is_named(field: str, tmp_path: Path) -> None:
    table = to_table(make_columns(CARD, 5, np.random.default_rng(0)), CARD).drop_columns([field])
    pq.write_table(table, tmp_path / "part.parquet")
    groups = read_row_groups([str(tmp_path / "part.parquet")])
    with pytest.raises(DataError, match="missing") as caught:
        read_columns(groups, CARD)
    assert str(caught.value).startswith(f"{tmp_path / 'part.parquet'}, field {field!r}: ")


def test_a_missing_oracle_column_is_named(tmp_path: Path) -> None:
    card = dataclasses.replace(CARD, oracle_columns=["like"])
    groups = read_row_groups([write(tmp_path, of_lengths([2, 3]))])
    with pytest.raises(DataError, match="field 'oracle_like': column is missing"):
        read_columns(groups, card, with_oracle=True)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("item_id", [[1.5] * 3, [2.0] * 2]),
        ("item_id", [["a"] * 3, ["b"] * 2]),
        ("item_id", [1, 2]),
        ("group", ["x", "y"]),
        ("group", [0.5, 1.0]),
        ("ts_ms", [5, 6]),
        ("action", [[0, 1, 4], [0, 4]]),
        ("action_offset_s", [[["a"]] * 3, [["b"]] * 2]),
        ("label_click", [["a"] * 3, ["b"] * 2]),
    ],
)
def test_a_column_of_another_type_is_named(field: str, values: list, tmp_path: Path) -> None:
    table = to_table(of_lengths([3, 2]), CARD)
    table = table.set_column(table.schema.get_field_index(field), field, pa.array(values))
    pq.write_table(table, tmp_path / "part.parquet")
    groups = read_row_groups([str(tmp_path / "part.parquet")])
    with pytest.raises(DataError) as caught:
        read_columns(groups, CARD)
    assert f"{tmp_path / 'part.parquet'}, field {field!r}: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_named(share: float, tmp_path: Path) -> None:
    file = Path(write(tmp_path, make_columns(CARD, 40, np.random.default_rng(0))))
    whole, groups = file.read_bytes(), read_row_groups([str(file)])
    file.write_bytes(whole[: int(share * len(whole))])
    for read in (lambda: read_row_groups([str(file)]), lambda: read_columns(groups, CARD)):
        with pytest.raises(DataError, match="not a readable Parquet file") as caught:
            read()
        assert str(caught.value).startswith(str(file))
        assert "\n" not in str(caught.value)


def test_damaged_pages_are_named(tmp_path: Path) -> None:
    file = Path(write(tmp_path, make_columns(CARD, 40, np.random.default_rng(0))))
    content = bytearray(file.read_bytes())
    meta = pq.ParquetFile(file).metadata.row_group(1).column(0)
    groups = read_row_groups([str(file)])
    content[4 : meta.data_page_offset] = b"\xff" * (meta.data_page_offset - 4)
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_columns(groups[:1], CARD)
    assert str(caught.value).startswith(str(file))


@pytest.mark.parametrize("content", [b"user,item\n1,2\n", b"PAR1 and then something else PAR1", b""])
def test_what_is_not_parquet_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "part.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"part\.parquet: not a readable Parquet file"):
        read_row_groups([str(tmp_path / "part.parquet")])


def test_a_file_that_went_away_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.parquet: not a readable Parquet file"):
        read_columns([RowGroup(str(tmp_path / "gone.parquet"), 0, 0, 3)], CARD)


def test_read_user_names_what_it_cannot_read(tmp_path: Path) -> None:
    table = to_table(of_lengths([3, 2]), CARD)
    pq.write_table(table.drop_columns(["user"]), tmp_path / "part.parquet")
    with pytest.raises(DataError, match="field 'user'"):
        read_user_windows([str(tmp_path / "part.parquet")], CARD, "1")
    pq.write_table(table.set_column(0, "user", pa.array([1, 2])), tmp_path / "part.parquet")
    with pytest.raises(DataError, match=r"field 'user'.*int64"):
        read_user_windows([str(tmp_path / "part.parquet")], CARD, "1")
