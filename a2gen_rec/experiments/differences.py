"""Means of metrics over seeds, and differences of models with intervals (METHODS §8)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from a2gen_rec.experiments.bootstrap import add_seed_error, p_value, percentile_interval

MIN_USERS = 20
"""Minimum number of users behind every averaged outcome for a test of a difference. Over fewer users, resampling is too
sure: intervals of pure noise exclude 0 in 49% of cases with 2 users, 16% with 5, 12% with 8, 7% with 20."""


@dataclass(frozen=True)
class MeanStd:
    """Mean and sample standard deviation of a metric over seeds; ``std`` is None for a single seed."""

    mean: float
    std: float | None


@dataclass(frozen=True)
class Difference:
    """Difference of a metric to the reference model, with 95 % interval and two-sided p-value (bootstrap)."""

    value: float
    low: float
    high: float
    p: float
    p_is_bound: bool
    """Whether all resampled differences have the same sign; ``p`` is then an upper bound."""
    users: int
    """Minimum number of users behind an averaged outcome, see :class:`Resampled`."""

    @property
    def testable(self) -> bool:
        """Whether there are enough users for a test: otherwise, ``p`` and ``significant`` have no meaning."""
        return self.users >= MIN_USERS

    @property
    def significant(self) -> bool:
        """Whether there are enough users and the interval excludes 0."""
        return self.testable and (self.low > 0 or self.high < 0)


def mean_std(values: Iterable[float | None]) -> MeanStd | None:
    """Return mean and standard deviation over seeds; None if a value is unknown or there are none."""
    values = list(values)
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known or len(known) < len(values):
        return None
    return MeanStd(float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None)


def with_seed_error(runs: np.ndarray, other: np.ndarray | None = None) -> np.ndarray:
    """Return the mean over runs [resamples], or the difference to another model's, with the error of the seeds."""
    samples = [runs] if other is None else [runs, other]
    values = runs.mean(0) if other is None else runs.mean(0) - other.mean(0)
    return add_seed_error(values, samples, np.random.default_rng(len(samples)))


def difference_of(
    value: MeanStd | None, reference: MeanStd | None, runs: np.ndarray, reference_runs: np.ndarray, users: int
) -> Difference | None:
    """Return the difference of a metric to the reference's; None without one.

    Args:
        value: Metric over seeds.
        reference: Metric of the reference over seeds.
        runs: [runs, resamples] metric.
        reference_runs: [runs, resamples] metric of the reference.
        users: Minimum number of users behind an averaged outcome.
    """
    differences = with_seed_error(runs, reference_runs)
    interval, p = percentile_interval(differences), p_value(differences)
    if value is None or reference is None or interval is None or p is None:
        return None
    return Difference(value.mean - reference.mean, *interval, p, _same_sign(differences), users)


def _same_sign(differences: np.ndarray) -> bool:
    known = differences[np.isfinite(differences)]
    return bool((known > 0).all() or (known < 0).all())
