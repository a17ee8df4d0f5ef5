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
from a2gen_rec.models.base import Encoded, RankingModel
from a2gen_rec.models.embedding_tables import ACTION, TIME
from a2gen_rec.models.hierarchical import HierarchicalRanker
from a2gen_rec.nn.canonical_order import owners, vocabulary_order
from a2gen_rec.nn.decoding import Decoded, decode
from a2gen_rec.nn.generator import ExplicitGenerator, Generator, ImplicitGenerator, StepEmbeddings, Steps, StepTokens
from a2gen_rec.nn.marginals import Occurrence, occurrence

RAREST = 1e-4
"""Base rate below which an action is taken to be that common when its predictions are weighed."""
TOLD = (1e-6, 1 - 1e-4)
"""Probabilities between which log-odds are told apart; close to 1, single precision has few digits left of them."""


@dataclass(frozen=True)
class Occurring:
    """Whether each action happens at all, told from the context alone [ours].

    Attributes:
        logits: [targets, events].
        entropy: [events] of the actions' base rates, in nats: what a prediction is measured by, so that the context
            learns of rare actions as much as of common ones.
    """

    logits: Tensor
    entropy: Tensor

    def averaged(self, generated: Occurrence) -> Occurrence:
        """The mean, in log-odds, of this and of what a generator's sequences tell; the remainder stays theirs."""
        logits = torch.logit(generated.probability[:, 1:-1].clamp(*TOLD))
        happens = torch.sigmoid((logits + self.logits) / 2)
        probability = torch.cat([generated.probability[:, :1], happens, generated.probability[:, -1:]], dim=1)
        return replace(generated, probability=probability)


@dataclass(frozen=True)
class A2GenEncoded(Encoded):
    """The targets of a batch; their ``context`` is the generator's, from which sequences are decoded.

    Attributes:
        tables: the small tables that decoding reads.
        occurring: what the tower of occurrence says; None without.
    """

    tables: StepEmbeddings
    occurring: Occurring | None


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


class DenseRanker(HierarchicalRanker[A2GenEncoded]):
    """A2Gen after the lookups."""

    generates = True
    generator: Generator
    event_entropy: Tensor
    step_tokens: StepTokens | None = None
    """What the generator may emit, once neither weights nor tables change any more (:meth:`settle`)."""

    def __init__(self, card: DatasetCard, config: ModelConfig) -> None:
        super().__init__(card, config)
        rate = torch.tensor([card.base_rate[name] for name in card.events]).clamp(RAREST, 1 - RAREST)
        entropy = -(rate * rate.log() + (1 - rate) * (1 - rate).log())
        self.register_buffer("event_entropy", entropy, persistent=False)
        has_tower = bool(card.events) and config.occurrence_tower
        self.occurring = self._tower(self.d_context, torch.logit(rate)) if has_tower else None

    def _make_generator(self, card: DatasetCard) -> Generator:
        config = self.config
        forms: dict[str, type[Generator]] = {"explicit": ExplicitGenerator, "implicit": ImplicitGenerator}
        generator = forms[config.generator](
            self.d_context,
            config.dim,
            config.heads,
            len(card.actions),
            residual=config.residual,
            mlp_ratio=config.mlp_ratio,
            time_head=config.time_head,
            time_distribution=config.time_distribution,
            time_per_action=config.time_per_action,
            max_offset_s=config.max_offset_s,
            dropout=config.dropout,
            context_query=config.context_query,
            head_gate=config.head_gate,
        )
        rate = torch.tensor([0.0, *(card.base_rate[name] for name in card.events), 1.0])
        seconds = [card.median_time_s.get(name, float("nan")) for name in card.actions]
        generator.start_from(rate / rate.sum(), torch.log1p(torch.tensor(seconds)))
        return generator

    def forward(self, rows: dict[str, JaggedTensor], batch: WindowBatch) -> A2GenOutput:
        """Predictions for the targets of a batch, given the looked-up rows of every table."""
        encoded = self.encode(rows, batch)
        action, offset_s, label = batch.action[batch.step], batch.offset_s[batch.step], batch.step_label
        place = None
        if not self.config.action_order:
            owner, actions = owners(action), len(self.timed)
            place = vocabulary_order(label, owner, actions)
            action, label = action[vocabulary_order(action, owner, actions)], label[place]
        if not self._emits_times:
            offset_s = torch.where(action > 0, torch.nan, 0.0)
        steps, draft = self.generator(action, offset_s, label, encoded.context, batch.steps, encoded.tables)
        if place is not None:  # every label is predicted once, whatever the order: losses find it at its own step
            steps, draft = steps.at(place.argsort()), None if draft is None else draft.at(place.argsort())
        return A2GenOutput(**vars(encoded), steps=steps, draft=draft)

    def encode(self, rows: dict[str, JaggedTensor], batch: WindowBatch, actions: Tensor | None = None) -> A2GenEncoded:
        predicted = self._predict(self._context(rows, batch, actions))
        occurring = None
        if self.occurring is not None:
            occurring = Occurring(self.occurring(predicted.context), self.event_entropy)
        tables = StepEmbeddings(rows[ACTION].values(), rows[TIME].values())
        return A2GenEncoded(**vars(predicted), tables=tables, occurring=occurring)

    def train(self, mode: bool = True) -> Self:
        if mode:
            self.step_tokens = None  # weights are about to change
        return super().train(mode)

    def settle(self, rows: Mapping[str, JaggedTensor]) -> None:
        if isinstance(self.generator, ExplicitGenerator):
            tables = StepEmbeddings(rows[ACTION].values(), rows[TIME].values())
            self.step_tokens = self.generator.tokens(tables, self._fed_back)

    def occurrence(self, targets: A2GenEncoded, max_error: float) -> Occurrence:
        """Whether and when each action happens in ``targets``: with a tower of occurrence, whether it does is the mean
        of what that says and of what the generator's sequences tell.
        """
        tables, fed_back = targets.tables, self._fed_back
        what = occurrence(self.generator, targets.context, tables, fed_back, max_error, self.step_tokens)
        return what if targets.occurring is None else targets.occurring.averaged(what)

    def decode(self, targets: A2GenEncoded, width: int) -> Decoded:
        """The most probable action sequences of ``targets``."""
        return decode(self.generator, targets.context, targets.tables, self._fed_back, "beam", width)

    @property
    def _emits_times(self) -> bool:
        # The times of actions emitted so far would tell their order.
        return self.config.action_times and self.config.action_order

    @property
    def _fed_back(self) -> Tensor:
        """[actions] bool, whether an emitted action is read with its time."""
        return self.timed if self._emits_times else torch.zeros_like(self.timed)
