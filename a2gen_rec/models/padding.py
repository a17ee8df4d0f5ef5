"""Values of impressions, history and targets by window, padded; intervals of impressions."""

import torch
from torch import Tensor

from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.utils.jagged import jagged_to_padded_dense


def pad_history(batch: WindowBatch, values: Tensor, fill: int) -> Tensor:
    """Return [windows, max keys, *d] values of the history, padded with ``fill``; ``values``: [impressions, *d]."""
    return jagged_to_padded_dense(
        values[batch.history_index], batch.history_window, batch.history_column, batch.history_shape, fill
    )


def pad_targets(batch: WindowBatch, values: Tensor) -> Tensor:
    """Return [windows, max targets, *d] values of the targets, padded with zeros; ``values``: [targets, *d]."""
    return jagged_to_padded_dense(values, batch.target_window, batch.target_column, batch.target_shape)


def pad_queries(batch: WindowBatch, values: Tensor) -> Tensor:
    """Pad values that depend only on the targets' query times.

    Args:
        batch: Targets.
        values: [targets, *d], equal for targets of one window if they share a query time.

    Returns:
        [windows, max targets, *d]; [windows, 1, *d] if the targets of each window share one query time.
    """
    if not batch.single_query_time:
        return pad_targets(batch, values)
    first = (batch.target_column == 0).nonzero().squeeze(1)
    return jagged_to_padded_dense(
        values[first], batch.target_window[first], batch.target_column[first], (batch.target_shape[0], 1)
    )


def history_intervals(batch: WindowBatch) -> tuple[Tensor, Tensor]:
    """Return [windows, max keys] start and end in ms of the history's impressions; padding never ends."""
    return pad_history(batch, batch.ts_ms, 0), pad_history(batch, batch.end_ms, torch.iinfo(torch.int64).max)


def seconds_since_previous(batch: WindowBatch) -> Tensor:
    """Return [keys] seconds since the previous impression of the window; NaN for the first."""
    start = batch.ts_ms[batch.history_index]
    seconds = torch.diff(start, prepend=start[:1]).float() / 1000
    return seconds.masked_fill(batch.history_column == 0, torch.nan)
