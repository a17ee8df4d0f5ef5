"""Offline metrics on full splits: METHODS §8."""

import numpy as np


def grouped_auc(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the exact AUC of every group with both classes; ties count half.

    Args:
        scores: [n].
        labels: [n], 0 or 1.
        groups: [n] group key.

    Returns:
        AUC and number of rows per group, [groups with both classes] each.
    """
    order = np.lexsort((scores, groups))
    scores, labels, groups = scores[order], labels[order].astype(np.float64), groups[order]
    new_group = np.append(True, groups[1:] != groups[:-1]) if len(groups) else np.zeros(0, bool)
    new_tie = new_group | np.append(True, scores[1:] != scores[:-1]) if len(groups) else new_group
    group, tie = np.cumsum(new_group) - 1, np.cumsum(new_tie) - 1
    # Average rank of a tie: mean of its 1-based ranks within the group.
    tie_first = np.flatnonzero(new_tie)
    tie_size = np.diff(np.append(tie_first, len(scores)))
    rank = (tie_first + (tie_size + 1) / 2)[tie] - np.flatnonzero(new_group)[group] if len(scores) else scores
    size = np.bincount(group) if len(scores) else np.zeros(0, np.int64)
    positive = np.bincount(group, labels, len(size))
    rank_sum = np.bincount(group, rank * labels, len(size))
    both = (positive > 0) & (positive < size)
    positive, negative = positive[both], size[both] - positive[both]
    return (rank_sum[both] - positive * (positive + 1) / 2) / (positive * negative), size[both]


def auc(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Return the area under the ROC curve; None unless both classes occur."""
    values, _ = grouped_auc(scores, labels, np.zeros(len(scores), np.int64))
    return float(values[0]) if len(values) else None


def gauc(scores: np.ndarray, labels: np.ndarray, users: np.ndarray) -> float | None:
    """Return the impression-weighted mean AUC over users with both classes; None if there are none."""
    values, sizes = grouped_auc(scores, labels, users)
    return float(np.average(values, weights=sizes)) if len(values) else None


def normalized_entropy(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Return log loss divided by that of the split's base rate; None unless both classes occur."""
    rate = labels.mean(dtype=np.float64) if len(labels) else 0.0
    if not 0 < rate < 1:
        return None
    p = np.clip(scores.astype(np.float64), 1e-7, 1 - 1e-7)
    loss = -np.mean(labels * np.log(p) + (1 - labels) * np.log1p(-p))
    return float(loss / -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)))


def calibration(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Return predicted divided by observed positives; None without positives."""
    observed = labels.sum(dtype=np.float64)
    return float(scores.astype(np.float64).sum() / observed) if observed else None


def binary_metrics(scores: np.ndarray, labels: np.ndarray, users: np.ndarray) -> dict[str, float | int | None]:
    """Return all binary metrics of one action; rows with a NaN label or score are excluded."""
    known = np.isfinite(labels) & np.isfinite(scores)
    scores, labels, users = scores[known], labels[known], users[known]
    return {
        "auc": auc(scores, labels),
        "gauc": gauc(scores, labels, users),
        "ne": normalized_entropy(scores, labels),
        "calibration": calibration(scores, labels),
        "positives": int(labels.sum()),
    }


def time_metrics(predicted: np.ndarray, observed: np.ndarray) -> dict[str, float | int | None]:
    """Return errors of times in log1p seconds over rows where both are known.

    Args:
        predicted: [n] predicted times, log1p seconds.
        observed: [n] observed times, log1p seconds.

    Returns:
        ``mae_log`` in log1p seconds, ``mae_s`` in seconds, ``rank_correlation``, ``count``.
    """
    known = np.isfinite(predicted) & np.isfinite(observed)
    predicted, observed = predicted[known].astype(np.float64), observed[known].astype(np.float64)
    if not len(observed):
        return {"mae_log": None, "mae_s": None, "rank_correlation": None, "count": 0}
    return {
        "mae_log": float(np.abs(predicted - observed).mean()),
        "mae_s": float(np.abs(np.expm1(predicted) - np.expm1(observed)).mean()),
        "rank_correlation": rank_correlation(predicted, observed),
        "count": len(observed),
    }


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Return Spearman's ρ of [n] values with average ranks for ties; None if either is constant."""
    a, b = _average_ranks(a), _average_ranks(b)
    if not (len(a) and a.std() and b.std()):
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _average_ranks(values: np.ndarray) -> np.ndarray:
    _, index, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[index]
