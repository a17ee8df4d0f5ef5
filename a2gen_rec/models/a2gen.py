"""A2Gen: encoder, generator and heads as one ranker (arXiv 2604.25834, METHODS §2–4)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torchrec import JaggedTensor

from a2gen_rec.config import ModelConfig
from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.models.base import RankerOutput, TargetEncoding
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
from a2gen_rec.nn.marginals import ActionMarginals, action_marginals, mean_log_odds

MIN_BASE_RATE = 1e-4
"""Lower bound on the base rates that scale the losses of actions."""
MIN_OUTCOMES = 100
"""Positives, and negatives, in training that estimate the unit of an action's loss. The unit of an action with fewer is
that of an action with so many: otherwise, few positives in validation would outweigh all other actions."""


@dataclass(frozen=True)
class OccurrenceHeadOutput:
    """Predictions of whether each action occurs, from the context alone [ours].

    Attributes:
        logits: [targets, events].
        entropy: [events] entropy of the actions' base rates, in nats (:func:`loss_units`). The loss is measured in
            units of it, so that rare actions train the context as much as common ones.
    """

    logits: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class A2GenEncoding(TargetEncoding):
    """Encoded targets of a batch; their ``context`` is the generator's input.

    Attributes:
        tables: Small tables that decoding reads.
        occurrence: Output of the occurrence head; None without one.
    """

    tables: StepEmbeddings
    occurrence: OccurrenceHeadOutput | None


@dataclass(frozen=True)
class A2GenOutput(A2GenEncoding, RankerOutput):
    """Predictions for the targets of a batch, given their observed actions.

    Attributes:
        steps: [steps, actions] teacher-forced predictions of every next step.
        draft: Draft of the implicit generator; None for the explicit form.
    """

    is_generative: ClassVar[bool] = True
    steps: StepPredictions
    draft: StepPredictions | None

    def step_times(self, batch: WindowBatch) -> Tensor:
        return self.steps.time.gather(1, batch.step_label[:, None]).squeeze(1)


def loss_units(rate: Tensor, num_targets: int) -> Tensor:
    """Return the entropies [events] of base rates, each at least that of ``MIN_OUTCOMES`` positives or negatives.

    Args:
        rate: [events] base rates in training.
        num_targets: Number of training targets.
    """
    smallest = min(MIN_OUTCOMES / max(num_targets, 1), 0.5)
    rate = rate.clamp(smallest, 1 - smallest)
    return -(rate * rate.log() + (1 - rate) * (1 - rate).log())


class A2GenRanker(HierarchicalRanker[A2GenEncoding]):
    """Dense part of A2Gen, after the lookups."""

    is_generative = True
    generator: Generator
    event_entropy: Tensor
    token_table: TokenTable | None = None
    """Tokens that the generator can emit, cached while weights and tables are fixed (:meth:`cache_token_table`)."""

    def __init__(self, card: DatasetCard, config: ModelConfig) -> None:
        super().__init__(card, config)
        rate = torch.tensor([card.base_rate[name] for name in card.predicted_actions]).clamp(
            MIN_BASE_RATE, 1 - MIN_BASE_RATE
        )
        self.register_buffer("event_entropy", loss_units(rate, card.splits["train"].targets), persistent=False)
        has_head = bool(card.predicted_actions) and config.occurrence_head
        self.occurrence_head = self._tower(self.d_context, torch.logit(rate)) if has_head else None

    def _make_generator(self, card: DatasetCard) -> Generator:
        config = self.config
        generators: dict[str, type[Generator]] = {"explicit": ExplicitGenerator, "implicit": ImplicitGenerator}
        generator = generators[config.generator](
            self.d_context,
            self._attention_config(),
            len(card.actions),
            time_head=config.time_head,
            time_distribution=config.time_distribution,
            time_per_action=config.time_per_action,
            max_offset_s=config.max_action_time_s,
        )
        rate = torch.tensor([0.0, *(card.base_rate[name] for name in card.predicted_actions), 1.0])
        median_s = [card.median_time_s.get(name, float("nan")) for name in card.actions]
        generator.init_from_statistics(rate / rate.sum(), torch.log1p(torch.tensor(median_s)))
        return generator

    def forward(self, rows: dict[str, JaggedTensor], batch: WindowBatch) -> A2GenOutput:
        encoding = self.encode(rows, batch)
        action, offset_s, label = batch.action[batch.step_token], batch.offset_s[batch.step_token], batch.step_label
        order = None
        if not self.config.use_action_order:
            sequence, num_actions = sequence_ids(action), len(self.is_timed)
            order = sort_by_vocabulary(label, sequence, num_actions)
            action, label = action[sort_by_vocabulary(action, sequence, num_actions)], label[order]
        if not self._emits_times:
            offset_s = torch.where(action > 0, torch.nan, 0.0)
        steps, draft = self.generator(action, offset_s, label, encoding.context, batch.target_buckets, encoding.tables)
        if order is not None:  # each label is predicted once in either order; losses expect it at its original step
            inverse = order.argsort()
            steps, draft = steps.select(inverse), None if draft is None else draft.select(inverse)
        return A2GenOutput(**vars(encoding), steps=steps, draft=draft, trained=self.trained_outcomes)

    def encode(self, rows: dict[str, JaggedTensor], batch: WindowBatch, actions: Tensor | None = None) -> A2GenEncoding:
        encoding = self._predict(*self._context(rows, batch, actions))
        occurrence = None
        if self.occurrence_head is not None:
            occurrence = OccurrenceHeadOutput(self.occurrence_head(encoding.context), self.event_entropy)
        tables = StepEmbeddings(rows[ACTION].values(), rows[TIME].values())
        return A2GenEncoding(**vars(encoding), tables=tables, occurrence=occurrence)

    def train(self, mode: bool = True) -> Self:
        if mode:
            self.token_table = None  # training changes the weights
        return super().train(mode)

    def cache_token_table(self, rows: Mapping[str, JaggedTensor]) -> None:
        if isinstance(self.generator, ExplicitGenerator):
            tables = StepEmbeddings(rows[ACTION].values(), rows[TIME].values())
            self.token_table = self.generator.precompute_tokens(tables, self._feeds_back_time)

    def marginals(self, targets: A2GenEncoding, max_unexplored_mass: float) -> ActionMarginals:
        """Return the probability and expected time of each action.

        With an occurrence head, the probability is the mean in log-odds of the head's and the generator's. With a wide
        part, probabilities and times are means of these and the wide part's.
        """
        tables, timed = targets.tables, self._feeds_back_time
        marginals = action_marginals(
            self.generator, targets.context, tables, timed, max_unexplored_mass, self.token_table
        )
        if targets.occurrence is not None:
            marginals = mean_log_odds(marginals, targets.occurrence.logits)
        return marginals if targets.wide is None else targets.wide.blend_with(marginals, self.is_timed)

    def decode(self, targets: A2GenEncoding, width: int) -> DecodedSequences:
        return decode(self.generator, targets.context, targets.tables, self._feeds_back_time, "beam", width)

    @property
    def _emits_times(self) -> bool:
        # The times of emitted actions would reveal their order.
        return self.config.use_action_times and self.config.use_action_order

    @property
    def _feeds_back_time(self) -> Tensor:
        """[actions] bool, whether an emitted action is read with its time."""
        return self.is_timed if self._emits_times else torch.zeros_like(self.is_timed)
