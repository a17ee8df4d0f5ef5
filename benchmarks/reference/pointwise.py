"""Pointwise reference of A2Gen: one padded history, unsharded embeddings and one attention matrix per target.

It implements the mathematics of ``a2gen_rec.models.a2gen`` and ``a2gen_rec.losses`` in their default configuration,
independently and without optimizations. It loads A2Gen's weights and gives the same loss and gradients. It is the
reference for both correctness and speed.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from reference.examples import Examples
from torch import Tensor, nn
from torch.nn import functional as F

from a2gen_rec.config import LossConfig, ModelConfig
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.models.embedding_tables import EmbeddingTables, module_key

_NAMES = (
    (f"embeddings.embeddings.{module_key('')}", "tables."),
    ("ranker.encoder.", ""),
    ("ranker.generator.attention.", "generator."),
    ("ranker.generator.heads.action.", "next_action."),
    ("ranker.generator.heads.time.", "next_time."),
    ("ranker.labels.", "labels."),
)


def to_reference_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename A2Gen's parameters or gradients to the names of the reference."""
    renamed = {}
    for name, value in weights.items():
        for prefix, reference_prefix in _NAMES:
            name = reference_prefix + name.removeprefix(prefix) if name.startswith(prefix) else name
        renamed[name] = value
    return renamed


class Embedded(NamedTuple):
    """Looked-up rows of B examples.

    Attributes:
        user: [B, d_user].
        target: [B, d_item].
        history: [B, n, d_item].
        gap: [B, n, dim].
        tokens: [B, n, L, 2·dim] actions of the history with their times.
        steps: [B, S, 2·dim] actions of the target with their times.
    """

    user: Tensor
    target: Tensor
    history: Tensor
    gap: Tensor
    tokens: Tensor
    steps: Tensor


class Predictions(NamedTuple):
    """Predictions for B examples.

    Attributes:
        logits: [B, S, actions] logits of the next action.
        time: [B, S, actions] log1p seconds of the next action.
        labels: [B, labels] logits.
    """

    logits: Tensor
    time: Tensor
    labels: Tensor


class PointwiseA2Gen(nn.Module):
    """A2Gen in its default configuration: explicit generator, unconstrained point estimate of the time per action."""

    def __init__(self, card: DatasetCard, config: ModelConfig) -> None:
        super().__init__()
        dim, heads, buckets = config.dim, config.num_heads, config.time_buckets
        self.config, self.actions = config, len(card.actions)
        self.user = [feature.name for feature in card.features_at("user")]
        self.matched = [feature.name for feature in card.features_at("item")]
        self.item = self.matched + [feature.name for feature in card.features_at("context")]
        rows = EmbeddingTables.from_card(card, config).id_rows
        rows |= {"action": self.actions, "time_bucket": buckets, "gap_bucket": buckets}
        self.tables = nn.ModuleDict({name: nn.Embedding(count, dim) for name, count in rows.items()})
        d_item, d_user = dim * len(self.item), dim * len(self.user)
        d_context = d_user + d_item + dim
        self.action_pooling = ContextAttention(2 * dim, d_item, config)
        self.item_pooling = ContextAttention(d_item + 2 * dim, d_item, config)
        self.generator = ContextAttention(2 * dim, d_context, config)
        self.recency = nn.Embedding(buckets, heads)
        self.match = nn.Linear(len(self.matched), heads, bias=False)
        self.next_action = nn.Linear(dim, self.actions)
        self.next_time = nn.Linear(dim, self.actions)
        hidden = int(dim * config.tower_mlp_ratio)
        self.labels = nn.Sequential(
            nn.LayerNorm(d_context),
            nn.Linear(d_context, hidden),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(hidden, len(card.labels)),
        )

    def forward(self, examples: Examples) -> Predictions:
        return self.predict(self.embed(examples), examples)

    def embed(self, examples: Examples) -> Embedded:
        """Look up all embedding rows."""
        offset, gap = self.config.max_action_time_s, self.config.max_gap_s
        return Embedded(
            user=self._rows(examples.user, self.user),
            target=self._rows(examples.target, self.item),
            history=self._rows(examples.history, self.item),
            gap=self.tables["gap_bucket"](self._bucket(examples.gap_s, gap)),
            tokens=torch.cat(
                [
                    self.tables["time_bucket"](self._bucket(examples.offset_s, offset)),
                    self.tables["action"](examples.action),
                ],
                dim=-1,
            ),
            steps=torch.cat(
                [
                    self.tables["time_bucket"](self._bucket(examples.step_offset_s, offset)),
                    self.tables["action"](examples.step_action),
                ],
                dim=-1,
            ),
        )

    def predict(self, rows: Embedded, examples: Examples) -> Predictions:
        """Compute the predictions from looked-up rows."""
        context = self.context(rows, examples)
        hidden = self.generator(rows.steps, context)
        # The first input step is ``start``. No action, ``start`` included, occurs twice.
        emitted = F.one_hot(examples.step_action, self.actions).cumsum(1) > 0
        logits = self.next_action(hidden).masked_fill(emitted, -torch.inf)
        return Predictions(logits, self.next_time(hidden), self.labels(context))

    def context(self, rows: Embedded, examples: Examples) -> Tensor:
        """Return [B, d_context]: user, target and history vectors, the context of the generator."""
        count, n = examples.history_mask.shape
        actions = self.action_pooling.pool(
            rows.tokens.flatten(0, 1), rows.history.flatten(0, 1), examples.token_mask.flatten(0, 1)
        )
        tokens = torch.cat([rows.history, actions.view(count, n, -1), rows.gap], dim=-1)
        history = self.item_pooling.pool(tokens, rows.target, examples.history_mask, self._pair_bias(examples))
        return torch.cat([rows.user, rows.target, history], dim=-1)

    def _rows(self, ids: Mapping[str, Tensor], names: list[str]) -> Tensor:
        return torch.cat([self.tables[name](ids[name]) for name in names], dim=-1)

    def _pair_bias(self, examples: Examples) -> Tensor:
        """Return [B, heads, n]: bias of each key's logits from recency and shared item features."""
        same = torch.stack(
            [
                (examples.history[name] == examples.target[name][:, None]) & (examples.history[name] != 0)
                for name in self.matched
            ],
            dim=-1,
        )
        recency = self.recency(self._bucket(examples.age_s, self.config.max_gap_s))
        return (recency + self.match(same.to(recency.dtype))).transpose(1, 2)

    def _bucket(self, seconds: Tensor, max_seconds: float) -> Tensor:
        """Return time buckets: 0 for unknown times, then log-spaced up to ``max_seconds``."""
        log_max = torch.log1p(torch.tensor(max_seconds, dtype=torch.float64)).item()
        bucket = 1 + torch.floor(torch.log1p(seconds.clamp(min=0)) * ((self.config.time_buckets - 2) / log_max))
        return bucket.clamp(max=self.config.time_buckets - 1).nan_to_num(0.0).long()


