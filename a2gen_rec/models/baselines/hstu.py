"""HSTU (arXiv 2402.17152) over the sequence of impressions, with MMoE experts and one tower per task: METHODS §7."""

import torch
from torch import Tensor, nn

from a2gen_rec.config import ModelConfig
from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.models.base import FeatureEmbeddings
from a2gen_rec.models.baselines.towers import TowerRanker
from a2gen_rec.models.matches import item_matches
from a2gen_rec.models.padding import history_intervals, pad_targets
from a2gen_rec.nn.encoder import WindowLayout, log_bucketize
from a2gen_rec.nn.experts import MMoE
from a2gen_rec.nn.hstu import HSTU, SequenceLayout
from a2gen_rec.utils.jagged import jagged_to_padded_dense, padded_dense_to_jagged


class HSTURanker(TowerRanker):
    """Ranker on one sequence per window, of history impressions and targets, encoded once for all targets.

    An impression of the history attends to the impressions that a target in its position would see: those of the last
    ``max_history`` that had ended before its start. One layer therefore reaches the same impressions as A2Gen, and L
    layers reach L · ``max_history`` impressions back, limited by the window.

    Dropout is applied to tokens and layers as in the source's code, and to the context as in every baseline.
    """

    def __init__(self, card: DatasetCard, config: ModelConfig) -> None:
        super().__init__(card, config)
        self.item = nn.Linear(self.d_target, config.dim, bias=False)  # features shared by history and targets
        self.history_only = nn.Linear(
            self.d_token - self.d_target, config.dim, bias=False
        )  # features of the history alone
        self.sequence = HSTU(
            config.dim,
            config.num_heads,
            config.num_layers,
            self.max_history,
            config.time_buckets if config.recency_bias else 0,
            len(self.features["item"]) if config.match_bias else 0,
            config.dropout,
        )
        self.mixture = MMoE(self.d_context, config.dim, self.num_towers, config.num_experts)

    def _history(self, inputs: FeatureEmbeddings, actions: Tensor, batch: WindowBatch, layout: WindowLayout) -> Tensor:
        shared = torch.cat([inputs.item, inputs.session], dim=-1)
        history_only = torch.cat([actions, inputs.gap, inputs.outcome], dim=-1)
        history = jagged_to_padded_dense(
            self.item(shared) + self.history_only(history_only),
            batch.history_window,
            batch.history_column,
            batch.history_shape,
        )
        target = pad_targets(batch, self.item(inputs.target))
        return padded_dense_to_jagged(
            self.sequence(history, target, self._layout_with_targets(batch)), batch.target_window, batch.target_column
        )

    def _layout_with_targets(self, batch: WindowBatch) -> SequenceLayout:
        """Return the layout whose rows are the window's history impressions, then its targets."""
        column = torch.arange(batch.history_shape[1], device=batch.history_column.device)
        start, end = history_intervals(batch)
        # A row attends to columns before its position that had ended at its time: its start, or its query time.
        positions = [column.expand(batch.history_shape), pad_targets(batch, batch.history_end)]
        position = torch.cat(positions, dim=1)[..., None]
        now = torch.cat([start, pad_targets(batch, batch.ts_ms[batch.query_index])], dim=1)[..., None]
        distance, start, end = position - column, start[:, None], end[:, None]
        time_bucket = None
        if self.config.recency_bias:
            time_bucket = log_bucketize((now - start).float() / 1000, self.config.time_buckets, self.config.max_gap_s)
        matches = None
        if self.config.match_bias:
            matches = item_matches(batch, self.features["item"], with_history=True)
        return SequenceLayout(
            attention_mask=(distance > 0) & (distance <= self.max_history) & (start < now) & (end <= now),
            distance=distance.clamp(0, self.max_history),
            time_bucket=time_bucket,
            matches=matches,
        )
