"""Datasets are read back as written; every violation of the format is reported with file, row and field."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2gen_rec.data.columns import WindowColumns, concat_ranges
from a2gen_rec.data.schema import SPLITS
from a2gen_rec.data.window_reader import RowGroup, read_columns, read_row_groups, read_user_windows
from a2gen_rec.errors import DataError
from tests.helpers.cards import make_card, make_columns, to_table, write_dataset

CARD = make_card()
LAST = len(CARD.actions) - 1


def concat_reference(parts: list[WindowColumns]) -> dict[str, Any]:
    """Concatenate the written columns as fields of :class:`WindowColumns`."""
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


def test_dataset_round_trip(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", CARD, windows=50, files=2, seed=5)
    rng = np.random.default_rng(5)
    for split in SPLITS:
        written = [make_columns(CARD, 50, rng) for _ in range(2)]
        files = sorted(str(path) for path in (tmp_path / "data" / split).iterdir())
        groups = read_row_groups(files)
        assert [(g.file, g.index, g.first_row, g.num_rows) for g in groups] == [
            (file, *position) for file in files for position in ((0, 0, 20), (1, 20, 20), (2, 40, 10))
        ]
        got = read_columns(groups, CARD)
        assert_equal(got, concat_reference(written))
        assert got.oracle.shape == (len(got.ts_ms), 0)
        one = read_columns(groups[1:2], CARD)
        assert_equal(one, concat_reference([written[0].take(np.arange(20, 40))]))


def test_reads_row_groups_in_any_order(tmp_path: Path) -> None:
    columns = make_columns(CARD, 30, np.random.default_rng(0))
    write(tmp_path, columns)
    groups = read_row_groups([str(tmp_path / "part.parquet")])
    got = read_columns([groups[2], groups[0]], CARD)
    rows = np.concatenate([np.arange(20, 30), np.arange(10)])
    assert_equal(got, concat_reference([columns.take(rows)]))


def test_take_equals_slicing(tmp_path: Path) -> None:
    columns = make_columns(CARD, 20, np.random.default_rng(1))
    rows = np.array([7, 0, 7, 19, 3])
    taken = columns.take(rows)
    assert len(taken) == 5
    for window, row in enumerate(rows):
        new = slice(taken.starts[window], taken.starts[window] + taken.lengths[window])
        old = slice(columns.starts[row], columns.starts[row] + columns.lengths[row])
        np.testing.assert_array_equal(taken.ts_ms[new], columns.ts_ms[old])
        np.testing.assert_array_equal(taken.labels[new], columns.labels[old])
        for new_row, old_row in zip(range(new.start, new.stop), range(old.start, old.stop), strict=True):
            for name in ("action", "offset_s"):
                start, end = taken.action_starts[new_row], taken.action_starts[new_row] + taken.action_lengths[new_row]
                old_start = columns.action_starts[old_row]
                np.testing.assert_array_equal(
                    getattr(taken, name)[start:end], getattr(columns, name)[old_start : old_start + end - start]
                )


def test_reads_oracle_columns_on_request(tmp_path: Path) -> None:
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


def test_end_is_the_last_recorded_time(tmp_path: Path) -> None:
    """The end is the watch time or the last timed action, whichever is later; else the start."""

    def change(rows: dict[str, list]) -> None:
        rows["dwell_s"][0] = [9.0, math.nan, math.nan, 2.0]
        rows["action"][0] = [[0, 1, LAST]] * 4
        rows["action_offset_s"][0] = [[0, 3.5, 9], [0, 3.5, math.nan], [0, math.nan, math.nan], [0, 3.5, math.nan]]

    columns = windows_of_lengths([4, 2])
    write(tmp_path, columns, change)
    got = read_columns(read_row_groups([str(tmp_path / "part.parquet")]), CARD)
    assert (got.end_ms - got.ts_ms)[:4].tolist() == [9000, 3500, 0, 3500]


def test_reads_other_storage_types(tmp_path: Path) -> None:
    """The format defines values, not their storage width."""
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
    assert_equal(got, concat_reference([columns]))


def test_read_user_windows_returns_all_windows_of_one_user(tmp_path: Path) -> None:
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
    assert_equal(got, concat_reference([columns.take(np.array([3, 11, 38]))]))
    assert read_user_windows(files, CARD, "nobody") is None


@given(st.lists(st.tuples(st.integers(-5, 50), st.integers(0, 4))))
def test_concat_ranges(pieces: list[tuple[int, int]]) -> None:
    starts, lengths = (np.array([piece[i] for piece in pieces], dtype=np.int64) for i in (0, 1))
    expected = [value for start, length in pieces for value in range(start, start + length)]
    assert concat_ranges(starts, lengths).tolist() == expected


# Violations of the format -------------------------------------------------------------------------------------------

ROW = 13  # in the second row group of ten rows: its row in the file differs from its row in the group
Change = Callable[[dict[str, list]], None]


def write(folder: Path, columns: WindowColumns, change: Change | None = None, name: str = "part.parquet") -> str:
    """Write the windows to a Parquet file with ten rows per group after ``change`` of the Python values."""
    table = to_table(columns, CARD)
    if change is not None:
        rows = table.to_pydict()
        change(rows)
        table = pa.table({key: pa.array(rows[key], table.schema.field(key).type) for key in rows})
    pq.write_table(table, folder / name, row_group_size=10)
    return str(folder / name)


def windows_of_lengths(lengths: list[int]) -> WindowColumns:
    """Return random windows of the given lengths."""
    selected = []
    rng = np.random.default_rng(0)
    pool = make_columns(CARD, 400, rng, max_length=max(lengths))
    for length in lengths:
        selected.append(next(i for i in np.flatnonzero(pool.lengths == length) if i not in selected))
    return pool.take(np.array(selected))


def set_value(field: str, value: object, *path: int) -> Change:
    """Set ``rows[field][ROW][path...]``."""

    def change(rows: dict[str, list]) -> None:
        index, *inner = [ROW, *path]
        target = rows[field]
        for next_index in inner:
            target, index = target[index], next_index
        target[index] = value

    return change


def set_actions(actions: list[int], offsets: list[float]) -> Change:
    """Set the actions of ROW's last impression and their times."""

    def change(rows: dict[str, list]) -> None:
        rows["action"][ROW][-1], rows["action_offset_s"][ROW][-1] = actions, offsets

    return change


