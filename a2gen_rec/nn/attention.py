"""Context-aware attention (CAM): METHODS §2 after A2Gen, arXiv 2604.25834.

Keys and values come from the sequence alone, queries from sequence and context, and a gate driven by the
context alone mixes the heads::

    S = X W_s      C = c W_c      Q = [S ‖ C] W_q      K = S W_k      V = S W_v
    O_h = softmax(Q_h K_hᵀ / √d_h + mask) V_h W_o^h      CAM = Σ_h softmax(c W_g)_h O_h + C  [+ S]

``Q`` is linear in ``[S ‖ C]``, so a logit is a part shared by all contexts plus a part shared by all query
positions. :meth:`ContextAwareAttention.pooled` uses that to pool many contexts over one sequence in three matrix
products, without ever building an attention matrix per context (METHODS §2.1).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Residual = Literal["context", "both"]
AttentionImpl = Literal["factorized", "reference"]


class ContextProjection(NamedTuple):
    """What contexts contribute, whatever the sequence: C and its part of the scaled queries, each [m, dim], and the
    heads' gate [m, heads]."""

    context: Tensor
    query: Tensor
    gate: Tensor


class TokenProjection(NamedTuple):
    """What tokens contribute, whatever the context: S and its part of the scaled queries, each [m, dim], and ``seen``,
    their keys and values side by side, [m, 2·dim]."""

    hidden: Tensor
    query: Tensor
    kv: Tensor


