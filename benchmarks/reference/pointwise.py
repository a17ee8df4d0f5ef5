"""A2Gen the usual way: one padded history per target, plain embeddings, an attention matrix for each.

The same mathematics as ``a2gen_rec.models.a2gen`` and ``training.losses`` in their default configuration, written
apart from them and without their levers. It takes over A2Gen's weights and gives the same loss and gradients, so it
is both the oracle and what the speed is compared with.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from reference.examples import Examples
from torch import Tensor, nn
from torch.nn import functional as F

from a2gen_rec.config import LossConfig, ModelConfig
from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.models.embedding_tables import EmbeddingTables

_NAMES = (
    ("embeddings.embeddings.", "tables."),
    ("ranker.encoder.", ""),
    ("ranker.generator.attention.", "generator."),
    ("ranker.generator.heads.action.", "next_action."),
    ("ranker.generator.heads.time.", "next_time."),
    ("ranker.labels.", "labels."),
)


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A2Gen's parameters (or their gradients), by the reference's names."""
    named = {}
    for name, value in weights.items():
        for theirs, own in _NAMES:
            name = own + name.removeprefix(theirs) if name.startswith(theirs) else name
        named[name] = value
    return named


class Embedded(NamedTuple):
    """Looked-up rows of B examples.

    Attributes:
        user: [B, d_user]; target: [B, d_item]; history: [B, n, d_item]; gap: [B, n, dim].
        tokens: [B, n, L, 2·dim] past actions with their times; steps: [B, S, 2·dim] the target's own.
    """

    user: Tensor
    target: Tensor
    history: Tensor
    gap: Tensor
    tokens: Tensor
    steps: Tensor


class Predictions(NamedTuple):
    """logits, time: [B, S, actions]; labels: [B, labels] logits."""

    logits: Tensor
    time: Tensor
    labels: Tensor


class PointwiseA2Gen(nn.Module):
    """The default configuration: explicit generator, free point times per action."""

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
        self.action_level = ContextAttention(2 * dim, d_item, config)
        self.item_level = ContextAttention(d_item + 2 * dim, d_item, config)
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
        """All lookups."""
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
        """Everything after the lookups."""
        context = self.context(rows, examples)
        hidden = self.generator(rows.steps, context)
        # The first input step is ``start``: from it on, each emitted action cannot come again.
        emitted = F.one_hot(examples.step_action, self.actions).cumsum(1) > 0
        logits = self.next_action(hidden).masked_fill(emitted, -torch.inf)
        return Predictions(logits, self.next_time(hidden), self.labels(context))

    def context(self, rows: Embedded, examples: Examples) -> Tensor:
        """[B, d_context] user, target and history: what the generator is given."""
        count, n = examples.visible.shape
        acted = self.action_level.pooled(
            rows.tokens.flatten(0, 1), rows.history.flatten(0, 1), examples.token.flatten(0, 1)
        )
        past = torch.cat([rows.history, acted.view(count, n, -1), rows.gap], dim=-1)
        history = self.item_level.pooled(past, rows.target, examples.visible, self._pair_bias(examples))
        return torch.cat([rows.user, rows.target, history], dim=-1)

    def _rows(self, ids: Mapping[str, Tensor], names: list[str]) -> Tensor:
        return torch.cat([self.tables[name](ids[name]) for name in names], dim=-1)

    def _pair_bias(self, examples: Examples) -> Tensor:
        """[B, heads, n] what recency and shared item features add to the logits of each key."""
        same = torch.stack(
            [
                (examples.history[name] == examples.target[name][:, None]) & (examples.history[name] != 0)
                for name in self.matched
            ],
            dim=-1,
        )
        recency = self.recency(self._bucket(examples.age_s, self.config.max_gap_s))
        return (recency + self.match(same.to(recency.dtype))).transpose(1, 2)

    def _bucket(self, seconds: Tensor, largest: float) -> Tensor:
        """0 for unknown times, then log-spaced up to ``largest``."""
        top = torch.log1p(torch.tensor(largest, dtype=torch.float64)).item()
        place = 1 + torch.floor(torch.log1p(seconds.clamp(min=0)) * ((self.config.time_buckets - 2) / top))
        return place.clamp(max=self.config.time_buckets - 1).nan_to_num(0.0).long()


class ContextAttention(nn.Module):
    """Context-aware attention (METHODS §2) with the block that follows."""

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
        """Causal: x [m, n, d_sequence], context [m, d_context] -> [m, n, dim]."""
        s, c, gate = self._inputs(x, context)
        query, key, value = self._projections(s, c)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True) * gate[..., None, None]
        return self.block(self._project(mixed.transpose(1, 2)) + c[:, None] + s)

    def pooled(self, x: Tensor, context: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
        """Mean over the real positions ``mask`` [m, n]; ``bias`` [m, heads, n] on keys -> [m, dim]."""
        s, c, gate = self._inputs(x, context)
        query, key, value = self._projections(s, c)
        hidden = torch.zeros_like(mask, dtype=s.dtype).masked_fill(~mask, torch.finfo(s.dtype).min)[:, None]
        on_keys = hidden if bias is None else bias + hidden
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=on_keys[:, :, None])
        share = mask / mask.sum(1, keepdim=True).clamp(min=1)
        mean = (share[:, None, None] @ attended).squeeze(2) * gate[..., None]
        return self.block(self._project(mean) + c + (share[:, None] @ s).squeeze(1))

    def _inputs(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.sequence(x), self.context(context), torch.softmax(self.gate(context), dim=-1)

    def _projections(self, s: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [m, heads, n, d_head]."""
        asked = self.query_sequence(s) + self.query_context(c)[:, None]
        return tuple(
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (asked, self.key(s), self.value(s))
        )

    def _project(self, heads: Tensor) -> Tensor:
        """[*, heads, d_head] -> [*, dim]"""
        return self.output(heads.flatten(-2))


class _Block(nn.Module):
    """LayerNorm → MLP with a residual around both."""

    def __init__(self, dim: int, ratio: float, dropout: float) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.layers = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def loss(predictions: Predictions, examples: Examples, config: LossConfig) -> Tensor:
    """The weighted sum of the loss terms, each a mean over its own valid steps."""
    step, label = examples.step, examples.label
    action = F.cross_entropy(predictions.logits[step], label[step])
    time = predictions.time.gather(-1, label[..., None]).squeeze(-1)
    known = step & torch.isfinite(examples.label_time)
    error = (time - examples.label_time)[known]
    pairs = known[:, 1:] & known[:, :-1]
    back = F.relu(time[:, :-1] - time[:, 1:])[pairs] ** config.order_power
    labelled = torch.isfinite(examples.labels)
    label_error = F.binary_cross_entropy_with_logits(
        predictions.labels[labelled], examples.labels[labelled], reduction="sum"
    )
    return (
        config.action_weight * action
        + config.time_weight * error.square().sum() / known.sum().clamp(min=1)
        + config.order_weight * back.sum() / pairs.sum().clamp(min=1)
        + config.label_weight * label_error / labelled.sum().clamp(min=1)
    )
