"""MMoE (KDD 2018) and PLE (RecSys 2020) on target attention over the history: METHODS §7."""

import torch
from torch import Tensor

from a2gen_rec.config import ModelConfig
from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.models.base import FeatureEmbeddings
from a2gen_rec.models.baselines.towers import TowerRanker
from a2gen_rec.nn.encoder import WindowLayout
from a2gen_rec.nn.experts import PLE, MMoE
from a2gen_rec.nn.target_attention import TargetAttention


class TargetAttentionRanker(TowerRanker):
    """Base of MMoE and PLE; the history vector is the target's attention over the history."""

    def __init__(self, card: DatasetCard, config: ModelConfig) -> None:
        super().__init__(card, config)
        self.attention = TargetAttention(
            self.d_token,
            self.d_target,
            config.dim,
            config.num_heads,
            config.time_buckets if config.recency_bias else 0,
            len(self.features["item"]) if config.match_bias else 0,
        )

    def _history(self, inputs: FeatureEmbeddings, actions: Tensor, batch: WindowBatch, layout: WindowLayout) -> Tensor:
        tokens = torch.cat([inputs.item, actions, inputs.side_features()], dim=-1)
        return self.attention(tokens, inputs.target, layout)


class MMoERanker(TargetAttentionRanker):
    """Ranker with experts shared by all tasks and one softmax gate per task."""

    def __init__(self, card: DatasetCard, config: ModelConfig) -> None:
        super().__init__(card, config)
        self.mixture = MMoE(self.d_context, config.dim, self.num_towers, config.num_experts)


class PLERanker(TargetAttentionRanker):
    """Ranker with two levels of shared and task-specific experts."""

    def __init__(self, card: DatasetCard, config: ModelConfig) -> None:
        super().__init__(card, config)
        self.mixture = PLE(self.d_context, config.dim, self.num_towers, config.shared_experts, config.task_experts)
