"""Metrics of objectives and watch time: METHODS §5, §8.

The generator also predicts watch times and quantities derived from them. If the generator and a separate head predict
the same quantity, both are measured.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.schema import EXIT, WATCH_TIME
from a2gen_rec.evaluation.metrics import auc, binary_metrics, rank_correlation, time_metrics
from a2gen_rec.evaluation.predict import Predictions

DURATION_GROUPS = 8


def objective_metrics(predictions: Predictions, columns: Mapping[str, int], card: DatasetCard) -> dict[str, Any]:
    """Return metrics of objectives and watch time as plain data.

    Args:
        predictions: Predictions of the split.
        columns: Name -> column of ``predictions``.
        card: Dataset card.

    Returns:
        ``objectives``: Predicted objective -> :func:`binary_metrics`.
        ``generator_vs_head``: Comparison of generator and heads (:func:`_generator_vs_head`).
        ``by_duration``: The same per group of videos of similar duration (:func:`_by_duration`).
        Entries without data are empty.
    """
    predicted = [name for name in card.objectives if np.isfinite(predictions.probability[:, columns[name]]).any()]
    return {
        "objectives": {name: _metrics(predictions, columns[name]) for name in predicted},
        "generator_vs_head": _generator_vs_head(predictions, columns, card),
        "by_duration": _by_duration(predictions, columns, card),
    }


def _metrics(predictions: Predictions, column: int, rows: np.ndarray | slice = slice(None)) -> dict[str, Any]:
    occurred, probability = predictions.occurred[rows, column], predictions.probability[rows, column]
    return binary_metrics(probability, occurred, predictions.user[rows])


def _generator_vs_head(predictions: Predictions, columns: Mapping[str, int], card: DatasetCard) -> dict[str, Any]:
    """Return metrics of generator and head for watch time and every objective.

    The generator predicts an expected watch time, not its distribution. For glances and effective views that time is a
    score but no probability, so only the AUC is reported. The objective of explicit negatives is the probability of any
    negative action, with the actions assumed independent.
    """
    metrics: dict[str, Any] = {}
    if EXIT not in card.timed_actions:
        return metrics
    watch, observed = _watch_times(predictions, columns)
    metrics[WATCH_TIME] = {"generator": time_metrics(watch, observed)}
    head = predictions.watch_time
    if np.isfinite(head).any():
        metrics[WATCH_TIME] |= {"head": time_metrics(head, observed), "agreement": rank_correlation(watch, head)}
    scores = {"glance": -watch, "effective": watch - np.log1p(_median_watch_s(predictions, card))}
    if "negative" in card.objectives:
        complements = [1 - predictions.probability[:, columns[name]] for name in card.negative_actions]
        scores["negative"] = 1 - np.prod(complements, axis=0)
    for name in card.objectives:
        occurred, probability = predictions.occurred[:, columns[name]], predictions.probability[:, columns[name]]
        metrics[name] = {"generator": {"auc": _known_auc(scores[name], occurred)}}
        if np.isfinite(probability).any():
            agreement = rank_correlation(scores[name], probability)
            metrics[name] |= {"head": {"auc": _known_auc(probability, occurred)}, "agreement": agreement}
    return metrics


def _by_duration(predictions: Predictions, columns: Mapping[str, int], card: DatasetCard) -> list[dict[str, Any]]:
    """Return metrics of watch time and glances for groups of videos of similar duration and equal size.

    The meaning of a glance depends on the video's duration. Over all durations, a model could predict glances well from
    the duration alone.
    """
    feature = next((f for f in card.features if card.feedback and f.name == card.feedback.duration_feature), None)
    if feature is None or not feature.boundaries or EXIT not in card.timed_actions:
        return []
    watch, observed = _watch_times(predictions, columns)
    edges = [None, *feature.boundaries, None]
    groups = []
    for first, last in _equal_groups(np.bincount(predictions.duration_bucket, minlength=feature.cardinality)[1:]):
        rows = (predictions.duration_bucket > first) & (predictions.duration_bucket <= last)
        group: dict[str, Any] = {"from_s": edges[first], "to_s": edges[last], "targets": int(rows.sum())}
        group["watch_time"] = {"generator": time_metrics(watch[rows], observed[rows])}
        if np.isfinite(predictions.watch_time).any():
            group["watch_time"]["head"] = time_metrics(predictions.watch_time[rows], observed[rows])
        if "glance" in card.objectives:
            column = columns["glance"]
            occurred = predictions.occurred[rows, column]
            group["glance"] = {
                "rate": _rate(occurred),
                "generator": {"auc": _known_auc(-watch[rows], occurred)},
            }
            if np.isfinite(predictions.probability[:, column]).any():
                group["glance"]["head"] = _metrics(predictions, column, rows)
        groups.append(group)
    return groups


def _equal_groups(counts: np.ndarray) -> list[tuple[int, int]]:
    """Return (first, last) of up to ``DURATION_GROUPS`` non-empty ranges of buckets with about equal counts."""
    cumulative = np.append(0, np.cumsum(counts)) / max(counts.sum(), 1)
    quantiles = np.arange(DURATION_GROUPS + 1) / DURATION_GROUPS
    cuts = np.unique(np.abs(cumulative[:, None] - quantiles).argmin(0))
    return [(int(a), int(b)) for a, b in pairwise(cuts) if counts[a:b].sum()]


def _watch_times(predictions: Predictions, columns: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the generator's expected and the observed watch time, [n] log1p seconds."""
    return predictions.time[:, columns[EXIT]], predictions.observed_time[:, columns[EXIT]]


def _median_watch_s(predictions: Predictions, card: DatasetCard) -> np.ndarray:
    """Return [n] the minimum watch time of an effective view in seconds: the median, or a shorter video's duration.

    The rule depends on the duration. Only its bucket is known here, so the bucket's midpoint is used.
    """
    rule = card.feedback
    feature = next((f for f in card.features if rule and f.name == rule.duration_feature), None)
    if rule is None:
        return np.zeros(len(predictions.duration_bucket))
    median_s = np.maximum(rule.median_watch_s, rule.glance_s)  # a glance is not an effective view
    if feature is None or not feature.boundaries:
        return np.full(len(predictions.duration_bucket), median_s[0])
    edges = np.array(feature.boundaries)
    duration_s = np.array([edges[0] / 2, *(edges[:-1] + edges[1:]) / 2, edges[-1]])
    bucket = 1 + np.searchsorted(rule.duration_edges_s, duration_s, side="right")
    return np.append(median_s[0], np.minimum(duration_s, median_s[bucket]))[predictions.duration_bucket]


def _rate(occurred: np.ndarray) -> float | None:
    """Return the rate over known values; None if there are none."""
    known = occurred[np.isfinite(occurred)]
    return float(known.mean(dtype=np.float64)) if len(known) else None


def _known_auc(scores: np.ndarray, occurred: np.ndarray) -> float | None:
    known = np.isfinite(occurred) & np.isfinite(scores)
    return auc(scores[known], occurred[known])
