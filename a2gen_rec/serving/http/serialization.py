"""Content of rankings in responses. Not built from the response models, whose validation would take longer."""

from dataclasses import asdict
from typing import Any

from a2gen_rec.ranking.contributions import Contribution
from a2gen_rec.ranking.types import RankedList, ScoredCandidate, Timeline


def rank_response(ranked: RankedList, fallbacks: list[str]) -> dict[str, Any]:
    """Return the content of a :class:`~a2gen_rec.serving.http.schema.RankResponse`."""
    return {
        "user": ranked.user,
        "user_known": ranked.user_known,
        "history_length": ranked.history_length,
        "sort_by": ranked.sort_by,
        "ascending": ranked.ascending,
        "num_candidates": ranked.num_candidates,
        "unknown_items": ranked.unknown_items,
        "fallbacks": fallbacks,
        "model_version": ranked.model_version,
        "candidates": [_candidate(candidate) for candidate in ranked.candidates],
        "what_if": [asdict(result) for result in ranked.what_if],
    }


def _candidate(candidate: ScoredCandidate) -> dict[str, Any]:
    sequences = [
        {"probability": probability, "steps": _steps(timeline)} for timeline, probability in candidate.sequences
    ]
    return {
        "item": candidate.item,
        "known": candidate.known,
        "score": candidate.score,
        "probability": candidate.probability,
        "expected_watch_s": candidate.expected_watch_s,
        "timeline": _steps(candidate.timeline),
        "timeline_probability": candidate.timeline_probability,
        "sequences": sequences,
        "expected_time_s": candidate.expected_time_s,
        "duration_s": candidate.duration_s,
        "explanation": [_contribution(contribution) for contribution in candidate.explanation],
    }


def _steps(timeline: Timeline) -> list[dict[str, Any]]:
    return [{"action": action, "at_s": at_s} for action, at_s in timeline]


def _contribution(contribution: Contribution) -> dict[str, Any]:
    return {
        "objective": contribution.objective,
        "higher_is_better": contribution.higher_is_better,
        "prediction": contribution.prediction,
        "unit": contribution.unit,
        "transform": contribution.transform,
        "weight": contribution.weight,
        "contribution": contribution.contribution,
    }
