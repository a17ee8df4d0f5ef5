"""Collation against plain Python over windows, impressions and actions."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from a2gen_rec.data.batch import WHOLE_WINDOW, WindowBatch, collate, count_names
from a2gen_rec.data.columns import WindowColumns
from a2gen_rec.utils.jagged import LengthBuckets
from tests.helpers.cards import full_tables, make_card, make_columns, small_config

CARD = make_card(labels=("click", "long_view"))
WHOLE = full_tables(CARD, small_config())
WHOLE_NUMBERS = ("user_key", "lengths", "first_target", "ts_ms", "end_ms", "action", "target")
WHOLE_NUMBERS += (
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
FRACTIONS = ("offset_s", "step_time", "labels", "objectives", "watch_s", "oracle")
LOOKED_UP = [feature.name for level in ("user", "item", "context") for feature in CARD.features_at(level)]
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
    made = make_columns(CARD, 20, rng)
    labels = np.where(rng.random(made.labels.shape) < 0.3, np.nan, made.labels).astype(np.float32)
    return dataclasses.replace(made, labels=labels, oracle=rng.random((len(made.ts_ms), 3)).astype(np.float32))


def slow(columns: WindowColumns, rows: np.ndarray, with_targets: bool = True, gap_s: float | None = None) -> dict:
    """Every field of a batch, gathered one value at a time."""
    out: dict[str, list[Any]] = {name: [] for name in (*WHOLE_NUMBERS, *FRACTIONS, "history_buckets", "target_buckets")}
    ids: dict[str, list[int]] = {name: [] for name in LOOKED_UP}
    session: dict[str, list[int]] = {feature.name: [] for feature in CARD.features_at("session")}
    outcome: dict[str, list[int]] = {feature.name: [] for feature in CARD.features_at("outcome")}
    counts = dict.fromkeys(count_names(CARD), 0)
    for place, row in enumerate(rows):
        length = int(columns.lengths[row])
        first = int(columns.first_target[row]) if with_targets else length
        out["user_key"].append(int(columns.user_key[row]))
        out["lengths"].append(length)
        out["first_target"].append(first)
        for name, values in columns.user_ids.items():
            ids[name].append(int(values[row]))
        begin_ms = columns.ts_ms[int(columns.starts[row]) :]
        judged = []  # column of the impression at whose begin each target is judged
        for column in range(first, length):
            apart = column == first or gap_s is None or begin_ms[column] - begin_ms[column - 1] > 1000 * gap_s
            judged.append(column if apart else judged[-1])
        seen = max(judged, default=0)
        for column in range(length):
            flat = int(columns.starts[row]) + column
            for name in ("ts_ms", "end_ms"):
                out[name].append(int(getattr(columns, name)[flat]))
            for name, values in columns.impression_ids.items():
                ids[name].append(int(values[flat]))
            for name, values in columns.session.items():
                session[name].append(int(values[flat]))
            begin, many = int(columns.action_starts[flat]), int(columns.action_lengths[flat])
            codes, times = columns.action[begin : begin + many].tolist(), columns.offset_s[begin : begin + many]
            if column < seen:
                out["history_index"].append(len(out["ts_ms"]) - 1)
                out["history_window"].append(place)
                out["history_column"].append(column)
                out["history_token"] += range(len(out["action"]), len(out["action"]) + many)
                out["history_buckets"].append(many)
                for name, values in columns.outcome.items():
                    outcome[name].append(int(values[flat]))
            if column >= first:
                out["target"].append(len(out["ts_ms"]) - 1)
                out["target_window"].append(place)
                out["target_column"].append(column - first)
                out["history_end"].append(judged[column - first])
                out["query_index"].append(len(out["ts_ms"]) - 1 - column + judged[column - first])
                out["watch_s"].append(times[-1])
                out["labels"].append(columns.labels[flat].tolist())
                out["objectives"].append(columns.objectives[flat].tolist())
                out["oracle"].append(columns.oracle[flat].tolist())
                out["step_token"] += range(len(out["action"]), len(out["action"]) + many - 1)
                out["step_label"] += codes[1:]
                out["step_time"] += [math.log1p(t) for t in times[1:]]
                out["target_buckets"].append(many - 1)
                known = [not math.isnan(t) for t in times[1:]]
                counts["targets"] += 1
                counts["steps"] += many - 1
                counts["timed_steps"] += sum(known)
                counts["ordered_pairs"] += sum(a and b for a, b in itertools.pairwise(known))
                counts["labels"] += sum(not math.isnan(label) for label in columns.labels[flat])
                for name, value in zip(CARD.objectives, columns.objectives[flat], strict=True):
                    counts[name] += not math.isnan(value)
                counts["watch_time"] += not math.isnan(times[-1])
            out["action"] += codes
            out["offset_s"] += times.tolist()
    return {**out, "ids": ids, "session": session, "outcome": outcome, "counts": list(counts.values())}


def looked_up(batch: WindowBatch) -> dict[str, list[int]]:
    """The ids that each occurrence finds through the batch's lookups."""
    return {name: batch.ids(name).tolist() for name in LOOKED_UP}


