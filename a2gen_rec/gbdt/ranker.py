"""Boosters as a ranker: predictions in the form that losses, metrics and prediction files read."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchrec import JaggedTensor

from a2gen_rec.config import Config
from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.schema import DatasetCard, FeatureLevel
from a2gen_rec.gbdt.rows import latest_columns, latest_rows
from a2gen_rec.models.base import BaseRanker
from a2gen_rec.models.baselines.towers import TowerOutput, tower_marginals
from a2gen_rec.models.history_statistics import HistoryStatistics
from a2gen_rec.nn.marginals import ActionMarginals

_LEVELS: tuple[FeatureLevel, ...] = ("user", "item", "context")


@dataclass(frozen=True)
class Task:
    """Outcome with a booster of its own.

    Attributes:
        outcome: Action, label or objective.
        kind: ``occurrence`` (log-odds), or ``time`` of an action in log1p seconds.
        constant: Prediction without a booster: training log-odds, or training median of log1p seconds.
    """

    outcome: str
    kind: str
    constant: float


class GBDTRanker(BaseRanker[TowerOutput]):
    """Ranker without embeddings: one booster per task on flat rows.

    Args:
        card: Dataset card.
        config: Configuration of the run.
        boosters: (outcome, kind) -> LightGBM booster; tasks without one have a constant prediction.

    Attributes:
        tasks: All tasks: occurrences of actions, labels and objectives, then times by action.
        columns: Names of the columns of :meth:`rows`.
    """

    history_statistics: HistoryStatistics

    def __init__(
        self, card: DatasetCard, config: Config, boosters: Mapping[tuple[str, str], Any] | None = None
    ) -> None:
        # Outcomes of the latest impressions are those of the history statistics, so these always exist.
        super().__init__(card, replace(config.model, statistics=True, recency_bias=False))
        self.numbers = None
        self.has_statistics = config.model.statistics
        self.boosters, self.threads = dict(boosters or {}), config.gbdt.threads
        self.objective_tasks = tuple(card.objectives) if config.model.predict_objectives else ()
        small = {feature.name for feature in card.features if feature.cardinality <= config.gbdt.max_cardinality}
        self.columns_by_level = {level: [name for name in self.features[level] if name in small] for level in _LEVELS}
        occurrences = [*card.predicted_actions, *card.labels, *self.objective_tasks]
        rates = torch.logit(torch.tensor([card.base_rate[name] for name in occurrences]), eps=1e-4).tolist()
        times = [name for name in card.actions if name in card.timed_actions]
        medians = [float(np.nan_to_num(np.log1p(card.median_time_s.get(name, 0.0)))) for name in times]
        self.tasks = [
            *(Task(name, "occurrence", value) for name, value in zip(occurrences, rates, strict=True)),
            *(Task(name, "time", value) for name, value in zip(times, medians, strict=True)),
        ]
        self._counts = [len(card.predicted_actions), len(card.labels), len(self.objective_tasks), len(times)]
        statistics = [f"{statistic.feature}: {statistic.outcome}" for statistic in card.statistics]
        self._num_item_numbers = len(card.numbers_at("item"))
        self.columns = [
            *(name for level in _LEVELS for name in self.columns_by_level[level]),
            *(number.name for level in _LEVELS for number in card.numbers_at(level)),
            *(f"{vector.name} {index}" for vector in card.vectors for index in range(vector.width)),
            *self.features["session"],
            *([*statistics, *self.history_statistics.names(self.features["item"])] if self.has_statistics else []),
            *latest_columns(self.history_statistics, self.features["item"]),
        ]

    def rows(self, batch: WindowBatch) -> Tensor:
        """Return [targets, columns] float32: table rows of small features, numbers, vectors, statistics, and latest
        impressions. A multi-valued feature has the row of its first value.

        Everything is known at the query time: outcomes are those of visible impressions.
        """
        indices = {"user": batch.target_window, "item": batch.target, "context": batch.query_index}
        parts = [
            _first_rows(batch, name)[indices[level]][:, None]
            for level in _LEVELS
            for name in self.columns_by_level[level]
        ]
        item, context = batch.numbers.tensor_split([self._num_item_numbers], dim=1)
        parts += [batch.user_numbers[batch.target_window], item[batch.target], context[batch.query_index]]
        parts += [values[batch.vector_index[batch.target]] for values in batch.vectors.values()]
        parts += [batch.session[name][batch.query_index][:, None] for name in self.features["session"]]
        layout = self._layout(batch)
        if self.has_statistics:
            parts += [batch.statistics, self.history_statistics(batch, layout)]
        parts.append(latest_rows(batch, layout, self.history_statistics))
        return torch.cat([part.float() for part in parts], dim=1)

    def forward(self, rows: dict[str, JaggedTensor], batch: WindowBatch) -> TowerOutput:
        return self.encode(rows, batch)

    def encode(self, rows: dict[str, JaggedTensor], batch: WindowBatch, actions: Tensor | None = None) -> TowerOutput:
        flat = self.rows(batch)
        columns = [torch.from_numpy(self._predict(task, flat.numpy())) for task in self.tasks]
        predicted = torch.stack([flat.new_zeros(len(flat)), *columns], dim=1)[:, 1:].float()
        events, labels, objectives, times = predicted.split(self._counts, dim=1)
        time = torch.zeros(len(flat), len(self.is_timed)).masked_scatter(self.is_timed, times.clamp(min=0))
        return TowerOutput(flat[:, :0], labels, objectives, None, events, time, trained=self.trained_outcomes)

    def marginals(self, targets: TowerOutput, max_unexplored_mass: float) -> ActionMarginals:
        """Return the boosters' predictions; the unexplored mass is 0."""
        return tower_marginals(targets, self.is_timed)

    def _predict(self, task: Task, rows: np.ndarray) -> np.ndarray:
        """Return [n] raw scores of a task."""
        booster = self.boosters.get((task.outcome, task.kind))
        if booster is None:
            return np.full(len(rows), task.constant)
        scores: np.ndarray = booster.predict(rows, raw_score=True, num_threads=self.threads)
        return scores


class GBDTModel(nn.Module):
    """Boosters as a model: batch -> predictions, as :class:`~a2gen_rec.models.base.RankingModel`."""

    def __init__(self, ranker: GBDTRanker) -> None:
        super().__init__()
        self.ranker = ranker

    def forward(self, batch: WindowBatch) -> TowerOutput:
        return self.ranker({}, batch)


def _first_rows(batch: WindowBatch, feature: str) -> Tensor:
    """Return the table rows of a feature, [windows] or [impressions]; of the first value of a multi-valued one."""
    ids = batch.ids(feature)
    return ids[batch.bags[feature].offsets] if feature in batch.bags else ids
