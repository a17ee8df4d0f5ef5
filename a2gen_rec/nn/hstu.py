"""Hierarchical sequential transduction units (HSTU): arXiv 2402.17152, METHODS §7.

A layer replaces attention and feed-forward block by one gated, pointwise attention::

    U, V, Q, K = SiLU(Norm(X) W)      A = SiLU(Q Kᵀ + position bias + time bias) ⊙ mask / N
    Y = (Norm(A V) ⊙ U) W_o + X

Nothing normalises over the keys, so that how much there was of something reaches the output too. N is the longest
history, whatever the padding.

A window's past is encoded once, causally, and all its targets read it: a row, past impression or target, attends to
past impressions that it may see, and to itself. No row attends to a target but that target itself.

It begins as a sum over the past, all of it alike, behind open gates: queries and keys near zero, as in the source's
code, and biases of position and of gates at one [ours]. Begun like the rest, weights A of either sign and gates about
zero hide from the output what the past has in common; rare actions are then hardly learnt.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from a2gen_rec.nn.encoder import make_pair_biases, pair_bias


@dataclass(frozen=True)
class SequenceLayout:
    """How the rows of m windows, n past impressions and then k targets of each, stand to their n keys, the past.

    Attributes:
        seen: [m, n + k, n] bool, keys that a row attends to besides itself; never its own, nor a later one.
        distance: [m, n + k, n] int64, how many impressions back a key is; any number where it is not seen.
        elapsed: [m, n + k, n] int64 bucket of the time from key to row; None where there is no time bias.
        matches: [m, item features, n + k, n] bool, whether key and row share each.
    """

    attention_mask: Tensor
    distance: Tensor
    time_bucket: Tensor | None
    matches: Tensor | None = None

    def target_rows(self) -> "SequenceLayout":
        """The rows of targets alone."""
        n = self.attention_mask.shape[2]
        elapsed = None if self.time_bucket is None else self.time_bucket[:, n:]
        matches = None if self.matches is None else self.matches[:, :, n:]
        return SequenceLayout(self.attention_mask[:, n:], self.distance[:, n:], elapsed, matches)


class HSTU(nn.Module):
    """Layers over windows' past impressions and targets.

    Args:
        dim: width of all tokens; heads divides it.
        length: N, farthest distance that is seen.
        buckets: of times; 0 for no time bias.
        match_features: as :class:`HierarchicalEncoder` takes [ours].
    """

    def __init__(
        self, dim: int, heads: int, layers: int, length: int, buckets: int = 0, match_features: int = 0
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(HSTULayer(dim, heads, length, buckets, match_features) for _ in range(layers))

    def forward(self, past: Tensor, target: Tensor, layout: SequenceLayout) -> Tensor:
        """Targets that know their past.

        Args:
            past: [m, n, dim] tokens of the past; target: [m, k, dim] of the targets.

        Returns:
            [m, k, dim]
        """
        x = torch.cat([past, target], dim=1)
        for layer in self.layers[:-1]:
            x = layer(x, layout)
        last: Tensor = self.layers[-1](x, layout.target_rows())  # nobody asks for the past beyond the last layer
        return last


class HSTULayer(nn.Module):
    """One unit; arguments as :class:`HSTU` takes."""

    def __init__(self, dim: int, heads: int, length: int, buckets: int = 0, match_features: int = 0) -> None:
        super().__init__()
        self.heads, self.length = heads, length
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, 4 * dim)
        self.position = nn.Parameter(torch.ones(heads, length + 1))  # by distance; 0 is the row itself
        self.recency, self.match = make_pair_biases(buckets, match_features, heads)
        self.attended_norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, dim)
        for layer in (self.project, self.output):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.project.weight[2 * dim :].normal_(std=0.02)  # of queries and keys
            self.project.bias[:dim] = 1.0  # of gates

    def forward(self, x: Tensor, layout: SequenceLayout) -> Tensor:
        """Rows after attending to their past and themselves.

        Args:
            x: [m, n + k, dim] past and targets; layout: of their last r rows.

        Returns:
            [m, r, dim]
        """
        rows, keys = layout.attention_mask.shape[1:]
        first = x.shape[1] - rows
        gate, *others = F.silu(self.project(self.norm(x))).chunk(4, dim=-1)
        value, query, key = (other.unflatten(-1, (self.heads, -1)).transpose(1, 2) for other in others)
        logits = query[:, :, first:] @ key[:, :, :keys].transpose(-1, -2)
        logits = logits + torch.stack([of_head[layout.distance] for of_head in self.position], dim=1)
        by_pair = pair_bias(layout.time_bucket, layout.matches, self.recency, self.match)
        weights = F.silu(logits if by_pair is None else logits + by_pair).masked_fill(
            ~layout.attention_mask[:, None], 0
        )
        own = F.silu((query * key)[:, :, first:].sum(-1) + self.position[:, :1])
        attended = weights @ value[:, :, :keys] + own[..., None] * value[:, :, first:]
        mean = attended.transpose(1, 2).flatten(-2) / self.length
        return x[:, first:] + self.output(self.attended_norm(mean) * gate[:, first:])
