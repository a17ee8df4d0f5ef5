"""Metrics against counted pairs and torchmetrics."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.functional.regression import spearman_corrcoef

from a2gen_rec.evaluation.metrics import (
    auc,
    binary_metrics,
    calibration,
    gauc,
    grouped_auc,
    normalized_entropy,
    rank_correlation,
    time_metrics,
)

# Few distinct scores, so that ties are common; -0.0 ties with 0.0.
SCORES = st.sampled_from([-0.0, 0.0, 0.1, 0.25, 0.5, 0.9, 1.0]) | st.floats(0, 1)
ROWS = st.lists(st.tuples(SCORES, st.booleans(), st.integers(0, 3)), max_size=40)


def arrays(rows: list) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scores, labels, groups = zip(*rows, strict=True) if rows else ((), (), ())
    return np.array(scores, np.float64), np.array(labels, np.float32), np.array(groups, np.int64)


def pairwise_auc(scores: list[float], labels: list[float]) -> float | None:
    """Share of (positive, negative) pairs in the right order, ties counting half."""
    positive = [s for s, label in zip(scores, labels, strict=True) if label]
    negative = [s for s, label in zip(scores, labels, strict=True) if not label]
    if not positive or not negative:
        return None
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    return wins / (len(positive) * len(negative))


@given(ROWS)
def test_grouped_auc_equals_pairs(rows: list) -> None:
    scores, labels, groups = arrays(rows)
    values, sizes = grouped_auc(scores, labels, groups)
    expected = []
    for group in sorted(set(groups.tolist())):
        group_rows = [(s, y) for s, y, g in rows if g == group]
        value = pairwise_auc([s for s, _ in group_rows], [y for _, y in group_rows])
        if value is not None:
            expected.append((value, len(group_rows)))
    assert values.tolist() == pytest.approx([value for value, _ in expected], abs=1e-12)
    assert sizes.tolist() == [size for _, size in expected]

    got = gauc(scores, labels, groups)
    if not expected:
        assert got is None
    else:
        assert got == pytest.approx(sum(v * n for v, n in expected) / sum(n for _, n in expected), abs=1e-12)


@given(ROWS)
def test_auc_equals_pairs_and_torchmetrics(rows: list) -> None:
    scores, labels, _ = arrays(rows)
    expected = pairwise_auc(scores.tolist(), labels.tolist())
    got = auc(scores, labels)
    if expected is None:
        assert got is None
        return
    assert got == pytest.approx(expected, abs=1e-12)
    theirs = binary_auroc(torch.from_numpy(scores), torch.from_numpy(labels).long())
    assert got == pytest.approx(theirs.item(), abs=1e-6)


def test_auc_of_many_rows_equals_torchmetrics() -> None:
    rng = np.random.default_rng(0)
    labels = rng.random(20_000) < 0.05
    scores = np.round(rng.normal(labels * 0.5, 1), 2).astype(np.float32)  # with ties
    theirs = binary_auroc(torch.sigmoid(torch.from_numpy(scores)).double(), torch.from_numpy(labels).long())
    assert auc(scores, labels) == pytest.approx(theirs.item(), abs=1e-6)
    users = rng.integers(-(2**40), 2**40, 500)[rng.integers(0, 500, 20_000)]
    values = []
    for user in np.unique(users):
        is_user = users == user
        if 0 < labels[is_user].sum() < is_user.sum():
            values.append((pairwise_auc(scores[is_user].tolist(), labels[is_user].tolist()), is_user.sum()))
    assert 100 < len(values) < 500
    expected = sum(v * n for v, n in values) / sum(n for _, n in values)
    assert gauc(scores, labels, users) == pytest.approx(expected, abs=1e-12)


def test_row_order_does_not_matter() -> None:
    rng = np.random.default_rng(1)
    scores, labels, groups = rng.integers(0, 5, 300) / 5, rng.random(300) < 0.4, rng.integers(0, 20, 300)
    shuffled = rng.permutation(300)
    for left, right in zip(
        grouped_auc(scores, labels, groups),
        grouped_auc(scores[shuffled], labels[shuffled], groups[shuffled]),
        strict=True,
    ):
        np.testing.assert_allclose(left, right, rtol=1e-12)


@pytest.mark.parametrize("labels", [[], [0, 0, 0], [1, 1, 1]])
def test_metrics_of_one_class_are_none(labels: list) -> None:
    scores, y = np.linspace(0.1, 0.9, len(labels)), np.array(labels, np.float32)
    assert auc(scores, y) is None
    assert gauc(scores, y, np.zeros(len(y), np.int64)) is None
    assert normalized_entropy(scores, y) is None
    if not sum(labels):
        assert calibration(scores, y) is None


@given(st.integers(2, 500).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1))))
@example((500, 499))
def test_normalized_entropy_of_the_base_rate_is_one(sizes: tuple[int, int]) -> None:
    """The rate is computed in float64: that of 499 positives of 500 is off by 3e-5 in float32."""
    n, positive = sizes
    labels = (np.arange(n) < positive).astype(np.float32)
    rate = np.full(n, positive / n)
    assert normalized_entropy(rate, labels) == pytest.approx(1, rel=1e-9)
    assert calibration(rate, labels) == pytest.approx(1, rel=1e-9)
    assert auc(rate, labels) == 0.5


def test_normalized_entropy_equals_its_definition() -> None:
    rng = np.random.default_rng(0)
    labels, scores = (rng.random(200) < 0.3).astype(np.float32), rng.random(200)
    rate = labels.mean()
    loss = sum(-math.log(p if y else 1 - p) for p, y in zip(scores, labels, strict=True)) / 200
    constant = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    assert normalized_entropy(scores, labels) == pytest.approx(loss / constant, rel=1e-6)
    assert normalized_entropy(scores, labels) > 1
    assert normalized_entropy(0.2 + 0.6 * labels, labels) < 1


def test_normalized_entropy_of_certain_predictions_is_finite() -> None:
    labels = np.array([0, 1, 1, 0], np.float32)
    assert normalized_entropy(labels, labels) == pytest.approx(0, abs=1e-5)
    wrong = normalized_entropy(1 - labels, labels)
    assert wrong is not None
    assert 10 < wrong < 100


def test_calibration_is_predicted_over_observed() -> None:
    assert calibration(np.array([0.5, 0.5, 1.0]), np.array([1.0, 0.0, 0.0])) == pytest.approx(2)
    assert calibration(np.array([0.1, 0.1]), np.array([1.0, 1.0])) == pytest.approx(0.1)


def test_float32_scores_are_summed_in_float64() -> None:
    n = 3_000_000
    scores, labels = np.full(n, 0.1, np.float32), np.zeros(n, np.float32)
    labels[: n // 10] = 1
    assert calibration(scores, labels) == pytest.approx(np.float32(0.1) / 0.1, rel=1e-6)


def test_binary_metrics_exclude_unknown_rows() -> None:
    rng = np.random.default_rng(3)
    scores, labels = rng.random(300), (rng.random(300) < 0.4).astype(np.float32)
    users = rng.integers(0, 12, 300)
    with_holes_scores, with_holes_labels = scores.copy(), labels.copy()
    with_holes_scores[::7], with_holes_labels[::5] = np.nan, np.nan
    keep = np.ones(300, bool)
    keep[::7] = keep[::5] = False
    got = binary_metrics(with_holes_scores, with_holes_labels, users)
    s, y, u = scores[keep], labels[keep], users[keep]
    assert got == {
        "auc": auc(s, y),
        "gauc": gauc(s, y, u),
        "ne": normalized_entropy(s, y),
        "calibration": calibration(s, y),
        "positives": int(y.sum()),
    }
    assert got["auc"] == pytest.approx(pairwise_auc(s.tolist(), y.tolist()))
    assert got["auc"] != auc(scores, labels)


def test_binary_metrics_of_empty_input() -> None:
    nothing = np.full(4, np.nan)
    for scores, labels in ((nothing, np.ones(4)), (np.ones(4) / 2, nothing), (nothing[:0], nothing[:0])):
        got = binary_metrics(scores, labels, np.arange(len(scores)))
        assert got == {"auc": None, "gauc": None, "ne": None, "calibration": None, "positives": 0}


def test_time_metrics_equal_loops() -> None:
    rng = np.random.default_rng(4)
    predicted, actual = rng.random(50) * 5, rng.random(50) * 5
    predicted[3], actual[8], actual[3] = np.nan, np.nan, np.nan
    known = [(p, a) for p, a in zip(predicted, actual, strict=True) if not math.isnan(p) and not math.isnan(a)]
    got = time_metrics(predicted.astype(np.float32), actual.astype(np.float32))
    assert got["count"] == len(known) == 48
    assert got["mae_log"] == pytest.approx(sum(abs(p - a) for p, a in known) / 48, rel=1e-5)
    assert got["mae_s"] == pytest.approx(sum(abs(math.exp(p) - math.exp(a)) for p, a in known) / 48, rel=1e-5)
    theirs = spearman_corrcoef(*(torch.tensor(values, dtype=torch.float64) for values in zip(*known, strict=True)))
    assert got["rank_correlation"] == pytest.approx(theirs.item(), abs=1e-6)


def test_time_metrics_of_empty_input() -> None:
    nothing = np.full(3, np.nan)
    for predicted, actual in ((nothing, np.ones(3)), (np.ones(3), nothing), (nothing[:0], nothing[:0])):
        assert time_metrics(predicted, actual) == {
            "mae_log": None,
            "mae_s": None,
            "rank_correlation": None,
            "count": 0,
        }


def by_pairs(a: list[float], b: list[float]) -> float | None:
    """Spearman's ρ as the correlation of how many are below less how many are above."""

    def standing(values: list[float]) -> list[int]:
        return [sum((v > w) - (v < w) for w in values) for v in values]

    x, y = standing(a), standing(b)
    scale = math.sqrt(sum(v * v for v in x) * sum(v * v for v in y))
    return sum(v * w for v, w in zip(x, y, strict=True)) / scale if scale else None


@given(st.lists(st.tuples(SCORES, SCORES), max_size=30))
def test_rank_correlation_equals_pairs(rows: list) -> None:
    a, b = [x for x, _ in rows], [y for _, y in rows]
    expected = by_pairs(a, b)
    got = rank_correlation(np.array(a), np.array(b))
    assert got == (None if expected is None else pytest.approx(expected, abs=1e-9))


def test_rank_correlation_equals_torchmetrics_and_depends_on_order_only() -> None:
    rng = np.random.default_rng(5)
    a = rng.normal(size=5000)
    b = np.round(a + rng.normal(size=5000), 1)  # with ties
    theirs = spearman_corrcoef(torch.from_numpy(a), torch.from_numpy(b)).item()
    got = rank_correlation(a, b)
    assert got == pytest.approx(theirs, abs=1e-6)
    assert got == pytest.approx(rank_correlation(np.exp(a), b**3), abs=1e-12)
    assert got == pytest.approx(-rank_correlation(-a, b), abs=1e-12)
    assert rank_correlation(a, np.expm1(a)) == pytest.approx(1.0)
