"""Collation against a reference with Python loops over windows, impressions and actions."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from a2gen_rec.data.batch import FULL_WINDOW, WindowBatch, count_names
from a2gen_rec.data.collate import collate
from a2gen_rec.data.columns import WindowColumns
from a2gen_rec.utils.jagged import LengthBuckets
from tests.helpers.cards import full_tables, make_card, make_columns, small_config

CARD = make_card(labels=("click", "long_view"))
FULL_TABLES = full_tables(CARD, small_config())
INTEGER_FIELDS = ("user_key", "lengths", "first_target", "ts_ms", "end_ms", "action", "target")
INTEGER_FIELDS += (
    "history_index",
    "history_window",
    "history_column",
    "history_token",
    "target_window",
    "target_column",
    "query_index",
    "history_end",
    "step_token",
    "step_label",
)
FLOAT_FIELDS = ("offset_s", "step_time", "labels", "objectives", "watch_s", "oracle")
LOOKUP_FEATURES = [feature.name for level in ("user", "item", "context") for feature in CARD.features_at(level)]
ROWS = {
    "all": np.arange(20),
    "some, in any order": np.array([7, 3, 19, 0, 11]),
    "one": np.array([5]),
    "twice": np.array([4, 4, 2]),
}


@pytest.fixture(scope="module")
def columns() -> WindowColumns:
    """Windows with missing times, unknown labels and true probabilities."""
    rng = np.random.default_rng(8)
    columns = make_columns(CARD, 20, rng)
    labels = np.where(rng.random(columns.labels.shape) < 0.3, np.nan, columns.labels).astype(np.float32)
    return dataclasses.replace(columns, labels=labels, oracle=rng.random((len(columns.ts_ms), 3)).astype(np.float32))


def collate_reference(
    columns: WindowColumns, rows: np.ndarray, with_targets: bool = True, gap_s: float | None = None
) -> dict:
    """Collect every field of a batch one value at a time."""
    out: dict[str, list[Any]] = {
        name: [] for name in (*INTEGER_FIELDS, *FLOAT_FIELDS, "history_buckets", "target_buckets")
    }
    ids: dict[str, list[int]] = {name: [] for name in LOOKUP_FEATURES}
    session: dict[str, list[int]] = {feature.name: [] for feature in CARD.features_at("session")}
    outcome: dict[str, list[int]] = {feature.name: [] for feature in CARD.features_at("outcome")}
    counts = dict.fromkeys(count_names(CARD), 0)
    for window, row in enumerate(rows):
        length = int(columns.lengths[row])
        first = int(columns.first_target[row]) if with_targets else length
        out["user_key"].append(int(columns.user_key[row]))
        out["lengths"].append(length)
        out["first_target"].append(first)
        for name, values in columns.user_ids.items():
            ids[name].append(int(values[row]))
        start_ms = columns.ts_ms[int(columns.starts[row]) :]
        query_columns = []  # position of the impression at the query time of each target
        for column in range(first, length):
            is_new_request = column == first or gap_s is None or start_ms[column] - start_ms[column - 1] > 1000 * gap_s
            query_columns.append(column if is_new_request else query_columns[-1])
        num_history = max(query_columns, default=0)
        for column in range(length):
            flat = int(columns.starts[row]) + column
            for name in ("ts_ms", "end_ms"):
                out[name].append(int(getattr(columns, name)[flat]))
            for name, values in columns.impression_ids.items():
                ids[name].append(int(values[flat]))
            for name, values in columns.session.items():
                session[name].append(int(values[flat]))
            first_token, num_tokens = int(columns.action_starts[flat]), int(columns.action_lengths[flat])
            codes, times = (
                columns.action[first_token : first_token + num_tokens].tolist(),
                columns.offset_s[first_token : first_token + num_tokens],
            )
            if column < num_history:
                out["history_index"].append(len(out["ts_ms"]) - 1)
                out["history_window"].append(window)
                out["history_column"].append(column)
                out["history_token"] += range(len(out["action"]), len(out["action"]) + num_tokens)
                out["history_buckets"].append(num_tokens)
                for name, values in columns.outcome.items():
                    outcome[name].append(int(values[flat]))
            if column >= first:
                out["target"].append(len(out["ts_ms"]) - 1)
                out["target_window"].append(window)
                out["target_column"].append(column - first)
                out["history_end"].append(query_columns[column - first])
                out["query_index"].append(len(out["ts_ms"]) - 1 - column + query_columns[column - first])
                out["watch_s"].append(times[-1])
                out["labels"].append(columns.labels[flat].tolist())
                out["objectives"].append(columns.objectives[flat].tolist())
                out["oracle"].append(columns.oracle[flat].tolist())
                out["step_token"] += range(len(out["action"]), len(out["action"]) + num_tokens - 1)
                out["step_label"] += codes[1:]
                out["step_time"] += [math.log1p(t) for t in times[1:]]
                out["target_buckets"].append(num_tokens - 1)
                known = [not math.isnan(t) for t in times[1:]]
                counts["targets"] += 1
                counts["steps"] += num_tokens - 1
                counts["timed_steps"] += sum(known)
                counts["ordered_pairs"] += sum(a and b for a, b in itertools.pairwise(known))
                counts["labels"] += sum(not math.isnan(label) for label in columns.labels[flat])
                for name, value in zip(CARD.objectives, columns.objectives[flat], strict=True):
                    counts[name] += not math.isnan(value)
                counts["watch_time"] += not math.isnan(times[-1])
            out["action"] += codes
            out["offset_s"] += times.tolist()
    return {**out, "ids": ids, "session": session, "outcome": outcome, "counts": list(counts.values())}


def looked_up_ids(batch: WindowBatch) -> dict[str, list[int]]:
    """Return the ids of every occurrence through the batch's lookups."""
    return {name: batch.ids(name).tolist() for name in LOOKUP_FEATURES}


