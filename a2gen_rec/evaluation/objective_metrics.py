"""What is measured of objectives and watch time: METHODS §5, §8.

The generator tells of watch times too, and of what follows from them. Where both it and a head of its own estimate the
same thing, both are measured.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from a2gen_rec.data.schema import EXIT, WATCH_TIME, DatasetCard
from a2gen_rec.evaluation.metrics import auc, binary_metrics, rank_correlation, time_metrics
from a2gen_rec.evaluation.predict import Predictions

DURATION_GROUPS = 8


def objective_metrics(predictions: Predictions, columns: Mapping[str, int], card: DatasetCard) -> dict[str, Any]:
    """Metrics of objectives and watch time, as plain data.

    Args:
        columns: of ``predictions``, by name.

    Returns:
        ``objectives``: per predicted objective, as :func:`binary_metrics`;
        ``shared_ground``: what two parts of the model estimate (:func:`_shared_ground`);
        ``lengths``: the same per group of videos of similar length (:func:`_per_length`).
        Each is empty where there is nothing to tell.
    """
    predicted = [name for name in card.objectives if np.isfinite(predictions.probability[:, columns[name]]).any()]
    return {
        "objectives": {name: _metrics(predictions, columns[name]) for name in predicted},
        "generator_vs_head": _generator_vs_head(predictions, columns, card),
        "by_duration": _by_duration(predictions, columns, card),
    }


def _metrics(predictions: Predictions, column: int, rows: np.ndarray | slice = slice(None)) -> dict[str, Any]:
    happened, chance = predictions.occurred[rows, column], predictions.probability[rows, column]
    return binary_metrics(chance, happened, predictions.user[rows])


def _generator_vs_head(predictions: Predictions, columns: Mapping[str, int], card: DatasetCard) -> dict[str, Any]:
    """Per watch time and objective, what the generator and what the head of its own is worth.

    The generator gives an expected watch time, not its distribution: as a score for glances and effective views that
    time says who is likelier to, not how likely, so they have an AUC alone. An objective of explicit negative actions
    is that any of them happens, taken as independent of each other.
    """
    found: dict[str, Any] = {}
    if EXIT not in card.timed_actions:
        return found
    watch, actual = _watch_times(predictions, columns)
    found[WATCH_TIME] = {"generator": time_metrics(watch, actual)}
    head = predictions.watch_time
    if np.isfinite(head).any():
        found[WATCH_TIME] |= {"head": time_metrics(head, actual), "agreement": rank_correlation(watch, head)}
    scores = {"glance": -watch, "effective": watch - np.log1p(_median_watch_s(predictions, card))}
    if "negative" in card.objectives:
        none = [1 - predictions.probability[:, columns[name]] for name in card.negative_actions]
        scores["negative"] = 1 - np.prod(none, axis=0)
    for name in card.objectives:
        happened, chance = predictions.occurred[:, columns[name]], predictions.probability[:, columns[name]]
        found[name] = {"generator": {"auc": _known_auc(scores[name], happened)}}
        if np.isfinite(chance).any():
            agreement = rank_correlation(scores[name], chance)
            found[name] |= {"head": {"auc": _known_auc(chance, happened)}, "agreement": agreement}
    return found


def _by_duration(predictions: Predictions, columns: Mapping[str, int], card: DatasetCard) -> list[dict[str, Any]]:
    """Watch time and glances per group of videos of similar length, of about equally many impressions.

    A glance at a video of five seconds is not one at a video of two minutes: over all lengths, a model may be good at
    glances by knowing lengths alone.
    """
    feature = next((f for f in card.features if card.feedback and f.name == card.feedback.duration_feature), None)
    if feature is None or not feature.boundaries or EXIT not in card.timed_actions:
        return []
    watch, actual = _watch_times(predictions, columns)
    edges = [None, *feature.boundaries, None]
    groups = []
    for first, last in _equal_groups(np.bincount(predictions.duration_bucket, minlength=feature.cardinality)[1:]):
        rows = (predictions.duration_bucket > first) & (predictions.duration_bucket <= last)
        group: dict[str, Any] = {"from_s": edges[first], "to_s": edges[last], "targets": int(rows.sum())}
        group["watch_time"] = {"generator": time_metrics(watch[rows], actual[rows])}
        if np.isfinite(predictions.watch_time).any():
            group["watch_time"]["head"] = time_metrics(predictions.watch_time[rows], actual[rows])
        if "glance" in card.objectives:
            column = columns["glance"]
            happened = predictions.occurred[rows, column]
            group["glance"] = {
                "rate": _rate(happened),
                "generator": {"auc": _known_auc(-watch[rows], happened)},
            }
            if np.isfinite(predictions.probability[:, column]).any():
                group["glance"]["head"] = _metrics(predictions, column, rows)
        groups.append(group)
    return groups


def _equal_groups(counts: np.ndarray) -> list[tuple[int, int]]:
    """(first, last) of at most ``LENGTH_GROUPS`` runs of neighbouring places with about equal counts, none empty."""
    before = np.append(0, np.cumsum(counts)) / max(counts.sum(), 1)
    wanted = np.arange(DURATION_GROUPS + 1) / DURATION_GROUPS
    cuts = np.unique(np.abs(before[:, None] - wanted).argmin(0))
    return [(int(a), int(b)) for a, b in pairwise(cuts) if counts[a:b].sum()]


def _watch_times(predictions: Predictions, columns: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """The generator's expected and the actual watch time, [n] log1p seconds."""
    return predictions.time[:, columns[EXIT]], predictions.observed_time[:, columns[EXIT]]


def _median_watch_s(predictions: Predictions, card: DatasetCard) -> np.ndarray:
    """[n] seconds that an effective view takes at the least: the usual, or the whole video if that is shorter.

    The log's rule goes by the length, of which no more is known here than its bucket: its middle stands for it.
    """
    rule = card.feedback
    feature = next((f for f in card.features if rule and f.name == rule.duration_feature), None)
    if rule is None:
        return np.zeros(len(predictions.duration_bucket))
    usual = np.maximum(rule.median_watch_s, rule.glance_s)  # a glance is no effective view
    if feature is None or not feature.boundaries:
        return np.full(len(predictions.duration_bucket), usual[0])
    edges = np.array(feature.boundaries)
    length_s = np.array([edges[0] / 2, *(edges[:-1] + edges[1:]) / 2, edges[-1]])
    bucket = 1 + np.searchsorted(rule.duration_edges_s, length_s, side="right")
    return np.append(usual[0], np.minimum(length_s, usual[bucket]))[predictions.duration_bucket]


def _rate(happened: np.ndarray) -> float | None:
    """Share of what is known that happened; None where nothing is."""
    known = happened[np.isfinite(happened)]
    return float(known.mean(dtype=np.float64)) if len(known) else None


def _known_auc(scores: np.ndarray, happened: np.ndarray) -> float | None:
    known = np.isfinite(happened) & np.isfinite(scores)
    return auc(scores[known], happened[known])
