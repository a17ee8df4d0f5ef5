"""A2Gen as one model: sharded tables in, per-target predictions out (arXiv 2604.25834, METHODS §2–4)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec import JaggedTensor

from a2gen_rec.config import Config, ModelConfig
from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.schema import EFFECTIVE, EXIT, FEEDBACK, GLANCE, NEGATIVE, UNKNOWN, WATCH_TIME, DatasetCard
from a2gen_rec.models.ranker import Encoded, Ranker, RankingModel
from a2gen_rec.nn.decoding import Decoded, Occurrence, decode, occurrence
from a2gen_rec.nn.encoder import HierarchicalEncoder, Views
from a2gen_rec.nn.generator import ExplicitGenerator, Generator, ImplicitGenerator, StepEmbeddings, Steps
from a2gen_rec.nn.objectives import ObjectiveHeads
from a2gen_rec.sharding.tables import ACTION, TIME


@dataclass(frozen=True)
class A2GenEncoded(Encoded):
    """The targets of a batch; their ``context`` is the generator's, from which sequences are decoded.

    Attributes:
        tables: the small tables that decoding reads.
    """

    tables: StepEmbeddings


@dataclass(frozen=True)
class A2GenOutput(A2GenEncoded):
    """Predictions for the targets of a batch, given what happened in them.

    Attributes:
        steps: teacher-forced predictions of every next step, [steps, actions].
        draft: the implicit generator's draft of them; None for the explicit form.
    """

    steps: Steps
    draft: Steps | None


class A2Gen(RankingModel):
    """Embedding tables (to be sharded) and the dense ranker.

    Args:
        device: where the tables are made; ``meta`` leaves making them to the sharding.
    """

    ranker: "DenseRanker"

    def __init__(self, card: DatasetCard, config: Config, device: torch.device | None = None) -> None:
        super().__init__(card, config, DenseRanker, device)


class DenseRanker(Ranker[A2GenEncoded]):
    """A2Gen after the lookups."""

    generates = True

    def __init__(self, card: DatasetCard, config: ModelConfig) -> None:
        super().__init__(card, config)
        dim = config.dim
        self.encoder = HierarchicalEncoder(
            self.d_item,
            dim,
            config.heads,
            config.residual,
            config.mlp_ratio,
            config.time_buckets if config.recency_bias else 0,
            len(self.features["item"]) if config.match_bias else 0,
            config.attention,
            config.dropout,
            self.d_session,
            self.d_outcome,
            self._views(),
        )
        form: type[Generator] = ExplicitGenerator if config.generator == "explicit" else ImplicitGenerator
        self.generator = form(
            self.d_context,
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
        self.labels = self._label_tower(self.d_context, len(card.labels)) if card.labels and not self.tasks else None
        self.objectives = (
            ObjectiveHeads(
                self.d_context,
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

    def encode(self, rows: dict[str, JaggedTensor], batch: WindowBatch, actions: Tensor | None = None) -> A2GenEncoded:
        inputs = self._inputs(rows, batch)
        if actions is None:
            actions = self._encode_actions(rows, batch, inputs.item)
        layout = self._layout(batch, *self._members(batch))
        history = self.encoder(inputs.item, actions, inputs.beside(), inputs.target, layout)
        tables = StepEmbeddings(rows[ACTION].values(), rows[TIME].values())
        return self._predict(self.dropout(inputs.context(history)), tables)

    def _predict(self, context: Tensor, tables: StepEmbeddings) -> A2GenEncoded:
        nothing = context[:, :0]
        if self.objectives is None:
            labels = nothing if self.labels is None else self.labels(context)
            return A2GenEncoded(context, labels, nothing, None, tables)
        predicted = self.objectives(context)
        labels, objectives = predicted.logits.tensor_split([self.label_count], dim=1)
        return A2GenEncoded(context, labels, objectives, predicted.watch_time, tables)

    def encode_actions(self, rows: dict[str, JaggedTensor], batch: WindowBatch) -> Tensor:
        """[keys, dim] what users did inside the impressions that targets may see; of no target's concern."""
        return self._encode_actions(rows, batch, self.shown_before(rows, batch))

    def _encode_actions(self, rows: dict[str, JaggedTensor], batch: WindowBatch, item: Tensor) -> Tensor:
        return self.encoder.encode_actions(self._action_tokens(rows, batch), item, batch.sequences)

    def occurrence(self, targets: A2GenEncoded, max_error: float) -> Occurrence:
        """Whether and when each action happens in ``targets``."""
        return occurrence(self.generator, targets.context, targets.tables, self.timed, max_error)

    def decode(self, targets: A2GenEncoded, width: int) -> Decoded:
        """The most probable action sequences of ``targets``."""
        return decode(self.generator, targets.context, targets.tables, self.timed, "beam", width)

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
