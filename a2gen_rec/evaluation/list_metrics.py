"""Ranking metrics of session lists: METHODS §6, §8.

A session list holds the impressions of one user in one session, padded at the end. A list counts for a behavior if its
candidates with known labels include a positive and a negative. Candidates with unknown labels are removed. Metrics are
means over all orders of tied scores: the log's order would leak the logging ranker, and a random order would add noise.
"""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from a2gen_rec.errors import ConfigError, DataError
from a2gen_rec.evaluation.metrics import grouped_auc


class BehaviorMetrics(TypedDict):
    """Metrics of one behavior; None if no list or no user has both classes.

    ``lists`` is the number of lists that count for ``hr`` and ``ndcg``, ``positives`` the number of known positives.
    """

    hr: float | None
    ndcg: float | None
    uauc: float | None
    lists: int
    positives: int


class ListMetrics(TypedDict):
    """Metrics of all behaviors, their unweighted means over measured behaviors, and the hypervolume of their NDCG.

    ``lists`` is the number of non-empty lists, ``mean_length`` their mean number of candidates.
    """

    behaviors: dict[str, BehaviorMetrics]
    hr: float | None
    ndcg: float | None
    uauc: float | None
    hypervolume: float | None
    lists: int
    mean_length: float | None


def list_metrics(
    scores: np.ndarray,
    labels: np.ndarray,
    mask: np.ndarray,
    users: np.ndarray,
    k: int,
    behaviors: Sequence[str],
    reference: np.ndarray | float = 0.0,
) -> ListMetrics:
    """Return all list metrics of one score.

    Args:
        scores: [n, C], higher ranks first.
        labels: [n, C, M], 0 or 1, NaN if unknown.
        mask: [n, C] bool, False at padding.
        users: [n] user key of each list.
        k: Cutoff, see :func:`hr_and_ndcg`.
        behaviors: M names.
        reference: [M] or scalar reference point, see :func:`hypervolume`.

    Raises:
        ConfigError: k < 1.
        DataError: A candidate's score is NaN. Ignoring it would favor a model that fails to score.
    """
    if np.isnan(scores[mask]).any():
        raise DataError(f"{int(np.isnan(scores[mask]).sum())} of {int(mask.sum())} candidates have a NaN score")
    by_behavior: dict[str, BehaviorMetrics] = {}
    for name, label in zip(behaviors, np.moveaxis(labels, -1, 0), strict=True):
        hits, gains = hr_and_ndcg(scores, label, mask, k)
        known = mask & ~np.isnan(label)
        by_behavior[name] = {
            "hr": _mean(hits),
            "ndcg": _mean(gains),
            "uauc": uauc(scores, label, mask, users),
            "lists": int(np.isfinite(gains).sum()),
            "positives": int(label[known].sum()),
        }
    lengths = mask.sum(-1)
    ndcg = np.array([metrics["ndcg"] for metrics in by_behavior.values()], np.float64)  # None becomes NaN
    measured = np.isfinite(ndcg)
    return {
        "behaviors": by_behavior,
        "hr": _mean([metrics["hr"] for metrics in by_behavior.values()]),
        "ndcg": _mean(ndcg),
        "uauc": _mean([metrics["uauc"] for metrics in by_behavior.values()]),
        "hypervolume": hypervolume(ndcg[measured], np.broadcast_to(reference, ndcg.shape)[measured])
        if measured.any()
        else None,
        "lists": int((lengths > 0).sum()),
        "mean_length": float(lengths[lengths > 0].mean()) if lengths.any() else None,
    }


