"""A batch of user windows: output of the loader and input of the model.

Two levels are jagged: impressions per window and actions per impression. All values that the host needs (sizes, length
buckets) are computed here, so that the model never synchronizes with an accelerator.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from a2gen_rec.data.bags import Bags
from a2gen_rec.data.columns import WindowColumns, concat_ranges, jagged_positions
from a2gen_rec.data.schema import WATCH_TIME, DatasetCard
from a2gen_rec.data.vectors import VectorTables
from a2gen_rec.utils.jagged import LengthBuckets

COUNT_NAMES = ("targets", "steps", "timed_steps", "ordered_pairs", "labels")

FULL_WINDOW = math.inf
"""Value of ``request_gap_s``: all targets of a window are candidates of one request."""


def count_names(card: DatasetCard) -> tuple[str, ...]:
    """Return the names of a batch's counts: ``COUNT_NAMES``, then targets with a known objective or watch time."""
    return (*COUNT_NAMES, *card.objectives, WATCH_TIME)


@dataclass(frozen=True)
class BagTensors:
    """Bags of one multi-valued feature; their ids are in the batch.

    Attributes:
        offsets: [bags] int64 first value.
        bag: [values] int64 bag of each value.
        weights: [values] float32 weights that sum to 1 in each bag.
        max_length: maximum number of values of a bag.
    """

    offsets: Tensor
    bag: Tensor
    weights: Tensor
    max_length: int

    @classmethod
    def from_bags(cls, bags: Bags) -> "BagTensors":
        index = np.repeat(np.arange(len(bags)), bags.lengths)
        totals = np.bincount(index, weights=bags.weights, minlength=len(bags))
        weights = (bags.weights / totals[index]).astype(np.float32)
        offsets = np.cumsum(bags.lengths) - bags.lengths
        longest = int(bags.lengths.max(initial=1))
        return cls(torch.from_numpy(offsets), torch.from_numpy(index), torch.from_numpy(weights), longest)

    def to_dense(self, ids: Tensor) -> Tensor:
        """Return [bags, max_length] of the ids [values], padded with 0."""
        column = torch.arange(len(ids), device=ids.device) - self.offsets[self.bag]
        return ids.new_zeros(len(self.offsets), self.max_length).index_put((self.bag, column), ids)

    def to(self, device: torch.device, non_blocking: bool = False) -> "BagTensors":
        return self._map_tensors(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "BagTensors":
        return self._map_tensors(lambda part: part.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        for part in (self.offsets, self.bag, self.weights):
            part.record_stream(stream)

    def _map_tensors(self, function: Callable[[Tensor], Tensor]) -> "BagTensors":
        return BagTensors(function(self.offsets), function(self.bag), function(self.weights), self.max_length)


@dataclass
class WindowBatch(Pipelineable):
    """Flattened user windows: impressions of all windows concatenated, tokens of all impressions concatenated.

    Attributes:
        sparse: ids to look up, one bag per feature (stride 1); distinct ids if deduplicated.
        row_index: feature -> [windows] (user level) or [impressions] index into the looked-up rows, of which the first
            is row 0, used by
            :meth:`lookup_rows` and :meth:`expand_rows`. Empty without deduplication: rows then are in this order.
        user_key: [windows] int64 hash of the user.
        lengths: [windows] number of impressions.
        first_target: [windows] number of impressions that are history only.
        history_index: [history] index of the impressions visible to any target: the first ones of every window.
        history_window: [history] window of each history impression.
        history_column: [history] position in the window.
        history_token: [history tokens] actions of the history impressions, or of a subset of them.
        history_buckets: history impressions grouped by number of tokens.
        ts_ms: [impressions] int64 start time.
        end_ms: [impressions] int64 end time if recorded, otherwise the start time.
        action: [tokens] int64 codes.
        offset_s: [tokens] float32 seconds, NaN if unknown.
        target: [targets] index among the impressions.
        target_window: [targets] window of each target.
        target_column: [targets] position among the targets of the window.
        query_index: [targets] impression whose start is the query time: the target itself, or the first candidate of
            its request. Candidates are alternatives and not part of each other's history.
        session: feature -> [impressions] int64 table rows. Tables of session and outcome features are small and
            therefore not in ``sparse``.
        outcome: feature -> [history] int64 table rows; limited to impressions visible to targets.
        statistics: [targets, statistics] float32.
        bags: multi-valued feature -> its bags. Such a feature has a bag of ids per window or impression in ``sparse``,
            concatenated, and ``row_index`` has one index per value.
        vectors: name -> [distinct items, width] float32 vectors of items, NaN if missing.
        vector_index: [impressions] index of the impression's item in ``vectors``; empty without vectors.
        user_numbers: [windows, user numbers] float32, NaN if missing.
        numbers: [impressions, item and context numbers] float32, NaN if missing.
        history_labels: [history, labels] float32, NaN if unknown.
        step_token: [steps] token of every input step of the targets (all except ``exit``); the label is the next
            token.
        target_buckets: targets grouped by number of steps.
        labels: [targets, labels] float32, NaN if unknown.
        objectives: [targets, objectives] float32, NaN if unknown.
        watch_s: [targets] seconds, NaN if unknown.
        oracle: [targets, oracle columns] float32 true probabilities, simulated data only. ``oracle``, ``labels``,
            ``objectives``, ``watch_s``, ``step_token``, ``target_buckets`` and ``counts`` are empty in a batch
            without outcomes.
        counts: [5 + objectives + 1] float64 denominators of the loss terms, in the order of :func:`count_names`.
        history_shape: (windows, maximum history impressions per window, at least 1).
        target_shape: (windows, maximum targets per window).
        single_query_time: whether all targets of a window share one query time.
        loader_state: state of the loader after this batch.
    """

    sparse: KeyedJaggedTensor
    row_index: dict[str, Tensor]
    user_key: Tensor
    lengths: Tensor
    first_target: Tensor
    history_index: Tensor
    history_window: Tensor
    history_column: Tensor
    history_token: Tensor
    history_buckets: LengthBuckets
    ts_ms: Tensor
    end_ms: Tensor
    action: Tensor
    offset_s: Tensor
    target: Tensor
    target_window: Tensor
    target_column: Tensor
    query_index: Tensor
    session: dict[str, Tensor]
    outcome: dict[str, Tensor]
    statistics: Tensor
    bags: dict[str, BagTensors]
    vectors: dict[str, Tensor]
    vector_index: Tensor
    user_numbers: Tensor
    numbers: Tensor
    history_labels: Tensor
    step_token: Tensor
    target_buckets: LengthBuckets
    labels: Tensor
    objectives: Tensor
    watch_s: Tensor
    oracle: Tensor
    counts: Tensor
    history_shape: tuple[int, int]
    target_shape: tuple[int, int]
    single_query_time: bool = False
    loader_state: dict[str, Any] | None = None

    @property
    def history_end(self) -> Tensor:
        """[targets] position in the window at which the target's history ends (exclusive)."""
        starts = torch.cumsum(self.lengths, 0) - self.lengths
        return self.query_index - starts[self.target_window]

    @property
    def same_target(self) -> Tensor:
        """[steps - 1] bool, whether a step and the next belong to one target and are adjacent tokens."""
        return self.step_token[1:] == self.step_token[:-1] + 1

    @property
    def step_target_index(self) -> Tensor:
        """[steps] index of the target that each step belongs to."""
        is_first = torch.ones_like(self.step_token, dtype=torch.bool)
        is_first[1:] = ~self.same_target
        return is_first.cumsum(0) - 1

    @property
    def timed_pairs(self) -> Tensor:
        """[steps - 1] bool, whether both next actions of adjacent steps of one target have a known time."""
        known = torch.isfinite(self.step_time)
        return self.same_target & known[1:] & known[:-1]

    @property
    def step_label(self) -> Tensor:
        """[steps] action after each input step."""
        return self.action[self.step_token + 1]

    @property
    def step_time(self) -> Tensor:
        """[steps] log1p seconds of the next action; NaN if unknown."""
        return torch.log1p(self.offset_s[self.step_token + 1])

    def lookup_rows(self, feature: str, indices: Tensor) -> Tensor:
        """Return indices into a feature's looked-up rows for windows (user level) or impressions ``indices``."""
        return self.row_index[feature][indices] if feature in self.row_index else indices

    def expand_rows(self, feature: str, rows: Tensor) -> Tensor:
        """Expand looked-up rows [rows, *d] to [windows, *d] (user level) or [impressions, *d]."""
        return rows.index_select(0, self.row_index[feature]) if feature in self.row_index else rows

    def ids(self, feature: str) -> Tensor:
        """Return the table rows of a feature, [windows] or [impressions], or [values] of all its bags."""
        key, offsets = self.sparse.keys().index(feature), self.sparse.offset_per_key()
        return self.expand_rows(feature, self.sparse.values()[offsets[key] : offsets[key + 1]])

    def to(self, device: torch.device, non_blocking: bool = False) -> "WindowBatch":
        return self._map_tensors(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "WindowBatch":
        return self._map_tensors(lambda part: part.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        def record(part: Any) -> Any:
            part.record_stream(stream)
            return part

        self._map_tensors(record)

    def _map_tensors(self, function: Callable[[Any], Any]) -> "WindowBatch":
        changed: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor | KeyedJaggedTensor | LengthBuckets):
                changed[item.name] = function(value)
            elif item.name in ("row_index", "session", "outcome", "bags", "vectors"):
                changed[item.name] = {name: function(part) for name, part in value.items()}
        return replace(self, **changed)


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
