"""Context-aware attention (CAM): METHODS §2 after A2Gen, arXiv 2604.25834.

Keys and values come from the sequence alone, queries from sequence and context. A gate driven by the context alone
mixes the heads::

    S = X W_s      C = c W_c      Q = [S ‖ C] W_q      K = S W_k      V = S W_v
    O_h = softmax(Q_h K_hᵀ / √d_h + mask) V_h W_o^h      CAM = Σ_h softmax(c W_g)_h O_h + C  [+ S]

``Q`` is linear in ``[S ‖ C]``, so a logit is the sum of a part shared by all contexts and a part shared by all query
positions. :meth:`ContextAwareAttention.pool` uses this to pool many contexts over one sequence in three matrix
products, without an attention matrix per context (METHODS §2.1).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from a2gen_rec.nn.dropout import Dropout

Residual = Literal["context", "both"]
AttentionImpl = Literal["factorized", "reference"]


@dataclass(frozen=True)
class AttentionConfig:
    """Hyper-parameters of context-aware attention.

    Attributes:
        dim: Width of the output and of all heads together.
        num_heads: Number of heads; divides ``dim``.
        residual: Term added to the attention: the context ``C``, or both ``C`` and the sequence ``S``.
        mlp_ratio: Hidden width of the LayerNorm → MLP block that follows, as a multiple of ``dim``; 0 for no block.
            Pooled outputs pass it after pooling.
        dropout: Dropout rate inside the block.
        context_query: Whether queries depend on the context; otherwise on the sequence alone, as keys do.
        head_gate: Whether the context mixes the heads; otherwise they are summed, as in standard attention.
    """

    dim: int
    num_heads: int
    residual: Residual = "context"
    mlp_ratio: float = 0.0
    dropout: float = 0.0
    context_query: bool = True
    head_gate: bool = True


class ContextProjection(NamedTuple):
    """Terms that depend on contexts alone.

    Attributes:
        context: [m, dim] C.
        query: [m, dim] context's part of the scaled queries.
        gate: [m, heads] gate of the heads.
    """

    context: Tensor
    query: Tensor
    gate: Tensor


class TokenProjection(NamedTuple):
    """Terms that depend on tokens alone.

    Attributes:
        hidden: [m, dim] S.
        query: [m, dim] sequence's part of the scaled queries.
        kv: [m, 2·dim] keys and values, concatenated.
    """

    hidden: Tensor
    query: Tensor
    kv: Tensor


class ContextAwareAttention(nn.Module):
    """Multi-head attention over a sequence, queried by a context.

    Args:
        d_sequence: Width of the sequence's tokens.
        d_context: Width of the context.
        config: Hyper-parameters.
    """

    head_indicator: Tensor

    def __init__(self, d_sequence: int, d_context: int, config: AttentionConfig) -> None:
        super().__init__()
        dim, heads = config.dim, config.num_heads
        self.dim, self.heads, self.d_head = dim, heads, dim // heads
        self.residual = config.residual
        self.sequence = nn.Linear(d_sequence, dim, bias=False)
        self.context = nn.Linear(d_context, dim, bias=False)
        self.query_sequence = nn.Linear(dim, dim, bias=False)  # W_q, upper half
        self.query_context = nn.Linear(dim, dim, bias=False) if config.context_query else None  # W_q, lower half
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)  # the stacked W_o^h: Σ_h g_h O_h W_o^h = (g ⊙ O) W_o
        self.gate = nn.Linear(d_context, heads, bias=False) if config.head_gate else None
        # [heads, dim], 1 where a component belongs to a head: products with it broadcast over components or sum them.
        self.register_buffer("head_indicator", torch.eye(heads).repeat_interleave(self.d_head, 1), persistent=False)
        for layer in (self.sequence, self.context, self.value, self.output):
            nn.init.xavier_uniform_(layer.weight)  # PyTorch's default shrinks a signal to a fifth in three layers
        self.block = FeedForward(dim, config.mlp_ratio, config.dropout) if config.mlp_ratio else nn.Identity()

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Return one output per position, with one context per sequence.

        Args:
            x: [m, n, d_sequence].
            context: [m, d_context].
            mask: [m, n] bool, keys that may be attended to; None for all. A position without any gets no attention.
            causal: Whether position i attends to positions up to i only.

        Returns:
            [m, n, dim]
        """
        hidden, projection = self.sequence(x), self.project_context(context)
        key, value = self.split_heads(self.key(hidden)), self.split_heads(self.value(hidden))
        logits = self._query(hidden, projection) @ key.transpose(-1, -2)
        allowed = None if mask is None else mask[:, None, None, :]
        if causal:
            n = x.shape[1]
            lower = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
            allowed = lower if allowed is None else allowed & lower
        attended = (masked_softmax(logits, allowed) @ value).transpose(1, 2)
        return self._output(self.merge_heads(attended, projection.gate[:, None]), hidden, projection.context[:, None])

    def project_context(self, context: Tensor) -> ContextProjection:
        """Return the terms of contexts [*, d_context]; :meth:`decode_step` reuses them at every step."""
        c = self.context(context)
        query = torch.zeros_like(c) if self.query_context is None else self.query_context(c) / self.d_head**0.5
        gate = c.new_ones(*c.shape[:-1], self.heads) if self.gate is None else small_softmax(self.gate(context))
        return ContextProjection(c, query, gate)

    def project_tokens(self, x: Tensor) -> TokenProjection:
        """Return the terms of tokens [m, d_sequence] for :meth:`decode_step`."""
        hidden = self.sequence(x)
        query = self.query_sequence(hidden) / self.d_head**0.5
        return TokenProjection(hidden, query, torch.cat([self.key(hidden), self.value(hidden)], dim=-1))

    def decode_step(
        self, token: TokenProjection, context: ContextProjection, kv_cache: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the output of the causal :meth:`forward` at one more position.

        Args:
            token: Terms of the m tokens at this position.
            context: Terms of the m contexts.
            kv_cache: [positions, m, 2·dim] keys and values of the earlier positions; None at the first.

        Returns:
            [m, dim] output and the cache including this position.
        """
        kv = token.kv[None]
        if kv_cache is None:  # the only position receives all attention
            attended = context.gate @ self.head_indicator * token.kv[:, self.dim :]
        else:
            kv = torch.cat([kv_cache, kv])
            key, value = kv.split(self.dim, dim=-1)
            # Many sequences of few steps: on CPU a third faster than as many tiny matrix products.
            logits = F.linear((token.query + context.query) * key, self.head_indicator)
            attention = torch.softmax(logits, dim=0) * context.gate
            attended = (attention @ self.head_indicator * value).sum(0)
        return self._output(self.output(attended), token.hidden, context.context), kv

    def pool(
        self,
        x: Tensor,
        context: Tensor,
        mask: Tensor,
        bias: Tensor | None = None,
        impl: AttentionImpl = "factorized",
    ) -> Tensor:
        """Return, per context, the masked mean over query positions of its attention over one sequence.

        Context t uses only the positions of ``mask[t]`` as queries, keys and values. With an empty mask its attention
        is zero and the residual remains.

        Args:
            x: [m, n, d_sequence].
            context: [m, T, d_context].
            mask: [m, T, n] bool, or [m, 1, n] if all contexts have the same mask.
            bias: [m, heads, T, n] added to the logit of (context, key).
            impl: ``reference`` computes all T·n·n logits; ``factorized`` is equal at a cost of T·n + n·n.

        Returns:
            [m, T, dim]
        """
        hidden, projection = self.sequence(x), self.project_context(context)
        shared_logits, context_logits = self.pair_logits(hidden, projection, bias)
        (weights,) = pooled_attention_weights([shared_logits], context_logits, mask, impl)
        attended = weighted_sum(weights.to(hidden.dtype), self.split_heads(self.value(hidden)))
        pooled = self.merge_heads(attended.transpose(1, 2), projection.gate)
        return self.apply_output_block(pooled, hidden, projection, mask)

    def pair_logits(
        self, hidden: Tensor, context: ContextProjection, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the two parts of the logits of :meth:`pool`.

        Args:
            hidden: [m, n, dim] projected sequence.
            context: Terms of contexts [m, T, d_context].
            bias: [m, heads, T, n].

        Returns:
            [m, heads, n, n] of (query, key) and [m, heads, T, n] of (context, key).
        """
        key = self.split_heads(self.key(hidden)).transpose(-1, -2)
        shared_logits = self.split_heads(self.query_sequence(hidden)) / self.d_head**0.5 @ key
        context_logits = self.split_heads(context.query) @ key
        return shared_logits, context_logits if bias is None else context_logits + bias

    def apply_output_block(self, pooled: Tensor, hidden: Tensor, context: ContextProjection, mask: Tensor) -> Tensor:
        """Add the residual to pooled attention [m, T, dim] and apply the block; other arguments as in :meth:`pool`."""
        out = pooled + context.context
        if self.residual == "both":
            weight = mask.to(hidden.dtype)
            out = out + weight @ hidden / weight.sum(-1, keepdim=True).clamp(min=1)
        return self.block(out)

    def split_heads(self, x: Tensor) -> Tensor:
        """[m, n, dim] -> [m, heads, n, d_head]"""
        return x.unflatten(-1, (self.heads, self.d_head)).transpose(1, 2)

    def merge_heads(self, attended: Tensor, gate: Tensor) -> Tensor:
        """[..., heads, d_head], gate broadcastable to [..., heads] -> [..., dim]"""
        return self.output((attended * gate[..., None]).flatten(-2))

    def _query(self, hidden: Tensor, context: ContextProjection) -> Tensor:
        """Return scaled queries [m, heads, n, d_head] of positions [m, n, dim] under m contexts."""
        return self.split_heads(self.query_sequence(hidden) / self.d_head**0.5 + context.query[:, None])

    def _output(self, attended: Tensor, hidden: Tensor, context: Tensor) -> Tensor:
        """Return the output of positions from their merged attention, S and C; all of one shape or broadcast."""
        out = attended + context
        return self.block(out + hidden if self.residual == "both" else out)


class FeedForward(nn.Module):
    """LayerNorm → MLP with a residual connection around both."""

    def __init__(self, dim: int, ratio: float, dropout: float = 0.0) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.layers = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), Dropout(dropout), nn.Linear(hidden, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class MeanPooling(nn.Module):
    """Masked mean instead of attention: all positions have equal weight, independent of the context.

    Args:
        d_sequence: Width of the sequence's tokens.
        config: Hyper-parameters; only ``dim``, ``mlp_ratio`` and ``dropout`` apply.
    """

    def __init__(self, d_sequence: int, config: AttentionConfig) -> None:
        super().__init__()
        self.sequence = nn.Linear(d_sequence, config.dim, bias=False)
        nn.init.xavier_uniform_(self.sequence.weight)
        self.block = FeedForward(config.dim, config.mlp_ratio, config.dropout) if config.mlp_ratio else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [m, n, d_sequence], mask [m, T, n] bool -> [m, T, dim]; the block's input is zero for an empty mask."""
        weight = mask.to(x.dtype)
        return self.block(self.sequence(weight @ x / weight.sum(-1, keepdim=True).clamp(min=1)))


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """Return ``weights @ values`` of [..., T, n] and narrow [..., n, d]; on CPU up to four times faster transposed."""
    return (values.transpose(-1, -2) @ weights.transpose(-1, -2)).transpose(-1, -2)


def pooled_attention_weights(
    shared_logits: Sequence[Tensor], context_logits: Tensor, mask: Tensor, impl: AttentionImpl
) -> list[Tensor]:
    """Return :func:`reference_weights` of each of ``shared_logits``, by either implementation, in float32 or wider.

    Sums of exponentials and their quotients need more than the 8 mantissa bits of autocast's products.
    """
    precise = torch.promote_types(context_logits.dtype, torch.float32)
    with torch.autocast(context_logits.device.type, enabled=False):
        shared_logits, context_logits = [logits.to(precise) for logits in shared_logits], context_logits.to(precise)
        if impl == "factorized":
            return factorized_weights(shared_logits, context_logits, mask)
        return [reference_weights(logits, context_logits, mask) for logits in shared_logits]


def reference_weights(shared_logits: Tensor, context_logits: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over unmasked queries of the attention to each key, with one attention matrix per context.

    Args:
        shared_logits: [m, heads, n, n] of (query, key).
        context_logits: [m, heads, T, n] of (context, key).
        mask: [m, T, n] bool, or [m, 1, n] if all contexts have the same mask.

    Returns:
        [m, heads, T, n]; zero for an empty mask.
    """
    key_mask = mask[:, None, :, None, :]
    attention = masked_softmax(shared_logits[:, :, None] + context_logits[:, :, :, None], key_mask)
    queries = mask[:, None].to(attention.dtype)
    count = queries.sum(-1, keepdim=True).clamp(min=1)
    return (queries[..., None, :] @ attention).squeeze(-2) / count


def factorized_weights(shared_logits: Sequence[Tensor], context_logits: Tensor, mask: Tensor) -> list[Tensor]:
    """Return :func:`reference_weights` of each of ``shared_logits`` by three matrix products (METHODS §2.1 [ours]).

    With E = exp(shared logits) and F = exp(context logits) on unmasked keys, the softmax denominators of all
    (context, query) pairs are D = F Eᵀ, and the mean attention is F ⊙ ((M / |M| / D) E). Rows of E and F may have any
    scale, as D cancels it: both are softmaxes. If the context's largest keys are the query's smallest, D approaches
    underflow; these pairs are computed as in the reference.
    """
    key_mask, n, num_shared = mask[:, None], mask.shape[-1], len(shared_logits)
    # Queries of all shared logits are concatenated, as they have the same F.
    queries = torch.cat(list(shared_logits), dim=2) if num_shared > 1 else shared_logits[0]
    e = torch.softmax(mask_logits(queries, mask.any(1)[:, None, None]), dim=-1)
    f = torch.softmax(mask_logits(context_logits, key_mask), dim=-1)
    denominator = f @ e.transpose(-1, -2)
    # The backward pass squares the denominator, so the floor is about the root of the smallest normal number.
    floor = torch.finfo(denominator.dtype).tiny ** 0.4
    query_weight = key_mask / key_mask.sum(-1, keepdim=True).clamp(min=1).to(f.dtype)
    query_weight, underflow = query_weight.repeat(1, 1, 1, num_shared), None
    if denominator.numel() and denominator.amin() <= floor:
        underflow = (denominator <= floor) & key_mask.repeat(1, 1, 1, num_shared)
        denominator = denominator.clamp(min=floor)
        if underflow.any():
            query_weight = query_weight.masked_fill(underflow, 0)
        else:  # only masked pairs, such as those of two views
            underflow = None
    scaled = query_weight / denominator
    shape = (num_shared, n)
    pairs = zip(scaled.unflatten(-1, shape).unbind(-2), e.unflatten(2, shape).unbind(2), strict=True)
    weights = [f * (scale @ exponentials) for scale, exponentials in pairs]
    if underflow is None:
        return weights
    parts = zip(weights, shared_logits, underflow.unflatten(-1, shape).unbind(-2), strict=True)
    return [weight + _reference_pairs(logits, context_logits, mask, pairs) for weight, logits, pairs in parts]


def _reference_pairs(shared_logits: Tensor, context_logits: Tensor, mask: Tensor, pairs: Tensor) -> Tensor:
    """Return the contribution [m, heads, T, n] of unmasked (context, query) ``pairs``, same shape, to the weights."""
    b, h, t, i = pairs.nonzero(as_tuple=True)
    mask_row = t if mask.shape[1] > 1 else torch.zeros_like(t)
    logits = mask_logits(shared_logits[b, h, i] + context_logits[b, h, t], mask[b, mask_row])
    attention = torch.softmax(logits, dim=-1) / mask.sum(-1)[b, mask_row, None]
    return torch.zeros_like(context_logits).index_put((b, h, t), attention, accumulate=True)


def mask_logits(logits: Tensor, mask: Tensor) -> Tensor:
    """Return logits whose softmax is zero outside ``mask`` (broadcast); unchanged in effect for an empty mask.

    Addition is several times faster on CPU than filling. Masked twice, the logits are still finite.
    """
    return logits + torch.where(mask, logits.new_zeros(()), torch.finfo(logits.dtype).min / 4)


def small_softmax(x: Tensor) -> Tensor:
    """Return the softmax over the last axis, fast for short rows on CPU.

    PyTorch's CPU kernel processes rows one at a time. For the few keys, heads or actions of a row, this costs 5 to 10
    times as much as a softmax over the first axis, which vectorizes over rows.
    """
    if x.device.type != "cpu" or x.shape[-1] >= 16:
        return torch.softmax(x, dim=-1)
    return torch.softmax(x.movedim(-1, 0).contiguous(), dim=0).movedim(0, -1)


def masked_softmax(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """Return the softmax over the last axis where ``allowed``; rows without any allowed key are zero, not NaN."""
    if allowed is None:
        return small_softmax(logits)
    lowest = torch.finfo(logits.dtype).min
    return small_softmax(logits.masked_fill(~allowed, lowest)).masked_fill(~allowed, 0)