def hr_and_ndcg(scores: np.ndarray, label: np.ndarray, mask: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return HR@k and NDCG@k of each list for one behavior, exact means over all orders of ties.

    HR is the probability that any of the first k ranks has a positive [ours: not the share of positives]. It is 1 for
    lists of at most k candidates. NDCG has gain 1 for a positive, discount 1 / log2(1 + rank), and is normalized by the
    best order of the list.

    The expected gain of a rank within a tie is the tie's share of positives, and DCG is linear in gains. The
    probability of no positive among the first k follows from drawing from each tie without replacement.

    Args:
        scores: [n, C], higher ranks first.
        label: [n, C], 0 or 1, NaN if unknown.
        mask: [n, C] bool, False at padding.
        k: Cutoff, at least 1.

    Returns:
        [n] HR and [n] NDCG, float64 in [0, 1]; NaN for lists that do not count.

    Raises:
        ConfigError: k < 1.
    """
    if k < 1:
        raise ConfigError(f"k {k} must be at least 1")
    known = mask & ~np.isnan(label)
    lists, _ = np.nonzero(known)
    order = np.lexsort((-scores[known], lists))  # keeps the order of lists, so ``lists`` stays valid
    score, positive = scores[known][order], label[known][order].astype(np.float64)
    new_list = np.ones(len(lists), bool)
    new_list[1:] = lists[1:] != lists[:-1]
    new_tie = new_list.copy()
    new_tie[1:] |= score[1:] != score[:-1]
    list_first, tie_first, tie = np.flatnonzero(new_list), np.flatnonzero(new_tie), np.cumsum(new_tie) - 1
    rank = np.arange(len(lists))
    rank_in_tie = rank - tie_first[tie]
    rank -= list_first[np.cumsum(new_list) - 1]
    tie_size, tie_positive = np.bincount(tie), np.bincount(tie, positive)

    n = len(scores)
    size, positives = np.bincount(lists, minlength=n), np.bincount(lists, positive, n)
    counts = (positives > 0) & (positives < size)
    discount = 1 / np.log2(np.arange(k) + 2)
    in_top_k = rank < k
    gain = (tie_positive / tie_size)[tie]
    dcg = np.bincount(lists[in_top_k], gain[in_top_k] * discount[rank[in_top_k]], n)
    best = np.append(0, np.cumsum(discount))[np.minimum(positives, k).astype(np.int64)]
    # Probability of a negative at this rank, given negatives at all earlier ranks of the tie.
    negative = np.maximum((tie_size - tie_positive)[tie] - rank_in_tie, 0) / (tie_size[tie] - rank_in_tie)
    miss_probability = np.ones(n)
    if len(lists):
        miss_probability[lists[list_first]] = np.multiply.reduceat(np.where(in_top_k, negative, 1), list_first)
    hits, ndcg = np.full((2, n), np.nan)
    hits[counts], ndcg[counts] = 1 - miss_probability[counts], dcg[counts] / best[counts]
    return hits, ndcg


def uauc(scores: np.ndarray, label: np.ndarray, mask: np.ndarray, users: np.ndarray) -> float | None:
    """Return the unweighted mean AUC over users with both classes for one behavior; None if there are none.

    All candidates of a user are compared, across lists. Unlike the top-k metrics, this requires scores that are
    comparable between lists of a user.

    Args:
        scores: [n, C] as in :func:`hr_and_ndcg`.
        label: [n, C] as in :func:`hr_and_ndcg`.
        mask: [n, C] as in :func:`hr_and_ndcg`.
        users: [n] user key of each list.
    """
    known = mask & ~np.isnan(label)
    values, _ = grouped_auc(scores[known], label[known], np.broadcast_to(users[:, None], known.shape)[known])
    return _mean(values)


def hypervolume(values: np.ndarray, reference: np.ndarray | float = 0.0) -> float:
    """Return Π_m max(v_m − r_m, 0), the volume dominated by one point over a reference point.

    It rewards improvement over the reference in all metrics at once. Equal *relative* gains over the reference count
    the same in every metric, balanced vectors win at equal sums, and it is zero if any metric is at or below its
    reference. Compare only vectors of the same metrics with the same reference.

    Args:
        values: [M], higher is better.
        reference: [M] or scalar.
    """
    return float(np.prod(np.maximum(values - reference, 0)))


def _mean(values: np.ndarray | Sequence[float | None]) -> float | None:
    """Return the mean without None and NaN; None if nothing is left."""
    array = np.asarray(values, np.float64)
    array = array[~np.isnan(array)]
    return float(array.mean()) if len(array) else None