def assert_groups(groups: LengthBuckets, lengths: list[int]) -> None:
    expected = LengthBuckets.from_lengths(torch.tensor(lengths, dtype=torch.int64))
    assert groups.sizes == expected.sizes
    for name in ("order", "inverse", "lengths", "token_order", "token_inverse"):
        assert torch.equal(getattr(groups, name), getattr(expected, name))


def assert_batch(batch: WindowBatch, expected: dict) -> None:
    for name in WHOLE_NUMBERS:
        value = getattr(batch, name)
        assert value.dtype == torch.int64
        assert value.tolist() == expected[name], name
    for name in FRACTIONS:
        width = () if name in ("offset_s", "step_time", "watch_s") else (-1,)
        value = np.array(expected[name], np.float32)
        got = getattr(batch, name)
        assert got.dtype == torch.float32
        np.testing.assert_allclose(got.numpy(), value.reshape(len(value), *width) if value.size else got, rtol=1e-6)
        assert len(got) == len(value)
    assert looked_up(batch) == expected["ids"]
    for name in ("session", "outcome"):
        rows = getattr(batch, name)
        assert {feature: values.tolist() for feature, values in rows.items()} == expected[name]
        assert {values.dtype for values in rows.values()} == {torch.int64}
    assert_groups(batch.history_buckets, expected["history_buckets"])
    assert_groups(batch.target_buckets, expected["target_buckets"])
    assert batch.counts.tolist() == expected["counts"]
    keys = [expected["history_window"].count(window) for window in range(len(expected["lengths"]))]
    assert batch.history_shape == (len(expected["lengths"]), max(1, *keys))
    targets = [expected["target_window"].count(window) for window in range(len(expected["lengths"]))]
    assert batch.target_shape == (len(expected["lengths"]), max(targets, default=0))
    assert batch.loader_state is None


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dedup", [True, False])
@pytest.mark.parametrize("gap_s", [None, 0.0, 15.0, WHOLE_WINDOW])
def test_collate_equals_loops(rows: np.ndarray, dedup: bool, gap_s: float | None, columns: WindowColumns) -> None:
    batch = collate(columns, rows, WHOLE, dedup, request_gap_s=gap_s)
    assert_batch(batch, slow(columns, rows, gap_s=gap_s))


def test_the_world_has_what_the_loops_must_show(columns: WindowColumns) -> None:
    expected = slow(columns, np.arange(20))
    targets, steps, timed, pairs, labels, *objectives, watched = expected["counts"]
    assert 0 < pairs < timed < steps
    assert 0 < labels < 2 * targets
    assert all(0 < known < targets for known in [*objectives, watched])
    assert 0 in expected["first_target"]
    assert len(set(expected["target_buckets"])) > 2


