"""Base of all rankers: embedding tables to be sharded, and the features of targets and their history."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torchrec import EmbeddingCollection, EmbeddingConfig, JaggedTensor

from a2gen_rec.config import Config, ModelConfig
from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.schema import FEEDBACK, FeatureLevel
from a2gen_rec.models.embedding_tables import ACTION, DTYPES, GAP, TIME, EmbeddingTables, module_key
from a2gen_rec.models.history_statistics import HistoryStatistics, NumericInputs
from a2gen_rec.models.inputs import LevelInputs, UsedInputs
from a2gen_rec.models.matches import item_matches
from a2gen_rec.models.padding import history_intervals, pad_queries, seconds_since_previous
from a2gen_rec.models.wide_towers import WidePredictions
from a2gen_rec.nn.canonical_order import canonicalize_order
from a2gen_rec.nn.decoding import DecodedSequences
from a2gen_rec.nn.encoder import WindowLayout, log_bucketize
from a2gen_rec.nn.marginals import ActionMarginals

MIN_ID_ROWS = 1000
"""Minimum number of table rows of an identifier: a feature whose vectors can be memorized."""


class TrainedOutcomes(NamedTuple):
    """Whether each outcome has positives in training; the others cannot be learned, and losses ignore them [ours].

    Attributes:
        actions: [actions] bool; true for ``start`` and ``exit``.
        labels: [labels] bool.
        objectives: [objectives] bool, without watch time.
    """

    actions: Tensor
    labels: Tensor
    objectives: Tensor


@dataclass(frozen=True)
class TargetEncoding:
    """Encoded targets of a batch, before any of their actions.

    Attributes:
        context: [targets, d_context] input of all predictions.
        label_logits: [targets, labels].
        objective_logits: [targets, objectives]; no columns if objectives are not predicted.
        watch_time: [targets] log1p seconds; None unless a separate head predicts it.
        wide: Predictions of the wide part; None without one.
    """

    context: Tensor
    label_logits: Tensor
    objective_logits: Tensor
    watch_time: Tensor | None
    wide: WidePredictions | None = field(default=None, kw_only=True)

    @property
    def label_probability(self) -> Tensor:
        """[targets, labels], of the mean log-odds of both parts."""
        logits = self.label_logits
        return (logits if self.wide is None else (logits + self.wide.label_logits) / 2).sigmoid()

    @property
    def objective_probability(self) -> Tensor:
        """[targets, objectives], of the mean log-odds of both parts."""
        logits = self.objective_logits
        return (logits if self.wide is None else (logits + self.wide.objective_logits) / 2).sigmoid()


@dataclass(frozen=True)
class RankerOutput(TargetEncoding):
    """Predictions that the losses of a batch need; each ranker's forward pass returns a subclass.

    Attributes:
        is_generative: Whether a generator made the predictions of actions, step by step.
        trained: Outcomes with positives in training; None if all have some.
    """

    is_generative: ClassVar[bool]
    trained: TrainedOutcomes | None = field(default=None, kw_only=True)

    def step_times(self, batch: WindowBatch) -> Tensor:
        """Return the predicted time of each observed step, [steps] log1p seconds, given the steps before it."""
        raise NotImplementedError


class FeatureEmbeddings(NamedTuple):
    """Concatenated embeddings of a batch.

    Attributes:
        item: [keys, d_item] item and context inputs of the impressions in the history.
        gap: [keys, dim] of the time since the previous impression.
        session: [keys, d_session] of the session features.
        outcome: [keys, d_outcome] of the outcome features.
        target: [targets, d_target] item, context and session inputs of the targets.
        user: [targets, d_user] of the user inputs.
        numbers: [targets, d_numbers] of the statistics; no columns without any.
        history_statistics: [targets, statistics] of the user's own history; no columns without any.
    """

    item: Tensor
    gap: Tensor
    session: Tensor
    outcome: Tensor
    target: Tensor
    user: Tensor
    numbers: Tensor
    history_statistics: Tensor

    def side_features(self) -> Tensor:
        """Return [keys, dim + d_session + d_outcome], the features of an impression besides its item and actions."""
        return torch.cat([self.gap, self.session, self.outcome], dim=-1)

    def context(self, history: Tensor) -> Tensor:
        """Return [targets, d_context] ``[user ‖ target ‖ numbers ‖ history]`` for history vectors [targets, dim]."""
        return torch.cat([self.user, self.target, self.numbers, history], dim=-1)


EncodingT = TypeVar("EncodingT", bound=TargetEncoding)


class BaseRanker(nn.Module, Generic[EncodingT]):
    """Dense part of a model, after the lookups; base class of all rankers.

    Attributes:
        is_generative: Whether the ranker predicts action sequences, which :meth:`decode` returns.
        num_towers: Number of task towers; 0 for rankers without one tower per task.
        max_history: Maximum number of impressions before a target in its history.
        used: Inputs that the ranker reads.
        features: Names of their features, by level.
        dropped_ids: Features with identifier dropout.
        objective_tasks: Objectives that the ranker predicts in addition to actions and labels.
        is_timed: [actions] bool, whether the log records the action's time.
        has_positives: [1 + outcomes] bool: true, then whether an action, label or objective has training positives.
    """

    is_generative: bool = False
    num_towers: int = 0
    objective_tasks: tuple[str, ...]
    is_timed: Tensor
    has_positives: Tensor

    def __init__(self, card: DatasetCard, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.max_history = config.max_history or card.max_history
        self.used = UsedInputs.from_card(card, config)
        self.features = self.used.features
        self.dropped_ids = {
            feature.name
            for feature in card.features
            if config.id_dropout and feature.level in ("user", "item") and feature.cardinality >= MIN_ID_ROWS
        }
        self.inputs = LevelInputs(self.used, config.dim)
        d_user, d_item, d_context = (self.inputs.widths[level] for level in ("user", "item", "context"))
        d_session, d_outcome = (config.dim * len(self.features[level]) for level in ("session", "outcome"))
        self.d_item, self.d_session, self.d_outcome = d_item + d_context, d_session, d_outcome
        self._item_widths = [d_item, d_context]
        self.d_target = self.d_item + d_session
        self.d_context = d_user + self.d_target + config.dim
        self.history_statistics = self.numbers = None
        if config.statistics:
            self.history_statistics = HistoryStatistics(
                card, len(self.features["item"]), FEEDBACK in self.features["outcome"]
            )
            num_inputs = len(self.used.statistics) + self.history_statistics.num_statistics
            self.numbers = NumericInputs(num_inputs, 2 * config.dim, config.dropout)
            self.d_context += 2 * config.dim
        timed = torch.tensor([name in card.timed_actions for name in card.actions])
        self.register_buffer("is_timed", timed, persistent=False)
        outcomes = [*card.predicted_actions, *card.labels, *card.objectives]
        positives = torch.tensor([True, *(card.base_rate[name] > 0 for name in outcomes)])
        self.register_buffer("has_positives", positives, persistent=False)
        self._outcome_counts = [len(card.predicted_actions), len(card.labels), len(card.objectives)]
        self._all_have_positives = bool(positives.all())

    @property
    def timed_actions(self) -> Tensor:
        """Codes [times] of the actions whose time the log records."""
        return self.is_timed.nonzero().squeeze(1)

    @property
    def trained_outcomes(self) -> TrainedOutcomes | None:
        """Outcomes with positives in training; None if all have some."""
        if self._all_have_positives:
            return None
        true, actions, labels, objectives = self.has_positives.split([1, *self._outcome_counts])
        return TrainedOutcomes(torch.cat([true, actions, true]), labels, objectives)

    def forward(self, rows: dict[str, JaggedTensor], batch: WindowBatch) -> RankerOutput:
        """Return the predictions that the losses need, given the looked-up rows of every table."""
        raise NotImplementedError

    def encode(self, rows: dict[str, JaggedTensor], batch: WindowBatch, actions: Tensor | None = None) -> EncodingT:
        """Encode targets without their actions; ranking needs nothing else.

        Args:
            rows: Looked-up rows of every table.
            batch: Targets and their history.
            actions: Result of :meth:`encode_actions`, if computed before.
        """
        raise NotImplementedError

    def encode_actions(self, rows: dict[str, JaggedTensor], batch: WindowBatch) -> Tensor:
        """Return [keys, d] encoded actions inside the impressions of the history; independent of any target."""
        raise NotImplementedError

    def cache_token_table(self, rows: Mapping[str, JaggedTensor]) -> None:
        """Precompute tensors that depend only on weights and full tables; both must not change until :meth:`train`.

        Args:
            rows: Looked-up rows of the full tables.
        """

    def marginals(self, targets: EncodingT, max_unexplored_mass: float) -> ActionMarginals:
        """Return the probability and expected time of each action in ``targets``.

        Args:
            targets: Result of :meth:`encode`.
            max_unexplored_mass: Upper bound on the unexplored mass of every target.
        """
        raise NotImplementedError

    def decode(self, targets: EncodingT, width: int) -> DecodedSequences:
        """Return the ``width`` most probable action sequences of ``targets``; only if :attr:`is_generative`."""
        raise NotImplementedError

    def target_item_embeddings(self, rows: dict[str, JaggedTensor], batch: WindowBatch) -> Tensor:
        """Return [targets, d_item] embeddings of the targets' items, and of the context at query time."""
        return self._target_items(self._embed_features(_values(rows), batch, "item", "context"), batch)

    def history_item_embeddings(self, rows: dict[str, JaggedTensor], batch: WindowBatch) -> Tensor:
        """Return [keys, d_item] embeddings of the history's item and context inputs."""
        return self._embed_features(_values(rows), batch, "item", "context").index_select(0, batch.history_index)

    def _embed(self, rows: dict[str, JaggedTensor], batch: WindowBatch, layout: WindowLayout) -> FeatureEmbeddings:
        looked_up = _values(rows)
        item = self._embed_features(looked_up, batch, "item", "context")
        gap = looked_up[GAP].index_select(
            0, log_bucketize(seconds_since_previous(batch), self.config.time_buckets, self.config.max_gap_s)
        )
        session = _embed_from_full_tables(looked_up, batch.session, item)
        target = self._target_items(item, batch)
        user = target[:, :0]
        if self.inputs.widths["user"]:
            user = self._embed_features(looked_up, batch, "user").index_select(0, batch.target_window)
        numbers = statistics = target[:, :0]
        if self.numbers is not None and self.history_statistics is not None:
            statistics = self.history_statistics(batch, layout)
            numbers = self.numbers(torch.cat([self.used.read_statistics(batch), statistics], dim=1))
        return FeatureEmbeddings(
            item=item.index_select(0, batch.history_index),
            gap=gap,
            session=session.index_select(0, batch.history_index),
            outcome=_embed_from_full_tables(looked_up, batch.outcome, gap),
            target=torch.cat([target, session.index_select(0, batch.query_index)], dim=-1),
            user=user,
            numbers=numbers,
            history_statistics=statistics,
        )

    def _action_tokens(self, rows: dict[str, JaggedTensor], batch: WindowBatch) -> Tensor:
        """Return [key tokens, 2·dim] ``[time-bucket ‖ action]`` embeddings of the history, concatenated over keys."""
        offset_s, action = batch.offset_s[batch.history_token], batch.action[batch.history_token]
        if not self.config.use_action_times:
            offset_s = torch.where(action > 0, torch.nan, 0.0)
        elif not self.config.use_action_order:
            action, offset_s = canonicalize_order(action, offset_s, len(self.is_timed))
        time = rows[TIME].values()[log_bucketize(offset_s, self.config.time_buckets, self.config.max_action_time_s)]
        return torch.cat([time, rows[ACTION].values()[action]], dim=-1)

    def _embed_features(self, looked_up: dict[str, Tensor], batch: WindowBatch, *levels: FeatureLevel) -> Tensor:
        """Return [windows or impressions, d] inputs of the levels (windows for the user level)."""
        names = [name for level in levels for name in self.features[level]]
        rows = {name: self._drop_ids(name, looked_up[name], batch) for name in names}
        embedded: Tensor = self.inputs(rows, batch, *levels)
        return embedded

    def _drop_ids(self, feature: str, rows: Tensor, batch: WindowBatch) -> Tensor:
        """Return looked-up rows, of which training replaces a random share by the first one, "unknown"."""
        if not self.training or feature not in self.dropped_ids or feature not in batch.row_index:
            return rows
        dropped = torch.rand(len(rows), 1, device=rows.device) < self.config.id_dropout
        return torch.where(dropped, rows[:1], rows)

    def _target_items(self, embeddings: Tensor, batch: WindowBatch) -> Tensor:
        """Return [targets, d_item] of the targets, given item and context inputs [impressions, d_item]."""
        # Context comes from query time: the hour or tab of a later impression would reveal that the user stayed.
        item, context = embeddings.split(self._item_widths, dim=-1)
        return torch.cat([item.index_select(0, batch.target), context.index_select(0, batch.query_index)], dim=-1)

    def _layout(
        self, batch: WindowBatch, positive: Tensor | None = None, negative: Tensor | None = None
    ) -> WindowLayout:
        """Return the layout in which each target sees its last ``max_history`` impressions that had ended.

        Args:
            batch: Targets and their history.
            positive: [windows, max keys] bool mask of the positive view; None without views.
            negative: [windows, max keys] bool mask of the negative view; None without views.
        """
        column = torch.arange(batch.history_shape[1], device=batch.history_column.device)

        # A target's features are those at query time: for a candidate, the time of its request.
        start, end = (values[:, None] for values in history_intervals(batch))
        now = pad_queries(batch, batch.ts_ms[batch.query_index])[..., None]
        history_end = pad_queries(batch, batch.history_end)[..., None]
        before = (column < history_end) & (column >= history_end - self.max_history)
        attention_mask = before & (start < now) & (end <= now)
        recency = None
        if self.config.recency_bias:
            seconds = (now - start).float() / 1000
            recency = log_bucketize(seconds, self.config.time_buckets, self.config.max_gap_s)
        matches = None
        if self.config.match_bias or self.config.statistics:
            matches = item_matches(batch, self.features["item"])
        return WindowLayout(
            batch.history_window,
            batch.history_column,
            batch.history_shape,
            batch.target_window,
            batch.target_column,
            batch.target_shape,
            attention_mask,
            recency,
            matches,
            positive,
            negative,
        )


