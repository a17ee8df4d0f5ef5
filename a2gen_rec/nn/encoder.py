"""Hierarchical sequence encoder (HSE): METHODS §3 after A2Gen, arXiv 2604.25834.

Action level: the actions inside one impression of the history become one vector, independent of the target. Item
level: the impressions that a target may see become its history vector, for all targets of a window at once.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from a2gen_rec.nn.attention import AttentionConfig, AttentionImpl, ContextAwareAttention, MeanPooling
from a2gen_rec.nn.feedback import DualViewAttention
from a2gen_rec.utils.jagged import LengthBuckets, jagged_to_padded_dense, padded_dense_to_jagged

FeedbackViews = Literal["none", "dual_view", "dual_view_full"]
ActionPooling = Literal["attention", "mean", "none"]
ItemPooling = Literal["attention", "mean"]


def log_bucketize(seconds: Tensor, buckets: int, max_seconds: float) -> Tensor:
    """Return the log-spaced bucket of a time: 0 if missing (NaN), else 1 .. buckets-1 for 0 s .. ``max_seconds``.

    Args:
        seconds: Any shape; negative times count as 0, times above ``max_seconds`` belong to the last bucket.
        buckets: Number of buckets.
        max_seconds: Lower end of the last bucket.

    Returns:
        int64, same shape.
    """
    scale = (buckets - 2) / math.log1p(max_seconds)
    bucket = 1 + (torch.log1p(seconds.clamp(min=0)) * scale).floor()
    return torch.nan_to_num(bucket, nan=0.0).clamp(max=buckets - 1).long()


@dataclass(frozen=True)
class WindowLayout:
    """Positions of flat keys (impressions of the history) and targets in padded windows.

    Attributes:
        row: [keys] window.
        column: [keys] position within the window.
        shape: (windows, max keys of a window).
        target_row: [targets] window.
        target_column: [targets] position among the window's targets.
        target_shape: (windows, max targets of a window).
        attention_mask: [windows, max targets, max keys] bool, impressions that each target may see. Like ``recency``,
            [windows, 1, max keys] if all targets of a window see the same at the same time.
        recency: [windows, max targets, max keys] int64 bucket of the time from each impression to each target.
        matches: [windows, item features, max targets, max keys] bool, whether impression and target share each feature.
        positive: [windows, max keys] bool, members of the positive view; None without views.
        negative: [windows, max keys] bool, members of the negative view; None without views.
    """

    row: Tensor
    column: Tensor
    shape: tuple[int, int]
    target_row: Tensor
    target_column: Tensor
    target_shape: tuple[int, int]
    attention_mask: Tensor
    recency: Tensor | None = None
    matches: Tensor | None = None
    positive: Tensor | None = None
    negative: Tensor | None = None


class HierarchicalEncoder(nn.Module):
    """Action-level and item-level CAM.

    Args:
        d_item: Width of an impression's item and context features.
        config: Hyper-parameters of both CAMs; ``dim`` is also the width of action, time and gap embeddings.
        recency_buckets: Rows of the learned bias per head on the time between impression and target; 0 for no bias.
            The token itself has the gap to the previous impression, which does not depend on the target, so that the
            factorized implementation stays exact [ours].
        match_features: Number of features whose equality in impression and target has a learned bias per head; 0 for no
            bias. Like recency it belongs to a pair of key and context, which the factorization supports [ours].
        impl: Implementation of the item-level attention.
        d_session: Width of the session features of impressions and targets.
        d_outcome: Width of the outcome features of impressions.
        views: Encode positive and negative views of the history (:class:`DualViewAttention`), optionally with the full
            history.
        action_pooling: CAM over the actions of an impression, their mean, or no actions at all.
        item_pooling: CAM over the impressions, or their mean, which has neither pair biases nor views.
    """

    def __init__(
        self,
        d_item: int,
        config: AttentionConfig,
        recency_buckets: int = 0,
        match_features: int = 0,
        impl: AttentionImpl = "factorized",
        d_session: int = 0,
        d_outcome: int = 0,
        views: FeedbackViews = "none",
        action_pooling: ActionPooling = "attention",
        item_pooling: ItemPooling = "attention",
    ) -> None:
        super().__init__()
        self.impl, self.dim = impl, config.dim
        self.action_pooling: ContextAwareAttention | MeanPooling | None = None
        if action_pooling == "attention":
            self.action_pooling = ContextAwareAttention(2 * config.dim, d_item, config)
        elif action_pooling == "mean":
            self.action_pooling = MeanPooling(2 * config.dim, config)
        d_token, d_target = d_item + config.dim + d_session + d_outcome, d_item + d_session
        if self.action_pooling is not None:
            d_token += config.dim
        self.item_pooling: ContextAwareAttention | DualViewAttention | MeanPooling
        if item_pooling == "mean":
            self.item_pooling = MeanPooling(d_token, config)
            recency_buckets = match_features = 0
        elif views == "none":
            self.item_pooling = ContextAwareAttention(d_token, d_target, config)
        else:
            self.item_pooling = DualViewAttention(d_token, d_target, config, views == "dual_view_full")
        self.recency, self.match = make_pair_biases(recency_buckets, match_features, config.num_heads)

    def encode_actions(self, tokens: Tensor, item: Tensor, buckets: LengthBuckets) -> Tensor:
        """Encode the action level, at a cost proportional to the number of tokens.

        Args:
            tokens: [tokens, 2·dim] ``[time-bucket ‖ action]`` embeddings, concatenated over keys.
            item: [keys, d_item].
            buckets: Length buckets of the keys' action sequences.

        Returns:
            [keys, dim], independent of the target, so that serving can cache it; zero without an action level.
        """
        pooling = self.action_pooling
        if pooling is None:
            return item.new_zeros(len(item), self.dim)

        def encode_bucket(x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
            if mask is None:
                mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            if isinstance(pooling, MeanPooling):
                return pooling(x, mask[:, None]).squeeze(1)
            return pooling.pool(x, context[:, None], mask[:, None], impl="reference").squeeze(1)

        return buckets.apply(encode_bucket, tokens, item, per_token=False)

    def forward(
        self, item: Tensor, actions: Tensor, side_features: Tensor, target: Tensor, layout: WindowLayout
    ) -> Tensor:
        """Encode the item level.

        Args:
            item: [keys, d_item].
            actions: [keys, dim] from :meth:`encode_actions`.
            side_features: [keys, dim + d_session + d_outcome] embeddings of the time since the previous impression, of
                the session and of the outcome.
            target: [targets, d_item + d_session] features of the targets.
            layout: Positions and masks.

        Returns:
            [targets, dim] history vectors.
        """
        parts = [item, side_features] if self.action_pooling is None else [item, actions, side_features]
        tokens = jagged_to_padded_dense(torch.cat(parts, dim=-1), layout.row, layout.column, layout.shape)
        context = jagged_to_padded_dense(target, layout.target_row, layout.target_column, layout.target_shape)
        bias, pooling = pair_bias(layout.recency, layout.matches, self.recency, self.match), self.item_pooling
        if isinstance(pooling, MeanPooling):
            pooled = pooling(tokens, layout.attention_mask).expand(-1, layout.target_shape[1], -1)
        elif isinstance(pooling, ContextAwareAttention):
            pooled = pooling.pool(tokens, context, layout.attention_mask, bias, self.impl)
        else:
            pooled = pooling(tokens, context, layout.attention_mask, layout.positive, layout.negative, bias, self.impl)
        return padded_dense_to_jagged(pooled, layout.target_row, layout.target_column)


def make_pair_biases(
    recency_buckets: int, match_features: int, num_heads: int
) -> tuple[nn.Embedding | None, nn.Linear | None]:
    """Return the parameters of :func:`pair_bias`, initialized to zero: a bias per head and time bucket or feature."""
    recency = nn.Embedding(recency_buckets, num_heads) if recency_buckets else None
    if recency is not None:
        nn.init.zeros_(recency.weight)
    match = nn.Linear(match_features, num_heads, bias=False) if match_features else None
    if match is not None:
        nn.init.zeros_(match.weight)
    return recency, match


def pair_bias(
    recency: Tensor | None, matches: Tensor | None, recency_table: nn.Embedding | None, match_layer: nn.Linear | None
) -> Tensor | None:
    """Return the learned bias of each pair of key and target, per head.

    Args:
        recency: [m, *pairs] int64 bucket of the time between the two; axes may be 1.
        matches: [m, features, *pairs] bool, whether the two share each feature.
        recency_table: Bias of each time bucket; None for no recency bias.
        match_layer: Bias of each matching feature; None for no match bias.

    Returns:
        [m, heads, *pairs]; None without any bias.
    """
    bias = None
    if recency_table is not None and recency is not None:
        # One lookup per head: four times as fast as looking up rows of all heads and permuting the axes.
        bias = torch.stack([head_bias[recency] for head_bias in recency_table.weight.t()], dim=1)
    if match_layer is not None and matches is not None:
        weight = match_layer.weight
        with torch.autocast(weight.device.type, enabled=False):
            # Viewed as bytes: converting bool to float takes seven times as long on CPU.
            matched = matches.flatten(2).view(torch.uint8).to(weight.dtype)
            match_bias = torch.bmm(weight.expand(len(matched), -1, -1), matched).unflatten(-1, matches.shape[2:])
        bias = match_bias if bias is None else match_bias + bias
    return bias
