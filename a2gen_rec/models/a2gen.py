"""A2Gen as one model: sharded tables in, per-target predictions out (arXiv 2604.25834, METHODS §2–4)."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torchrec import EmbeddingCollection, EmbeddingConfig, JaggedTensor

from a2gen_rec.config import Config, ModelConfig
from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.nn.decoding import Decoded, Occurrence, decode, occurrence
from a2gen_rec.nn.encoder import HierarchicalEncoder, WindowLayout, log_bucket
from a2gen_rec.nn.generator import ExplicitGenerator, Generator, ImplicitGenerator, StepEmbeddings, Steps
from a2gen_rec.ragged import pad
from a2gen_rec.sharding.tables import ACTION, DTYPES, GAP, TIME, table_rows, whole_tables


@dataclass(frozen=True)
class Encoded:
    """The targets of a batch, before anything happens in them.

    Attributes:
        context: [targets, d_context] of the generator, from which sequences are decoded.
        tables: the small tables that decoding reads.
        label_logits: [targets, labels].
    """

    context: Tensor
    tables: StepEmbeddings
    label_logits: Tensor


@dataclass(frozen=True)
class A2GenOutput(Encoded):
    """Predictions for the targets of a batch, given what happened in them.

    Attributes:
        steps: teacher-forced predictions of every next step, [steps, actions].
        draft: the implicit generator's draft of them; None for the explicit form.
    """

    steps: Steps
    draft: Steps | None


class A2Gen(nn.Module):
    """Embedding tables (to be sharded) and the dense ranker.

    Args:
        device: where the tables are made; ``meta`` leaves making them to the sharding.
    """

    def __init__(self, card: DatasetCard, config: Config, device: torch.device | None = None) -> None:
        super().__init__()
        whole = whole_tables(card, config.model)
        # Rows that every token reads begin at unit norm; rows of identifiers, some of them never trained, near zero.
        scales = dict.fromkeys(table_rows(card, config.model), config.sharding.init_scale)
        scales |= dict.fromkeys(whole, (3 / config.model.dim) ** 0.5)
        self.embeddings = EmbeddingCollection(
            device=device,
            tables=[
                EmbeddingConfig(
                    name=name,
                    embedding_dim=config.model.dim,
                    num_embeddings=rows,
                    feature_names=[name],
                    init_fn=partial(_uniform, scale=scales[name]),
                    data_type=DTYPES[config.sharding.dtype],
                )
                for name, rows in table_rows(card, config.model).items()
            ],
        )
        self.ranker = DenseRanker(card, config.model)

    def forward(self, batch: WindowBatch) -> A2GenOutput:
        # Nothing but these two calls: training pipelines trace this method to overlap the lookups.
        return self.ranker(self.embeddings(batch.sparse), batch)

    def encode(self, batch: WindowBatch, actions: Tensor | None = None) -> Encoded:
        """Targets without their actions: all that ranking needs. ``actions``: as :meth:`DenseRanker.encode` takes."""
        return self.ranker.encode(self.embeddings(batch.sparse), batch, actions)


def _uniform(weight: Tensor, scale: float) -> Tensor:
    return nn.init.uniform_(weight, -scale, scale)


class DenseRanker(nn.Module):
    """Everything after the lookups."""

    timed: Tensor

    def __init__(self, card: DatasetCard, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.history = config.history or card.history
        self.features = {
            level: [feature.name for feature in card.at_level(level)] for level in ("user", "item", "context")
        }
        dim = config.dim
        d_item = dim * (len(self.features["item"]) + len(self.features["context"]))
        d_context = dim * len(self.features["user"]) + d_item + dim
        self.encoder = HierarchicalEncoder(
            d_item,
            dim,
            config.heads,
            config.residual,
            config.mlp_ratio,
            config.time_buckets if config.recency_bias else 0,
            len(self.features["item"]) if config.match_bias else 0,
            config.attention,
            config.dropout,
        )
        form: type[Generator] = ExplicitGenerator if config.generator == "explicit" else ImplicitGenerator
        self.generator = form(
            d_context,
            dim,
            config.heads,
            len(card.actions),
            residual=config.residual,
            mlp_ratio=config.mlp_ratio,
            time_head=config.time_head,
            time_distribution=config.time_distribution,
            time_per_action=config.time_per_action,
            max_offset_s=config.max_offset_s,
            dropout=config.dropout,
        )
        hidden = int(dim * config.tower_ratio)
        self.labels = (
            nn.Sequential(
                nn.LayerNorm(d_context),
                nn.Linear(d_context, hidden),
                nn.GELU(),
                nn.Dropout(config.dropout),
                nn.Linear(hidden, len(card.labels)),
            )
            if card.labels
            else None
        )
        self.dropout = nn.Dropout(config.dropout)
        self._start_from_base_rates(card)
        timed = torch.tensor([name in card.timed for name in card.actions])
        self.register_buffer("timed", timed, persistent=False)

    @torch.no_grad()
    def _start_from_base_rates(self, card: DatasetCard) -> None:
        rate = torch.tensor([0.0, *(card.base_rate[name] for name in card.events), 1.0])
        seconds = [card.median_time_s.get(name, float("nan")) for name in card.actions]
        self.generator.start_from(rate / rate.sum(), torch.log1p(torch.tensor(seconds)))
        if self.labels is not None:
            rates = torch.tensor([card.base_rate[name] for name in card.labels])
            last = self.labels[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            last.bias.copy_(torch.logit(rates, eps=1e-4))

    def forward(self, rows: dict[str, JaggedTensor], batch: WindowBatch) -> A2GenOutput:
        """Predictions for the targets of a batch, given the looked-up rows of every table."""
        encoded = self.encode(rows, batch)
        action, offset_s = batch.action[batch.step], batch.offset_s[batch.step]
        steps, draft = self.generator(action, offset_s, batch.step_label, encoded.context, batch.steps, encoded.tables)
        return A2GenOutput(encoded.context, encoded.tables, encoded.label_logits, steps, draft)

    def encode(self, rows: dict[str, JaggedTensor], batch: WindowBatch, actions: Tensor | None = None) -> Encoded:
        """Targets without their actions.

        Args:
            rows: looked-up rows of every table.
            actions: [keys, dim] of :meth:`encode_actions`, if they are known already.
        """
        looked_up = {name: jagged.values() for name, jagged in rows.items()}
        tables = StepEmbeddings(looked_up[ACTION], looked_up[TIME])
        item = self._concatenate(looked_up, batch, "item", "context")
        key, target = item[batch.key], item[batch.target]
        if actions is None:
            actions = self._encode_actions(tables, key, batch)
        gap = looked_up[GAP][log_bucket(gap_s(batch), self.config.time_buckets, self.config.max_gap_s)]
        history = self.encoder(key, actions, gap, target, self._layout(batch))
        parts = [target, history]
        if self.features["user"]:
            parts.insert(0, self._concatenate(looked_up, batch, "user")[batch.target_window])
        context = self.dropout(torch.cat(parts, dim=-1))
        return Encoded(context, tables, context[:, :0] if self.labels is None else self.labels(context))

    def encode_actions(self, rows: dict[str, JaggedTensor], batch: WindowBatch) -> Tensor:
        """[keys, dim] what users did inside the impressions that targets may see; of no target's concern."""
        looked_up = {name: jagged.values() for name, jagged in rows.items()}
        key = self._concatenate(looked_up, batch, "item", "context")[batch.key]
        return self._encode_actions(StepEmbeddings(looked_up[ACTION], looked_up[TIME]), key, batch)

    def occurrence(self, targets: Encoded, max_error: float) -> Occurrence:
        """Whether and when each action happens in ``targets``."""
        return occurrence(self.generator, targets.context, targets.tables, self.timed, max_error)

    def decode(self, targets: Encoded, width: int) -> Decoded:
        """The most probable action sequences of ``targets``."""
        return decode(self.generator, targets.context, targets.tables, self.timed, "beam", width)

    def _concatenate(self, looked_up: dict[str, Tensor], batch: WindowBatch, *levels: str) -> Tensor:
        names = [name for level in levels for name in self.features[level]]
        return torch.cat([looked_up[name][batch.index[name]] for name in names], dim=-1)

    def _encode_actions(self, tables: StepEmbeddings, key: Tensor, batch: WindowBatch) -> Tensor:
        offset_s, action = batch.offset_s[batch.key_token], batch.action[batch.key_token]
        time = tables.time[log_bucket(offset_s, self.config.time_buckets, self.config.max_offset_s)]
        return self.encoder.encode_actions(torch.cat([time, tables.action[action]], dim=-1), key, batch.sequences)

    def _layout(self, batch: WindowBatch) -> WindowLayout:
        """A target sees the ``history`` impressions right before ``history_end``, of those the ones that had ended."""
        column = torch.arange(batch.key_shape[1], device=batch.key_column.device)

        def in_windows(values: Tensor, fill: int) -> Tensor:
            at_keys = (batch.key_window, batch.key_column)
            return values.new_full(batch.key_shape, fill).index_put(at_keys, values[batch.key])[:, None]

        def at_targets(values: Tensor) -> Tensor:
            return pad(values, batch.target_window, batch.target_column, batch.target_shape)[..., None]

        begin, end = in_windows(batch.ts_ms, 0), in_windows(batch.end_ms, torch.iinfo(torch.int64).max)
        now, history_end = at_targets(batch.ts_ms[batch.target]), at_targets(batch.history_end)
        before = (column < history_end) & (column >= history_end - self.history)
        visible = before & (begin < now) & (end <= now)
        recency = None
        if self.config.recency_bias:
            seconds = (now - begin).float() / 1000
            recency = log_bucket(seconds, self.config.time_buckets, self.config.max_gap_s)
        matches = []
        if self.config.match_bias:
            for name in self.features["item"]:
                ids = batch.ids(name)
                target = at_targets(ids[batch.target])
                matches.append((in_windows(ids, 0) == target) & (target != 0))  # unknown values match nothing
        return WindowLayout(
            batch.key_window,
            batch.key_column,
            batch.key_shape,
            batch.target_window,
            batch.target_column,
            batch.target_shape,
            visible,
            recency,
            matches,
        )


def gap_s(batch: WindowBatch) -> Tensor:
    """[keys] seconds since the impression before in the window; NaN for the first."""
    began = batch.ts_ms[batch.key]
    seconds = torch.diff(began, prepend=began[:1]).float() / 1000
    return seconds.masked_fill(batch.key_column == 0, torch.nan)