def assert_buckets(buckets: LengthBuckets, lengths: list[int]) -> None:
    expected = LengthBuckets.from_lengths(torch.tensor(lengths, dtype=torch.int64))
    assert buckets.sizes == expected.sizes
    for name in ("order", "inverse", "lengths", "token_order", "token_inverse"):
        assert torch.equal(getattr(buckets, name), getattr(expected, name))


def assert_batch(batch: WindowBatch, expected: dict) -> None:
    for name in INTEGER_FIELDS:
        value = getattr(batch, name)
        assert value.dtype == torch.int64
        assert value.tolist() == expected[name], name
    for name in FLOAT_FIELDS:
        width = () if name in ("offset_s", "step_time", "watch_s") else (-1,)
        value = np.array(expected[name], np.float32)
        got = getattr(batch, name)
        assert got.dtype == torch.float32
        np.testing.assert_allclose(got.numpy(), value.reshape(len(value), *width) if value.size else got, rtol=1e-6)
        assert len(got) == len(value)
    assert looked_up_ids(batch) == expected["ids"]
    for name in ("session", "outcome"):
        rows = getattr(batch, name)
        assert {feature: values.tolist() for feature, values in rows.items()} == expected[name]
        assert {values.dtype for values in rows.values()} == {torch.int64}
    assert_buckets(batch.history_buckets, expected["history_buckets"])
    assert_buckets(batch.target_buckets, expected["target_buckets"])
    assert batch.counts.tolist() == expected["counts"]
    keys = [expected["history_window"].count(window) for window in range(len(expected["lengths"]))]
    assert batch.history_shape == (len(expected["lengths"]), max(1, *keys))
    targets = [expected["target_window"].count(window) for window in range(len(expected["lengths"]))]
    assert batch.target_shape == (len(expected["lengths"]), max(targets, default=0))
    assert batch.loader_state is None


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dedup", [True, False])
@pytest.mark.parametrize("gap_s", [None, 0.0, 15.0, FULL_WINDOW])
def test_collate_equals_reference(rows: np.ndarray, dedup: bool, gap_s: float | None, columns: WindowColumns) -> None:
    batch = collate(columns, rows, FULL_TABLES, dedup, request_gap_s=gap_s)
    assert_batch(batch, collate_reference(columns, rows, gap_s=gap_s))


def test_random_columns_cover_all_cases(columns: WindowColumns) -> None:
    expected = collate_reference(columns, np.arange(20))
    targets, steps, timed, pairs, labels, *objectives, watched = expected["counts"]
    assert 0 < pairs < timed < steps
    assert 0 < labels < 2 * targets
    assert all(0 < known < targets for known in [*objectives, watched])
    assert 0 in expected["first_target"]
    assert len(set(expected["target_buckets"])) > 2


def test_without_targets_all_impressions_are_history(columns: WindowColumns) -> None:
    rows = np.array([3, 8])
    batch = collate(columns, rows, FULL_TABLES, include_targets=False)
    assert_batch(batch, collate_reference(columns, rows, with_targets=False))
    assert not batch.counts.any()
    assert torch.equal(batch.first_target, batch.lengths)
    assert batch.labels.shape == batch.objectives.shape == (0, 2)
    assert {len(rows) for rows in batch.outcome.values()} == {0}


