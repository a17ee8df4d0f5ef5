"""Session lists: round trip, batches against loops, and validation."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from a2gen_rec.ensemble import session_lists as module
from a2gen_rec.ensemble.session_lists import SessionLists, batch_indices, concatenate, mean_std, read_lists, write_lists
from a2gen_rec.errors import DataError, UserError

NAMES = [field.name for field in fields(SessionLists)]


def make(n: int = 7, seed: int = 0, dtype: type = np.float16, max_length: int = 5) -> SessionLists:
    """Return lists of 1 .. ``max_length`` candidates and 0 .. 4 events, with some unknown labels."""
    rng = np.random.default_rng(seed)
    length, events = rng.integers(1, max_length + 1, n), rng.integers(0, 5, n)
    candidates = int(length.sum())
    return SessionLists(
        objectives=("like", "watch time"),
        behaviors=("like", "follow", "share"),
        user=rng.integers(0, 3, n) - (1 << 62),
        ts_ms=rng.integers(0, 1 << 41, n),
        length=length,
        events_length=events,
        item=rng.integers(0, 1 << 40, candidates),
        predictions=rng.normal(size=(candidates, 2)).astype(np.float32),
        label=rng.choice(np.array([0, 1, np.nan], np.float32), (candidates, 3)),
        context=rng.normal(size=(candidates, 4)).astype(dtype),
        events=rng.normal(size=(int(events.sum()), 3)).astype(dtype),
    )


def assert_same(one: SessionLists, other: SessionLists) -> None:
    for name in NAMES:
        first, second = getattr(one, name), getattr(other, name)
        np.testing.assert_array_equal(first, second, err_msg=name)
        assert isinstance(first, tuple) or first.dtype == second.dtype, name


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("n", [0, 1, 7])
def test_write_and_read_round_trip(n: int, dtype: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROW_GROUP_SIZE", 3)  # several row groups
    lists = make(n, dtype=dtype)
    write_lists(f"{tmp_path}/a.parquet", lists)
    assert_same(read_lists([f"{tmp_path}/a.parquet"]), lists)
    assert [file.name for file in tmp_path.iterdir()] == ["a.parquet"]


def test_round_trip_without_events(tmp_path: Path) -> None:
    lists = make()
    lists = replace(lists, events_length=np.zeros_like(lists.length), events=lists.events[:0])
    write_lists(f"{tmp_path}/a.parquet", lists)
    assert_same(read_lists([f"{tmp_path}/a.parquet"]), lists)


def test_files_have_one_row_per_list(tmp_path: Path) -> None:
    lists = make()
    write_lists(f"{tmp_path}/a.parquet", lists)
    table = pq.read_table(tmp_path / "a.parquet")
    assert table["user_key"].to_pylist() == lists.user.tolist()
    first = 0
    for row, length in enumerate(lists.length.tolist()):
        inside = slice(first, first + length)
        assert table["item"][row].as_py() == lists.item[inside].tolist()
        assert table["prediction_watch time"][row].as_py() == lists.predictions[inside, 1].tolist()
        np.testing.assert_array_equal(table["label_share"][row].as_py(), lists.label[inside, 2])
        assert table["context"][row].as_py() == lists.context[inside].ravel().tolist()
        first += length


def test_reads_files_in_order(tmp_path: Path) -> None:
    parts = [make(3, 1), make(0, 2), make(4, 3)]
    files = [f"{tmp_path}/{number}.parquet" for number in range(3)]
    for file, part in zip(files, parts, strict=True):
        write_lists(file, part)
    combined = read_lists(files)
    assert_same(combined, concatenate(parts))
    assert_same(combined.select(np.array([3, 4, 5, 6])), parts[2])
    assert_same(combined.select(np.array([], np.int64)), make(0))


def test_batches_equal_loops() -> None:
    lists, rows = make(9, 4), np.array([5, 0, 8])
    batch = lists.batch(rows)
    starts, events_starts = (np.append(0, np.cumsum(lengths)) for lengths in (lists.length, lists.events_length))
    max_length, max_events = lists.length[rows].max(), lists.events_length[rows].max()
    indices = []
    assert batch.mask.shape == (3, max_length)
    assert batch.events.shape == (3, max_events, 3)
    for i, row in enumerate(rows):
        inside = slice(starts[row], starts[row + 1])
        length, events_length = lists.length[row], lists.events_length[row]
        indices += range(starts[row], starts[row + 1])
        assert batch.mask[i].tolist() == [True] * length + [False] * (max_length - length)
        for name in ("predictions", "label", "context"):
            padded, expected = getattr(batch, name)[i], getattr(lists, name)[inside].astype(np.float32)
            np.testing.assert_array_equal(padded[:length], expected)
            assert not padded[length:].any()
            assert padded.dtype == torch.float32
        events = lists.events[events_starts[row] : events_starts[row + 1]]
        np.testing.assert_array_equal(batch.events[i, :events_length], events.astype(np.float32))
        assert not batch.events[i, events_length:].any()
        assert batch.length[i] == events_length
    assert batch.candidate_index.tolist() == indices
    assert np.isnan(batch.label).any()


def test_padding_is_invertible() -> None:
    lists = make(9, 5)
    padded = lists.pad(lists.predictions)
    assert padded.shape == (9, lists.length.max(), 2)
    np.testing.assert_array_equal(padded[lists.mask], lists.predictions)
    assert np.isnan(padded[~lists.mask]).all()


def test_batches_contain_each_list_once_with_little_padding() -> None:
    lists = make(2000, max_length=100)
    batches = [list(batch_indices(lists, 16, np.random.default_rng(seed))) for seed in (0, 0, 1)]
    batches.append(list(batch_indices(lists, 16)))
    for index_batches in batches:
        assert sorted(np.concatenate(index_batches)) == list(range(2000))
        assert max(len(rows) for rows in index_batches) == 16
        slots = sum(len(rows) * lists.length[rows].max() for rows in index_batches)
        assert slots < 1.1 * lists.length.sum()
    assert np.array_equal(np.concatenate(batches[0]), np.concatenate(batches[1]))
    assert not np.array_equal(np.concatenate(batches[0]), np.concatenate(batches[2]))
    max_length = np.array([lists.length[rows].max() for rows in batches[0]])
    assert abs(np.corrcoef(max_length, np.arange(len(max_length)))[0, 1]) < 0.3  # no trend from short to long


def test_mean_std_replaces_zero_deviation() -> None:
    lists = make(50)
    lists.predictions[:, 1] = 3.3
    mean, std = mean_std(lists)
    torch.testing.assert_close(mean, torch.tensor([lists.predictions[:, 0].mean(dtype=float), 3.3]).float())
    torch.testing.assert_close(std, torch.tensor([lists.predictions[:, 0].std(dtype=float), 1.0]).float())


def changed(name: str, index: tuple[int, ...], number: float) -> Callable[[SessionLists], SessionLists]:
    def change(lists: SessionLists) -> SessionLists:
        array = getattr(lists, name).copy()
        array[index] = number
        return replace(lists, **{name: array})

    return change


BROKEN: dict[str, tuple[Callable[[SessionLists], SessionLists], str]] = {
    "value": (changed("predictions", (3, 1), np.nan), r"'prediction_watch time': contains non-finite values"),
    "label": (changed("label", (3, 1), 2), r"'label_follow': contains a label that is not 0, 1 or NaN"),
    "context": (changed("context", (3, 1), np.inf), r"'context': contains non-finite values"),
    "empty": (changed("length", (0,), 0), r"shape|without candidates"),
    "events": (lambda lists: replace(lists, events=lists.events[:-1]), r"'events': shape is"),
    "width": (
        lambda lists: replace(lists, context=lists.context[:, :0]),
        r"width of context and events must be at least 1",
    ),
    "double": (lambda lists: replace(lists, events=lists.events.astype(np.float64)), r"'events': dtype is float64"),
}


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_rejects_writing_invalid_lists(name: str, tmp_path: Path) -> None:
    change, reason = BROKEN[name]
    with pytest.raises(DataError, match=f"a.parquet.*({reason})"):
        write_lists(f"{tmp_path}/a.parquet", change(make()))
    assert not list(tmp_path.iterdir())


def rewrite(file: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(file)), file)


def put(table: pa.Table, name: str, values: list[object], kind: pa.DataType) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(values, kind))


def shorter(name: str, by: int = 1) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        rows = table[name].to_pylist()
        return put(table, name, [rows[0][:-by], *rows[1:]], table.schema.field(name).type)

    return change


DAMAGED: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "missing": (lambda table: table.drop_columns(["label_share"]), "'label_share': column is missing"),
    "foreign": (lambda table: table.replace_schema_metadata({}), "not a session list file"),
    "version": (
        lambda table: table.replace_schema_metadata({b"a2gen_lists": b'{"format": 9}'}),
        "unsupported format version 9, expected 2",
    ),
    "lengths": (shorter("prediction_like"), "'prediction_like': list lengths differ from 'item'"),
    "vectors": (shorter("context"), "'context': length is not a multiple of the vector width 4"),
    "contexts": (shorter("context", 4), "'context': list lengths differ from 'item'"),
    "type": (
        lambda table: put(table, "ts_ms", [1.5] * len(table), pa.float64()),
        "'ts_ms': type is double, expected int64",
    ),
    "no list": (lambda table: put(table, "item", [1] * len(table), pa.int64()), "'item': type is int64, expected list"),
    "null": (lambda table: put(table, "ts_ms", [None] * len(table), pa.int64()), "'ts_ms': contains null rows"),
    "nulls": (
        lambda table: put(table, "item", [[None] * len(row) for row in table["item"]], pa.list_(pa.int64())),
        "'item': contains nulls",
    ),
}


@pytest.mark.parametrize("name", sorted(DAMAGED))
def test_rejects_invalid_files(name: str, tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    write_lists(str(file), make())
    change, reason = DAMAGED[name]
    rewrite(file, change)
    with pytest.raises(DataError, match=f"a.parquet.*{reason}"):
        read_lists([str(file)])


def test_rejects_truncated_missing_and_inconsistent_files(tmp_path: Path) -> None:
    full, other = tmp_path / "a.parquet", tmp_path / "b.parquet"
    write_lists(str(full), make())
    other.write_bytes(full.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"b\.parquet: cannot be read"):
        read_lists([str(full), str(other)])
    with pytest.raises(DataError, match=r"c\.parquet: cannot be read"):
        read_lists([f"{tmp_path}/c.parquet"])
    write_lists(str(other), replace(make(), behaviors=("like", "follow", "collect")))
    with pytest.raises(DataError, match=r"b.parquet: objectives, behaviors or widths differ from .*a.parquet"):
        read_lists([str(full), str(other)])
    with pytest.raises(DataError, match="no session list file"):
        read_lists([])


def test_concurrent_writers_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One writer starts and finishes while the other is writing."""
    file, table, lists, others = tmp_path / "a.parquet", module._table, make(seed=1), [make(seed=2)]

    def interrupted(part: SessionLists) -> pa.Table:
        while others:
            write_lists(str(file), others.pop())
            assert_same(read_lists([str(file)]), make(seed=2))
        return table(part)

    monkeypatch.setattr(module, "_table", interrupted)
    write_lists(str(file), lists)
    assert_same(read_lists([str(file)]), lists)
    assert list(tmp_path.iterdir()) == [file]


def test_failed_write_keeps_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.parquet"
    write_lists(str(file), make())
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(UserError, match=r"a\.parquet: cannot be written .*No space left"):
        write_lists(str(file), make(9))
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