NAN, INF = math.nan, math.inf
VIOLATIONS: dict[str, tuple[Change, str, str]] = {
    "user id too large": (set_value("group", 4), "group", "id is not in"),
    "user id negative": (set_value("user_id", -1), "user_id", "id is not in"),
    "item id too large": (set_value("item_id", 40, -1), "item_id", "id is not in"),
    "item id negative": (set_value("author_id", -1, 0), "author_id", "id is not in"),
    "context id too large": (set_value("tab", 5, 1), "tab", "id is not in"),
    "session row too large": (set_value("session_gap", 5, 1), "session_gap", "id is not in"),
    "feedback level negative": (set_value("feedback", -1, 0), "feedback", "id is not in"),
    "null objective": (set_value("objective_glance", None, 0), "objective_glance", "null"),
    "null user id": (set_value("user_id", None), "user_id", "null"),
    "null user key": (set_value("user_key", None), "user_key", "null"),
    "null list": (set_value("ts_ms", None), "ts_ms", "null"),
    "null item id": (set_value("item_id", None, 0), "item_id", "null"),
    "null time": (set_value("ts_ms", None, 0), "ts_ms", "null"),
    "null label": (set_value("label_click", None, 0), "label_click", "null"),
    "null action list": (set_value("action", None, 0), "action", "exit"),
    "null action": (set_value("action", None, 0, 0), "action", "null"),
    "null action time": (set_value("action_offset_s", None, 0, 0), "action_offset_s", "null"),
    "unknown action": (set_actions([0, LAST + 1, LAST], [0, 1, 2]), "action", "unknown action"),
    "negative action": (set_actions([0, -1, LAST], [0, 1, 2]), "action", "unknown action"),
    "action twice": (set_actions([0, 2, 1, 2, LAST], [0, 1, 2, 3, 4]), "action", "twice"),
    "no start": (set_actions([1, 2, LAST], [0, 1, 2]), "action", "start"),
    "no exit": (set_actions([0, 1, 2], [0, 1, 2]), "action", "exit"),
    "exit alone": (set_actions([LAST], [0]), "action", "start"),
    "no action at all": (set_actions([], []), "action", "start"),
    "start inside": (set_actions([0, 1, 0, LAST], [0, 1, 2, 3]), "action", "twice"),
    "negative action time": (set_actions([0, 1, LAST], [0, -0.5, 2]), "action_offset_s", "negative or infinite"),
    "infinite action time": (set_actions([0, 1, LAST], [0, 1, INF]), "action_offset_s", "negative or infinite"),
    "unknown time of start": (set_actions([0, 1, LAST], [NAN, 1, 2]), "action_offset_s", "start"),
    "late start": (set_actions([0, 1, LAST], [1, 1, 2]), "action_offset_s", "start"),
    "fewer times than actions": (set_actions([0, 1, LAST], [0, 1]), "action_offset_s", "differs in length"),
    "infinite dwell": (set_value("dwell_s", INF, 0), "dwell_s", "negative or infinite"),
    "negative dwell": (set_value("dwell_s", -1.0, 0), "dwell_s", "negative or infinite"),
    "more items than times": (set_value("item_id", [1] * 11), "item_id", "differs in length"),
    "more labels than times": (set_value("label_click", [1.0] * 11), "label_click", "differs in length"),
    "more dwells than times": (set_value("dwell_s", [1.0] * 11), "dwell_s", "differs in length"),
    "fewer action lists": (set_value("action", [[0, LAST]]), "action", "differs in length"),
    "fewer action time lists": (set_value("action_offset_s", [[0.0, 1.0]]), "action_offset_s", "differs in length"),
    "first target beyond the window": (set_value("first_target", 4), "first_target", "is not in the window"),
    "negative first target": (set_value("first_target", -1), "first_target", "is not in the window"),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_reports_violations_with_file_row_and_field(name: str, tmp_path: Path) -> None:
    change, field, reason = VIOLATIONS[name]
    columns = windows_of_lengths([2, 3] * 5 + [2, 5, 1, 3, 4, 2])
    assert columns.lengths[ROW] == 3
    groups = read_row_groups([write(tmp_path, columns)])
    assert len(read_columns(groups, CARD)) == 16, "the file is valid without the violation"
    file = write(tmp_path, columns, change)
    with pytest.raises(DataError, match=reason) as caught:
        read_columns(groups, CARD)
    assert str(caught.value).startswith(f"{file}, row {ROW}, field {field!r}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["user_key", "ts_ms", "dwell_s", "action", "tab", "group", "label_click", "feedback"])
def test_reports_missing_columns(field: str, tmp_path: Path) -> None:
    table = to_table(make_columns(CARD, 5, np.random.default_rng(0)), CARD).drop_columns([field])
    pq.write_table(table, tmp_path / "part.parquet")
    groups = read_row_groups([str(tmp_path / "part.parquet")])
    with pytest.raises(DataError, match="missing") as caught:
        read_columns(groups, CARD)
    assert str(caught.value).startswith(f"{tmp_path / 'part.parquet'}, field {field!r}: ")


def test_reports_missing_oracle_columns(tmp_path: Path) -> None:
    card = dataclasses.replace(CARD, oracle_columns=["like"])
    groups = read_row_groups([write(tmp_path, windows_of_lengths([2, 3]))])
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
def test_reports_columns_of_another_type(field: str, values: list, tmp_path: Path) -> None:
    table = to_table(windows_of_lengths([3, 2]), CARD)
    table = table.set_column(table.schema.get_field_index(field), field, pa.array(values))
    pq.write_table(table, tmp_path / "part.parquet")
    groups = read_row_groups([str(tmp_path / "part.parquet")])
    with pytest.raises(DataError) as caught:
        read_columns(groups, CARD)
    assert f"{tmp_path / 'part.parquet'}, field {field!r}: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_reports_truncated_files(fraction: float, tmp_path: Path) -> None:
    file = Path(write(tmp_path, make_columns(CARD, 40, np.random.default_rng(0))))
    content, groups = file.read_bytes(), read_row_groups([str(file)])
    file.write_bytes(content[: int(fraction * len(content))])
    for read in (lambda: read_row_groups([str(file)]), lambda: read_columns(groups, CARD)):
        with pytest.raises(DataError, match="not a readable Parquet file") as caught:
            read()
        assert str(caught.value).startswith(str(file))
        assert "\n" not in str(caught.value)


def test_reports_corrupted_pages(tmp_path: Path) -> None:
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
def test_reports_files_that_are_not_parquet(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "part.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"part\.parquet: not a readable Parquet file"):
        read_row_groups([str(tmp_path / "part.parquet")])


def test_reports_deleted_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.parquet: not a readable Parquet file"):
        read_columns([RowGroup(str(tmp_path / "gone.parquet"), 0, 0, 3)], CARD)


def test_read_user_windows_reports_invalid_user_columns(tmp_path: Path) -> None:
    table = to_table(windows_of_lengths([3, 2]), CARD)
    pq.write_table(table.drop_columns(["user"]), tmp_path / "part.parquet")
    with pytest.raises(DataError, match="field 'user'"):
        read_user_windows([str(tmp_path / "part.parquet")], CARD, "1")
    pq.write_table(table.set_column(0, "user", pa.array([1, 2])), tmp_path / "part.parquet")
    with pytest.raises(DataError, match=r"field 'user'.*int64"):
        read_user_windows([str(tmp_path / "part.parquet")], CARD, "1")
