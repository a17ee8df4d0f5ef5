"""Distributions as counted values, against numpy on the values one by one."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from a2gen_rec.reporting.pages.dataset.value_counts import ValueCounts, log_histogram

numbers = st.lists(st.one_of(st.integers(0, 6).map(float), st.floats(0, 1e7)), min_size=1, max_size=40)


def counted(values: list[float]) -> ValueCounts:
    distinct, count = np.unique(np.array(values, np.float64), return_counts=True)
    return ValueCounts(distinct, count)


@settings(deadline=None)
@given(numbers, st.floats(0.001, 1.0))
def test_same_as_of_the_values_one_by_one(values: list[float], share: float) -> None:
    found = counted(values)
    assert found.total == len(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.median == pytest.approx(np.median(values))
    assert found.quantile(share) == sorted(values)[max(1, math.ceil(share * len(values))) - 1]
    top = sorted(values, reverse=True)[: math.ceil(share * len(values))]
    expected = sum(top) / sum(values) if sum(values) else math.nan
    assert found.top_share(share) == pytest.approx(expected, nan_ok=True)
    summary = found.summary()
    assert (summary["count"], summary["min"], summary["max"]) == (len(values), min(values), max(values))


@settings(deadline=None)
@given(numbers)
@example([9_999_999.999999998])
def test_every_value_is_in_its_bin(values: list[float]) -> None:
    edges, count = log_histogram(counted(values))
    assert (np.diff(edges) > 0).all()
    assert edges[0] > 0
    assert len(edges) == len(count) + 1
    for low, high, number in zip(edges[:-1], edges[1:], count, strict=True):
        small = low == edges[0]
        assert number == sum((low <= value or small) and value < high for value in values)
    assert count.sum() == len(values)


def test_whole_numbers_leave_no_bin_between_them() -> None:
    edges, count = log_histogram(counted([float(n) for n in range(1, 200)]))
    assert edges[:4].tolist() == [0.5, 1.5, 2.5, 3.5]
    assert (count > 0).all()


def test_nothing_has_no_figures() -> None:
    nothing = ValueCounts(np.zeros(0), np.zeros(0, np.int64))
    assert math.isnan(nothing.median)
    assert math.isnan(nothing.mean)
    assert math.isnan(nothing.top_share(0.5))
    assert set(nothing.summary().values()) == {0, None}
    assert len(log_histogram(nothing)[1]) == 0
