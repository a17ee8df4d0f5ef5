"""Pointwise training examples: one target with one padded history.

This is the usual data path of a sequence ranker: targets are shuffled individually, and each has copies of the previous
impressions, padded to the longest history and the longest action sequence of the batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from a2gen_rec.data.columns import WindowColumns, concat_ranges
from a2gen_rec.data.loader import WindowDataset
from a2gen_rec.data.window_reader import read_columns


@dataclass(frozen=True)
class Examples:
    """B targets with n history impressions, L action tokens per impression, and S steps of the target's sequence.

    Padding has id 0, action 0, and NaN times.

    Attributes:
        user: feature -> [B] table rows.
        target: feature -> [B] table rows.
        history: feature -> [B, n] table rows.
        history_mask: [B, n] bool, True for impressions, False for padding.
        action: [B, n, L] action codes.
        offset_s: [B, n, L] seconds from the start of the impression.
        token_mask: [B, n, L] bool, True for action tokens.
        gap_s: [B, n] seconds since the previous impression.
        age_s: [B, n] seconds until the target.
        step_action: [B, S] input actions: ``start`` first, without ``exit``.
        step_offset_s: [B, S] seconds of the input actions.
        label: [B, S] next actions.
        label_time: [B, S] log1p seconds of the next actions, NaN when unknown.
        step_mask: [B, S] bool, True for steps.
        labels: [B, labels] float32, NaN when unknown.
    """

    user: dict[str, Tensor]
    target: dict[str, Tensor]
    history: dict[str, Tensor]
    history_mask: Tensor
    action: Tensor
    offset_s: Tensor
    token_mask: Tensor
    gap_s: Tensor
    age_s: Tensor
    step_action: Tensor
    step_offset_s: Tensor
    label: Tensor
    label_time: Tensor
    step_mask: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.history_mask)

    def to(self, device: torch.device) -> "Examples":
        """Copy all tensors to a device."""
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Examples":
        """Copy all tensors to pinned memory."""
        return self.map_tensors(lambda tensor: tensor.pin_memory())

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> "Examples":
        """Apply a function to every tensor."""
        mapped: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            is_dict = isinstance(value, dict)
            mapped[item.name] = {key: function(ids) for key, ids in value.items()} if is_dict else function(value)
        return Examples(**mapped)


def window_targets(columns: WindowColumns, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (window, position in the window) of every target of the windows ``rows``."""
    count = columns.lengths[rows] - columns.first_target[rows]
    return np.repeat(rows, count), concat_ranges(columns.first_target[rows], count)


def build_examples(columns: WindowColumns, window: np.ndarray, position: np.ndarray, max_history: int) -> Examples:
    """Build the examples of the targets at ``position`` [B] of the windows ``window`` [B].

    Args:
        columns: windows.
        window: window of each target.
        position: position of each target in its window.
        max_history: number of impressions before the target that may be its history, if they ended before it started.
    """
    start = columns.starts[window]
    target = start + position
    now = columns.ts_ms[target]
    before = position[:, None] - max_history + np.arange(max_history)
    candidate = np.maximum(start[:, None] + before, 0)
    visible = (before >= 0) & (columns.ts_ms[candidate] < now[:, None]) & (columns.end_ms[candidate] <= now[:, None])
    example, column = np.nonzero(visible)
    length = visible.sum(1)
    compact = np.arange(len(example)) - np.repeat(np.cumsum(length) - length, length)
    shape = (len(target), max(1, int(length.max(initial=0))))

    def pad(values: np.ndarray, fill: float = 0) -> Tensor:
        """[visible, ...] -> [B, n, ...]"""
        out = np.full((*shape, *values.shape[1:]), fill, values.dtype)
        out[example, compact] = values
        return torch.from_numpy(out)

    history = candidate[example, column]
    elapsed_ms = np.diff(columns.ts_ms, prepend=0)[history]
    gap_s = elapsed_ms.astype(np.float32) / 1000
    gap_s[history == start[example]] = np.nan
    age_s = (now[example] - columns.ts_ms[history]).astype(np.float32) / 1000

    token_mask, action, offset_s = _sequences(columns, history)
    target_mask, target_action, target_offset_s = _sequences(columns, target)
    # The label of a step is the next token. The last token, ``exit``, is not a step.
    step_mask = target_mask[:, 1:]
    return Examples(
        user={name: torch.from_numpy(ids[window]) for name, ids in columns.user_ids.items()},
        target={name: torch.from_numpy(ids[target]) for name, ids in columns.impression_ids.items()},
        history={name: pad(ids[history]) for name, ids in columns.impression_ids.items()},
        history_mask=pad(np.ones(len(history), bool)),
        action=pad(action),
        offset_s=pad(offset_s, np.nan),
        token_mask=pad(token_mask),
        gap_s=pad(gap_s, np.nan),
        age_s=pad(age_s, np.nan),
        step_action=torch.from_numpy(np.where(step_mask, target_action[:, :-1], 0)),
        step_offset_s=torch.from_numpy(target_offset_s[:, :-1].copy()),
        label=torch.from_numpy(target_action[:, 1:].copy()),
        label_time=torch.log1p(torch.from_numpy(target_offset_s[:, 1:].copy())),
        step_mask=torch.from_numpy(step_mask.copy()),
        labels=torch.from_numpy(columns.labels[target]),
    )


def _sequences(columns: WindowColumns, impression: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (mask, action, offset in seconds) of impressions, each [impressions, longest sequence]."""
    length = columns.action_lengths[impression]
    position = np.arange(max(2, int(length.max(initial=0))))
    mask = position < length[:, None]
    token = np.where(mask, columns.action_starts[impression][:, None] + position, 0)
    return mask, np.where(mask, columns.action[token], 0), np.where(mask, columns.offset_s[token], np.float32(np.nan))


class ExampleDataset(WindowDataset):
    """Examples of one rank: the windows of :class:`WindowDataset` with individually shuffled targets.

    Attributes:
        max_history: maximum impressions in the history of a target.
        batch_targets: examples of a batch.
    """

    max_history: int
    batch_targets: int

    def __iter__(self) -> Iterator[Examples]:  # type: ignore[override]
        epoch = self.state.epoch
        for number, _, groups in self._buffers(self.state):
            columns = read_columns(groups, self.card)
            window, position = window_targets(columns, np.arange(len(columns)))
            order = np.random.default_rng([self.seed, epoch, self.rank, number]).permutation(len(window))
            for first in range(0, len(order), self.batch_targets):
                batch = order[first : first + self.batch_targets]
                yield build_examples(columns, window[batch], position[batch], self.max_history)