class ContextAwareAttention(nn.Module):
    """Multi-head attention over a sequence, asked by a context.

    Args:
        d_sequence: width of the sequence's tokens.
        d_context: width of the context.
        dim: width of the output and of all heads together.
        heads: number of heads; divides ``dim``.
        residual: what is added to the attention: the context ``C``, or ``C`` and the sequence ``S``.
        mlp_ratio: hidden width of the LayerNorm → MLP that follows, as a multiple of ``dim``; 0 for none.
            A pooled output passes it after pooling.
        dropout: rate inside that MLP.
        context_query: whether the context asks; else queries come from the sequence alone, as keys do.
        head_gate: whether the context mixes the heads; else they are summed, as plain attention does.
    """

    head_indicator: Tensor

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
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.d_head = dim, heads, dim // heads
        self.residual = residual
        self.sequence = nn.Linear(d_sequence, dim, bias=False)
        self.context = nn.Linear(d_context, dim, bias=False)
        self.query_sequence = nn.Linear(dim, dim, bias=False)  # W_q, upper half
        self.query_context = nn.Linear(dim, dim, bias=False) if context_query else None  # W_q, lower half
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)  # the stacked W_o^h: Σ_h g_h O_h W_o^h = (g ⊙ O) W_o
        self.gate = nn.Linear(d_context, heads, bias=False) if head_gate else None
        # [heads, dim], which places of a vector are of each head: products with it spread over them, or sum them up.
        self.register_buffer("head_indicator", torch.eye(heads).repeat_interleave(self.d_head, 1), persistent=False)
        for layer in (self.sequence, self.context, self.value, self.output):
            nn.init.xavier_uniform_(layer.weight)  # PyTorch's default shrinks a signal to a fifth in three layers
        self.block = FeedForward(dim, mlp_ratio, dropout) if mlp_ratio else nn.Identity()

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """One output per position, one context per sequence.

        Args:
            x: [m, n, d_sequence]; context: [m, d_context].
            mask: [m, n] keys that may be attended to; all when absent. A position without any gets no attention.
            causal: position i sees positions up to i only.

        Returns:
            [m, n, dim]
        """
        s, asked = self.sequence(x), self.project_context(context)
        key, value = self.split_heads(self.key(s)), self.split_heads(self.value(s))
        logits = self._query(s, asked) @ key.transpose(-1, -2)
        allowed = None if mask is None else mask[:, None, None, :]
        if causal:
            n = x.shape[1]
            lower = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
            allowed = lower if allowed is None else allowed & lower
        attended = (masked_softmax(logits, allowed) @ value).transpose(1, 2)
        return self._output(self.merge_heads(attended, asked.gate[:, None]), s, asked.context[:, None])

    def project_context(self, context: Tensor) -> ContextProjection:
        """What contexts [m, d_context] contribute to every :meth:`step`."""
        c = self.context(context)
        query = torch.zeros_like(c) if self.query_context is None else self.query_context(c) / self.d_head**0.5
        gate = c.new_ones(*c.shape[:-1], self.heads) if self.gate is None else small_softmax(self.gate(context))
        return ContextProjection(c, query, gate)

    def project_tokens(self, x: Tensor) -> TokenProjection:
        """What tokens [m, d_sequence] contribute to every :meth:`step`."""
        s = self.sequence(x)
        return TokenProjection(
            s, self.query_sequence(s) / self.d_head**0.5, torch.cat([self.key(s), self.value(s)], dim=-1)
        )

    def decode_step(
        self, token: TokenProjection, asked: ContextProjection, kv_cache: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The causal :meth:`forward`'s output at one more position.

        Args:
            token: the m tokens of this position; asked: by the m contexts.
            past: [positions, m, 2·dim] what was ``seen`` of the earlier positions; None at the first.

        Returns:
            [m, dim] and what was seen including this position.
        """
        seen = token.kv[None]
        if kv_cache is None:  # the one position gets all attention
            attended = asked.gate @ self.head_indicator * token.kv[:, self.dim :]
        else:
            seen = torch.cat([kv_cache, seen])
            key, value = seen.split(self.dim, dim=-1)
            # Many sequences of few steps: on CPU a third faster than as many tiny matrix products.
            logits = F.linear((token.query + asked.query) * key, self.head_indicator)
            attention = torch.softmax(logits, dim=0) * asked.gate
            attended = (attention @ self.head_indicator * value).sum(0)
        return self._output(self.output(attended), token.hidden, asked.context), seen

    def pool(
        self,
        x: Tensor,
        context: Tensor,
        mask: Tensor,
        bias: Tensor | None = None,
        form: AttentionImpl = "factorized",
    ) -> Tensor:
        """Masked mean over positions of the attention each context asks of its part of one sequence.

        Context t sees the positions of ``mask[t]`` only, as queries, keys and values. Seeing none, its attention
        is zero and the residual remains.

        Args:
            x: [m, n, d_sequence]; context: [m, T, d_context].
            mask: [m, T, n] bool, or [m, 1, n] if all contexts see the same.
            bias: [m, heads, T, n] added to the logit of (context, key).
            form: ``direct`` builds all T·n·n logits; ``factorized`` is equal in T·n + n·n.

        Returns:
            [m, T, dim]
        """
        s, asked = self.sequence(x), self.project_context(context)
        shared, wanted = self.pair_logits(s, asked, bias)
        (weights,) = pooled_attention_weights([shared], wanted, mask, form)
        attended = weighted_sum(weights.to(s.dtype), self.split_heads(self.value(s)))
        return self.apply_output_block(self.merge_heads(attended.transpose(1, 2), asked.gate), s, asked, mask)

    def pair_logits(self, s: Tensor, asked: ContextProjection, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The two parts of :meth:`pooled`'s logits.

        Args:
            s: [m, n, dim] the sequence; asked: by contexts [m, T, d_context]; bias: [m, heads, T, n].

        Returns:
            [m, heads, n, n] of (query, key) and [m, heads, T, n] of (context, key).
        """
        key = self.split_heads(self.key(s)).transpose(-1, -2)
        shared = self.split_heads(self.query_sequence(s)) / self.d_head**0.5 @ key
        wanted = self.split_heads(asked.query) @ key
        return shared, wanted if bias is None else wanted + bias

    def apply_output_block(self, pooled: Tensor, s: Tensor, asked: ContextProjection, mask: Tensor) -> Tensor:
        """Residual and block after pooled attention [m, T, dim], for :meth:`pooled`'s s, asked and mask."""
        out = pooled + asked.context
        if self.residual == "both":
            seen = mask.to(s.dtype)
            out = out + seen @ s / seen.sum(-1, keepdim=True).clamp(min=1)
        return self.block(out)

    def split_heads(self, x: Tensor) -> Tensor:
        """[m, n, dim] -> [m, heads, n, d_head]"""
        return x.unflatten(-1, (self.heads, self.d_head)).transpose(1, 2)

    def merge_heads(self, attended: Tensor, gate: Tensor) -> Tensor:
        """[..., heads, d_head], gate broadcastable to [..., heads] -> [..., dim]"""
        return self.output((attended * gate[..., None]).flatten(-2))

    def _query(self, s: Tensor, asked: ContextProjection) -> Tensor:
        """Scaled queries [m, heads, n, d_head] of positions s [m, n, dim] under m contexts."""
        return self.split_heads(self.query_sequence(s) / self.d_head**0.5 + asked.query[:, None])

    def _output(self, mixed: Tensor, s: Tensor, context: Tensor) -> Tensor:
        """Output of positions s, given their mixed attention and C; all of one shape or broadcast."""
        out = mixed + context
        return self.block(out + s if self.residual == "both" else out)


class FeedForward(nn.Module):
    """LayerNorm → MLP with a residual around both."""

    def __init__(self, dim: int, ratio: float, dropout: float = 0.0) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.layers = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class MeanPooling(nn.Module):
    """A masked mean in the place of attention: every position counts alike, whatever the context.

    Args:
        d_sequence, dim, mlp_ratio, dropout: as :class:`ContextAwareAttention` takes.
    """

    def __init__(self, d_sequence: int, dim: int, mlp_ratio: float = 0.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.sequence = nn.Linear(d_sequence, dim, bias=False)
        nn.init.xavier_uniform_(self.sequence.weight)
        self.block = FeedForward(dim, mlp_ratio, dropout) if mlp_ratio else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [m, n, d_sequence], mask [m, T, n] bool -> [m, T, dim]; before the block, zero where nothing is seen."""
        seen = mask.to(x.dtype)
        return self.block(self.sequence(seen @ x / seen.sum(-1, keepdim=True).clamp(min=1)))


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """``weights @ values`` of [..., T, n] and narrow values [..., n, d]: on CPU up to four times as fast transposed."""
    return (values.transpose(-1, -2) @ weights.transpose(-1, -2)).transpose(-1, -2)


def pooled_attention_weights(
    shared_logits: Sequence[Tensor], context_logits: Tensor, mask: Tensor, form: AttentionImpl
) -> list[Tensor]:
    """:func:`direct_weights` in either form, in float32 at least, for each of several logits ``shared`` that contexts
    ask alike.

    Sums of exponentials and their quotients need more than the 8 bits of autocast's products.
    """
    precise = torch.promote_types(context_logits.dtype, torch.float32)
    with torch.autocast(context_logits.device.type, enabled=False):
        shared_logits, context_logits = [each.to(precise) for each in shared_logits], context_logits.to(precise)
        if form == "factorized":
            return factorized_weights(shared_logits, context_logits, mask)
        return [reference_weights(each, context_logits, mask) for each in shared_logits]


def reference_weights(shared: Tensor, asked: Tensor, mask: Tensor) -> Tensor:
    """Mean over visible queries of the attention to each key, one attention matrix per context.

    Args:
        shared: [m, heads, n, n] logits of (query, key); asked: [m, heads, T, n] logits of (context, key).
        mask: [m, T, n] bool, or [m, 1, n] if all contexts see the same.

    Returns:
        [m, heads, T, n]; zero where nothing is visible.
    """
    visible = mask[:, None, :, None, :]
    attention = masked_softmax(shared[:, :, None] + asked[:, :, :, None], visible)
    queries = mask[:, None].to(attention.dtype)
    count = queries.sum(-1, keepdim=True).clamp(min=1)
    return (queries[..., None, :] @ attention).squeeze(-2) / count


def factorized_weights(shared: Sequence[Tensor], asked: Tensor, mask: Tensor) -> list[Tensor]:
    """:func:`direct_weights` of each of ``shared`` by three matrix products (METHODS §2.1 [ours]).

    With E = exp(shared) and F = exp(asked) on visible keys, the softmax denominators of all (context, query) pairs
    are D = F Eᵀ, and the mean attention is F ⊙ ((M / |M| / D) E). A row of E or F may have any scale, which D undoes:
    both are softmaxes. Pairs whose D nears underflow, because the context's favourite keys are the query's least,
    are computed the direct way.
    """
    seen, n = mask[:, None], mask.shape[-1]
    # The queries of all that is shared are one after another: F is the same for them.
    queries = torch.cat(list(shared), dim=2) if len(shared) > 1 else shared[0]
    e = torch.softmax(mask_logits(queries, mask.any(1)[:, None, None]), dim=-1)
    f = torch.softmax(mask_logits(asked, seen), dim=-1)
    denominator = f @ e.transpose(-1, -2)
    # The backward pass squares the denominator, so the floor is about the root of the smallest normal number.
    floor = torch.finfo(denominator.dtype).tiny ** 0.4
    share = seen / seen.sum(-1, keepdim=True).clamp(min=1).to(f.dtype)
    share, lost = share.repeat(1, 1, 1, len(shared)), None
    if denominator.numel() and denominator.amin() <= floor:
        lost = (denominator <= floor) & seen.repeat(1, 1, 1, len(shared))
        denominator = denominator.clamp(min=floor)
        if lost.any():
            share = share.masked_fill(lost, 0)
        else:  # only pairs that are not seen, such as those of two views
            lost = None
    wanted = share / denominator
    apart = (len(shared), n)
    rows = e.unflatten(2, apart).unbind(2)
    weights = [f * (each @ own) for each, own in zip(wanted.unflatten(-1, apart).unbind(-2), rows, strict=True)]
    if lost is None:
        return weights
    parts = zip(weights, shared, lost.unflatten(-1, apart).unbind(-2), strict=True)
    return [each + _direct_rows(logits, asked, mask, pairs) for each, logits, pairs in parts]


def _direct_rows(shared: Tensor, asked: Tensor, mask: Tensor, pairs: Tensor) -> Tensor:
    """[m, heads, T, n] what ``pairs`` [m, heads, T, n] of context and query, all of them seen, add to the weights."""
    b, h, t, i = pairs.nonzero(as_tuple=True)
    own = t if mask.shape[1] > 1 else torch.zeros_like(t)
    logits = mask_logits(shared[b, h, i] + asked[b, h, t], mask[b, own])
    attention = torch.softmax(logits, dim=-1) / mask.sum(-1)[b, own, None]
    return torch.zeros_like(asked).index_put((b, h, t), attention, accumulate=True)


def mask_logits(logits: Tensor, opened: Tensor) -> Tensor:
    """Logits that a softmax makes zero of where not ``opened``, which is broadcast; all alike where nothing is.

    By addition, several times as fast on CPU as filling. Done twice, they are still finite.
    """
    return logits + torch.where(opened, logits.new_zeros(()), torch.finfo(logits.dtype).min / 4)


def small_softmax(x: Tensor) -> Tensor:
    """Softmax over the last axis.

    PyTorch's CPU kernel takes rows one at a time, which for the few keys, heads or actions of a row costs 5 to 10
    times as much as along the first axis, where it takes many rows at once.
    """
    if x.device.type != "cpu" or x.shape[-1] >= 16:
        return torch.softmax(x, dim=-1)
    return torch.softmax(x.movedim(-1, 0).contiguous(), dim=0).movedim(0, -1)


def masked_softmax(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """Softmax over the last axis where ``allowed``; rows without any allowed key are zero, not NaN."""
    if allowed is None:
        return small_softmax(logits)
    lowest = torch.finfo(logits.dtype).min
    return small_softmax(logits.masked_fill(~allowed, lowest)).masked_fill(~allowed, 0)
