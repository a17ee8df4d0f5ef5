"""Hierarchical sequential transduction units (HSTU): arXiv 2402.17152, METHODS §7.

A layer replaces attention and feed-forward block by one gated, pointwise attention::

    U, V, Q, K = SiLU(Norm(X) W)      A = SiLU(Q Kᵀ + position bias + time bias) ⊙ mask / N
    Y = (Norm(A V) ⊙ U) W_o + X

Nothing normalises over the keys, so that how much there was of something reaches the output too. N is the longest
history, whatever the padding.

A sequence is what was seen of the past at one moment; the targets of that moment come right after it, each alone.
Every past impression attends to the earlier ones and itself, every target to the whole past and itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from a2gen_rec.nn.encoder import pair_bias, pair_tables


@dataclass(frozen=True)
class SequenceLayout:
    """How targets and past impressions stand to one another, for m sequences of n places and t targets.

    The last place is right before the targets. Places need not all be taken.

    Attributes:
        owner: [t] sequence that each target follows.
        seen: [m, n] bool, places taken by impressions that the targets may see.
        between: [m, n, n] int64 bucket of the time from the impression of the second place to that of the first;
            with ``since``, None where there is no time bias.
        since: [t, n] int64 bucket of the time from each impression to the target.
        matches: per item feature [t, n] bool, whether impression and target share it.
    """

    owner: Tensor
    seen: Tensor
    between: Tensor | None
    since: Tensor | None
    matches: Sequence[Tensor] = ()


class HSTU(nn.Module):
    """Layers over sequences and their targets.

    Args:
        dim: width of all tokens; heads divides it.
        length: places that a sequence has at most.
        buckets: of times; 0 for no time bias.
        match_features: as :class:`HierarchicalEncoder` takes, of targets alone [ours].
        dropout: rate on what a layer adds.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        layers: int,
        length: int,
        buckets: int = 0,
        match_features: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            HSTULayer(dim, heads, length, buckets, match_features, dropout) for _ in range(layers)
        )

    def forward(self, past: Tensor, target: Tensor, layout: SequenceLayout) -> Tensor:
        """Targets that know their past.

        Args:
            past: [m, n, dim] tokens of the past; target: [t, dim] of the targets.

        Returns:
            [t, dim]
        """
        for number, layer in enumerate(self.layers, start=1):
            assert isinstance(layer, HSTULayer)
            before = past
            if number < len(self.layers):  # nobody asks for the past beyond the last layer
                past = layer.of_past(before, layout)
            target = layer(before, target, layout)
        return target


class _Rows(NamedTuple):
    """What rows [*, dim] contribute: the gate [*, dim], and value, query and key [*, heads, d_head]."""

    gate: Tensor
    value: Tensor
    query: Tensor
    key: Tensor


class HSTULayer(nn.Module):
    """One unit; arguments as :class:`HSTU` takes."""

    def __init__(
        self, dim: int, heads: int, length: int, buckets: int = 0, match_features: int = 0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.heads, self.length = heads, length
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, 4 * dim)
        self.position = nn.Parameter(torch.zeros(heads, length + 1))  # by the distance of row and key
        self.recency, self.match = pair_tables(buckets, match_features, heads)
        self.attended_norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.project, self.output):
            nn.init.xavier_uniform_(layer.weight)

    def of_past(self, past: Tensor, layout: SequenceLayout) -> Tensor:
        """[m, n, dim] past impressions after attending to earlier ones and themselves."""
        rows = self._rows(past)
        place = torch.arange(past.shape[1], device=past.device)
        distance = place[:, None] - place
        bias = self.position[:, distance.clamp(min=0)]
        by_time = pair_bias(layout.between, (), self.recency, None)
        logits = torch.einsum("mihd,mjhd->mhij", rows.query, rows.key) + bias
        weights = F.silu(logits if by_time is None else logits + by_time)
        earlier = (distance > 0) & layout.seen[:, None, None]
        attended = torch.einsum("mhij,mjhd->mihd", weights.masked_fill(~earlier, 0), rows.value)
        return self._answer(past, rows, attended)

    def forward(self, past: Tensor, target: Tensor, layout: SequenceLayout) -> Tensor:
        """[t, dim] targets after attending to their past [m, n, dim] and themselves."""
        rows, known = self._rows(target), self._rows(past)
        bias = self.position[:, torch.arange(past.shape[1], 0, -1, device=past.device)]
        by_pair = pair_bias(layout.since, layout.matches, self.recency, self.match)
        logits = torch.einsum("thd,tjhd->thj", rows.query, known.key[layout.owner]) + bias
        weights = F.silu(logits if by_pair is None else logits + by_pair)
        weights = weights.masked_fill(~layout.seen[layout.owner][:, None], 0)
        return self._answer(target, rows, torch.einsum("thj,tjhd->thd", weights, known.value[layout.owner]))

    def _rows(self, x: Tensor) -> _Rows:
        gate, *others = F.silu(self.project(self.norm(x))).chunk(4, dim=-1)
        return _Rows(gate, *(other.unflatten(-1, (self.heads, -1)) for other in others))

    def _answer(self, x: Tensor, rows: _Rows, attended: Tensor) -> Tensor:
        """Rows x after adding themselves to what they attended to [*, heads, d_head], norm, gate and residual."""
        own = F.silu((rows.query * rows.key).sum(-1) + self.position[:, 0])
        mean = (attended + own[..., None] * rows.value).flatten(-2) / self.length
        return x + self.dropout(self.output(self.attended_norm(mean) * rows.gate))
