"""Sort keys, and the top candidates of requests whose targets have predictions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.columns import CandidateItems
from a2gen_rec.data.schema import EXIT, WATCH_TIME
from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.models.base import BaseRanker
from a2gen_rec.models.ensemble.io import EnsembleCard
from a2gen_rec.models.ensemble.model import Ensemble, EnsembleOutput, Objective
from a2gen_rec.models.scoring import TargetPredictions, prediction_objectives, recent_events
from a2gen_rec.ranking.contributions import Contribution
from a2gen_rec.ranking.timelines import top_timelines
from a2gen_rec.ranking.types import RankQuery, ScoredCandidate, Timeline
from a2gen_rec.utils.jagged import jagged_positions, jagged_to_padded_dense

WATCH, ENSEMBLE = "watch", "ensemble"


@dataclass(frozen=True)
class RankingTask:
    """Candidates of one request with their sort key, which is never empty."""

    items: CandidateItems
    sort_by: str
    request: RankQuery


@dataclass(frozen=True)
class Scorer:
    """Ranker that made the predictions, and its ensemble, if any."""

    card: DatasetCard
    ranker: BaseRanker[Any]
    ensemble: tuple[Ensemble, EnsembleCard] | None = None

    @property
    def objectives(self) -> tuple[Objective, ...]:
        return prediction_objectives(self.card, self.ranker.objective_tasks)

    @property
    def lower_is_better(self) -> set[str]:
        """Names of the objectives where lower values are better."""
        return {objective.name for objective in self.objectives if not objective.higher_is_better}


def sort_keys(card: DatasetCard, objective_tasks: Sequence[str] = (), has_ensemble: bool = False) -> list[str]:
    """Return the available sort keys, the default first; see :func:`resolve_sort_key`."""
    objectives = (name for name in card.objectives if name in objective_tasks)
    outcomes = [*card.predicted_actions, *card.labels, *objectives]
    return [*([ENSEMBLE] if has_ensemble else []), *([WATCH] if EXIT in card.timed_actions else []), *outcomes]


def resolve_sort_key(
    card: DatasetCard, sort_by: str, objective_tasks: Sequence[str] = (), has_ensemble: bool = False
) -> str:
    """Return ``sort_by``, or the default sort key if it is empty.

    Args:
        card: Dataset card.
        sort_by: Requested sort key.
        objective_tasks: Objectives that the model predicts in addition to actions and labels.
        has_ensemble: Whether the model has an ensemble.

    Raises:
        ConfigError: The sort key is unknown.
    """
    choices = sort_keys(card, objective_tasks, has_ensemble)
    if sort_by == ENSEMBLE and not has_ensemble:
        raise ConfigError("cannot sort by ensemble: the run has none; train one with `a2gen ensemble train`")
    if sort_by not in [*choices, ""]:
        raise ConfigError(f"unknown sort key {sort_by!r}; choose one of {', '.join(choices)}")
    if not choices:
        raise UserError(f"the dataset {card.name!r} has no action, label or watch time to sort by")
    return sort_by or choices[0]


def top_candidates(
    scorer: Scorer, predictions: TargetPredictions, batch: WindowBatch, tasks: Sequence[RankingTask]
) -> list[list[ScoredCandidate]]:
    """Return the top candidates of each task, best first; if lower is better, the lowest first.

    Args:
        scorer: Ranker and ensemble.
        predictions: Predictions of all targets of the batch.
        batch: One window per request, whose targets are its candidates.
        tasks: The requests, in the order of the windows.
    """
    objectives, lower_is_better = scorer.objectives, scorer.lower_is_better
    with_watch = EXIT in scorer.card.timed_actions
    outcomes = [objective.name for objective in objectives if objective.name != WATCH_TIME]
    output = None if scorer.ensemble is None else _ensemble_output(*scorer.ensemble, predictions, batch, with_watch)
    top_targets, first = [], 0
    for task in tasks:
        request_targets = slice(first, first + len(task.items.ids))
        if task.sort_by == ENSEMBLE and output is not None:
            value = output.score[request_targets]
        elif task.sort_by == WATCH:
            value = predictions.watch_time[request_targets]
        else:
            value = predictions.probability[request_targets, outcomes.index(task.sort_by)]
        order = value.argsort(descending=task.sort_by not in lower_is_better, stable=True)
        top_targets.append(first + order[: task.request.k])
        first = request_targets.stop
    with_timelines = [
        (targets, task.request)
        for targets, task in zip(top_targets, tasks, strict=True)
        if task.request.include_timelines
    ]
    counts = [max(1, request.num_sequences) for targets, request in with_timelines for _ in targets]
    rows = [targets for targets, _ in with_timelines]
    per_target = iter(
        top_timelines(scorer.ranker, predictions, torch.cat(rows), counts, scorer.card) if with_timelines else []
    )
    ranked, first = [], 0
    for targets, task in zip(top_targets, tasks, strict=True):
        probabilities = predictions.probability[targets].tolist()
        times = torch.expm1(predictions.time[targets]).clamp(min=0).tolist()
        scores = [None] * len(targets) if output is None else output.score[targets].tolist()
        candidates = []
        for index, seconds, probability, score in zip(
            (targets - first).tolist(), times, probabilities, scores, strict=True
        ):
            sequences = next(per_target) if task.request.include_timelines else []
            timeline: tuple[Timeline, float | None] = sequences[0] if sequences else ([], None)
            expected = _expected_times(seconds, scorer.card)
            candidates.append(
                ScoredCandidate(
                    task.items.ids[index],
                    bool(task.items.is_known[index]),
                    dict(zip(outcomes, probability, strict=True)),
                    expected[EXIT],
                    *timeline,
                    score=score,
                    expected_time_s=expected,
                    sequences=sequences[: task.request.num_sequences],
                )
            )
        if output is not None and task.request.explain:
            candidates = _add_explanations(candidates, objectives, output, targets)
        ranked.append(candidates)
        first += len(task.items.ids)
    return ranked


def _expected_times(seconds: Sequence[float], card: DatasetCard) -> dict[str, float | None]:
    times = zip([*card.predicted_actions, EXIT], seconds, strict=True)
    return {name: time if name in card.timed_actions and math.isfinite(time) else None for name, time in times}


def _ensemble_output(
    model: Ensemble, card: EnsembleCard, predictions: TargetPredictions, batch: WindowBatch, with_watch: bool
) -> EnsembleOutput:
    """Return the ensemble's output, one row per target."""

    def padded(values: Tensor) -> Tensor:
        return jagged_to_padded_dense(values, batch.target_window, batch.target_column, batch.target_shape)

    history, length = ensemble_history(card, predictions, batch)
    output = model(padded(predictions.ensemble_inputs(with_watch)), history, length, padded(predictions.context))
    index = (batch.target_window, batch.target_column)
    return EnsembleOutput(output.score[index], output.transform[index], output.weight[index], output.user_embedding)


