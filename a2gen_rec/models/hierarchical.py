"""Rankers on the hierarchical encoder: all of A2Gen (arXiv 2604.25834) but what predicts actions and their times."""

import math

import torch
from torch import Tensor, nn
from torchrec import JaggedTensor

from a2gen_rec.config import ModelConfig
from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.schema import EFFECTIVE, EXIT, FEEDBACK, GLANCE, NEGATIVE, UNKNOWN, WATCH_TIME, DatasetCard
from a2gen_rec.models.base import E, Encoded, Ranker
from a2gen_rec.nn.encoder import HierarchicalEncoder, Views
from a2gen_rec.nn.objectives import ObjectiveHeads
from a2gen_rec.utils.jagged import pad


class HierarchicalRanker(Ranker[E]):
    """Encoder, labels and objectives. Subclasses make the ``generator``, which predicts actions and their times."""

    generator: nn.Module

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
            config.action_level,
            config.item_level,
            config.context_query,
            config.head_gate,
        )
        self.generator = self._make_generator(card)
        self.tasks, self.label_count = objective_tasks(card, config), len(card.labels)
        rates = torch.tensor([card.base_rate[name] for name in [*card.labels, *card.objectives]])
        chances = torch.logit(rates[: len(card.labels)], eps=1e-4)
        self.labels = self._tower(self.d_context, chances) if card.labels and not self.tasks else None
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
        if self.objectives is not None:
            self.objectives.start_from(rates, math.log1p(card.median_time_s.get(EXIT, math.nan)))
        self.dropout = nn.Dropout(config.dropout)

    def _make_generator(self, card: DatasetCard) -> nn.Module:
        """What predicts actions and times from [n, d_context], begun at the card's rates and times."""
        raise NotImplementedError

    def encode_actions(self, rows: dict[str, JaggedTensor], batch: WindowBatch) -> Tensor:
        """[keys, dim] what users did inside the impressions that targets may see; of no target's concern."""
        return self._encode_actions(rows, batch, self.shown_before(rows, batch))

    def _context(self, rows: dict[str, JaggedTensor], batch: WindowBatch, actions: Tensor | None) -> Tensor:
        """[targets, d_context] of the targets, after dropout; ``actions`` as :meth:`encode` takes."""
        inputs = self._inputs(rows, batch)
        if actions is None:
            actions = self._encode_actions(rows, batch, inputs.item)
        layout = self._layout(batch, *self._members(batch))
        return self.dropout(inputs.context(self.encoder(inputs.item, actions, inputs.beside(), inputs.target, layout)))

    def _predict(self, context: Tensor) -> Encoded:
        """Labels and objectives of targets, given their ``context``."""
        nothing = context[:, :0]
        if self.objectives is None:
            return Encoded(context, nothing if self.labels is None else self.labels(context), nothing, None)
        predicted = self.objectives(context)
        labels, objectives = predicted.logits.tensor_split([self.label_count], dim=1)
        return Encoded(context, labels, objectives, predicted.watch_time)

    def _encode_actions(self, rows: dict[str, JaggedTensor], batch: WindowBatch, item: Tensor) -> Tensor:
        return self.encoder.encode_actions(self._action_tokens(rows, batch), item, batch.sequences)

    def _views(self) -> Views:
        known = FEEDBACK in self.features["outcome"]
        return self.config.feedback if known and self.config.feedback in ("views", "whole") else "off"

    def _members(self, batch: WindowBatch) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """[windows, longest] bool, what belongs to the positive and to the negative view."""
        if self._views() == "off":
            return None, None
        level = batch.outcome[FEEDBACK]
        padded = pad(level, batch.key_window, batch.key_column, batch.key_shape, UNKNOWN)
        return padded >= EFFECTIVE, (padded == NEGATIVE) | (padded == GLANCE)

    def _tower(self, d_context: int, begin: Tensor) -> nn.Sequential:
        """Outputs from contexts, which begin as ``begin`` [outputs] whatever the context."""
        hidden = int(self.config.dim * self.config.tower_ratio)
        last = nn.Linear(hidden, len(begin))
        nn.init.zeros_(last.weight)
        with torch.no_grad():
            last.bias.copy_(begin)
        first = nn.Linear(d_context, hidden)
        return nn.Sequential(nn.LayerNorm(d_context), first, nn.GELU(), nn.Dropout(self.config.dropout), last)


def objective_tasks(card: DatasetCard, config: ModelConfig) -> tuple[str, ...]:
    """What is predicted beside actions and labels: objectives of the card, and the watch time where the log has it."""
    if not config.objectives:
        return ()
    return (*card.objectives, *([WATCH_TIME] if EXIT in card.timed else []))
