"""HSTU (arXiv 2402.17152) over the sequence of impressions, with MMoE's experts and a tower per task: METHODS §7."""

import torch
from torch import Tensor, nn

from a2gen_rec.config import ModelConfig
from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.models.base import (
    FeatureEmbeddings,
    feature_matches,
    history_intervals,
    pad_history,
    pad_targets,
    stack_ids,
)
from a2gen_rec.models.baselines.towers import TowerRanker
from a2gen_rec.nn.encoder import log_bucketize
from a2gen_rec.nn.experts import MMoE
from a2gen_rec.nn.hstu import HSTU, SequenceLayout
from a2gen_rec.utils.jagged import jagged_to_padded_dense, padded_dense_to_jagged


class HSTURanker(TowerRanker):
    """Impressions and targets are tokens of one sequence per window, encoded once for all its targets.

    A past impression attends to those that a target in its place would see: of the ``history`` before it, the ones
    that had ended when it began. So what reaches a target through the first layer is what A2Gen sees, and through L
    layers what goes L · ``history`` impressions back, as far as its window does.

    Dropout is on the context, as in every baseline; the source has it in the layers too.
    """

    def __init__(self, card: DatasetCard, config: ModelConfig) -> None:
        super().__init__(card, config)
        self.item = nn.Linear(self.d_target, config.dim, bias=False)  # of past and target alike
        self.past = nn.Linear(self.d_token - self.d_target, config.dim, bias=False)  # what only the past has
        self.sequence = HSTU(
            config.dim,
            config.num_heads,
            config.num_layers,
            self.max_history,
            config.time_buckets if config.recency_bias else 0,
            len(self.features["item"]) if config.match_bias else 0,
        )
        self.mixture = MMoE(self.d_context, config.dim, self.outputs, config.num_experts)

    def _history(self, inputs: FeatureEmbeddings, actions: Tensor, batch: WindowBatch) -> Tensor:
        shown = torch.cat([inputs.item, inputs.session], dim=-1)
        known = torch.cat([actions, inputs.gap, inputs.outcome], dim=-1)
        past = jagged_to_padded_dense(
            self.item(shown) + self.past(known), batch.history_window, batch.history_column, batch.history_shape
        )
        target = pad_targets(batch, self.item(inputs.target))
        return padded_dense_to_jagged(
            self.sequence(past, target, self._sequences(batch)), batch.target_window, batch.target_column
        )

    def _sequences(self, batch: WindowBatch) -> SequenceLayout:
        """What rows, past impressions and then targets, see of their windows' past."""
        column = torch.arange(batch.history_shape[1], device=batch.history_column.device)
        begin, end = history_intervals(batch)
        # A row sees what lies before a place and had ended at a moment: its own, or that of its request.
        place = torch.cat([column.expand(batch.history_shape), pad_targets(batch, batch.history_end)], dim=1)[..., None]
        now = torch.cat([begin, pad_targets(batch, batch.ts_ms[batch.query_index])], dim=1)[..., None]
        distance, begin, end = place - column, begin[:, None], end[:, None]
        elapsed = None
        if self.config.recency_bias:
            elapsed = log_bucketize((now - begin).float() / 1000, self.config.time_buckets, self.config.max_gap_s)
        matches = None
        if self.config.match_bias:
            ids = stack_ids(batch, self.features["item"])
            past = pad_history(batch, ids, 0)
            matches = feature_matches(torch.cat([past, pad_targets(batch, ids[batch.target])], dim=1), past)
        return SequenceLayout(
            attention_mask=(distance > 0) & (distance <= self.max_history) & (begin < now) & (end <= now),
            distance=distance.clamp(0, self.max_history),
            time_bucket=elapsed,
            matches=matches,
        )