def ensemble_history(card: EnsembleCard, predictions: TargetPredictions, batch: WindowBatch) -> tuple[Tensor, Tensor]:
    """Return the ensemble's history input of each window, padded [windows, max length, d_event], and its length."""
    first = (batch.target_column == 0).nonzero().squeeze(1)
    events, length = recent_events(batch, first, card.config.max_history_events)
    shape = (len(length), int(length.max()) if len(length) else 0)
    return jagged_to_padded_dense(predictions.event_embedding[events], *jagged_positions(length), shape), length


def _add_explanations(
    candidates: list[ScoredCandidate], objectives: Sequence[Objective], output: EnsembleOutput, targets: Tensor
) -> list[ScoredCandidate]:
    """Return the candidates with the contributions to their scores."""
    explained = []
    rows = zip(candidates, output.transform[targets].tolist(), output.weight[targets].tolist(), strict=True)
    for candidate, transforms, weights in rows:
        explanation = []
        for objective, transform, weight in zip(objectives, transforms, weights, strict=True):
            name, higher_is_better = objective.name, objective.higher_is_better
            if name == WATCH_TIME:
                assert candidate.expected_watch_s is not None
                prediction = candidate.expected_watch_s
                explanation.append(Contribution(name, higher_is_better, prediction, transform, weight, "s"))
            else:
                prediction = candidate.probability[name]
                explanation.append(Contribution(name, higher_is_better, prediction, transform, weight))
        explained.append(replace(candidate, explanation=explanation))
    return explained
