"""Hierarchical sequential transduction units (HSTU): arXiv 2402.17152, METHODS §7.

One gated, pointwise attention per layer replaces attention and feed-forward block::

    U, V, Q, K = SiLU(Norm(X) W)      A = SiLU(Q Kᵀ + position bias + time bias) ⊙ mask / N
    Y = (Norm(A V) ⊙ U) W_o + X

Attention is not normalized over the keys, so the output depends on how many keys match. N is the maximum history
length, independent of padding.

A window's history is encoded once, causally, for all its targets: a row, impression of the history or target, attends
to itself and to the impressions of the history that its mask allows. No row attends to another target.

A layer is initialized as an unweighted sum over the history behind open gates: queries and keys near zero, as in the
source's code, and biases of position and gates at one [ours]. With the default initialization, weights A of either sign
and gates near zero cancel the common part of the history in the output; rare actions are then hardly learned.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from a2gen_rec.nn.dropout import Dropout
from a2gen_rec.nn.encoder import make_pair_biases, pair_bias


@dataclass(frozen=True)
class SequenceLayout:
    """Relations of the rows of m windows (n history impressions, then k targets) to their n keys, the history.

    Attributes:
        attention_mask: [m, n + k, n] bool, keys that a row attends to in addition to itself; only earlier keys.
        distance: [m, n + k, n] int64 number of impressions between row and key; any value where masked.
        time_bucket: [m, n + k, n] int64 bucket of the time from key to row; None without time bias.
        matches: [m, item features, n + k, n] bool, whether key and row share each feature.
    """

    attention_mask: Tensor
    distance: Tensor
    time_bucket: Tensor | None
    matches: Tensor | None = None

    def target_rows(self) -> "SequenceLayout":
        """Return the layout of the target rows alone."""
        n = self.attention_mask.shape[2]
        time_bucket = None if self.time_bucket is None else self.time_bucket[:, n:]
        matches = None if self.matches is None else self.matches[:, :, n:]
        return SequenceLayout(self.attention_mask[:, n:], self.distance[:, n:], time_bucket, matches)


class HSTU(nn.Module):
    """Layers over windows of history impressions and targets.

    Args:
        dim: Width of all tokens.
        num_heads: Number of heads; divides ``dim``.
        num_layers: Number of layers.
        max_history: N, maximum attended distance.
        time_buckets: Number of time buckets; 0 for no time bias.
        match_features: As in :class:`HierarchicalEncoder` [ours].
        dropout: Dropout rate of the tokens, and of every layer's gated attention before its output projection, as in
            the source's code.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_layers: int,
        max_history: int,
        time_buckets: int = 0,
        match_features: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dropout = Dropout(dropout)
        self.layers = nn.ModuleList(
            HSTULayer(dim, num_heads, max_history, time_buckets, match_features, dropout) for _ in range(num_layers)
        )

    def forward(self, history: Tensor, target: Tensor, layout: SequenceLayout) -> Tensor:
        """Encode targets together with their history. Outputs have unit norm, as in the source's public experiments.

        Without it, a history of unit variance per entry dominates the norm over the context that all towers share:
        embeddings, which start near zero, are then learned late.

        Args:
            history: [m, n, dim] tokens of the history.
            target: [m, k, dim] tokens of the targets.
            layout: Masks and distances.

        Returns:
            [m, k, dim]
        """
        x = self.dropout(torch.cat([history, target], dim=1))
        for layer in self.layers[:-1]:
            x = layer(x, layout)
        last: Tensor = self.layers[-1](x, layout.target_rows())  # the last layer's history rows are unused
        return F.normalize(last, dim=-1)


class HSTULayer(nn.Module):
    """One unit; arguments as in :class:`HSTU`."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        max_history: int,
        time_buckets: int = 0,
        match_features: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.max_history = num_heads, max_history
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, 4 * dim)
        self.position = nn.Parameter(torch.ones(num_heads, max_history + 1))  # by distance; 0 is the row itself
        self.recency, self.match = make_pair_biases(time_buckets, match_features, num_heads)
        self.attended_norm = nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)
        self.output = nn.Linear(dim, dim)
        for layer in (self.project, self.output):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.project.weight[2 * dim :].normal_(std=0.02)  # queries and keys
            self.project.bias[:dim] = 1.0  # gates

    def forward(self, x: Tensor, layout: SequenceLayout) -> Tensor:
        """Return rows after attention to their history and themselves.

        Args:
            x: [m, n + k, dim] history and targets.
            layout: Masks and distances of the last r rows.

        Returns:
            [m, r, dim]
        """
        rows, keys = layout.attention_mask.shape[1:]
        first = x.shape[1] - rows
        gate, *others = F.silu(self.project(self.norm(x))).chunk(4, dim=-1)
        value, query, key = (other.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for other in others)
        logits = query[:, :, first:] @ key[:, :, :keys].transpose(-1, -2)
        logits = logits + torch.stack([head_bias[layout.distance] for head_bias in self.position], dim=1)
        bias = pair_bias(layout.time_bucket, layout.matches, self.recency, self.match)
        weights = F.silu(logits if bias is None else logits + bias).masked_fill(~layout.attention_mask[:, None], 0)
        self_weight = F.silu((query * key)[:, :, first:].sum(-1) + self.position[:, :1])
        attended = weights @ value[:, :, :keys] + self_weight[..., None] * value[:, :, first:]
        mean = attended.transpose(1, 2).flatten(-2) / self.max_history
        return x[:, first:] + self.output(self.dropout(self.attended_norm(mean) * gate[:, first:]))
