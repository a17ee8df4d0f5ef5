"""Bootstrap of metrics over users, the independent units of a log: METHODS §8.

Users are drawn with replacement, with all their impressions. A resample is a weight per user, the number of draws. All
models share the weights, so differences are paired. Weighted metrics are computed for all resamples at once. Training
runs with different seeds are few, and have an error of their own (:func:`add_seed_error`).
"""

import math
from collections.abc import Sequence

import numpy as np

_BLOCK = 2**20  # weights gathered at a time: 8 MB, which fit a cache


def resample_weights(num_users: int, num_resamples: int, seed: int = 0) -> np.ndarray:
    """Return [num_users, num_resamples] float32 draws per user; each resample draws ``num_users`` users."""
    rng = np.random.default_rng(seed)
    weights = np.empty((num_users, num_resamples), np.float32)
    for column in range(num_resamples):
        weights[:, column] = np.bincount(rng.integers(0, num_users, num_users), minlength=num_users)
    return weights


def weighted_auc(scores: np.ndarray, labels: np.ndarray, user: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weighted AUC of each resample; ties count half.

    Args:
        scores: [n].
        labels: [n], 0 or 1.
        user: [n] row of the user in ``weights``.
        weights: [users, resamples] weights of users.

    Returns:
        [resamples] float64; NaN if a resample lacks one of the classes.
    """
    order = np.lexsort((labels, scores))
    scores, positive, user = scores[order], labels[order] > 0, user[order]
    resamples = weights.shape[1]
    if positive.all() or not positive.any():
        return np.full(resamples, math.nan)
    # Sum runs of one class, within which order does not matter, at once; a tie with both classes is its own run.
    new_tie = np.append(True, scores[1:] != scores[:-1])
    tie, new_class = np.cumsum(new_tie) - 1, np.append(False, positive[1:] != positive[:-1])
    mixed = np.bincount(tie[new_class & ~new_tie], minlength=tie[-1] + 1) > 0
    new_run = new_class | (new_tie & (mixed[tie] | np.append(False, mixed[tie[:-1]])))
    new_run[0] = True
    first = np.flatnonzero(new_run)
    # For each run of positives, the number of preceding runs of negatives; those of its own tie come last.
    negative_runs, positive_runs = np.flatnonzero(~positive[first]), np.flatnonzero(positive[first])
    preceding = np.searchsorted(negative_runs, positive_runs)
    tied = np.flatnonzero(mixed[tie[first[positive_runs]]])
    concordant, pairs = np.empty(resamples), np.empty(resamples)
    block = max(_BLOCK // len(scores), 16)
    for start in range(0, resamples, block):
        part = slice(start, start + block)
        runs = np.add.reduceat(np.take(weights[:, part], user, axis=0), first, axis=0)
        cumulative = np.zeros((len(negative_runs) + 1, runs.shape[1]))
        np.cumsum(runs[negative_runs], axis=0, out=cumulative[1:])
        below, positive_weights = cumulative[preceding], runs[positive_runs]
        below[tied] -= runs[positive_runs[tied] - 1] / 2
        concordant[part] = np.einsum("nr,nr->r", positive_weights, below)
        pairs[part] = positive_weights.sum(0, dtype=np.float64) * cumulative[-1]
    return concordant / np.where(pairs > 0, pairs, math.nan)


def weighted_mean(values: np.ndarray, user: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weighted mean of ``values`` [n] in each resample.

    Args:
        values: [n].
        user: [n] row of the user in ``weights``.
        weights: [users, resamples] weights of users.

    Returns:
        [resamples] float64; NaN if a resample has no value.
    """
    num_users = len(weights)
    total = np.bincount(user, values, num_users) @ weights.astype(np.float64)
    count = np.bincount(user, minlength=num_users) @ weights.astype(np.float64)
    return total / np.where(count > 0, count, math.nan)


def mean_known(values: np.ndarray) -> np.ndarray:
    """Return the mean over the first dimension of the values that are not NaN; NaN without any."""
    known = np.isfinite(values)
    count = known.sum(0)
    mean: np.ndarray = np.where(known, values, 0).sum(0) / np.where(count > 0, count, math.nan)
    return mean


def add_seed_error(values: np.ndarray, by_seed: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Add the error of a mean over few training runs to resampled means, or to differences of means.

    Resampling two or three runs with replacement gives too narrow intervals: it underestimates their variance by the
    factor (n - 1) / n, and it has no heavy tails. The error of every resample is instead drawn from the distribution of
    Welch's t-test: Student's t with Welch-Satterthwaite degrees of freedom, scaled by the standard error.

    Args:
        values: [resamples] means over runs, or differences of such means.
        by_seed: Metric of each model in ``values``, [runs, resamples]. Models with a single run add no error.
        rng: Random generator.
    """
    repeated = [runs for runs in by_seed if len(runs) > 1]
    if not repeated:
        return values
    squared_errors = np.array([runs.var(0, ddof=1) / len(runs) for runs in repeated])
    known = squared_errors[:, np.isfinite(squared_errors).all(0)]
    total = known.mean(1) if known.size else np.zeros(len(repeated))
    if not total.sum() > 0:
        return values
    freedom = total.sum() ** 2 / sum(error**2 / (len(runs) - 1) for error, runs in zip(total, repeated, strict=True))
    return values + np.sqrt(squared_errors.sum(0)) * rng.standard_t(freedom, len(values))


def percentile_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float] | None:
    """Return the percentile interval of a resampled metric [resamples]; None if all values are NaN."""
    known = values[np.isfinite(values)]
    if not len(known):
        return None
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def p_value(differences: np.ndarray) -> float | None:
    """Return the two-sided bootstrap p-value of differences [resamples] from 0; at least 2 / (resamples + 1)."""
    known = differences[np.isfinite(differences)]
    if not len(known):
        return None
    tail = min(np.count_nonzero(known <= 0), np.count_nonzero(known >= 0))
    return min(1.0, 2 * (int(tail) + 1) / (len(known) + 1))
