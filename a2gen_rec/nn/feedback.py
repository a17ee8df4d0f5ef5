"""Feedback-aware history encoding: METHODS §5 [ours], after implicit negative feedback, arXiv 2308.13249.

One history is read twice: as the impressions that pleased (positive view) and as those that did not (negative
view). The views share everything of the item-level CAM but the mask and the value map::

    v⁺, v⁻ = pooled attention within each view        gate = σ([c ‖ v⁺ ‖ v⁻] W_g + b_g)        e_t = c W_c
    history = [v⁺ ‖ gate ⊙ v⁻ ‖ v⁺ ⊙ e_t ‖ v⁻ ⊙ e_t] W + residual

An impression is in one view at most, and it asks and answers only within its own. The attention of both views is
therefore one attention whose logits between views are shut off: the denominators ``D = F (E ⊙ B)ᵀ``, B being 1 where
query and key share a view, are each query's in its own view, and one pair of matrix products serves both.
"""

import torch
from torch import Tensor, nn

from a2gen_rec.nn.attention import (
    AttentionImpl,
    ContextAwareAttention,
    Residual,
    mask_logits,
    pooled_attention_weights,
    weighted_sum,
)


class DualViewAttention(nn.Module):
    """Item-level CAM over a positive and a negative view of one history.

    The residual stays the CAM's own, over all that a context sees: with the sequence in it, it tells how often which
    feedback occurs, which means within views cannot, and keeps the impressions of neither view. Attention over the
    whole history as well costs a second pair of matrix products: ``whole`` lets measurement decide.

    Args:
        d_sequence, d_context, dim, heads, residual, mlp_ratio, dropout, context_query, head_gate: as
            :class:`ContextAwareAttention` takes.
        whole: the pooled attention over all that a context sees joins the two views. It has the positive view's
            value map.
    """

    def __init__(
        self,
        d_sequence: int,
        d_context: int,
        dim: int,
        heads: int,
        residual: Residual = "context",
        mlp_ratio: float = 0.0,
        dropout: float = 0.0,
        context_query: bool = True,
        head_gate: bool = True,
        include_full_history: bool = False,
    ) -> None:
        super().__init__()
        self.cam = ContextAwareAttention(
            d_sequence, d_context, dim, heads, residual, mlp_ratio, dropout, context_query, head_gate
        )
        self.negative_value = nn.Linear(dim, dim, bias=False)  # the CAM's own value map is the positive view's
        self.gate = nn.Linear(d_context + 2 * dim, dim)
        self.whole = include_full_history
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
        form: AttentionImpl = "factorized",
    ) -> Tensor:
        """History vectors of many contexts over one sequence.

        A view of which a context sees nothing is zero for it. Where both are, the residual remains.

        Args:
            x: [m, n, d_sequence]; context: [m, T, d_context].
            mask: [m, T, n] bool, or [m, 1, n] if all contexts see the same.
            positive, negative: [m, n] bool, what belongs to each view; nothing belongs to both.
            bias: [m, heads, T, n] added to the logit of (context, key).
            form: ``direct`` builds all T·n·n logits of each view; ``factorized`` is equal in T·n + n·n.

        Returns:
            [m, T, dim]
        """
        cam = self.cam
        s, asked = cam.sequence(x), cam.project_context(context)
        shared, wanted = cam.pair_logits(s, asked, bias)
        value, views = cam.split_heads(cam.value(s)), (positive, negative)
        values = (value, cam.split_heads(self.negative_value(s)))
        if form == "factorized":
            # Both views in one pass, beside the whole: one attention whose logits between views are shut off.
            readings = [mask_logits(shared, _same_view_mask(views)), *([shared] if self.whole else [])]
            weights, *whole = (each.to(s.dtype) for each in pooled_attention_weights(readings, wanted, mask, form))
            pooled = _pool_views(weights, mask, views, values)
        else:
            pooled = _pool_direct(shared, wanted, mask, views, values)
            whole = pooled_attention_weights([shared] if self.whole else [], wanted, mask, form)
        liked, disliked = (cam.merge_heads(each.transpose(1, 2), asked.gate) for each in pooled)
        gate = torch.sigmoid(self.gate(torch.cat([context, liked, disliked], dim=-1)))
        parts = [liked, gate * disliked, liked * asked.context, disliked * asked.context]
        parts += [
            cam.merge_heads(weighted_sum(weights.to(s.dtype), value).transpose(1, 2), asked.gate) for weights in whole
        ]
        return cam.apply_output_block(self.project(torch.cat(parts, dim=-1)), s, asked, mask)


def _pool_direct(
    shared: Tensor, asked: Tensor, mask: Tensor, views: tuple[Tensor, ...], values: tuple[Tensor, ...]
) -> list[Tensor]:
    """Mean-pooled attention within each view, one view after the other.

    Args:
        shared: [m, heads, n, n] logits of (query, key); asked: [m, heads, T, n] logits of (context, key).
        mask: [m, T, n] bool; views: [m, n] bool each, disjoint; values: [m, heads, n, d_head] of each view.

    Returns:
        [m, heads, T, d_head] of each view; zero where nothing of it is visible.
    """
    return [
        pooled_attention_weights([shared], asked, mask & view[:, None], "reference")[0].to(value.dtype) @ value
        for view, value in zip(views, values, strict=True)
    ]


def _same_view_mask(views: tuple[Tensor, ...]) -> Tensor:
    """[m, 1, n, n] bool, whether two positions share a view, or are in none, given disjoint views [m, n]."""
    code = torch.stack([place * view for place, view in enumerate(views, 1)]).sum(0)
    return (code[:, :, None] == code[:, None])[:, None]


def _pool_views(weights: Tensor, mask: Tensor, views: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> list[Tensor]:
    """:func:`_pool_direct` of weights [m, heads, T, n] in which attention stays within views."""
    # Values outside their view are zero: so the products, not one more pass over T·n weights, tell views apart.
    inside = [value * view[:, None, :, None] for view, value in zip(views, values, strict=True)]
    pooled = weighted_sum(weights, torch.cat(inside, dim=-1)).chunk(len(views), dim=-1)
    # The weights are a mean over all that is visible; a view's own mean is over its share of it.
    seen = mask.to(weights.dtype)
    count = seen @ torch.stack(views, dim=-1).to(seen.dtype)
    scale = seen.sum(-1, keepdim=True) / count.clamp(min=1)
    return [each * scale[:, None, :, v, None] for v, each in enumerate(pooled)]
