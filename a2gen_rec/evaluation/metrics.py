"""Offline ranking metrics on whole splits: METHODS §8."""

import numpy as np


def grouped_auc(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exact AUC within every group that has both classes, ties counting half.

    Args:
        scores, labels, groups: [n]; labels 0 or 1.

    Returns:
        AUC and number of rows of each such group, [groups with both classes].
    """
    order = np.lexsort((scores, groups))
    scores, labels, groups = scores[order], labels[order].astype(np.float64), groups[order]
    new_group = np.append(True, groups[1:] != groups[:-1]) if len(groups) else np.zeros(0, bool)
    new_tie = new_group | np.append(True, scores[1:] != scores[:-1]) if len(groups) else new_group
    group, tie = np.cumsum(new_group) - 1, np.cumsum(new_tie) - 1
    # Mid-rank of a tie: the mean of the (1-based) ranks it spans, counted from its group's first row.
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
    """Area under the ROC curve; None unless both classes are there."""
    values, _ = grouped_auc(scores, labels, np.zeros(len(scores), np.int64))
    return float(values[0]) if len(values) else None


def gauc(scores: np.ndarray, labels: np.ndarray, users: np.ndarray) -> float | None:
    """Mean of the users' AUCs weighted by their impressions, over users with both classes; None without any."""
    values, sizes = grouped_auc(scores, labels, users)
    return float(np.average(values, weights=sizes)) if len(values) else None


def normalized_entropy(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Log loss over that of the constant prediction at the split's own rate; None unless both classes are there."""
    rate = labels.mean() if len(labels) else 0.0
    if not 0 < rate < 1:
        return None
    p = np.clip(scores.astype(np.float64), 1e-7, 1 - 1e-7)
    loss = -np.mean(labels * np.log(p) + (1 - labels) * np.log1p(-p))
    return float(loss / -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)))


def calibration(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Predicted over observed positives; None without positives."""
    observed = labels.sum()
    return float(scores.astype(np.float64).sum() / observed) if observed else None


def binary_metrics(scores: np.ndarray, labels: np.ndarray, users: np.ndarray) -> dict[str, float | int | None]:
    """All of the above for one action; rows with an unknown (NaN) label or score are left out."""
    known = np.isfinite(labels) & np.isfinite(scores)
    scores, labels, users = scores[known], labels[known], users[known]
    return {
        "auc": auc(scores, labels),
        "gauc": gauc(scores, labels, users),
        "ne": normalized_entropy(scores, labels),
        "calibration": calibration(scores, labels),
        "positives": int(labels.sum()),
    }


def time_metrics(predicted: np.ndarray, actual: np.ndarray) -> dict[str, float | int | None]:
    """Mean absolute error of times given in log1p seconds, over rows where both are known.

    Returns:
        ``mae_log`` in log1p seconds, ``mae_s`` in seconds, ``rank_correlation``, ``count``.
    """
    known = np.isfinite(predicted) & np.isfinite(actual)
    predicted, actual = predicted[known].astype(np.float64), actual[known].astype(np.float64)
    if not len(actual):
        return {"mae_log": None, "mae_s": None, "rank_correlation": None, "count": 0}
    return {
        "mae_log": float(np.abs(predicted - actual).mean()),
        "mae_s": float(np.abs(np.expm1(predicted) - np.expm1(actual)).mean()),
        "rank_correlation": rank_correlation(predicted, actual),
        "count": len(actual),
    }


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's ρ of [n] values, ties at their mean rank; None where either does not vary."""
    a, b = _average_ranks(a), _average_ranks(b)
    if not (len(a) and a.std() and b.std()):
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _average_ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]
