"""A batch of user windows: what the loader makes and the model reads.

Two levels are ragged: impressions per window and actions per impression. Everything that must be known on the host
(sizes, groups of equal length) is computed here, so that the model never asks an accelerator for it.
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

from a2gen_rec.data.columns import WindowColumns, concat_ranges, jagged_positions
from a2gen_rec.data.schema import WATCH_TIME, DatasetCard
from a2gen_rec.utils.jagged import LengthBuckets

COUNT_NAMES = ("targets", "steps", "timed_steps", "ordered_pairs", "labels")

WHOLE_WINDOW = math.inf
"""As a ``request_gap_s``: all targets of a window are candidates of one request."""


def count_names(card: DatasetCard) -> tuple[str, ...]:
    """What a batch's counts count: as ``COUNTS``, then targets of which an objective or the watch time is known."""
    return (*COUNT_NAMES, *card.objectives, WATCH_TIME)


@dataclass
class WindowBatch(Pipelineable):
    """User windows, flattened: impressions of all windows one after another, tokens of all impressions likewise.

    Attributes:
        sparse: ids to look up, one bag per feature (stride 1); distinct ids if deduplicated.
        index: feature -> [windows] (user level) or [impressions] place of its row among the looked-up ones, which
            :meth:`places` and :meth:`spread` read; without deduplication they are in this order, and not here.
        user_key: [windows] int64 hash of the user.
        lengths, first_target: [windows] impressions, and how many of them are history only.
        key: [keys] impressions that any target may see, the first ones of every window; key_window, key_column;
            ``key_shape``: (windows, most keys of one, at least 1). Actions of them, or of some: key_token [key tokens]
            and ``sequences``, the groups of keys by number of tokens.
        ts_ms, end_ms: [impressions] int64 begin, and end as far as the log tells (else the begin).
        action: [tokens] int64 codes; offset_s: [tokens] float32 seconds, NaN when unknown.
        target: [targets] place among the impressions; target_window, target_column; ``target_shape``.
        moment: [targets] impression at whose begin a target is judged: itself, or the first candidate of its request.
            Candidates are alternatives and not one another's past. ``one_moment``: whether all targets of a window
            share one.
        session, outcome: feature -> [impressions] or [keys] int64 table rows. Their tables are small: they are not
            among ``sparse``. Of an outcome only what a target may see is here.
        step: [steps] token of every input step of the targets (all but ``exit``); its label is the next token.
        steps: groups of targets by number of steps.
        labels, objectives: [targets, names] float32, watch_s: [targets] seconds; NaN when unknown.
        oracle: [targets, oracle columns] float32 true probabilities, simulated data only. These, ``step``, ``steps``
            and ``counts`` are empty where a batch was made without outcomes.
        counts: [5 + objectives + 1] float64, what the loss terms are means over, as named by :func:`count_names`.
        position: where in the data the loader stands after this batch.
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
        """[targets] column before which a target's history ends."""
        starts = torch.cumsum(self.lengths, 0) - self.lengths
        return self.query_index - starts[self.target_window]

    @property
    def same_target(self) -> Tensor:
        """[steps - 1] bool, whether a step and the next are of one target: then they are neighbouring tokens."""
        return self.step_token[1:] == self.step_token[:-1] + 1

    @property
    def step_target_index(self) -> Tensor:
        """[steps] index of the target that each step belongs to."""
        is_first = torch.ones_like(self.step_token, dtype=torch.bool)
        is_first[1:] = ~self.same_target
        return is_first.cumsum(0) - 1

    @property
    def timed_pairs(self) -> Tensor:
        """[steps - 1] bool, neighbouring steps of one target whose next actions both have a known time."""
        known = torch.isfinite(self.step_time)
        return self.same_target & known[1:] & known[:-1]

    @property
    def step_label(self) -> Tensor:
        """[steps] action that follows each input step."""
        return self.action[self.step_token + 1]

    @property
    def step_time(self) -> Tensor:
        """[steps] log1p seconds of the action that follows; NaN when unknown."""
        return torch.log1p(self.offset_s[self.step_token + 1])

    def lookup_rows(self, feature: str, indices: Tensor) -> Tensor:
        """Places among a feature's looked-up rows of the windows (user level) or impressions ``at``."""
        return self.row_index[feature][indices] if feature in self.row_index else indices

    def expand_rows(self, feature: str, rows: Tensor) -> Tensor:
        """[windows] or [impressions, *d] what was looked up, [rows, *d], of each."""
        return rows.index_select(0, self.row_index[feature]) if feature in self.row_index else rows

    def ids(self, feature: str) -> Tensor:
        """[windows] or [impressions] table rows of a feature."""
        place, ends = self.sparse.keys().index(feature), self.sparse.offset_per_key()
        return self.expand_rows(feature, self.sparse.values()[ends[place] : ends[place + 1]])

    def to(self, device: torch.device, non_blocking: bool = False) -> "WindowBatch":
        return self._map_tensors(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "WindowBatch":
        return self._map_tensors(lambda part: part.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        def record(part: Any) -> Any:
            part.record_stream(stream)
            return part

        self._map_tensors(record)

    def _map_tensors(self, change: Callable[[Any], Any]) -> "WindowBatch":
        changed: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor | KeyedJaggedTensor | LengthBuckets):
                changed[item.name] = change(value)
            elif item.name in ("row_index", "session", "outcome"):
                changed[item.name] = {name: change(part) for name, part in value.items()}
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
) -> WindowBatch:
    """Build a batch of the windows ``rows`` [windows] (int64), without a Python loop over them.

    Args:
        whole: tables looked up whole, name -> rows: small ones that every token reads.
        with_targets: else all impressions are history and no loss or metric comes of the batch.
        request_gap_s: targets of a window that begin within so many seconds of the one before are candidates of one
            request, judged at its first moment; None judges each at its own.
        bucket_overhead: as :meth:`LengthGroups.from_lengths` takes, of action sequences.
        with_outcomes: else nothing of what happened in the targets is there, nor are ``counts``.
        acted: places among the keys of those whose actions are wanted: ``key_token`` and ``sequences`` are theirs
            alone; None wants all.
    """
    # In numpy, whose calls cost a fraction of torch's: a request's arrays are small.
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
    # The last target to be judged sees the most; without targets, nothing is seen.
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

    ids = {name: values[rows] for name, values in columns.user_ids.items()}
    ids |= {name: values[flat] for name, values in columns.impression_ids.items()}
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
        history_shape=(len(rows), int(history_count.max(initial=1))),
        target_shape=(len(rows), int(target_count.max(initial=0))),
        single_query_time=request_gap_s == WHOLE_WINDOW,
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
    """The fields of a batch that tell what happened in its targets, given its impressions' first tokens and numbers of
    tokens, and the tokens' times."""
    step_lengths = token_lengths[target] - 1
    step_target, step_place = (torch.from_numpy(each) for each in jagged_positions(step_lengths))
    step = torch.from_numpy(token_starts[target])[step_target] + step_place
    labels, objectives, oracle = (
        torch.from_numpy(each[flat[target]]) for each in (columns.labels, columns.objectives, columns.oracle)
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


@cache  # empty tensors, which hold nothing that a batch could change for another
def _empty_outcomes() -> dict[str, Any]:
    none = torch.zeros(0, 0)
    return {
        "step_token": torch.zeros(0, dtype=torch.long),
        "target_buckets": LengthBuckets.from_lengths(torch.zeros(0, dtype=torch.long)),
        "watch_s": torch.zeros(0),
        "counts": torch.zeros(0, dtype=torch.float64),
        **dict.fromkeys(("labels", "objectives", "oracle"), none),
    }


def _query_indices(target: np.ndarray, column: np.ndarray, ts_ms: np.ndarray, gap_s: float) -> np.ndarray:
    """[targets] the first target of each one's request, given the targets' columns among their window's."""
    starts_request = column == 0
    starts_request[1:] |= np.diff(ts_ms[target]) > 1000 * gap_s
    moments: np.ndarray = np.maximum.accumulate(np.where(starts_request, target, -1))
    return moments


def _build_sparse(
    ids: Mapping[str, np.ndarray], full_tables: Mapping[str, int], dedup: bool
) -> tuple[KeyedJaggedTensor, dict[str, Tensor]]:
    """The ids to look up as one bag per feature, and where each occurrence finds its row if not at its own place."""
    values, row_index = [], {}
    for name, occurrences in ids.items():
        distinct = occurrences
        if dedup:
            found, row_index[name] = torch.unique(torch.from_numpy(occurrences), return_inverse=True)
            distinct = found.numpy()
        values.append(distinct)
    values += [np.arange(rows) for rows in full_tables.values()]
    sparse = KeyedJaggedTensor(
        keys=[*ids, *full_tables],
        values=torch.from_numpy(np.concatenate(values)),
        lengths=torch.tensor([len(part) for part in values], dtype=torch.int64),
    )
    return sparse, row_index
