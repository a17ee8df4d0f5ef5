"""HSTU (arXiv 2402.17152) over the sequence of impressions, with MMoE's experts and a tower per task: METHODS §7."""

import torch
from torch import Tensor, nn

from a2gen_rec.config import ModelConfig
from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.models.base import Inputs, at_targets, in_windows, key_times, matching, stacked_ids
from a2gen_rec.models.baselines.towers import TowersRanker
from a2gen_rec.nn.encoder import log_bucket
from a2gen_rec.nn.experts import MMoE
from a2gen_rec.nn.hstu import HSTU, SequenceLayout
from a2gen_rec.utils.jagged import pad, unpad


class HSTURanker(TowersRanker):
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
            config.heads,
            config.layers,
            self.history,
            config.time_buckets if config.recency_bias else 0,
            len(self.features["item"]) if config.match_bias else 0,
        )
        self.mixture = MMoE(self.d_context, config.dim, self.outputs, config.experts)

    def _history(self, inputs: Inputs, actions: Tensor, batch: WindowBatch) -> Tensor:
        shown = torch.cat([inputs.item, inputs.session], dim=-1)
        known = torch.cat([actions, inputs.gap, inputs.outcome], dim=-1)
        past = pad(self.item(shown) + self.past(known), batch.key_window, batch.key_column, batch.key_shape)
        target = at_targets(batch, self.item(inputs.target))
        return unpad(self.sequence(past, target, self._sequences(batch)), batch.target_window, batch.target_column)

    def _sequences(self, batch: WindowBatch) -> SequenceLayout:
        """What rows, past impressions and then targets, see of their windows' past."""
        column = torch.arange(batch.key_shape[1], device=batch.key_column.device)
        begin, end = key_times(batch)
        # A row sees what lies before a place and had ended at a moment: its own, or that of its request.
        place = torch.cat([column.expand(batch.key_shape), at_targets(batch, batch.history_end)], dim=1)[..., None]
        now = torch.cat([begin, at_targets(batch, batch.ts_ms[batch.moment])], dim=1)[..., None]
        distance, begin, end = place - column, begin[:, None], end[:, None]
        elapsed = None
        if self.config.recency_bias:
            elapsed = log_bucket((now - begin).float() / 1000, self.config.time_buckets, self.config.max_gap_s)
        matches = None
        if self.config.match_bias:
            ids = stacked_ids(batch, self.features["item"])
            past = in_windows(batch, ids, 0)
            matches = matching(torch.cat([past, at_targets(batch, ids[batch.target])], dim=1), past)
        return SequenceLayout(
            seen=(distance > 0) & (distance <= self.history) & (begin < now) & (end <= now),
            distance=distance.clamp(0, self.history),
            elapsed=elapsed,
            matches=matches,
        )
