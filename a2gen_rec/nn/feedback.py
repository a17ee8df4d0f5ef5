"""Feedback-aware history encoding: METHODS §5 [ours], after implicit negative feedback, arXiv 2308.13249.

One history is encoded in two views: the positively received impressions (positive view) and the negatively received
ones (negative view). The views share the item-level CAM except for the mask and the value projection::

    v⁺, v⁻ = pooled attention within each view        gate = σ([c ‖ v⁺ ‖ v⁻] W_g + b_g)        e_t = c W_c
    history = [v⁺ ‖ gate ⊙ v⁻ ‖ v⁺ ⊙ e_t ‖ v⁻ ⊙ e_t] W + residual

An impression belongs to one view at most, and attends only within its view. The attention of both views is therefore
one attention with masked logits between views: the denominators ``D = F (E ⊙ B)ᵀ``, with B = 1 where query and key
share a view, are those of each query within its view. One pair of matrix products serves both views.
"""

import torch
from torch import Tensor, nn

from a2gen_rec.nn.attention import (
    AttentionConfig,
    AttentionImpl,
    ContextAwareAttention,
    mask_logits,
    pooled_attention_weights,
    weighted_sum,
)


class DualViewAttention(nn.Module):
    """Item-level CAM over a positive and a negative view of one history.

    The residual is that of the CAM, over all unmasked impressions. With the sequence in it, it keeps the frequency of
    each feedback level, which means within views lose, and the impressions of neither view. Attention over the full
    history costs a second pair of matrix products; ``include_full_history`` makes it optional.

    Args:
        d_sequence: Width of the sequence's tokens.
        d_context: Width of the context.
        config: Hyper-parameters of the CAM.
        include_full_history: Add the pooled attention over all unmasked impressions to the two views. It uses the
            value projection of the positive view.
    """

    def __init__(
        self, d_sequence: int, d_context: int, config: AttentionConfig, include_full_history: bool = False
    ) -> None:
        super().__init__()
        dim = config.dim
        self.cam = ContextAwareAttention(d_sequence, d_context, config)
        self.negative_value = nn.Linear(dim, dim, bias=False)  # the positive view uses the CAM's value projection
        self.gate = nn.Linear(d_context + 2 * dim, dim)
        self.include_full_history = include_full_history
        self.project = nn.Linear((5 if include_full_history else 4) * dim, dim, bias=False)
        for layer in (self.negative_value, self.project):
            nn.init.xavier_uniform_(layer.weight)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        mask: Tensor,
        positive: Tensor,
        negative: Tensor,
        bias: Tensor | None = None,
        impl: AttentionImpl = "factorized",
    ) -> Tensor:
        """Return history vectors of many contexts over one sequence.

        A view without unmasked impressions is zero. If both are, the residual remains.

        Args:
            x: [m, n, d_sequence].
            context: [m, T, d_context].
            mask: [m, T, n] bool, or [m, 1, n] if all contexts have the same mask.
            positive: [m, n] bool, members of the positive view.
            negative: [m, n] bool, members of the negative view, disjoint from ``positive``.
            bias: [m, heads, T, n] added to the logit of (context, key).
            impl: ``reference`` computes all T·n·n logits of each view; ``factorized`` is equal at a cost of T·n + n·n.

        Returns:
            [m, T, dim]
        """
        cam = self.cam
        hidden, projection = cam.sequence(x), cam.project_context(context)
        shared_logits, context_logits = cam.pair_logits(hidden, projection, bias)
        full_logits = [shared_logits] if self.include_full_history else []
        value, views = cam.split_heads(cam.value(hidden)), (positive, negative)
        values = (value, cam.split_heads(self.negative_value(hidden)))
        if impl == "factorized":
            # Both views and the full history in one pass; logits between views are masked.
            logits = [mask_logits(shared_logits, _same_view_mask(views)), *full_logits]
            all_weights = pooled_attention_weights(logits, context_logits, mask, impl)
            weights, *full_weights = (weight.to(hidden.dtype) for weight in all_weights)
            pooled = _pool_views(weights, mask, views, values)
        else:
            pooled = _pool_views_reference(shared_logits, context_logits, mask, views, values)
            full_weights = pooled_attention_weights(full_logits, context_logits, mask, impl)
        liked, disliked = (cam.merge_heads(view.transpose(1, 2), projection.gate) for view in pooled)
        gate = torch.sigmoid(self.gate(torch.cat([context, liked, disliked], dim=-1)))
        parts = [liked, gate * disliked, liked * projection.context, disliked * projection.context]
        for weights in full_weights:
            attended = weighted_sum(weights.to(hidden.dtype), value)
            parts.append(cam.merge_heads(attended.transpose(1, 2), projection.gate))
        return cam.apply_output_block(self.project(torch.cat(parts, dim=-1)), hidden, projection, mask)


def _pool_views_reference(
    shared_logits: Tensor,
    context_logits: Tensor,
    mask: Tensor,
    views: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
) -> list[Tensor]:
    """Return the mean-pooled attention within each view, computed one view after the other.

    Args:
        shared_logits: [m, heads, n, n] of (query, key).
        context_logits: [m, heads, T, n] of (context, key).
        mask: [m, T, n] bool.
        views: [m, n] bool of each view, disjoint.
        values: [m, heads, n, d_head] of each view.

    Returns:
        [m, heads, T, d_head] of each view; zero for a view without unmasked impressions.
    """
    pooled = []
    for view, value in zip(views, values, strict=True):
        (weights,) = pooled_attention_weights([shared_logits], context_logits, mask & view[:, None], "reference")
        pooled.append(weights.to(value.dtype) @ value)
    return pooled


def _same_view_mask(views: tuple[Tensor, ...]) -> Tensor:
    """Return [m, 1, n, n] bool, whether two positions share a view or both are in none; ``views``: [m, n], disjoint."""
    view_id = torch.stack([number * view for number, view in enumerate(views, 1)]).sum(0)
    return (view_id[:, :, None] == view_id[:, None])[:, None]


def _pool_views(weights: Tensor, mask: Tensor, views: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> list[Tensor]:
    """Return :func:`_pool_views_reference` from weights [m, heads, T, n] whose attention stays within views."""
    # Values are zero outside their view: the product separates the views without another pass over T·n weights.
    masked_values = [value * view[:, None, :, None] for view, value in zip(views, values, strict=True)]
    pooled = weighted_sum(weights, torch.cat(masked_values, dim=-1)).chunk(len(views), dim=-1)
    # The weights are a mean over all unmasked queries; rescale to a mean over those of the view.
    unmasked = mask.to(weights.dtype)
    count = unmasked @ torch.stack(views, dim=-1).to(unmasked.dtype)
    scale = unmasked.sum(-1, keepdim=True) / count.clamp(min=1)
    return [view * scale[:, None, :, index, None] for index, view in enumerate(pooled)]
