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
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.models.base import BaseRanker
from a2gen_rec.models.baselines.towers import TowerOutput, tower_marginals
from a2gen_rec.models.flat_inputs import FlatInputs
from a2gen_rec.models.history_statistics import HistoryStatistics
from a2gen_rec.nn.marginals import ActionMarginals


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
        self.boosters, self.threads = dict(boosters or {}), config.gbdt.threads
        self.objective_tasks = tuple(card.objectives) if config.model.predict_objectives else ()
        occurrences = [*card.predicted_actions, *card.labels, *self.objective_tasks]
        rates = torch.logit(torch.tensor([card.base_rate[name] for name in occurrences]), eps=1e-4).tolist()
        times = [name for name in card.actions if name in card.timed_actions]
        medians = [float(np.nan_to_num(np.log1p(card.median_time_s.get(name, 0.0)))) for name in times]
        self.tasks = [
            *(Task(name, "occurrence", value) for name, value in zip(occurrences, rates, strict=True)),
            *(Task(name, "time", value) for name, value in zip(times, medians, strict=True)),
        ]
        self._counts = [len(card.predicted_actions), len(card.labels), len(self.objective_tasks), len(times)]
        self.flat_inputs = FlatInputs(
            card, self.used, self.history_statistics, config.gbdt.max_cardinality, config.model.statistics
        )
        self.columns = self.flat_inputs.columns

    def rows(self, batch: WindowBatch) -> Tensor:
        """Return [targets, columns] float32, :class:`FlatInputs`."""
        layout = self._layout(batch)
        return self.flat_inputs(batch, layout, self.history_statistics(batch, layout))

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
