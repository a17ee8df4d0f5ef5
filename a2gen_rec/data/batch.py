"""A batch of user windows: output of the loader and input of the model.

Two levels are jagged: impressions per window and actions per impression. All values that the host needs (sizes, length
buckets) are computed here, so that the model never synchronizes with an accelerator.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from a2gen_rec.data.bags import Bags
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.schema import WATCH_TIME
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
