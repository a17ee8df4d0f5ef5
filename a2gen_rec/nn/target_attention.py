"""Target attention over a user's history, as in deep interest networks: DIN (KDD 2018), METHODS §7.

Multi-head attention with a softmax, in which only targets are queries: unlike in context-aware attention, impressions
do not attend to one another, and no gate mixes the heads.
"""

from torch import Tensor, nn

from a2gen_rec.nn.attention import masked_softmax
from a2gen_rec.nn.encoder import WindowLayout, make_pair_biases, pair_bias
from a2gen_rec.utils.jagged import jagged_to_padded_dense, padded_dense_to_jagged


class TargetAttention(nn.Module):
    """Multi-head attention of every target over the impressions it may see.

    Args:
        d_token: Width of an impression's token.
        d_target: Width of a target.
        dim: Width of the output and of all heads together.
        num_heads: Number of heads; divides ``dim``.
        recency_buckets: As in :class:`HierarchicalEncoder`.
        match_features: As in :class:`HierarchicalEncoder`.
    """

    def __init__(
        self, d_token: int, d_target: int, dim: int, num_heads: int, recency_buckets: int = 0, match_features: int = 0
    ) -> None:
        super().__init__()
        self.num_heads, self.d_head = num_heads, dim // num_heads
        self.query = nn.Linear(d_target, dim, bias=False)
        self.key = nn.Linear(d_token, dim, bias=False)
        self.value = nn.Linear(d_token, dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        for layer in (self.value, self.output):
            nn.init.xavier_uniform_(layer.weight)
        self.recency, self.match = make_pair_biases(recency_buckets, match_features, num_heads)

    def forward(self, tokens: Tensor, target: Tensor, layout: WindowLayout) -> Tensor:
        """Return history vectors.

        Args:
            tokens: [keys, d_token].
            target: [targets, d_target].
            layout: Positions and masks.

        Returns:
            [targets, dim]; zero for a target with an empty mask.
        """
        key, value = (
            self._split(jagged_to_padded_dense(project(tokens), layout.row, layout.column, layout.shape))
            for project in (self.key, self.value)
        )
        query = self._split(
            jagged_to_padded_dense(self.query(target), layout.target_row, layout.target_column, layout.target_shape)
        )
        logits = query / self.d_head**0.5 @ key.transpose(-1, -2)
        bias = pair_bias(layout.recency, layout.matches, self.recency, self.match)
        weights = masked_softmax(logits if bias is None else logits + bias, layout.attention_mask[:, None])
        attended = (weights.to(value.dtype) @ value).transpose(1, 2).flatten(-2)
        return self.output(padded_dense_to_jagged(attended, layout.target_row, layout.target_column))

    def _split(self, x: Tensor) -> Tensor:
        """[m, n, dim] -> [m, heads, n, d_head]"""
        return x.unflatten(-1, (self.num_heads, self.d_head)).transpose(1, 2)
