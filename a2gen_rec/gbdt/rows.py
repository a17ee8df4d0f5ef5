"""Latest visible impressions of every target as flat columns [ours]."""

from collections.abc import Sequence

import torch
from torch import Tensor

from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.models.base import history_intervals, pad_queries
from a2gen_rec.models.history_statistics import HistoryStatistics, visible_from_each
from a2gen_rec.nn.encoder import WindowLayout
from a2gen_rec.utils.jagged import jagged_to_padded_dense, padded_dense_to_jagged

NUM_LATEST = 3
"""Number of latest visible impressions with columns of their own."""


def latest_columns(statistics: HistoryStatistics, features: Sequence[str]) -> list[str]:
    """Return the names of the columns of :func:`latest_rows`, given the item features."""
    values = ["seconds before", *statistics.rate_names, *(f"time of {name}" for name in statistics.time_names)]
    values += [f"same {name}" for name in features]
    return [f"latest {number}: {value}" for number in range(1, NUM_LATEST + 1) for value in values]


def latest_rows(batch: WindowBatch, layout: WindowLayout, statistics: HistoryStatistics) -> Tensor:
    """Return the outcomes of the ``NUM_LATEST`` latest impressions that each target may see.

    Args:
        batch: Targets and their history.
        layout: Positions, masks and feature matches of the batch.
        statistics: Definition of the outcomes.

    Returns:
        [targets, columns] seconds from the start of the impression to the query time, binary outcomes, log1p seconds
        of actions, and whether each item feature is that of the target; NaN where unknown or without an impression.
    """
    assert layout.matches is not None
    rates, times = len(statistics.rate_names), len(statistics.time_names)
    _, positive, known, time, timed = statistics.outcomes(batch).split([1, rates, rates, times, times], dim=1)
    outcomes = torch.cat([positive, time], dim=1).masked_fill(torch.cat([known, timed], dim=1) == 0, torch.nan)
    padded = jagged_to_padded_dense(outcomes, layout.row, layout.column, layout.shape)
    start, _ = history_intervals(batch)
    now = pad_queries(batch, batch.ts_ms[batch.query_index])
    visible = layout.attention_mask  # [windows, max targets, max keys]
    remaining = visible_from_each(visible)
    window = torch.arange(len(visible))[:, None]
    parts = []
    for number in range(1, NUM_LATEST + 1):
        is_latest = visible & (remaining == number)
        column = is_latest.int().argmax(-1)  # [windows, max targets]
        seconds = (now - start[window, column]).float() / 1000
        same = layout.matches.gather(-1, column[:, None, :, None].expand(-1, layout.matches.shape[1], -1, 1))
        values = torch.cat([seconds[..., None], padded[window, column], same.squeeze(-1).transpose(1, 2)], dim=-1)
        parts.append(values.masked_fill(~is_latest.any(-1, keepdim=True), torch.nan))
    return padded_dense_to_jagged(torch.cat(parts, dim=-1), layout.target_row, layout.target_column)
