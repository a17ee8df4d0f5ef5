"""The best candidates of requests whose targets a ranker has judged, and what is told of each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.columns import CandidateItems
from a2gen_rec.data.schema import EXIT, WATCH_TIME, DatasetCard
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
    """A request's candidates, and what they are ordered ``by``, which is never empty."""

    items: CandidateItems
    by: str
    request: RankQuery


@dataclass(frozen=True)
class Scorer:
    """What orders judged targets: the ranker that judged them, and its ensemble, if there is one."""

    card: DatasetCard
    ranker: BaseRanker[Any]
    ensemble: tuple[Ensemble, EnsembleCard] | None = None

    @property
    def objectives(self) -> tuple[Objective, ...]:
        return prediction_objectives(self.card, self.ranker.objective_tasks)

    @property
    def lower_is_better(self) -> set[str]:
        """Names of what less is better of."""
        return {objective.name for objective in self.objectives if not objective.higher_is_better}


def sort_keys(card: DatasetCard, tasks: Sequence[str] = (), fused: bool = False) -> list[str]:
    """What there is to rank by, the default first; see :func:`order_by`."""
    outcomes = [*card.predicted_actions, *card.labels, *(name for name in card.objectives if name in tasks)]
    return [*([ENSEMBLE] if fused else []), *([WATCH] if EXIT in card.timed_actions else []), *outcomes]


def resolve_sort_key(card: DatasetCard, by: str, tasks: Sequence[str] = (), fused: bool = False) -> str:
    """What to rank by, ``by`` or the default.

    Args:
        tasks: that the model predicts beside actions and labels; fused: whether there is an ensemble.

    Raises:
        ConfigError: there is nothing of that name.
    """
    choices = sort_keys(card, tasks, fused)
    if by == ENSEMBLE and not fused:
        raise ConfigError("cannot rank by ensemble: the run has none; `a2gen ensemble train` trains one")
    if by not in [*choices, ""]:
        raise ConfigError(f"cannot rank by {by!r}; this run predicts {', '.join(choices)}")
    if not choices:
        raise UserError(f"the dataset {card.name!r} has no action, label or watch time to rank by")
    return by or choices[0]


def top_candidates(
    scorer: Scorer, predictions: TargetPredictions, batch: WindowBatch, orders: Sequence[RankingTask]
) -> list[list[ScoredCandidate]]:
    """The best of each request's items, best first; where less is better, those with the least.

    Args:
        batch: a window for each request, whose targets are its items.
    """
    named, less, with_watch = scorer.objectives, scorer.lower_is_better, EXIT in scorer.card.timed_actions
    outcomes = [objective.name for objective in named if objective.name != WATCH_TIME]
    output = None if scorer.ensemble is None else _fuse(*scorer.ensemble, predictions, batch, with_watch)
    places, first = [], 0
    for order in orders:
        mine = slice(first, first + len(order.items.ids))
        if order.by == ENSEMBLE and output is not None:
            value = output.score[mine]
        elif order.by == WATCH:
            value = predictions.watch_time[mine]
        else:
            value = predictions.probability[mine, outcomes.index(order.by)]
        places.append(first + value.argsort(descending=order.by not in less, stable=True)[: order.request.k])
        first = mine.stop
    told = [
        (place, order.request) for place, order in zip(places, orders, strict=True) if order.request.include_timelines
    ]
    most = [max(1, request.num_sequences) for place, request in told for _ in place]
    best = [place for place, _ in told]
    likely = iter(top_timelines(scorer.ranker, predictions, torch.cat(best), most, scorer.card) if told else [])
    found, first = [], 0
    for place, order in zip(places, orders, strict=True):
        chances = predictions.probability[place].tolist()
        times = torch.expm1(predictions.time[place]).clamp(min=0).tolist()
        scores = [math.nan] * len(place) if output is None else output.score[place].tolist()
        listed = []
        for at, seconds, chance, score in zip((place - first).tolist(), times, chances, scores, strict=True):
            sequences = next(likely) if order.request.include_timelines else []
            timeline: tuple[Timeline, float] = sequences[0] if sequences else ([], math.nan)
            expected = _expected_times(seconds, scorer.card)
            listed.append(
                ScoredCandidate(
                    order.items.ids[at],
                    bool(order.items.is_known[at]),
                    dict(zip(outcomes, chance, strict=True)),
                    expected[EXIT],
                    *timeline,
                    score=score,
                    expected_time_s=expected,
                    sequences=sequences[: order.request.num_sequences],
                )
            )
        if output is not None and order.request.explain:
            listed = _explained(listed, named, output, place)
        found.append(listed)
        first += len(order.items.ids)
    return found


def _expected_times(seconds: Sequence[float], card: DatasetCard) -> dict[str, float | None]:
    named = zip([*card.predicted_actions, EXIT], seconds, strict=True)
    return {name: time if name in card.timed_actions and math.isfinite(time) else None for name, time in named}


def _fuse(
    model: Ensemble, card: EnsembleCard, judged: TargetPredictions, batch: WindowBatch, with_watch: bool
) -> EnsembleOutput:
    """The ensemble's output, a row per target."""

    def padded(values: Tensor) -> Tensor:
        return jagged_to_padded_dense(values, batch.target_window, batch.target_column, batch.target_shape)

    output = model(
        padded(judged.ensemble_inputs(with_watch)), *ensemble_history(card, judged, batch), padded(judged.context)
    )
    at = (batch.target_window, batch.target_column)
    return EnsembleOutput(output.score[at], output.transform[at], output.weight[at], output.user_embedding)


def ensemble_history(card: EnsembleCard, judged: TargetPredictions, batch: WindowBatch) -> tuple[Tensor, Tensor]:
    """What the ensemble reads of each window's user: [windows, most, d_event], padded, and how many there are."""
    first = (batch.target_column == 0).nonzero().squeeze(1)
    seen, length = recent_events(batch, first, card.config.max_history_events)
    most = int(length.max()) if len(length) else 0
    return jagged_to_padded_dense(judged.event_embedding[seen], *jagged_positions(length), (len(length), most)), length


def _explained(
    candidates: list[ScoredCandidate], named: Sequence[Objective], output: EnsembleOutput, place: Tensor
) -> list[ScoredCandidate]:
    """The candidates with what their scores are made of."""
    explained = []
    parts = zip(candidates, output.transform[place].tolist(), output.weight[place].tolist(), strict=True)
    for candidate, transform, weight in parts:
        explanation = []
        for objective, part, share in zip(named, transform, weight, strict=True):
            name, better = objective.name, objective.higher_is_better
            if name == WATCH_TIME:
                assert candidate.expected_watch_s is not None
                explanation.append(Contribution(name, better, candidate.expected_watch_s, part, share, "s"))
            else:
                explanation.append(Contribution(name, better, candidate.probability[name], part, share))
        explained.append(replace(candidate, explanation=explanation))
    return explained
