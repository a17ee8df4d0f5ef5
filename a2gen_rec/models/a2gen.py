"""A2Gen as one model: sharded tables in, per-target predictions out (arXiv 2604.25834, METHODS §2–4)."""

import math
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn
from torchrec import EmbeddingCollection, EmbeddingConfig, JaggedTensor

from a2gen_rec.config import Config, ModelConfig
from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.schema import (
    EFFECTIVE,
    EXIT,
    FEEDBACK,
    GLANCE,
    NEGATIVE,
    UNKNOWN,
    WATCH_TIME,
    DatasetCard,
    Level,
)
from a2gen_rec.nn.decoding import Decoded, Occurrence, decode, occurrence
from a2gen_rec.nn.encoder import HierarchicalEncoder, Views, WindowLayout, log_bucket
from a2gen_rec.nn.generator import ExplicitGenerator, Generator, ImplicitGenerator, StepEmbeddings, Steps
from a2gen_rec.nn.objectives import ObjectiveHeads
from a2gen_rec.ragged import pad
from a2gen_rec.sharding.tables import ACTION, DTYPES, GAP, TIME, read_by, table_rows, whole_tables


@dataclass(frozen=True)
class Encoded:
    """The targets of a batch, before anything happens in them.

    Attributes:
        context: [targets, d_context] of the generator, from which sequences are decoded.
        tables: the small tables that decoding reads.
        label_logits: [targets, labels].
        objective_logits: [targets, objectives], none of them if they are not predicted.
        watch_time: [targets] in log1p seconds; None if not predicted beside the sequence.
    """

    context: Tensor
    tables: StepEmbeddings
    label_logits: Tensor
    objective_logits: Tensor
    watch_time: Tensor | None


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
            level: [feature.name for feature in card.at_level(level) if read_by(config, feature)]
            for level in get_args(Level)
        }
        dim = config.dim
        d_user, d_shown, d_context, d_moment, d_outcome = (dim * len(self.features[level]) for level in get_args(Level))
        d_item = d_shown + d_context
        d_generator = d_user + d_item + d_moment + dim
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
            d_moment,
            d_outcome,
            self._views(),
        )
        form: type[Generator] = ExplicitGenerator if config.generator == "explicit" else ImplicitGenerator
        self.generator = form(
            d_generator,
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
        self.tasks, self.label_count = objective_tasks(card, config), len(card.labels)
        self.labels = self._label_tower(d_generator, len(card.labels)) if card.labels and not self.tasks else None
        self.objectives = (
            ObjectiveHeads(
                d_generator,
                dim,
                len(card.labels) + len(card.objectives),
                WATCH_TIME in self.tasks,
                config.shared_experts,
                config.own_experts,
                config.tower_ratio,
                config.dropout,
            )
            if self.tasks
            else None
        )
        self.dropout = nn.Dropout(config.dropout)
        self._start_from_base_rates(card)
        timed = torch.tensor([name in card.timed for name in card.actions])
        self.register_buffer("timed", timed, persistent=False)

    def _views(self) -> Views:
        known = FEEDBACK in self.features["outcome"]
        return self.config.feedback if known and self.config.feedback in ("views", "whole") else "off"

    def _label_tower(self, d_context: int, labels: int) -> nn.Sequential:
        hidden = int(self.config.dim * self.config.tower_ratio)
        return nn.Sequential(
            nn.LayerNorm(d_context),
            nn.Linear(d_context, hidden),
            nn.GELU(),
            nn.Dropout(self.config.dropout),
            nn.Linear(hidden, labels),
        )

    @torch.no_grad()
    def _start_from_base_rates(self, card: DatasetCard) -> None:
        rate = torch.tensor([0.0, *(card.base_rate[name] for name in card.events), 1.0])
        seconds = [card.median_time_s.get(name, float("nan")) for name in card.actions]
        self.generator.start_from(rate / rate.sum(), torch.log1p(torch.tensor(seconds)))
        rates = torch.tensor([card.base_rate[name] for name in [*card.labels, *card.objectives]])
        if self.objectives is not None:
            self.objectives.start_from(rates, math.log1p(card.median_time_s.get(EXIT, math.nan)))
        if self.labels is not None:
            last = self.labels[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            last.bias.copy_(torch.logit(rates[: len(card.labels)], eps=1e-4))

    def forward(self, rows: dict[str, JaggedTensor], batch: WindowBatch) -> A2GenOutput:
        """Predictions for the targets of a batch, given the looked-up rows of every table."""
        encoded = self.encode(rows, batch)
        action, offset_s = batch.action[batch.step], batch.offset_s[batch.step]
        steps, draft = self.generator(action, offset_s, batch.step_label, encoded.context, batch.steps, encoded.tables)
        return A2GenOutput(**vars(encoded), steps=steps, draft=draft)

    def encode(self, rows: dict[str, JaggedTensor], batch: WindowBatch, actions: Tensor | None = None) -> Encoded:
        """Targets without their actions.

        Args:
            rows: looked-up rows of every table.
            actions: [keys, dim] of :meth:`encode_actions`, if they are known already.
        """
        looked_up = {name: jagged.values() for name, jagged in rows.items()}
        tables = StepEmbeddings(looked_up[ACTION], looked_up[TIME])
        key = self._concatenate(looked_up, batch, "item", "context")[batch.key]
        target = [self._shown(looked_up, batch), *self._whole(looked_up, batch.session, batch.moment)]
        if actions is None:
            actions = self._encode_actions(tables, key, batch)
        beside = [
            looked_up[GAP][log_bucket(gap_s(batch), self.config.time_buckets, self.config.max_gap_s)],
            *self._whole(looked_up, batch.session, batch.key),
            *self._whole(looked_up, batch.outcome),
        ]
        asked = torch.cat(target, dim=-1)
        history = self.encoder(key, actions, torch.cat(beside, dim=-1), asked, self._layout(batch))
        parts = [asked, history]
        if self.features["user"]:
            parts.insert(0, self._concatenate(looked_up, batch, "user")[batch.target_window])
        return self._predict(self.dropout(torch.cat(parts, dim=-1)), tables)

    def _predict(self, context: Tensor, tables: StepEmbeddings) -> Encoded:
        nothing = context[:, :0]
        if self.objectives is None:
            labels = nothing if self.labels is None else self.labels(context)
            return Encoded(context, tables, labels, nothing, None)
        predicted = self.objectives(context)
        labels, objectives = predicted.logits.tensor_split([self.label_count], dim=1)
        return Encoded(context, tables, labels, objectives, predicted.watch_time)

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

    def shown(self, rows: dict[str, JaggedTensor], batch: WindowBatch) -> Tensor:
        """[targets, d_item] embeddings of what is shown, and of the context at the moment it is judged."""
        return self._shown({name: jagged.values() for name, jagged in rows.items()}, batch)

    def _shown(self, looked_up: dict[str, Tensor], batch: WindowBatch) -> Tensor:
        # The hour or tab in which a candidate was shown later would tell that, and whether, the user stayed.
        places = [(name, batch.target) for name in self.features["item"]]
        places += [(name, batch.moment) for name in self.features["context"]]
        return torch.cat([looked_up[name][batch.index[name][place]] for name, place in places], dim=-1)

    def _concatenate(self, looked_up: dict[str, Tensor], batch: WindowBatch, *levels: str) -> Tensor:
        names = [name for level in levels for name in self.features[level]]
        return torch.cat([looked_up[name][batch.index[name]] for name in names], dim=-1)

    def _whole(
        self, looked_up: dict[str, Tensor], features: dict[str, Tensor], places: Tensor | None = None
    ) -> list[Tensor]:
        """Embeddings of those of the ``features`` that the model reads, from tables looked up whole."""
        rows = {name: values if places is None else values[places] for name, values in features.items()}
        return [looked_up[name][values] for name, values in rows.items() if name in looked_up]

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

        # What is known of a target is known at its moment: for a candidate, that of its request.
        begin, end = in_windows(batch.ts_ms, 0), in_windows(batch.end_ms, torch.iinfo(torch.int64).max)
        now, history_end = at_targets(batch.ts_ms[batch.moment]), at_targets(batch.history_end)
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
            *self._members(batch),
        )

    def _members(self, batch: WindowBatch) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """[windows, longest] bool, what belongs to the positive and to the negative view."""
        if self._views() == "off":
            return None, None
        level = batch.outcome[FEEDBACK]
        at_keys = (batch.key_window, batch.key_column)
        padded = level.new_full(batch.key_shape, UNKNOWN).index_put(at_keys, level)
        return padded >= EFFECTIVE, (padded == NEGATIVE) | (padded == GLANCE)


def objective_tasks(card: DatasetCard, config: ModelConfig) -> tuple[str, ...]:
    """What is predicted beside actions and labels: objectives of the card, and the watch time where the log has it."""
    if not config.objectives:
        return ()
    return (*card.objectives, *([WATCH_TIME] if EXIT in card.timed else []))


def gap_s(batch: WindowBatch) -> Tensor:
    """[keys] seconds since the impression before in the window; NaN for the first."""
    began = batch.ts_ms[batch.key]
    seconds = torch.diff(began, prepend=began[:1]).float() / 1000
    return seconds.masked_fill(batch.key_column == 0, torch.nan)