def test_without_targets_all_is_history(columns: WindowColumns) -> None:
    rows = np.array([3, 8])
    batch = collate(columns, rows, WHOLE, include_targets=False)
    assert_batch(batch, slow(columns, rows, with_targets=False))
    assert not batch.counts.any()
    assert torch.equal(batch.first_target, batch.lengths)
    assert batch.labels.shape == batch.objectives.shape == (0, 2)
    assert {len(rows) for rows in batch.outcome.values()} == {0}


@pytest.mark.parametrize("dedup", [True, False])
def test_lookups_are_one_bag_per_feature_and_the_whole_tables(dedup: bool, columns: WindowColumns) -> None:
    batch = collate(columns, np.arange(20), WHOLE, dedup)
    assert batch.sparse.keys() == LOOKED_UP + list(WHOLE)
    assert batch.sparse.stride() == 1
    for name, rows in WHOLE.items():
        assert batch.sparse[name].values().tolist() == list(range(rows))
    for name in LOOKED_UP:
        values, ids = batch.sparse[name].values(), batch.ids(name)
        assert torch.equal(values[batch.lookup_rows(name, torch.arange(len(ids)))], ids)
        if dedup:
            assert len(values.unique()) == len(values)
            place = batch.row_index[name]
            assert sorted(set(place.tolist())) == list(range(len(values))), "nothing is looked up in vain"
        else:
            assert name not in batch.row_index


def test_dedup_looks_up_less_but_the_same(columns: WindowColumns) -> None:
    with_dedup, without = (collate(columns, np.arange(20), WHOLE, dedup) for dedup in (True, False))
    assert looked_up(with_dedup) == looked_up(without)
    assert len(with_dedup.sparse.values()) < len(without.sparse.values())


@pytest.mark.parametrize("acted", [[], [0], [4, 1, 7], list(range(9))])
def test_actions_of_some_keys_are_theirs_in_a_batch_of_all(acted: list[int], columns: WindowColumns) -> None:
    rows = np.array([7, 3, 19, 0, 11])
    whole_batch = collate(columns, rows, WHOLE, request_gap_s=WHOLE_WINDOW)
    some = collate(
        columns,
        rows,
        WHOLE,
        request_gap_s=WHOLE_WINDOW,
        token_history=np.array(acted, np.int64),
        include_outcomes=False,
    )
    assert torch.equal(some.history_index, whole_batch.history_index)
    lengths = whole_batch.history_buckets.lengths[whole_batch.history_buckets.inverse]
    tokens = whole_batch.history_token.split(lengths.tolist())
    assert some.history_token.tolist() == [token for key in acted for token in tokens[key].tolist()]
    assert some.history_buckets.lengths[some.history_buckets.inverse].tolist() == lengths[acted].tolist()
    for name in ("step_token", "labels", "counts"):
        assert not getattr(some, name).numel()


def tensors(batch: WindowBatch) -> dict[str, Tensor]:
    """Every tensor of a batch by a name of its own."""
    found: dict[str, Tensor] = {
        f"{field}.{name}": value
        for field in ("row_index", "session", "outcome")
        for name, value in getattr(batch, field).items()
    }
    found |= {"sparse.values": batch.sparse.values(), "sparse.lengths": batch.sparse.lengths()}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            found[field.name] = value
        elif isinstance(value, LengthBuckets):
            for part in ("order", "inverse", "lengths", "token_order", "token_inverse"):
                found[f"{field.name}.{part}"] = getattr(value, part)
    return found


def test_to_moves_every_tensor_and_keeps_the_rest(columns: WindowColumns) -> None:
    batch = dataclasses.replace(collate(columns, np.arange(5), WHOLE), loader_state={"epoch": 3})
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
    batch = collate(columns, np.arange(5), WHOLE)
    recorded: list[int] = []
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: recorded.append(self.data_ptr()))
    batch.record_stream(object())
    assert {value.data_ptr() for value in tensors(batch).values()} <= set(recorded)