@pytest.mark.parametrize("dedup", [True, False])
def test_lookups_are_one_bag_per_feature_and_full_tables(dedup: bool, columns: WindowColumns) -> None:
    batch = collate(columns, np.arange(20), FULL_TABLES, dedup)
    assert batch.sparse.keys() == LOOKUP_FEATURES + list(FULL_TABLES)
    assert batch.sparse.stride() == 1
    for name, rows in FULL_TABLES.items():
        assert batch.sparse[name].values().tolist() == list(range(rows))
    for name in LOOKUP_FEATURES:
        values, ids = batch.sparse[name].values(), batch.ids(name)
        assert torch.equal(values[batch.lookup_rows(name, torch.arange(len(ids)))], ids)
        if dedup:
            assert len(values.unique()) == len(values)
            index = batch.row_index[name]
            assert sorted(set(index.tolist())) == list(range(len(values))), "every looked-up row is used"
        else:
            assert name not in batch.row_index


def test_dedup_looks_up_fewer_rows_with_equal_ids(columns: WindowColumns) -> None:
    with_dedup, without = (collate(columns, np.arange(20), FULL_TABLES, dedup) for dedup in (True, False))
    assert looked_up_ids(with_dedup) == looked_up_ids(without)
    assert len(with_dedup.sparse.values()) < len(without.sparse.values())


@pytest.mark.parametrize("subset", [[], [0], [4, 1, 7], list(range(9))])
def test_token_history_selects_tokens_of_the_full_batch(subset: list[int], columns: WindowColumns) -> None:
    rows = np.array([7, 3, 19, 0, 11])
    full_batch = collate(columns, rows, FULL_TABLES, request_gap_s=FULL_WINDOW)
    partial = collate(
        columns,
        rows,
        FULL_TABLES,
        request_gap_s=FULL_WINDOW,
        token_history=np.array(subset, np.int64),
        include_outcomes=False,
    )
    assert torch.equal(partial.history_index, full_batch.history_index)
    lengths = full_batch.history_buckets.lengths[full_batch.history_buckets.inverse]
    tokens = full_batch.history_token.split(lengths.tolist())
    assert partial.history_token.tolist() == [token for index in subset for token in tokens[index].tolist()]
    assert partial.history_buckets.lengths[partial.history_buckets.inverse].tolist() == lengths[subset].tolist()
    for name in ("step_token", "labels", "counts"):
        assert not getattr(partial, name).numel()


def tensors(batch: WindowBatch) -> dict[str, Tensor]:
    """Return every tensor of a batch by unique name."""
    tensors_by_name: dict[str, Tensor] = {
        f"{field}.{name}": value
        for field in ("row_index", "session", "outcome")
        for name, value in getattr(batch, field).items()
    }
    tensors_by_name |= {"sparse.values": batch.sparse.values(), "sparse.lengths": batch.sparse.lengths()}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            tensors_by_name[field.name] = value
        elif isinstance(value, LengthBuckets):
            for part in ("order", "inverse", "lengths", "token_order", "token_inverse"):
                tensors_by_name[f"{field.name}.{part}"] = getattr(value, part)
    return tensors_by_name


def test_to_moves_every_tensor_and_keeps_the_rest(columns: WindowColumns) -> None:
    batch = dataclasses.replace(collate(columns, np.arange(5), FULL_TABLES), loader_state={"epoch": 3})
    moved = batch.to(torch.device("meta"))
    assert tensors(moved).keys() == tensors(batch).keys()
    assert {value.device.type for value in tensors(moved).values()} == {"meta"}
    assert (moved.history_shape, moved.target_shape) == (batch.history_shape, batch.target_shape)
    assert moved.loader_state == {"epoch": 3}
    assert moved.target_buckets.sizes == batch.target_buckets.sizes
    same = batch.to(torch.device("cpu"))
    for name, value in tensors(same).items():
        torch.testing.assert_close(value, tensors(batch)[name], equal_nan=True)


def test_record_stream_reaches_every_tensor(columns: WindowColumns, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = collate(columns, np.arange(5), FULL_TABLES)
    recorded: list[int] = []
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: recorded.append(self.data_ptr()))
    batch.record_stream(object())
    assert {value.data_ptr() for value in tensors(batch).values()} <= set(recorded)
