"""Distributions as value counts, against numpy on all values."""

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from a2gen_rec.reporting.pages.dataset.value_counts import ValueCounts, log_histogram

numbers = st.lists(st.one_of(st.integers(0, 6).map(float), st.floats(0, 1e7)), min_size=1, max_size=40)


def value_counts(values: list[float]) -> ValueCounts:
    distinct, count = np.unique(np.array(values, np.float64), return_counts=True)
    return ValueCounts(distinct, count)


@given(numbers, st.floats(0.001, 1.0))
def test_statistics_equal_numpy(values: list[float], share: float) -> None:
    distribution = value_counts(values)
    assert distribution.total == len(values)
    assert distribution.mean == pytest.approx(np.mean(values))
    assert distribution.median == pytest.approx(np.median(values))
    assert distribution.quantile(share) == sorted(values)[max(1, math.ceil(share * len(values))) - 1]
    top = sorted(values, reverse=True)[: math.ceil(share * len(values))]
    expected = sum(top) / sum(values) if sum(values) else math.nan
    assert distribution.top_share(share) == pytest.approx(expected, nan_ok=True)
    summary = distribution.summary()
    assert (summary["count"], summary["min"], summary["max"]) == (len(values), min(values), max(values))


@given(numbers)
@example([9_999_999.999999998])
def test_each_value_is_in_its_bin(values: list[float]) -> None:
    edges, count = log_histogram(value_counts(values))
    assert (np.diff(edges) > 0).all()
    assert edges[0] > 0
    assert len(edges) == len(count) + 1
    for low, high, number in zip(edges[:-1], edges[1:], count, strict=True):
        small = low == edges[0]
        assert number == sum((low <= value or small) and value < high for value in values)
    assert count.sum() == len(values)


def test_integers_have_no_empty_bins_between_them() -> None:
    edges, count = log_histogram(value_counts([float(n) for n in range(1, 200)]))
    assert edges[:4].tolist() == [0.5, 1.5, 2.5, 3.5]
    assert (count > 0).all()


def test_empty_distribution() -> None:
    empty = ValueCounts(np.zeros(0), np.zeros(0, np.int64))
    assert math.isnan(empty.median)
    assert math.isnan(empty.mean)
    assert math.isnan(empty.top_share(0.5))
    assert set(empty.summary().values()) == {0, None}
    assert len(log_histogram(empty)[1]) == 0
