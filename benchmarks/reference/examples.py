"""Pointwise training examples: every target with a padded history of its own.

The usual data path of a sequence ranker: targets are shuffled one by one, and each carries copies of the impressions
before it, padded to the longest history and the longest action sequence of the batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from a2gen_rec.data.columns import WindowColumns, concat_ranges
from a2gen_rec.data.loader import WindowDataset
from a2gen_rec.data.parquet_reader import read_columns


@dataclass(frozen=True)
class Examples:
    """B targets; n places of history, L action tokens per place, S steps of the target's own sequence.

    Padding has id 0, action 0, and NaN times.

    Attributes:
        user, target: feature -> [B] table rows; history: feature -> [B, n].
        visible: [B, n] bool, real places of the history.
        action, offset_s: [B, n, L] codes and seconds; token: [B, n, L] bool, real tokens.
        gap_s: [B, n] since the impression before; age_s: [B, n] until the target.
        step_action, step_offset_s: [B, S] what was emitted, ``start`` first, without ``exit``.
        label, label_time: [B, S] the action that followed, and its log1p seconds, NaN when unknown.
        step: [B, S] bool, real steps.
        labels: [B, labels] float32, NaN when unknown.
    """

    user: dict[str, Tensor]
    target: dict[str, Tensor]
    history: dict[str, Tensor]
    visible: Tensor
    action: Tensor
    offset_s: Tensor
    token: Tensor
    gap_s: Tensor
    age_s: Tensor
    step_action: Tensor
    step_offset_s: Tensor
    label: Tensor
    label_time: Tensor
    step: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.visible)

    def to(self, device: torch.device) -> "Examples":
        return self.each(lambda part: part.to(device, non_blocking=True))

    def pin_memory(self) -> "Examples":
        return self.each(lambda part: part.pin_memory())

    def each(self, change: Callable[[Tensor], Tensor]) -> "Examples":
        """With every tensor changed."""
        changed: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            by_feature = isinstance(value, dict)
            changed[item.name] = {key: change(ids) for key, ids in value.items()} if by_feature else change(value)
        return Examples(**changed)


def targets_of(columns: WindowColumns, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(window, place within it) of every target of the windows ``rows``."""
    count = columns.lengths[rows] - columns.first_target[rows]
    return np.repeat(rows, count), concat_ranges(columns.first_target[rows], count)


def build(columns: WindowColumns, window: np.ndarray, place: np.ndarray, history: int) -> Examples:
    """Examples of the targets at ``place`` [B] of the windows ``window`` [B].

    Args:
        history: impressions right before the target that it may see, those of them that had ended when it began.
    """
    start = columns.starts[window]
    target = start + place
    now = columns.ts_ms[target]
    before = place[:, None] - history + np.arange(history)
    candidate = np.maximum(start[:, None] + before, 0)
    seen = (before >= 0) & (columns.ts_ms[candidate] < now[:, None]) & (columns.end_ms[candidate] <= now[:, None])
    example, column = np.nonzero(seen)
    length = seen.sum(1)
    compact = np.arange(len(example)) - np.repeat(np.cumsum(length) - length, length)
    shape = (len(target), max(1, int(length.max(initial=0))))

    def laid_out(values: np.ndarray, fill: float = 0) -> Tensor:
        """[seen, ...] -> [B, n, ...]"""
        out = np.full((*shape, *values.shape[1:]), fill, values.dtype)
        out[example, compact] = values
        return torch.from_numpy(out)

    past = candidate[example, column]
    elapsed_ms = np.diff(columns.ts_ms, prepend=0)[past]
    gap_s = elapsed_ms.astype(np.float32) / 1000
    gap_s[past == start[example]] = np.nan
    age_s = (now[example] - columns.ts_ms[past]).astype(np.float32) / 1000

    token, action, offset_s = _sequences(columns, past)
    step, emitted, emitted_s = _sequences(columns, target)
    # A step's label is the next token; the last token, ``exit``, is no step.
    is_step = step[:, 1:]
    return Examples(
        user={name: torch.from_numpy(ids[window]) for name, ids in columns.user_ids.items()},
        target={name: torch.from_numpy(ids[target]) for name, ids in columns.impression_ids.items()},
        history={name: laid_out(ids[past]) for name, ids in columns.impression_ids.items()},
        visible=laid_out(np.ones(len(past), bool)),
        action=laid_out(action),
        offset_s=laid_out(offset_s, np.nan),
        token=laid_out(token),
        gap_s=laid_out(gap_s, np.nan),
        age_s=laid_out(age_s, np.nan),
        step_action=torch.from_numpy(np.where(is_step, emitted[:, :-1], 0)),
        step_offset_s=torch.from_numpy(emitted_s[:, :-1].copy()),
        label=torch.from_numpy(emitted[:, 1:].copy()),
        label_time=torch.log1p(torch.from_numpy(emitted_s[:, 1:].copy())),
        step=torch.from_numpy(is_step.copy()),
        labels=torch.from_numpy(columns.labels[target]),
    )


def _sequences(columns: WindowColumns, impression: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(real, action, offset in seconds) of impressions, each [impressions, longest]."""
    length = columns.action_lengths[impression]
    place = np.arange(max(2, int(length.max(initial=0))))
    real = place < length[:, None]
    token = np.where(real, columns.action_starts[impression][:, None] + place, 0)
    return real, np.where(real, columns.action[token], 0), np.where(real, columns.offset_s[token], np.float32(np.nan))


class ExampleStream(WindowDataset):
    """The examples of one rank: the windows of :class:`WindowStream`, their targets shuffled one by one.

    Attributes:
        history: impressions a target may see.
        batch_targets: examples of a batch.
    """

    history: int
    batch_targets: int

    def __iter__(self) -> Iterator[Examples]:  # type: ignore[override]
        epoch = self.state.epoch
        for number, groups in self._buffers(self.state):
            columns = read_columns(groups, self.card)
            window, place = targets_of(columns, np.arange(len(columns)))
            order = np.random.default_rng([self.seed, epoch, self.rank, number]).permutation(len(window))
            for first in range(0, len(order), self.batch_targets):
                chosen = order[first : first + self.batch_targets]
                yield build(columns, window[chosen], place[chosen], self.history)
