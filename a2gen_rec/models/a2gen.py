"""A2Gen as one model: sharded tables in, per-target predictions out (arXiv 2604.25834, METHODS §2–4)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torchrec import JaggedTensor

from a2gen_rec.config import Config, ModelConfig
from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.models.base import RankingModel, TargetEncoding
from a2gen_rec.models.embedding_tables import ACTION, TIME
from a2gen_rec.models.hierarchical import HierarchicalRanker
from a2gen_rec.nn.canonical_order import sequence_ids, sort_by_vocabulary
from a2gen_rec.nn.decoding import DecodedSequences, decode
from a2gen_rec.nn.generator import (
    ExplicitGenerator,
    Generator,
    ImplicitGenerator,
    StepEmbeddings,
    StepPredictions,
    TokenTable,
)
from a2gen_rec.nn.marginals import ActionMarginals, action_marginals

MIN_BASE_RATE = 1e-4
"""Base rate below which an action is taken to be that common when its predictions are weighed."""
PROBABILITY_EPS = (1e-6, 1 - 1e-4)
"""Probabilities between which log-odds are told apart; close to 1, single precision has few digits left of them."""


@dataclass(frozen=True)
class OccurrenceHeadOutput:
    """Whether each action happens at all, told from the context alone [ours].

    Attributes:
        logits: [targets, events].
        entropy: [events] of the actions' base rates, in nats: what a prediction is measured by, so that the context
            learns of rare actions as much as of common ones.
    """

    logits: Tensor
    entropy: Tensor

    def blend_with(self, generated: ActionMarginals) -> ActionMarginals:
        """The mean, in log-odds, of this and of what a generator's sequences tell; the remainder stays theirs."""
        logits = torch.logit(generated.probability[:, 1:-1].clamp(*PROBABILITY_EPS))
        happens = torch.sigmoid((logits + self.logits) / 2)
        probability = torch.cat([generated.probability[:, :1], happens, generated.probability[:, -1:]], dim=1)
        return replace(generated, probability=probability)


@dataclass(frozen=True)
class A2GenEncoding(TargetEncoding):
    """The targets of a batch; their ``context`` is the generator's, from which sequences are decoded.

    Attributes:
        tables: the small tables that decoding reads.
        occurring: what the tower of occurrence says; None without.
    """

    tables: StepEmbeddings
    occurrence: OccurrenceHeadOutput | None


@dataclass(frozen=True)
class A2GenOutput(A2GenEncoding):
    """Predictions for the targets of a batch, given what happened in them.

    Attributes:
        steps: teacher-forced predictions of every next step, [steps, actions].
        draft: the implicit generator's draft of them; None for the explicit form.
    """

    steps: StepPredictions
    draft: StepPredictions | None


class A2Gen(RankingModel):
    """Embedding tables (to be sharded) and the dense ranker.

    Args:
        device: where the tables are made; ``meta`` leaves making them to the sharding.
    """

    ranker: "A2GenRanker"

    def __init__(self, card: DatasetCard, config: Config, device: torch.device | None = None) -> None:
        super().__init__(card, config, A2GenRanker, device)


