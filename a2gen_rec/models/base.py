"""What all rankers share: embedding tables to be sharded, and the features of targets and of their past."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor, nn
from torchrec import EmbeddingCollection, EmbeddingConfig, JaggedTensor

from a2gen_rec.config import Config, ModelConfig
from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.schema import DatasetCard, FeatureLevel
from a2gen_rec.models.embedding_tables import ACTION, DTYPES, GAP, TIME, full_tables, is_used_by, table_rows
from a2gen_rec.nn.canonical_order import canonicalize_order
from a2gen_rec.nn.encoder import WindowLayout, log_bucketize
from a2gen_rec.nn.marginals import ActionMarginals
from a2gen_rec.utils.jagged import jagged_to_padded_dense


@dataclass(frozen=True)
class TargetEncoding:
    """The targets of a batch, before anything happens in them.

    Attributes:
        context: [targets, d_context] what all predictions are made from.
        label_logits: [targets, labels].
        objective_logits: [targets, objectives], none of them if they are not predicted.
        watch_time: [targets] in log1p seconds; None if not predicted beside the actions' times.
    """

    context: Tensor
    label_logits: Tensor
    objective_logits: Tensor
    watch_time: Tensor | None


class FeatureEmbeddings(NamedTuple):
    """Embeddings of a batch, concatenated.

    Attributes:
        item: [keys, d_item] what was shown in the impressions that targets may see: item and context features.
        gap: [keys, dim] of the time since the impression before.
        session: [keys, d_session]; outcome: [keys, d_outcome].
        target: [targets, d_target] what is known of the targets: item, context and session features.
        user: [targets, d_user].
    """

    item: Tensor
    gap: Tensor
    session: Tensor
    outcome: Tensor
    target: Tensor
    user: Tensor

    def side_features(self) -> Tensor:
        """[keys, dim + d_session + d_outcome] what is known of an impression beside what was shown and done."""
        return torch.cat([self.gap, self.session, self.outcome], dim=-1)

    def context(self, history: Tensor) -> Tensor:
        """[targets, d_context] ``[user ‖ target ‖ history]``, given the history vectors [targets, dim]."""
        return torch.cat([self.user, self.target, history], dim=-1)


EncodingT = TypeVar("EncodingT", bound=TargetEncoding)


class BaseRanker(nn.Module, Generic[EncodingT]):
    """Everything after the lookups; the base of all rankers.

    Attributes:
        generates: whether it predicts sequences of actions, which can be decoded.
        history: most impressions before a target that it sees.
        features: names of those it reads, by level.
        tasks: objectives that it predicts beside actions and labels.
        timed: [actions] bool, whether the log records the action's time.
    """

    is_generative: bool = False
    objective_tasks: tuple[str, ...]
    is_timed: Tensor

    def __init__(self, card: DatasetCard, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.max_history = config.max_history or card.max_history
        self.features = {
            level: [feature.name for feature in card.features_at(level) if is_used_by(config, feature)]
            for level in get_args(FeatureLevel)
        }
        d_user, d_shown, d_context, d_session, d_outcome = (
            config.dim * len(self.features[level]) for level in get_args(FeatureLevel)
        )
        self.d_item, self.d_session, self.d_outcome = d_shown + d_context, d_session, d_outcome
        self._d_shown = [d_shown, d_context]
        self.d_target = self.d_item + d_session
        self.d_context = d_user + self.d_target + config.dim
        timed = torch.tensor([name in card.timed_actions for name in card.actions])
        self.register_buffer("is_timed", timed, persistent=False)

    def forward(self, rows: dict[str, JaggedTensor], batch: WindowBatch) -> EncodingT:
        """What the losses need, given the looked-up rows of every table."""
        raise NotImplementedError

    def encode(self, rows: dict[str, JaggedTensor], batch: WindowBatch, actions: Tensor | None = None) -> EncodingT:
        """Targets without their actions: all that ranking needs.

        Args:
            rows: looked-up rows of every table.
            actions: of :meth:`encode_actions`, if they are known already.
        """
        raise NotImplementedError

    def encode_actions(self, rows: dict[str, JaggedTensor], batch: WindowBatch) -> Tensor:
        """[keys, d] what users did inside the impressions that targets may see; of no target's concern."""
        raise NotImplementedError

    def cache_token_table(self, rows: Mapping[str, JaggedTensor]) -> None:
        """Compute once what depends on weights and small tables alone, which are not to change until :meth:`train`.

        Args:
            rows: of the tables that are looked up whole.
        """

    def marginals(self, targets: EncodingT, max_error: float) -> ActionMarginals:
        """Whether and when each action happens in ``targets``; ``max_error``: bound on every remainder."""
        raise NotImplementedError

    def target_item_embeddings(self, rows: dict[str, JaggedTensor], batch: WindowBatch) -> Tensor:
        """[targets, d_item] embeddings of what is shown, and of the context at the moment it is judged."""
        return self._at_targets(self._embedded(_values(rows), batch, "item", "context"), batch)

    def history_item_embeddings(self, rows: dict[str, JaggedTensor], batch: WindowBatch) -> Tensor:
        """[keys, d_item] embeddings of what was shown in the past: item and context features."""
        return self._embedded(_values(rows), batch, "item", "context").index_select(0, batch.history_index)

    def _inputs(self, rows: dict[str, JaggedTensor], batch: WindowBatch) -> FeatureEmbeddings:
        looked_up = _values(rows)
        shown = self._embedded(looked_up, batch, "item", "context")
        gap = looked_up[GAP].index_select(
            0, log_bucketize(seconds_since_previous(batch), self.config.time_buckets, self.config.max_gap_s)
        )
        session = _whole(looked_up, batch.session, shown)
        target = self._at_targets(shown, batch)
        user = target[:, :0]
        if self.features["user"]:
            user = self._embedded(looked_up, batch, "user").index_select(0, batch.target_window)
        return FeatureEmbeddings(
            item=shown.index_select(0, batch.history_index),
            gap=gap,
            session=session.index_select(0, batch.history_index),
            outcome=_whole(looked_up, batch.outcome, gap),
            target=torch.cat([target, session.index_select(0, batch.query_index)], dim=-1),
            user=user,
        )

    def _action_tokens(self, rows: dict[str, JaggedTensor], batch: WindowBatch) -> Tensor:
        """[key tokens, 2·dim] ``[time-bucket ‖ action]`` embeddings of the past, keys one after another."""
        offset_s, action = batch.offset_s[batch.history_token], batch.action[batch.history_token]
        if not self.config.use_action_times:
            offset_s = torch.where(action > 0, torch.nan, 0.0)
        elif not self.config.use_action_order:
            action, offset_s = canonicalize_order(action, offset_s, len(self.is_timed))
        time = rows[TIME].values()[log_bucketize(offset_s, self.config.time_buckets, self.config.max_action_time_s)]
        return torch.cat([time, rows[ACTION].values()[action]], dim=-1)

    def _embedded(self, looked_up: dict[str, Tensor], batch: WindowBatch, *levels: FeatureLevel) -> Tensor:
        """[windows or impressions, d] rows of the user level's features, or of others, side by side."""
        names = [name for level in levels for name in self.features[level]]
        return torch.cat([batch.expand_rows(name, looked_up[name]) for name in names], dim=-1)

    def _at_targets(self, shown: Tensor, batch: WindowBatch) -> Tensor:
        """[targets, d_item] of the targets, given item and context features [impressions, d_item]."""
        # The hour or tab in which a candidate was shown later would tell that, and whether, the user stayed.
        item, context = shown.split(self._d_shown, dim=-1)
        return torch.cat([item.index_select(0, batch.target), context.index_select(0, batch.query_index)], dim=-1)

    def _layout(
        self, batch: WindowBatch, positive: Tensor | None = None, negative: Tensor | None = None
    ) -> WindowLayout:
        """A target sees the ``history`` impressions right before ``history_end``, of those the ones that had ended."""
        column = torch.arange(batch.history_shape[1], device=batch.history_column.device)

        # What is known of a target is known at its moment: for a candidate, that of its request.
        begin, end = (values[:, None] for values in history_intervals(batch))
        now = pad_queries(batch, batch.ts_ms[batch.query_index])[..., None]
        history_end = pad_queries(batch, batch.history_end)[..., None]
        before = (column < history_end) & (column >= history_end - self.max_history)
        visible = before & (begin < now) & (end <= now)
        recency = None
        if self.config.recency_bias:
            seconds = (now - begin).float() / 1000
            recency = log_bucketize(seconds, self.config.time_buckets, self.config.max_gap_s)
        matches = None
        if self.config.match_bias:
            ids = stack_ids(batch, self.features["item"])
            matches = feature_matches(pad_targets(batch, ids[batch.target]), pad_history(batch, ids, 0))
        return WindowLayout(
            batch.history_window,
            batch.history_column,
            batch.history_shape,
            batch.target_window,
            batch.target_column,
            batch.target_shape,
            visible,
            recency,
            matches,
            positive,
            negative,
        )


