"""Attention of targets over a user's past, as deep interest networks have it: DIN (KDD 2018), METHODS §7.

Multi-head with a softmax, each target asking on its own: unlike the context-aware attention, impressions do not ask
one another, and no gate mixes the heads.
"""

from torch import Tensor, nn

from a2gen_rec.nn.attention import masked_softmax
from a2gen_rec.nn.encoder import WindowLayout, make_pair_biases, pair_bias
from a2gen_rec.utils.jagged import jagged_to_padded_dense, padded_dense_to_jagged


class TargetAttention(nn.Module):
    """Multi-head attention of every target over the impressions it may see.

    Args:
        d_token: width of an impression's token; d_target: of a target.
        dim: width of the output and of all heads together; heads divides it.
        recency_buckets, match_features: as :class:`HierarchicalEncoder` takes.
    """

    def __init__(
        self, d_token: int, d_target: int, dim: int, heads: int, recency_buckets: int = 0, match_features: int = 0
    ) -> None:
        super().__init__()
        self.heads, self.d_head = heads, dim // heads
        self.query = nn.Linear(d_target, dim, bias=False)
        self.key = nn.Linear(d_token, dim, bias=False)
        self.value = nn.Linear(d_token, dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        for layer in (self.value, self.output):
            nn.init.xavier_uniform_(layer.weight)
        self.recency, self.match = make_pair_biases(recency_buckets, match_features, heads)

    def forward(self, tokens: Tensor, target: Tensor, layout: WindowLayout) -> Tensor:
        """History vectors.

        Args:
            tokens: [keys, d_token]; target: [targets, d_target].

        Returns:
            [targets, dim]; zero for a target that sees nothing.
        """
        at_keys = (layout.row, layout.column, layout.shape)
        key, value = (self._split(jagged_to_padded_dense(of(tokens), *at_keys)) for of in (self.key, self.value))
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
        return x.unflatten(-1, (self.heads, self.d_head)).transpose(1, 2)
