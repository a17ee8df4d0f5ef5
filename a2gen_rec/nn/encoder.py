"""Hierarchical sequence encoder (HSE): METHODS §3 after A2Gen, arXiv 2604.25834.

Action level: what a user did inside one past impression becomes one vector, whatever the target. Item level: the
past impressions a target may see become its history vector, all targets of a window at once.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from a2gen_rec.nn.attention import ContextAwareAttention, MeanPooling, Residual
from a2gen_rec.nn.feedback import DualViewAttention
from a2gen_rec.utils.jagged import LengthBuckets, jagged_to_padded_dense, padded_dense_to_jagged

FeedbackViews = Literal["none", "dual_view", "dual_view_full"]
ActionPooling = Literal["attention", "mean", "none"]
ItemPooling = Literal["attention", "mean"]


def log_bucketize(seconds: Tensor, buckets: int, largest: float) -> Tensor:
    """Log-spaced bucket of a time: 0 for missing (NaN), then 1 .. buckets-1 from 0 s to ``largest`` and beyond.

    Args:
        seconds: any shape; negative times count as 0.

    Returns:
        int64, same shape.
    """
    scale = (buckets - 2) / math.log1p(largest)
    bucket = 1 + (torch.log1p(seconds.clamp(min=0)) * scale).floor()
    return torch.nan_to_num(bucket, nan=0.0).clamp(max=buckets - 1).long()


@dataclass(frozen=True)
class WindowLayout:
    """Where flat keys (the impressions that targets may see) and targets lie in padded windows.

    Attributes:
        row, column: [keys] window, and place within it.
        shape: (windows, most keys of one).
        target_row, target_column: [targets] window, and place among its targets.
        target_shape: (windows, most targets of one).
        visible: [windows, most targets, longest] bool, the impressions each target may see; as ``recency``,
            [windows, 1, longest] where all targets of a window see the same at the same moment.
        positive, negative: [windows, longest] bool, impressions that pleased and that did not; None without views.
        recency: [windows, most targets, longest] int64 bucket of the time from each impression to each target.
        matches: [windows, item features, most targets, longest] bool, whether impression and target share each.
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
        d_item: width of an impression's item and context features.
        dim: width of action, time and gap embeddings and of the output.
        recency_buckets: rows of the learned bias per head on the time between impression and target; 0 for none.
            The token itself carries the gap to the impression before, which no target can change, so that the
            factorized form stays exact [ours].
        match_features: features whose equality in impression and target has a learned bias per head; 0 for none.
            Like recency it belongs to the pair of key and context, which the factorized form takes as it is [ours].
        d_moment: width of what is known of the moment, of impressions and targets alike.
        d_outcome: width of what is known of an impression after it.
        views: read the history as what pleased and what did not (:class:`FeedbackAttention`), and as a ``whole`` too.
        action_level: CAM over the actions of an impression, their ``mean``, or nothing of them (``off``).
        item_level: CAM over the impressions, or their ``mean``, which has neither pair biases nor views.
        context_query, head_gate: as :class:`ContextAwareAttention` takes.
    """

    def __init__(
        self,
        d_item: int,
        dim: int,
        heads: int,
        residual: Residual = "context",
        mlp_ratio: float = 0.0,
        recency_buckets: int = 0,
        match_features: int = 0,
        form: Literal["factorized", "reference"] = "factorized",
        dropout: float = 0.0,
        d_session: int = 0,
        d_outcome: int = 0,
        views: FeedbackViews = "none",
        action_level: ActionPooling = "attention",
        item_level: ItemPooling = "attention",
        context_query: bool = True,
        head_gate: bool = True,
    ) -> None:
        super().__init__()
        self.form, self.dim = form, dim
        cam = (dim, heads, residual, mlp_ratio, dropout, context_query, head_gate)
        self.action_level: ContextAwareAttention | MeanPooling | None = None
        if action_level == "attention":
            self.action_level = ContextAwareAttention(2 * dim, d_item, *cam)
        elif action_level == "mean":
            self.action_level = MeanPooling(2 * dim, dim, mlp_ratio, dropout)
        d_token, d_target = d_item + dim + d_session + d_outcome, d_item + d_session
        if self.action_level is not None:
            d_token += dim
        self.item_level: ContextAwareAttention | DualViewAttention | MeanPooling
        if item_level == "mean":
            self.item_level = MeanPooling(d_token, dim, mlp_ratio, dropout)
            recency_buckets = match_features = 0
        elif views == "none":
            self.item_level = ContextAwareAttention(d_token, d_target, *cam)
        else:
            self.item_level = DualViewAttention(d_token, d_target, *cam, include_full_history=views == "dual_view_full")
        self.recency, self.match = make_pair_biases(recency_buckets, match_features, heads)

    def encode_actions(self, tokens: Tensor, item: Tensor, groups: LengthBuckets) -> Tensor:
        """Action level, at the cost of the real tokens.

        Args:
            tokens: [tokens, 2·dim] ``[time-bucket ‖ action]`` embeddings, keys one after another.
            item: [keys, d_item]; groups: of the keys' action sequences.

        Returns:
            [keys, dim], whatever the target: what serving may keep between requests. Zero without an action level.
        """
        level = self.action_level
        if level is None:
            return item.new_zeros(len(item), self.dim)

        def piece(x: Tensor, context: Tensor, real: Tensor | None) -> Tensor:
            if real is None:
                real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            if isinstance(level, MeanPooling):
                return level(x, real[:, None]).squeeze(1)
            return level.pool(x, context[:, None], real[:, None], form="reference").squeeze(1)

        return groups.apply(piece, tokens, item, per_token=False)

    def forward(
        self, item: Tensor, actions: Tensor, side_features: Tensor, target: Tensor, layout: WindowLayout
    ) -> Tensor:
        """Item level.

        Args:
            item: [keys, d_item]; actions: [keys, dim] from :meth:`encode_actions`.
            beside: [keys, dim + d_moment + d_outcome] embeddings of the time since the impression before, of the
                moment and of the outcome.
            target: [targets, d_item + d_moment] features of the targets.

        Returns:
            [targets, dim] history vectors.
        """
        parts = [item, side_features] if self.action_level is None else [item, actions, side_features]
        tokens = jagged_to_padded_dense(torch.cat(parts, dim=-1), layout.row, layout.column, layout.shape)
        context = jagged_to_padded_dense(target, layout.target_row, layout.target_column, layout.target_shape)
        bias, level = pair_bias(layout.recency, layout.matches, self.recency, self.match), self.item_level
        if isinstance(level, MeanPooling):
            pooled = level(tokens, layout.attention_mask).expand(-1, layout.target_shape[1], -1)
        elif isinstance(level, ContextAwareAttention):
            pooled = level.pool(tokens, context, layout.attention_mask, bias, self.form)
        else:
            pooled = level(tokens, context, layout.attention_mask, layout.positive, layout.negative, bias, self.form)
        return padded_dense_to_jagged(pooled, layout.target_row, layout.target_column)


def make_pair_biases(
    recency_buckets: int, match_features: int, heads: int
) -> tuple[nn.Embedding | None, nn.Linear | None]:
    """What :func:`pair_bias` learns, begun at zero: per time bucket and per matching feature, a bias of every head."""
    recency = nn.Embedding(recency_buckets, heads) if recency_buckets else None
    if recency is not None:
        nn.init.zeros_(recency.weight)
    match = nn.Linear(match_features, heads, bias=False) if match_features else None
    if match is not None:
        nn.init.zeros_(match.weight)
    return recency, match


def pair_bias(
    recency: Tensor | None, matches: Tensor | None, recency_table: nn.Embedding | None, of_match: nn.Linear | None
) -> Tensor | None:
    """What each pair of key and target adds to the logits of every head.

    Args:
        recency: [m, *pairs] int64 bucket of the time between the two; matches: [m, features, *pairs] bool, whether they
            share each. Axes of recency may be 1.

    Returns:
        [m, heads, *pairs]; None where neither is looked at.
    """
    bias = None
    if recency_table is not None and recency is not None:
        # A lookup per head: four times as fast as rows of all heads, which then change places.
        bias = torch.stack([of_head[recency] for of_head in recency_table.weight.t()], dim=1)
    if of_match is not None and matches is not None:
        weight = of_match.weight
        with torch.autocast(weight.device.type, enabled=False):
            # As bytes: truth values take seven times as long to become numbers on CPU.
            known = matches.flatten(2).view(torch.uint8).to(weight.dtype)
            shared = torch.bmm(weight.expand(len(known), -1, -1), known).unflatten(-1, matches.shape[2:])
        bias = shared if bias is None else shared + bias
    return bias