class RankingModel(nn.Module):
    """Embedding tables (to be sharded) and a ranker on top.

    Args:
        kind: of ranker.
        device: where the tables are made; ``meta`` leaves making them to the sharding.
    """

    ranker: BaseRanker[Any]

    def __init__(
        self, card: DatasetCard, config: Config, kind: type[BaseRanker[Any]], device: torch.device | None = None
    ) -> None:
        super().__init__()
        whole = full_tables(card, config.model)
        # Rows that every token reads begin at unit norm; rows of identifiers, some of them never trained, near zero.
        scales = dict.fromkeys(table_rows(card, config.model), config.model.embedding_init_scale)
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
        self.ranker = kind(card, config.model)

    def forward(self, batch: WindowBatch) -> TargetEncoding:
        # Nothing but these two calls: training pipelines trace this method to overlap the lookups.
        return self.ranker(self.embeddings(batch.sparse), batch)

    def encode(self, batch: WindowBatch, actions: Tensor | None = None) -> TargetEncoding:
        """Targets without their actions: all that ranking needs. ``actions``: as :meth:`Ranker.encode` takes."""
        return self.ranker.encode(self.embeddings(batch.sparse), batch, actions)


def pad_history(batch: WindowBatch, values: Tensor, fill: int) -> Tensor:
    """[windows, longest, *d] values [impressions, *d] of the impressions that targets may see; ``fill`` beyond them."""
    return jagged_to_padded_dense(
        values[batch.history_index], batch.history_window, batch.history_column, batch.history_shape, fill
    )


