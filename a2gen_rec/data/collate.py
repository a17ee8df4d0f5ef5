"""Collation of user windows into a batch."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

from a2gen_rec.data.batch import FULL_WINDOW, BagTensors, WindowBatch
from a2gen_rec.data.columns import WindowColumns, concat_ranges, jagged_positions
from a2gen_rec.data.vectors import VectorTables
from a2gen_rec.utils.jagged import LengthBuckets


def collate(
    columns: WindowColumns,
    rows: np.ndarray,
    full_tables: Mapping[str, int],
    dedup: bool = True,
    include_targets: bool = True,
    request_gap_s: float | None = None,
    bucket_overhead: int = 0,
    include_outcomes: bool = True,
    token_history: np.ndarray | None = None,
    vectors: VectorTables | None = None,
) -> WindowBatch:
    """Build a batch of the windows ``rows`` [windows] (int64) without a Python loop over windows.

    Args:
        columns: windows to select from.
        rows: windows of the batch.
        full_tables: small tables that are looked up completely, because every token reads them: name -> rows.
        dedup: look up distinct ids only.
        include_targets: if False, all impressions are history and the batch contributes to no loss or metric.
        request_gap_s: targets of a window that start within this many seconds of the previous one are candidates of
            one request and share its first query time; None for one query time per target.
        bucket_overhead: as in :meth:`LengthBuckets.from_lengths`, for action sequences.
        include_outcomes: if False, outcomes of the targets and ``counts`` are empty.
        token_history: [subset] positions among the history impressions. ``history_token`` and ``history_buckets``
            then contain this subset only; None for all.
        vectors: vectors of the items.
    """
    # A request's arrays are small, and numpy calls cost a fraction of torch calls.
    lengths = columns.lengths[rows]
    flat = concat_ranges(columns.starts[rows], lengths)
    token_lengths = columns.action_lengths[flat]
    tokens = concat_ranges(columns.action_starts[flat], token_lengths)
    first_target = columns.first_target[rows] if include_targets else lengths

    ends = np.cumsum(lengths)
    starts = ends - lengths
    target_count = lengths - first_target
    target_window, target_column = jagged_positions(target_count)
    target = concat_ranges(ends - target_count, target_count)
    ts_ms = columns.ts_ms[flat]
    query_index = target if request_gap_s is None else _query_indices(target, target_column, ts_ms, request_gap_s)
    # The latest query time has the longest history. Without targets there is no history.
    history_count = np.zeros_like(lengths)
    np.maximum.at(history_count, target_window, query_index - starts[target_window])
    history_index = concat_ranges(starts, history_count)
    history_window, history_column = jagged_positions(history_count)

    token_starts = np.cumsum(token_lengths) - token_lengths
    token_history_index = history_index if token_history is None else history_index[token_history]
    history_token_lengths = token_lengths[token_history_index]
    offset_s = torch.from_numpy(columns.offset_s[tokens])
    if include_outcomes:
        outcomes = _target_outcomes(columns, flat, target, token_starts, token_lengths, offset_s, bucket_overhead)
    else:
        outcomes = _empty_outcomes()

    statistics_index = concat_ranges(columns.target_starts[rows], target_count)
    ids = {name: values[rows] for name, values in columns.user_ids.items()}
    ids |= {name: values[flat] for name, values in columns.impression_ids.items()}
    items, vector_index = (
        np.unique(columns.item_index[flat], return_inverse=True) if vectors else (np.zeros(0, np.int64),) * 2
    )
    bags = {name: values[rows] for name, values in columns.user_bags.items()}
    bags |= {name: values[flat] for name, values in columns.impression_bags.items()}
    ids |= {name: values.ids for name, values in bags.items()}
    sparse, row_index = _build_sparse(ids, full_tables, dedup)
    return WindowBatch(
        sparse=sparse,
        row_index=row_index,
        user_key=torch.from_numpy(columns.user_key[rows]),
        lengths=torch.from_numpy(lengths),
        first_target=torch.from_numpy(first_target),
        history_index=torch.from_numpy(history_index),
        history_window=torch.from_numpy(history_window),
        history_column=torch.from_numpy(history_column),
        history_token=torch.from_numpy(concat_ranges(token_starts[token_history_index], history_token_lengths)),
        history_buckets=LengthBuckets.from_lengths(torch.from_numpy(history_token_lengths), bucket_overhead),
        ts_ms=torch.from_numpy(ts_ms),
        end_ms=torch.from_numpy(columns.end_ms[flat]),
        action=torch.from_numpy(columns.action[tokens]),
        offset_s=offset_s,
        target=torch.from_numpy(target),
        target_window=torch.from_numpy(target_window),
        target_column=torch.from_numpy(target_column),
        query_index=torch.from_numpy(query_index),
        session={name: torch.from_numpy(rows[flat]) for name, rows in columns.session.items()},
        outcome={name: torch.from_numpy(rows[flat[history_index]]) for name, rows in columns.outcome.items()},
        statistics=torch.from_numpy(columns.statistics[statistics_index]).float(),
        bags={name: BagTensors.from_bags(values) for name, values in bags.items()},
        vectors={name: torch.from_numpy(table.lookup(items)) for name, table in (vectors or {}).items()},
        vector_index=torch.from_numpy(vector_index),
        user_numbers=torch.from_numpy(columns.user_numbers[rows]),
        numbers=torch.from_numpy(columns.numbers[flat]),
        history_labels=torch.from_numpy(columns.labels[flat[history_index]]),
        history_shape=(len(rows), int(history_count.max(initial=1))),
        target_shape=(len(rows), int(target_count.max(initial=0))),
        single_query_time=request_gap_s == FULL_WINDOW,
        **outcomes,
    )


def _target_outcomes(
    columns: WindowColumns,
    flat: np.ndarray,
    target: np.ndarray,
    token_starts: np.ndarray,
    token_lengths: np.ndarray,
    offset_s: Tensor,
    bucket_overhead: int,
) -> dict[str, Any]:
    """Return the outcome fields of a batch.

    Args:
        columns: windows to select from.
        flat: [impressions] index into ``columns``.
        target: [targets] index among the impressions.
        token_starts: [impressions] first token.
        token_lengths: [impressions] number of tokens.
        offset_s: [tokens] seconds.
        bucket_overhead: as in :func:`collate`.
    """
    step_lengths = token_lengths[target] - 1
    step_target, step_position = (torch.from_numpy(array) for array in jagged_positions(step_lengths))
    step = torch.from_numpy(token_starts[target])[step_target] + step_position
    labels, objectives, oracle = (
        torch.from_numpy(values[flat[target]]) for values in (columns.labels, columns.objectives, columns.oracle)
    )
    watch_s = offset_s[torch.from_numpy((token_starts + token_lengths)[target] - 1)]
    known = torch.isfinite(offset_s[step + 1])
    ordered = known[1:] & known[:-1] & (step_target[1:] == step_target[:-1])
    counts = [len(target), len(step), int(known.sum()), int(ordered.sum()), int(torch.isfinite(labels).sum())]
    counts += [*torch.isfinite(objectives).sum(0).tolist(), int(torch.isfinite(watch_s).sum())]
    return {
        "step_token": step,
        "target_buckets": LengthBuckets.from_lengths(torch.from_numpy(step_lengths), bucket_overhead),
        "labels": labels,
        "objectives": objectives,
        "watch_s": watch_s,
        "oracle": oracle,
        "counts": torch.tensor(counts, dtype=torch.float64),
    }


@cache  # empty tensors are safe to share between batches
def _empty_outcomes() -> dict[str, Any]:
    empty = torch.zeros(0, 0)
    return {
        "step_token": torch.zeros(0, dtype=torch.long),
        "target_buckets": LengthBuckets.from_lengths(torch.zeros(0, dtype=torch.long)),
        "watch_s": torch.zeros(0),
        "counts": torch.zeros(0, dtype=torch.float64),
        **dict.fromkeys(("labels", "objectives", "oracle"), empty),
    }


def _query_indices(target: np.ndarray, column: np.ndarray, ts_ms: np.ndarray, gap_s: float) -> np.ndarray:
    """Return [targets] the first target of each target's request, given the positions among the window's targets."""
    starts_request = column == 0
    starts_request[1:] |= np.diff(ts_ms[target]) > 1000 * gap_s
    query_index: np.ndarray = np.maximum.accumulate(np.where(starts_request, target, -1))
    return query_index


def _build_sparse(
    ids: Mapping[str, np.ndarray], full_tables: Mapping[str, int], dedup: bool
) -> tuple[KeyedJaggedTensor, dict[str, Tensor]]:
    """Return the ids to look up as one bag per feature, and the row index of each occurrence if deduplicated."""
    values, row_index = [], {}
    for name, occurrences in ids.items():
        distinct = occurrences
        if dedup:
            # Row 0, "unknown", is always looked up, and first: identifier dropout needs its vector.
            unique, index = torch.unique(torch.from_numpy(np.append(occurrences, 0)), return_inverse=True)
            distinct, row_index[name] = unique.numpy(), index[:-1]
        values.append(distinct)
    values += [np.arange(rows) for rows in full_tables.values()]
    sparse = KeyedJaggedTensor(
        keys=[*ids, *full_tables],
        values=torch.from_numpy(np.concatenate(values)),
        lengths=torch.tensor([len(part) for part in values], dtype=torch.int64),
    )
    return sparse, row_index
