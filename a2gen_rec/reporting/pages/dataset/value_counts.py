"""A distribution as distinct values and their counts, small for any number of observations."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

QUANTILES = (0.1, 0.25, 0.75, 0.9, 0.99)


@dataclass(frozen=True)
class ValueCounts:
    """Distinct values in ascending order, [values] float64, and their counts, [values] int64; both may be empty."""

    values: np.ndarray
    counts: np.ndarray

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """Mean; NaN if empty."""
        return float(self.values @ self.counts / self.total) if self.total else math.nan

    @property
    def median(self) -> float:
        """Median, the mean of the middle two values for an even count; NaN if empty."""
        return (self._at((self.total + 1) // 2) + self._at(self.total // 2 + 1)) / 2

    def quantile(self, share: float) -> float:
        """Return the smallest value that is at least as large as ``share`` of all values; NaN if empty."""
        return self._at(max(1, math.ceil(share * self.total)))

    def top_share(self, share: float) -> float:
        """Return the part of the sum that the largest ``share`` of all values contributes; NaN if the sum is 0."""
        total = float(self.values @ self.counts)
        if not total:
            return math.nan
        num_top = math.ceil(share * self.total)
        # Count of each distinct value, the largest first; the last value may be included only in part.
        taken = np.diff(np.minimum(np.cumsum(self.counts[::-1]), num_top), prepend=0)
        return float(taken @ self.values[::-1]) / total

    def summary(self) -> dict[str, Any]:
        """Return count, mean, extremes and quantiles as plain data; None if empty."""
        quantiles = {f"p{100 * share:g}": self.quantile(share) for share in QUANTILES}
        extremes = {"min": self._at(1), "max": self._at(self.total)}
        numbers = {"mean": self.mean, "median": self.median} | extremes | quantiles
        return {"count": self.total} | {name: None if math.isnan(value) else value for name, value in numbers.items()}

    def _at(self, index: int) -> float:
        """Return the value at a 1-based index of all sorted values."""
        if not len(self.values):
            return math.nan
        return float(self.values[np.searchsorted(np.cumsum(self.counts), index)])


def log_histogram(distribution: ValueCounts, per_decade: int = 8, floor: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Return bins of about equal width on a logarithmic axis: edges [bins + 1] and counts [bins]; empty without values.

    Integers get bins around integers; otherwise bins between 1 and 2 would be empty.

    Args:
        distribution: The distribution.
        per_decade: Bins per factor of 10.
        floor: Minimum of the axis; smaller values are in the first bin.
    """
    if not distribution.total:
        return np.zeros(1), np.zeros(0, np.int64)
    integers = bool((distribution.values == np.rint(distribution.values)).all())
    minimum = 1.0 if integers else floor
    low, high = max(minimum, distribution.values[0]), max(minimum, distribution.values[-1])
    first, last = math.floor(math.log10(low) * per_decade), math.ceil(math.log10(high) * per_decade)
    # One extra bin below: a logarithm may round up to the edge above its value.
    edges = 10.0 ** (np.arange(first - 1, last + per_decade) / per_decade)
    if integers:
        edges = np.unique(np.rint(edges)) - 0.5
    start, end = np.searchsorted(edges, [low, high], side="right")
    edges = edges[max(start - 1, 0) : end + 1]
    bins = np.maximum(np.searchsorted(edges, distribution.values, side="right") - 1, 0)
    return edges, np.bincount(bins, distribution.counts, len(edges) - 1).astype(np.int64)