def stack_ids(batch: WindowBatch, features: Sequence[str]) -> Tensor:
    """[impressions, features] table rows."""
    return torch.stack([batch.ids(name) for name in features], dim=-1)


def feature_matches(row: Tensor, past: Tensor) -> Tensor:
    """[windows, features, rows, longest] bool, whether a row and a past impression share each feature.

    Args:
        row: [windows, rows, features], past: [windows, longest, features] table rows. 0, unknown, matches nothing.
    """
    known = row.masked_fill(row == 0, -1)
    # Copies: comparing along an axis whose neighbours are apart is several times as slow on CPU.
    known, past = (each.movedim(-1, 1).contiguous() for each in (known, past))
    return known[..., None] == past[:, :, None]


def pad_targets(batch: WindowBatch, values: Tensor) -> Tensor:
    """[windows, most targets, *d] values [targets, *d] of the targets; zero beyond them."""
    return jagged_to_padded_dense(values, batch.target_window, batch.target_column, batch.target_shape)


def pad_queries(batch: WindowBatch, values: Tensor) -> Tensor:
    """[windows, most targets, *d] values [targets, *d] that only targets' moments tell; [windows, 1, *d] where those of
    a window share one."""
    if not batch.single_query_time:
        return pad_targets(batch, values)
    first = (batch.target_column == 0).nonzero().squeeze(1)
    return jagged_to_padded_dense(
        values[first], batch.target_window[first], batch.target_column[first], (batch.target_shape[0], 1)
    )


def history_intervals(batch: WindowBatch) -> tuple[Tensor, Tensor]:
    """[windows, longest] begin and end in ms of the impressions that targets may see; what is none never ends."""
    return pad_history(batch, batch.ts_ms, 0), pad_history(batch, batch.end_ms, torch.iinfo(torch.int64).max)


def seconds_since_previous(batch: WindowBatch) -> Tensor:
    """[keys] seconds since the impression before in the window; NaN for the first."""
    began = batch.ts_ms[batch.history_index]
    seconds = torch.diff(began, prepend=began[:1]).float() / 1000
    return seconds.masked_fill(batch.history_column == 0, torch.nan)


def _values(rows: dict[str, JaggedTensor]) -> dict[str, Tensor]:
    return {name: jagged.values() for name, jagged in rows.items()}


def _whole(looked_up: dict[str, Tensor], features: dict[str, Tensor], like: Tensor) -> Tensor:
    """[n, d] embeddings of those of the ``features`` [n] that the model reads, from tables looked up whole, side by
    side; of ``like`` [n, any], if there are none, the number."""
    rows = [looked_up[name].index_select(0, values) for name, values in features.items() if name in looked_up]
    return torch.cat([like[:, :0], *rows], dim=-1)


def _uniform(weight: Tensor, scale: float) -> Tensor:
    return nn.init.uniform_(weight, -scale, scale)
