"""Rankers on the hierarchical encoder: A2Gen (arXiv 2604.25834) except the predictor of actions and times."""

import math

import torch
from torch import Tensor, nn
from torchrec import JaggedTensor

from a2gen_rec.config import ModelConfig
from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.schema import EFFECTIVE, EXIT, FEEDBACK, GLANCE, NEGATIVE, UNKNOWN, WATCH_TIME
from a2gen_rec.models.base import MIN_ID_ROWS, BaseRanker, EncodingT, TargetEncoding
from a2gen_rec.models.flat_inputs import FlatInputs
from a2gen_rec.models.wide_towers import WidePredictions, WideTowers
from a2gen_rec.nn.attention import AttentionConfig
from a2gen_rec.nn.dropout import Dropout
from a2gen_rec.nn.encoder import FeedbackViews, HierarchicalEncoder
from a2gen_rec.nn.objectives import MultiObjectiveHead
from a2gen_rec.utils.jagged import jagged_to_padded_dense


class HierarchicalRanker(BaseRanker[EncodingT]):
    """Encoder, label head and objective head. Subclasses add the ``generator``, which predicts actions and times."""

    generator: nn.Module
    small_columns: Tensor

    def __init__(self, card: DatasetCard, config: ModelConfig) -> None:
        super().__init__(card, config)
        dim = config.dim
        self.encoder = HierarchicalEncoder(
            self.d_item,
            self._attention_config(),
            config.time_buckets if config.recency_bias else 0,
            len(self.features["item"]) if config.match_bias else 0,
            config.attention_impl,
            self.d_session,
            self.d_outcome,
            self._views(),
            config.action_pooling,
            config.item_pooling,
        )
        self.generator = self._make_generator(card)
        self.objective_tasks, self.label_count = objective_tasks(card, config), len(card.labels)
        rates = torch.tensor([card.base_rate[name] for name in [*card.labels, *card.objectives]])
        label_logits = torch.logit(rates[: len(card.labels)], eps=1e-4)
        self.labels = self._tower(self.d_context, label_logits) if card.labels and not self.objective_tasks else None
        self.objectives = (
            MultiObjectiveHead(
                self.d_context,
                dim,
                len(card.labels) + len(card.objectives),
                WATCH_TIME in self.objective_tasks,
                config.shared_experts,
                config.task_experts,
                config.tower_mlp_ratio,
                config.dropout,
            )
            if self.objective_tasks
            else None
        )
        if self.objectives is not None:
            self.objectives.init_output_bias(rates, math.log1p(card.median_time_s.get(EXIT, math.nan)))
        self.dropout = Dropout(config.dropout)
        self.flat_inputs = self.wide = None
        has_outcomes = bool(card.predicted_actions or card.labels or self.objective_tasks or card.timed_actions)
        if self.history_statistics is not None and config.wide_dim and has_outcomes:
            self.flat_inputs = FlatInputs(card, self.used, self.history_statistics, max_cardinality=0)
            small = self.inputs.columns(
                {feature.name for feature in card.features if feature.cardinality < MIN_ID_ROWS}
            )
            self.register_buffer("small_columns", torch.tensor(small, dtype=torch.int64), persistent=False)
            objectives = card.objectives if self.objective_tasks else ()
            self.wide = WideTowers(
                card, self.flat_inputs, len(small), dim, objectives, config.wide_dim, config.wide_dropout
            )

    def _attention_config(self) -> AttentionConfig:
        """Return the hyper-parameters that encoder and generator share."""
        config = self.config
        return AttentionConfig(
            config.dim,
            config.num_heads,
            config.residual,
            config.mlp_ratio,
            config.dropout,
            config.context_in_query,
            config.use_head_gate,
        )

    def _make_generator(self, card: DatasetCard) -> nn.Module:
        """Return the predictor of actions and times from [n, d_context], initialized to the card's rates and times."""
        raise NotImplementedError

    def encode_actions(self, rows: dict[str, JaggedTensor], batch: WindowBatch) -> Tensor:
        """Return [keys, dim] encoded actions inside the impressions of the history; independent of any target."""
        return self._encode_actions(rows, batch, self.history_item_embeddings(rows, batch))

    def _context(
        self, rows: dict[str, JaggedTensor], batch: WindowBatch, actions: Tensor | None
    ) -> tuple[Tensor, WidePredictions | None]:
        """Return [targets, d_context] contexts after dropout, and the wide part's predictions; ``actions`` as in
        :meth:`encode`."""
        layout = self._layout(batch, *self._view_masks(batch))
        inputs = self._embed(rows, batch, layout)
        if actions is None:
            actions = self._encode_actions(rows, batch, inputs.item)
        history = self.encoder(inputs.item, actions, inputs.side_features(), inputs.target, layout)
        wide = None
        if self.wide is not None and self.flat_inputs is not None:
            embeddings = torch.cat([inputs.user, inputs.target], dim=1).unflatten(1, (-1, self.config.dim))
            values = self.flat_inputs(batch, layout, inputs.history_statistics)
            wide = self.wide(values, embeddings.index_select(1, self.small_columns))
        return self.dropout(inputs.context(history)), wide

    def _predict(self, context: Tensor, wide: WidePredictions | None) -> TargetEncoding:
        """Return the predicted labels and objectives of targets, given their ``context``."""
        empty = context[:, :0]
        if self.objectives is None:
            labels = empty if self.labels is None else self.labels(context)
            return TargetEncoding(context, labels, empty, None, wide=wide)
        predicted = self.objectives(context)
        labels, objectives = predicted.logits.tensor_split([self.label_count], dim=1)
        return TargetEncoding(context, labels, objectives, predicted.watch_time, wide=wide)

    def _encode_actions(self, rows: dict[str, JaggedTensor], batch: WindowBatch, item: Tensor) -> Tensor:
        return self.encoder.encode_actions(self._action_tokens(rows, batch), item, batch.history_buckets)

    def _views(self) -> FeedbackViews:
        encoding = self.config.feedback_encoding
        has_feedback = FEEDBACK in self.features["outcome"]
        return encoding if has_feedback and encoding != "tokens" else "none"

    def _view_masks(self, batch: WindowBatch) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Return the masks [windows, max keys] bool of the positive and of the negative view."""
        if self._views() == "none":
            return None, None
        level = batch.outcome[FEEDBACK]
        padded = jagged_to_padded_dense(level, batch.history_window, batch.history_column, batch.history_shape, UNKNOWN)
        return padded >= EFFECTIVE, (padded == NEGATIVE) | (padded == GLANCE)

    def _tower(self, d_context: int, initial_output: Tensor) -> nn.Sequential:
        """Return an MLP on contexts that initially outputs ``initial_output`` [outputs] for every context."""
        hidden = int(self.config.dim * self.config.tower_mlp_ratio)
        last = nn.Linear(hidden, len(initial_output))
        nn.init.zeros_(last.weight)
        with torch.no_grad():
            last.bias.copy_(initial_output)
        first = nn.Linear(d_context, hidden)
        return nn.Sequential(nn.LayerNorm(d_context), first, nn.GELU(), Dropout(self.config.dropout), last)


def objective_tasks(card: DatasetCard, config: ModelConfig) -> tuple[str, ...]:
    """Return the objectives of the card and, if the log records it, the watch time; none if not configured."""
    if not config.predict_objectives:
        return ()
    return (*card.objectives, *([WATCH_TIME] if EXIT in card.timed_actions else []))
