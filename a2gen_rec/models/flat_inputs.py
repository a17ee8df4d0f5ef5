"""Targets as flat rows: inputs of the wide towers and of boosted trees [ours]."""

from collections.abc import Sequence

import torch
from torch import Tensor

from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.models.history_statistics import HistoryStatistics, visible_from_each
from a2gen_rec.models.inputs import INPUT_LEVELS, UsedInputs
from a2gen_rec.models.padding import history_intervals, pad_queries
from a2gen_rec.nn.encoder import WindowLayout
from a2gen_rec.utils.jagged import jagged_to_padded_dense, padded_dense_to_jagged

NUM_LATEST = 3
"""Number of latest visible impressions with columns of their own."""
_TIME_SCALE = 0.2
"""Scale of log1p seconds since an impression."""
_STATISTIC_SCALES = {"count": 0.5, "rate": 1.5, "mean": 4.0}


class FlatInputs:
    """Columns of one flat row per target: what is known at its query time, as numbers.

    Args:
        card: Dataset card.
        used: Inputs that the ranker reads.
        statistics: Statistics of the user's own history; they define the outcomes of the latest impressions.
        max_cardinality: Maximum number of table rows of a feature whose row is a column; 0 for none.
        use_statistics: Whether the statistics are columns.

    Attributes:
        columns: Names of the columns: table rows of small features, numbers, vectors, session features, latest
            impressions, statistics.
        num_optional: Number of columns after the table rows whose value may be missing.
        scales: Factor of each column after the table rows that brings it to about unit variance.
    """

    def __init__(
        self,
        card: DatasetCard,
        used: UsedInputs,
        statistics: HistoryStatistics,
        max_cardinality: int,
        use_statistics: bool = True,
    ) -> None:
        sizes = {feature.name: feature.cardinality for feature in card.features}
        self.small = {
            level: [name for name in used.features[level] if sizes[name] <= max_cardinality] for level in INPUT_LEVELS
        }
        self.used, self.statistics, self.use_statistics = used, statistics, use_statistics
        self.session = used.features["session"]
        latest = latest_columns(statistics, used.features["item"])
        numbers = [number.name for level in INPUT_LEVELS for number in used.numbers[level]]
        optional = [
            *numbers,
            *(f"{vector.name} {index}" for vector in used.vectors for index in range(vector.width)),
            *self.session,
            *latest,
        ]
        self.num_optional = len(optional)
        names = [f"{statistic.feature}: {statistic.outcome}" for statistic in used.statistics]
        history = statistics.names(used.features["item"])
        small = [name for level in INPUT_LEVELS for name in self.small[level]]
        self.columns = [*small, *optional, *([*names, *history] if use_statistics else [])]
        self.scales = [1.0] * len(numbers)
        self.scales += [1 / vector.rms for vector in used.vectors for _ in range(vector.width)]
        self.scales += [4 / sizes[name] for name in self.session]
        self.scales += [_TIME_SCALE if name.endswith(": time since") else 1.0 for name in latest]
        if use_statistics:
            self.scales += [_STATISTIC_SCALES[statistic.kind] for statistic in used.statistics]
            group = [1.0, *(3.0 for _ in statistics.rate_names), *(6.0 for _ in statistics.time_names)]
            self.scales += group * statistics.num_groups

    def __call__(self, batch: WindowBatch, layout: WindowLayout, history: Tensor) -> Tensor:
        """Return [targets, columns] float32 rows; NaN where a value is missing.

        A multi-valued feature has the table row of its first value. Outcomes are those of visible impressions.

        Args:
            batch: Targets and their history.
            layout: Positions, masks and feature matches of the batch.
            history: [targets, statistics] of the user's own history, :class:`HistoryStatistics`.
        """
        index = {"user": batch.target_window, "item": batch.target, "context": batch.query_index}
        parts = [
            _first_rows(batch, name)[index[level]][:, None] for level in INPUT_LEVELS for name in self.small[level]
        ]
        parts += [self.used.read_numbers(batch, level)[index[level]] for level in INPUT_LEVELS]
        parts += [batch.vectors[vector.name][batch.vector_index[batch.target]] for vector in self.used.vectors]
        parts += [batch.session[name][batch.query_index][:, None] for name in self.session]
        parts.append(latest_rows(batch, layout, self.statistics))
        if self.use_statistics:
            parts += [self.used.read_statistics(batch), history]
        return torch.cat([part.float() for part in parts], dim=1)


def latest_columns(statistics: HistoryStatistics, features: Sequence[str]) -> list[str]:
    """Return the names of the columns of :func:`latest_rows`, given the item features."""
    values = ["time since", *statistics.rate_names, *(f"time of {name}" for name in statistics.time_names)]
    values += [f"same {name}" for name in features]
    return [f"latest {number}: {value}" for number in range(1, NUM_LATEST + 1) for value in values]


def latest_rows(batch: WindowBatch, layout: WindowLayout, statistics: HistoryStatistics) -> Tensor:
    """Return the outcomes of the ``NUM_LATEST`` latest impressions that each target may see.

    Args:
        batch: Targets and their history.
        layout: Positions, masks and feature matches of the batch.
        statistics: Definition of the outcomes.

    Returns:
        [targets, columns] log1p seconds from the start of the impression to the query time, binary outcomes, log1p
        seconds of actions, and whether each item feature is that of the target; NaN where unknown or without an
        impression.
    """
    assert layout.matches is not None
    rates, times = len(statistics.rate_names), len(statistics.time_names)
    _, positive, known, time, timed = statistics.outcomes(batch).split([1, rates, rates, times, times], dim=1)
    outcomes = torch.cat([positive, time], dim=1).masked_fill(torch.cat([known, timed], dim=1) == 0, torch.nan)
    padded = jagged_to_padded_dense(outcomes, layout.row, layout.column, layout.shape)
    start, _ = history_intervals(batch)
    now = pad_queries(batch, batch.ts_ms[batch.query_index])
    visible = layout.attention_mask  # [windows, max targets, max keys]; one row if targets share a query time
    remaining = visible_from_each(visible)
    window = torch.arange(len(visible), device=visible.device)[:, None]
    max_targets, num_features = layout.matches.shape[2], layout.matches.shape[1]
    parts = []
    for number in range(1, NUM_LATEST + 1):
        is_latest = visible & (remaining == number)
        column = is_latest.int().argmax(-1)  # [windows, max targets]
        seconds = (now - start[window, column]).float() / 1000
        values = torch.cat([seconds.clamp(min=0).log1p()[..., None], padded[window, column]], dim=-1)
        index = column.expand(-1, max_targets)[:, None, :, None].expand(-1, num_features, -1, 1)
        same = layout.matches.gather(-1, index).squeeze(-1).transpose(1, 2)
        values = torch.cat([values.expand(-1, max_targets, -1), same], dim=-1)
        parts.append(values.masked_fill(~is_latest.any(-1, keepdim=True), torch.nan))
    return padded_dense_to_jagged(torch.cat(parts, dim=-1), layout.target_row, layout.target_column)


def _first_rows(batch: WindowBatch, feature: str) -> Tensor:
    """Return the table rows of a feature, [windows] or [impressions]; of the first value of a multi-valued one."""
    ids = batch.ids(feature)
    return ids[batch.bags[feature].offsets] if feature in batch.bags else ids
