"""A distribution as its distinct values and how often each occurs: small whatever it was counted over."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

QUANTILES = (0.1, 0.25, 0.75, 0.9, 0.99)


@dataclass(frozen=True)
class ValueCounts:
    """Distinct values, rising [values] float64, and how often each occurs [values] int64. There may be none."""

    value: np.ndarray
    count: np.ndarray

    @property
    def total(self) -> int:
        return int(self.count.sum())

    @property
    def mean(self) -> float:
        """NaN where there is nothing."""
        return float(self.value @ self.count / self.total) if self.total else math.nan

    @property
    def median(self) -> float:
        """The middle value, or the mean of the middle two; NaN where there is nothing."""
        return (self._at((self.total + 1) // 2) + self._at(self.total // 2 + 1)) / 2

    def quantile(self, share: float) -> float:
        """The least value that ``share`` of all do not exceed; NaN where there is nothing."""
        return self._at(max(1, math.ceil(share * self.total)))

    def top_share(self, share: float) -> float:
        """What part of the sum of all values the greatest ``share`` of them makes; NaN where the sum is 0."""
        whole = float(self.value @ self.count)
        if not whole:
            return math.nan
        wanted = math.ceil(share * self.total)
        # How many of each distinct value, the greatest first; of the last one wanted perhaps not all.
        taken = np.diff(np.minimum(np.cumsum(self.count[::-1]), wanted), prepend=0)
        return float(taken @ self.value[::-1]) / whole

    def summary(self) -> dict[str, Any]:
        """Total, mean, extremes and quantiles, as plain data; None where there is nothing."""
        named = {f"p{100 * share:g}": self.quantile(share) for share in QUANTILES}
        ends = {"min": self._at(1), "max": self._at(self.total)}
        found = {"mean": self.mean, "median": self.median} | ends | named
        return {"count": self.total} | {name: None if math.isnan(value) else value for name, value in found.items()}

    def _at(self, place: int) -> float:
        """The value at a 1-based place of all."""
        if not len(self.value):
            return math.nan
        return float(self.value[np.searchsorted(np.cumsum(self.count), place)])


def log_histogram(counted: ValueCounts, per_decade: int = 8, floor: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Bins of about equal width on a logarithmic axis: edges [bins + 1] and counts [bins]; no bins without values.

    Values that are all whole numbers get bins around whole numbers: others would stand empty between 1 and 2.

    Args:
        floor: where the axis begins at the least; smaller values, which have no place on it, are in the first bin.
    """
    if not counted.total:
        return np.zeros(1), np.zeros(0, np.int64)
    whole = bool((counted.value == np.rint(counted.value)).all())
    least = 1.0 if whole else floor
    low, high = max(least, counted.value[0]), max(least, counted.value[-1])
    first, last = math.floor(math.log10(low) * per_decade), math.ceil(math.log10(high) * per_decade)
    # One bin too many below: a logarithm may round up to the edge above its value.
    edges = 10.0 ** (np.arange(first - 1, last + per_decade) / per_decade)
    if whole:
        edges = np.unique(np.rint(edges)) - 0.5
    begin, end = np.searchsorted(edges, [low, high], side="right")
    edges = edges[max(begin - 1, 0) : end + 1]
    bins = np.maximum(np.searchsorted(edges, counted.value, side="right") - 1, 0)
    return edges, np.bincount(bins, counted.count, len(edges) - 1).astype(np.int64)
