"""Uncertainty of metrics by resampling users, who are what is independent in a log: METHODS §8.

Users are drawn with replacement, all their impressions with them. A resample is a weight per user, how often it was
drawn; the same weights for every model make differences paired. Metrics are weighted, for all resamples at once.
"""

import math

import numpy as np

_BLOCK = 2**20  # weights gathered at a time: 8 MB, which stay in a cache


def resample_weights(num_users: int, num_resamples: int, seed: int = 0) -> np.ndarray:
    """How often each user is drawn, [users, resamples] float32; every resample draws ``users``."""
    rng = np.random.default_rng(seed)
    weights = np.empty((num_users, num_resamples), np.float32)
    for column in range(num_resamples):
        weights[:, column] = np.bincount(rng.integers(0, num_users, num_users), minlength=num_users)
    return weights


def weighted_auc(scores: np.ndarray, labels: np.ndarray, user: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUC of each resample, [resamples] float64: a row counts as often as its user, and ties count half.

    Args:
        scores, labels: [n], labels 0 or 1; user: [n] its row in ``weights`` [users, resamples].

    Returns:
        NaN where a resample lacks one of the classes.
    """
    order = np.lexsort((labels, scores))
    scores, positive, user = scores[order], labels[order] > 0, user[order]
    resamples = weights.shape[1]
    if positive.all() or not positive.any():
        return np.full(resamples, math.nan)
    # Runs of one class, in which no order matters, are summed at once; a tie of both classes stays by itself.
    new_tie = np.append(True, scores[1:] != scores[:-1])
    tie, new_class = np.cumsum(new_tie) - 1, np.append(False, positive[1:] != positive[:-1])
    mixed = np.bincount(tie[new_class & ~new_tie], minlength=tie[-1] + 1) > 0
    new_run = new_class | (new_tie & (mixed[tie] | np.append(False, mixed[tie[:-1]])))
    new_run[0] = True
    first = np.flatnonzero(new_run)
    # Each run of positives with the number of runs of negatives before it; a tie's own come last of them.
    minus, plus = np.flatnonzero(~positive[first]), np.flatnonzero(positive[first])
    before = np.searchsorted(minus, plus)
    after_tied = np.flatnonzero(mixed[tie[first[plus]]])
    won, pairs = np.empty(resamples), np.empty(resamples)
    wide = max(_BLOCK // len(scores), 16)
    for begin in range(0, resamples, wide):
        part = slice(begin, begin + wide)
        runs = np.add.reduceat(np.take(weights[:, part], user, axis=0), first, axis=0)
        below = np.zeros((len(minus) + 1, runs.shape[1]))
        np.cumsum(runs[minus], axis=0, out=below[1:])
        beaten, of_plus = below[before], runs[plus]
        beaten[after_tied] -= runs[plus[after_tied] - 1] / 2
        won[part] = np.einsum("nr,nr->r", of_plus, beaten)
        pairs[part] = of_plus.sum(0, dtype=np.float64) * below[-1]
    return won / np.where(pairs > 0, pairs, math.nan)


def weighted_mean(values: np.ndarray, user: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean of ``values`` [n] in each resample, [resamples] float64; NaN where it has none. Others as above."""
    users = len(weights)
    total = np.bincount(user, values, users) @ weights.astype(np.float64)
    count = np.bincount(user, minlength=users) @ weights.astype(np.float64)
    return total / np.where(count > 0, count, math.nan)


def percentile_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float] | None:
    """Percentile interval of a resampled metric [resamples]; None where no resample has it."""
    known = values[np.isfinite(values)]
    if not len(known):
        return None
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def p_value(differences: np.ndarray) -> float | None:
    """Two-sided: how often, of resampled differences [resamples], 0 is passed; at least 2 / (resamples + 1)."""
    known = differences[np.isfinite(differences)]
    if not len(known):
        return None
    tail = min(np.count_nonzero(known <= 0), np.count_nonzero(known >= 0))
    return min(1.0, 2 * (int(tail) + 1) / (len(known) + 1))