class A2GenRanker(HierarchicalRanker[A2GenEncoding]):
    """A2Gen after the lookups."""

    is_generative = True
    generator: Generator
    event_entropy: Tensor
    step_tokens: TokenTable | None = None
    """What the generator may emit, once neither weights nor tables change any more (:meth:`settle`)."""

    def __init__(self, card: DatasetCard, config: ModelConfig) -> None:
        super().__init__(card, config)
        rate = torch.tensor([card.base_rate[name] for name in card.predicted_actions]).clamp(
            MIN_BASE_RATE, 1 - MIN_BASE_RATE
        )
        entropy = -(rate * rate.log() + (1 - rate) * (1 - rate).log())
        self.register_buffer("event_entropy", entropy, persistent=False)
        has_tower = bool(card.predicted_actions) and config.occurrence_head
        self.occurring = self._tower(self.d_context, torch.logit(rate)) if has_tower else None

    def _make_generator(self, card: DatasetCard) -> Generator:
        config = self.config
        forms: dict[str, type[Generator]] = {"explicit": ExplicitGenerator, "implicit": ImplicitGenerator}
        generator = forms[config.generator](
            self.d_context,
            config.dim,
            config.num_heads,
            len(card.actions),
            residual=config.residual,
            mlp_ratio=config.mlp_ratio,
            time_head=config.time_head,
            time_distribution=config.time_distribution,
            time_per_action=config.time_per_action,
            max_offset_s=config.max_action_time_s,
            dropout=config.dropout,
            context_query=config.context_in_query,
            head_gate=config.use_head_gate,
        )
        rate = torch.tensor([0.0, *(card.base_rate[name] for name in card.predicted_actions), 1.0])
        seconds = [card.median_time_s.get(name, float("nan")) for name in card.actions]
        generator.init_from_statistics(rate / rate.sum(), torch.log1p(torch.tensor(seconds)))
        return generator

    def forward(self, rows: dict[str, JaggedTensor], batch: WindowBatch) -> A2GenOutput:
        """Predictions for the targets of a batch, given the looked-up rows of every table."""
        encoded = self.encode(rows, batch)
        action, offset_s, label = batch.action[batch.step_token], batch.offset_s[batch.step_token], batch.step_label
        place = None
        if not self.config.use_action_order:
            owner, actions = sequence_ids(action), len(self.is_timed)
            place = sort_by_vocabulary(label, owner, actions)
            action, label = action[sort_by_vocabulary(action, owner, actions)], label[place]
        if not self._emits_times:
            offset_s = torch.where(action > 0, torch.nan, 0.0)
        steps, draft = self.generator(action, offset_s, label, encoded.context, batch.target_buckets, encoded.tables)
        if place is not None:  # every label is predicted once, whatever the order: losses find it at its own step
            steps, draft = steps.select(place.argsort()), None if draft is None else draft.select(place.argsort())
        return A2GenOutput(**vars(encoded), steps=steps, draft=draft)

    def encode(self, rows: dict[str, JaggedTensor], batch: WindowBatch, actions: Tensor | None = None) -> A2GenEncoding:
        predicted = self._predict(self._context(rows, batch, actions))
        occurring = None
        if self.occurring is not None:
            occurring = OccurrenceHeadOutput(self.occurring(predicted.context), self.event_entropy)
        tables = StepEmbeddings(rows[ACTION].values(), rows[TIME].values())
        return A2GenEncoding(**vars(predicted), tables=tables, occurrence=occurring)

    def train(self, mode: bool = True) -> Self:
        if mode:
            self.step_tokens = None  # weights are about to change
        return super().train(mode)

    def cache_token_table(self, rows: Mapping[str, JaggedTensor]) -> None:
        if isinstance(self.generator, ExplicitGenerator):
            tables = StepEmbeddings(rows[ACTION].values(), rows[TIME].values())
            self.step_tokens = self.generator.precompute_tokens(tables, self._feeds_back_actions)

    def marginals(self, targets: A2GenEncoding, max_error: float) -> ActionMarginals:
        """Whether and when each action happens in ``targets``: with a tower of occurrence, whether it does is the mean
        of what that says and of what the generator's sequences tell.
        """
        tables, fed_back = targets.tables, self._feeds_back_actions
        what = action_marginals(self.generator, targets.context, tables, fed_back, max_error, self.step_tokens)
        return what if targets.occurrence is None else targets.occurrence.blend_with(what)

    def decode(self, targets: A2GenEncoding, width: int) -> DecodedSequences:
        """The most probable action sequences of ``targets``."""
        return decode(self.generator, targets.context, targets.tables, self._feeds_back_actions, "beam", width)

    @property
    def _emits_times(self) -> bool:
        # The times of actions emitted so far would tell their order.
        return self.config.use_action_times and self.config.use_action_order

    @property
    def _feeds_back_actions(self) -> Tensor:
        """[actions] bool, whether an emitted action is read with its time."""
        return self.is_timed if self._emits_times else torch.zeros_like(self.is_timed)