class RankingModel(nn.Module):
    """Embedding tables (to be sharded) and a ranker on top.

    Args:
        card: Dataset card.
        config: Configuration of the run.
        ranker_class: Class of the ranker.
        device: Device of the tables; with ``meta``, sharding allocates them.

    Attributes:
        tables: Names and sizes of the tables.
    """

    ranker: BaseRanker[Any]

    def __init__(
        self, card: DatasetCard, config: Config, ranker_class: type[BaseRanker[Any]], device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.tables = EmbeddingTables.from_card(card, config.model)
        # Rows of full tables, which every token reads, start at unit norm. Rows of ids start near zero, as some of
        # them are never trained.
        scales = dict.fromkeys(self.tables.rows, config.model.embedding_init_scale)
        scales |= dict.fromkeys(self.tables.full_tables, (3 / config.model.dim) ** 0.5)
        self.embeddings = EmbeddingCollection(
            device=device,
            tables=[
                EmbeddingConfig(
                    name=module_key(name),
                    embedding_dim=config.model.dim,
                    num_embeddings=rows,
                    feature_names=[name],
                    init_fn=partial(_uniform, scale=scales[name]),
                    data_type=DTYPES[config.sharding.dtype],
                )
                for name, rows in self.tables.rows.items()
            ],
        )
        self.ranker = ranker_class(card, config.model)

    def forward(self, batch: WindowBatch) -> RankerOutput:
        # Only these two calls: training pipelines trace this method to overlap lookups with computation.
        return self.ranker(self.embeddings(batch.sparse), batch)

    def encode(self, batch: WindowBatch, actions: Tensor | None = None) -> TargetEncoding:
        """Encode targets without their actions, see :meth:`BaseRanker.encode`."""
        return self.ranker.encode(self.embeddings(batch.sparse), batch, actions)


def _values(rows: dict[str, JaggedTensor]) -> dict[str, Tensor]:
    return {name: jagged.values() for name, jagged in rows.items()}


def _embed_from_full_tables(looked_up: dict[str, Tensor], features: dict[str, Tensor], like: Tensor) -> Tensor:
    """Return [n, d] concatenated embeddings of the used ``features`` [n], from full tables.

    Without any used feature the result is [n, 0], where ``like`` [n, *] gives n, dtype and device.
    """
    rows = [looked_up[name].index_select(0, values) for name, values in features.items() if name in looked_up]
    return torch.cat([like[:, :0], *rows], dim=-1)


def _uniform(weight: Tensor, scale: float) -> Tensor:
    return nn.init.uniform_(weight, -scale, scale)