class ContextAttention(nn.Module):
    """Context-aware attention (METHODS §2) with its output block."""

    def __init__(self, d_sequence: int, d_context: int, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.num_heads
        self.sequence = nn.Linear(d_sequence, dim, bias=False)
        self.context = nn.Linear(d_context, dim, bias=False)
        self.query_sequence = nn.Linear(dim, dim, bias=False)
        self.query_context = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        self.gate = nn.Linear(d_context, config.num_heads, bias=False)
        self.block = _Block(dim, config.mlp_ratio, config.dropout)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Apply causal attention: x [m, n, d_sequence], context [m, d_context] -> [m, n, dim]."""
        s, c, gate = self._inputs(x, context)
        query, key, value = self._projections(s, c)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True) * gate[..., None, None]
        return self.block(self._project(mixed.transpose(1, 2)) + c[:, None] + s)

    def pool(self, x: Tensor, context: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return [m, dim]: mean over the positions in ``mask`` [m, n], with ``bias`` [m, heads, n] on keys."""
        s, c, gate = self._inputs(x, context)
        query, key, value = self._projections(s, c)
        mask_bias = torch.zeros_like(mask, dtype=s.dtype).masked_fill(~mask, torch.finfo(s.dtype).min)[:, None]
        key_bias = mask_bias if bias is None else bias + mask_bias
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=key_bias[:, :, None])
        weights = mask / mask.sum(1, keepdim=True).clamp(min=1)
        mean = (weights[:, None, None] @ attended).squeeze(2) * gate[..., None]
        return self.block(self._project(mean) + c + (weights[:, None] @ s).squeeze(1))

    def _inputs(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.sequence(x), self.context(context), torch.softmax(self.gate(context), dim=-1)

    def _projections(self, s: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each [m, heads, n, d_head]."""
        query = self.query_sequence(s) + self.query_context(c)[:, None]
        return tuple(
            projection.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (query, self.key(s), self.value(s))
        )

    def _project(self, heads: Tensor) -> Tensor:
        """Concatenate and project heads: [*, heads, d_head] -> [*, dim]."""
        return self.output(heads.flatten(-2))


class _Block(nn.Module):
    """LayerNorm and MLP with a residual connection."""

    def __init__(self, dim: int, ratio: float, dropout: float) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.layers = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def reference_loss(predictions: Predictions, examples: Examples, config: LossConfig) -> Tensor:
    """Return the weighted sum of the loss terms; each is a mean over its valid steps."""
    step, label = examples.step_mask, examples.label
    action = F.cross_entropy(predictions.logits[step], label[step])
    time = predictions.time.gather(-1, label[..., None]).squeeze(-1)
    known = step & torch.isfinite(examples.label_time)
    error = (time - examples.label_time)[known]
    pairs = known[:, 1:] & known[:, :-1]
    violation = F.relu(time[:, :-1] - time[:, 1:])[pairs] ** config.order_power
    labeled = torch.isfinite(examples.labels)
    label_error = F.binary_cross_entropy_with_logits(
        predictions.labels[labeled], examples.labels[labeled], reduction="sum"
    )
    return (
        config.action_weight * action
        + config.time_weight * error.square().sum() / known.sum().clamp(min=1)
        + config.order_weight * violation.sum() / pairs.sum().clamp(min=1)
        + config.label_weight * label_error / labeled.sum().clamp(min=1)
    )
