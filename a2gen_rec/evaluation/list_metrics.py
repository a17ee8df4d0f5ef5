"""How well a score orders session lists: METHODS §6, §8.

A session list is what one user was shown in one session, padded at the end. A list counts for a behaviour where
candidates of known label include a positive and a negative: otherwise there is nothing to order. Candidates of unknown
label are taken out of the list. Equal scores have no order, so everything here is the mean over all orders of ties: the
log's own order would leak the ranker that made the log, and a drawn one would add noise.
"""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from a2gen_rec.errors import ConfigError, DataError
from a2gen_rec.evaluation.metrics import grouped_auc


class BehaviorMetrics(TypedDict):
    """One behaviour; None where no list or no user has both classes.

    ``lists`` is the number that count for ``hr`` and ``ndcg``, ``positives`` that of all known positives.
    """

    hr: float | None
    ndcg: float | None
    uauc: float | None
    lists: int
    positives: int


class ListMetrics(TypedDict):
    """All behaviours, the plain means over those measured, and the hypervolume of their NDCG.

    ``lists`` is the number of lists with any candidate, ``length`` their mean number of candidates.
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
    """All of this module for one score.

    Args:
        scores: [n, C], higher ranks first; labels: [n, C, M] 0 or 1, NaN unknown; valid: [n, C] bool.
        users: [n] key of each list's user.
        k: see :func:`top_k`.
        behaviours: M names.
        reference: [M] or one for all, see :func:`hypervolume`.

    Raises:
        ConfigError: k < 1.
        DataError: the score of a candidate is not a number. Left out, it would flatter what failed to rank it.
    """
    if np.isnan(scores[mask]).any():
        raise DataError(f"{int(np.isnan(scores[mask]).sum())} of {int(mask.sum())} candidates have NaN for a score")
    each: dict[str, BehaviorMetrics] = {}
    for name, label in zip(behaviors, np.moveaxis(labels, -1, 0), strict=True):
        hits, gains = hr_and_ndcg(scores, label, mask, k)
        known = mask & ~np.isnan(label)
        each[name] = {
            "hr": _mean(hits),
            "ndcg": _mean(gains),
            "uauc": uauc(scores, label, mask, users),
            "lists": int(np.isfinite(gains).sum()),
            "positives": int(label[known].sum()),
        }
    lengths = mask.sum(-1)
    ndcg = np.array([metrics["ndcg"] for metrics in each.values()], np.float64)  # None becomes NaN
    measured = np.isfinite(ndcg)
    return {
        "behaviors": each,
        "hr": _mean([metrics["hr"] for metrics in each.values()]),
        "ndcg": _mean(ndcg),
        "uauc": _mean([metrics["uauc"] for metrics in each.values()]),
        "hypervolume": hypervolume(ndcg[measured], np.broadcast_to(reference, ndcg.shape)[measured])
        if measured.any()
        else None,
        "lists": int((lengths > 0).sum()),
        "mean_length": float(lengths[lengths > 0].mean()) if lengths.any() else None,
    }


def hr_and_ndcg(scores: np.ndarray, label: np.ndarray, mask: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """HR@k and NDCG@k of each list for one behaviour, the exact means over all orders of ties.

    HR is the chance that any positive is among the first k [ours: not the share of positives], so 1 in every list of
    at most k candidates. NDCG has gain 1 for a positive, discount 1 / log2(1 + rank), and the best order of the same
    list for its unit.

    A place within a tie has the tie's share of positives for its expected gain, and DCG is linear in gains. That no
    place shows a positive is drawing from each tie without replacement.

    Args:
        scores, label: [n, C], label 0 or 1, NaN unknown; valid: [n, C] bool; k: number of first places, at least 1.

    Returns:
        [n] and [n] float64 in [0, 1]; NaN where the list does not count.

    Raises:
        ConfigError: k < 1.
    """
    if k < 1:
        raise ConfigError(f"the first {k} places of a list hold nothing to measure")
    known = mask & ~np.isnan(label)
    lists, _ = np.nonzero(known)
    order = np.lexsort((-scores[known], lists))  # lists stay in place, so ``lists`` need not be reordered
    score, positive = scores[known][order], label[known][order].astype(np.float64)
    new_list = np.ones(len(lists), bool)
    new_list[1:] = lists[1:] != lists[:-1]
    new_tie = new_list.copy()
    new_tie[1:] |= score[1:] != score[:-1]
    list_first, tie_first, tie = np.flatnonzero(new_list), np.flatnonzero(new_tie), np.cumsum(new_tie) - 1
    place = np.arange(len(lists))
    ahead_in_tie = place - tie_first[tie]
    place -= list_first[np.cumsum(new_list) - 1]
    tie_size, tie_positive = np.bincount(tie), np.bincount(tie, positive)

    n = len(scores)
    size, positives = np.bincount(lists, minlength=n), np.bincount(lists, positive, n)
    counts = (positives > 0) & (positives < size)
    discount = 1 / np.log2(np.arange(k) + 2)
    first = place < k
    gain = (tie_positive / tie_size)[tie]
    dcg = np.bincount(lists[first], gain[first] * discount[place[first]], n)
    best = np.append(0, np.cumsum(discount))[np.minimum(positives, k).astype(np.int64)]
    # Chance that this place shows a negative, if all before it in the tie did.
    negative = np.maximum((tie_size - tie_positive)[tie] - ahead_in_tie, 0) / (tie_size[tie] - ahead_in_tie)
    missed = np.ones(n)
    if len(lists):
        missed[lists[list_first]] = np.multiply.reduceat(np.where(first, negative, 1), list_first)
    hits, ndcg = np.full((2, n), np.nan)
    hits[counts], ndcg[counts] = 1 - missed[counts], dcg[counts] / best[counts]
    return hits, ndcg


def uauc(scores: np.ndarray, label: np.ndarray, mask: np.ndarray, users: np.ndarray) -> float | None:
    """Plain mean of the users' AUCs for one behaviour, over users with both classes; None without any.

    A user's candidates of all lists are compared with one another, so unlike the top-k metrics it also asks for
    scores that compare between the lists of a user.

    Args:
        scores, label, valid: as :func:`top_k` takes; users: [n] key of each list's user.
    """
    known = mask & ~np.isnan(label)
    values, _ = grouped_auc(scores[known], label[known], np.broadcast_to(users[:, None], known.shape)[known])
    return _mean(values)


def hypervolume(values: np.ndarray, reference: np.ndarray | float = 0.0) -> float:
    """Π_m max(v_m − r_m, 0): the volume that one point dominates over a reference point.

    It rewards being better than the reference in everything at once. The same *relative* gain over the reference
    counts the same in any metric, at equal sums the even vector wins, and one metric at its reference or under it
    makes all of it zero. It compares only vectors of the same metrics over the same reference.

    Args:
        values, reference: [M], more is better.
    """
    return float(np.prod(np.maximum(values - reference, 0)))


def _mean(values: np.ndarray | Sequence[float | None]) -> float | None:
    """Mean of what is there: None and NaN are not."""
    array = np.asarray(values, np.float64)
    array = array[~np.isnan(array)]
    return float(array.mean()) if len(array) else None
