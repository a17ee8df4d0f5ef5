"""Weighted metrics of resampled users against unweighted metrics of repeated rows."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2gen_rec.evaluation.metrics import auc
from a2gen_rec.experiments import bootstrap
from a2gen_rec.experiments.bootstrap import (
    add_seed_error,
    p_value,
    percentile_interval,
    resample_weights,
    weighted_auc,
    weighted_mean,
)
from a2gen_rec.experiments.differences import MIN_USERS


def direct(values: np.ndarray, user: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The rows of one resample: those of every user drawn, as often as it was drawn."""
    return np.concatenate([values[user == one] for one in range(len(weights)) for _ in range(int(weights[one]))])


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 40),
    users=st.integers(1, 8),
    distinct=st.sampled_from([1, 3, 1000]),
    rate=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_weighted_auc_equals_auc_of_repeated_rows(seed: int, n: int, users: int, distinct: int, rate: float) -> None:
    """With ties of one class and of both, and resamples that lack a class."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, distinct, n).astype(np.float32)
    labels = (rng.random(n) < rate).astype(np.float32)
    user, weights = rng.integers(0, users, n), resample_weights(users, 20, seed)
    for column, value in enumerate(weighted_auc(scores, labels, user, weights)):
        drawn = weights[:, column]
        if drawn[user].sum() == 0:
            assert math.isnan(value)
            continue
        expected = auc(direct(scores, user, drawn), direct(labels, user, drawn))
        assert math.isnan(value) if expected is None else value == pytest.approx(expected, abs=1e-12)


def test_all_tie_patterns_of_four_rows() -> None:
    """Runs that are summed at once may end at a tie of both classes, or begin there."""
    weights = np.array([[1, 0, 3], [1, 2, 0], [1, 1, 1], [1, 3, 2]], np.float32)
    for scores in itertools.product(range(3), repeat=4):
        for labels in itertools.product((0.0, 1.0), repeat=4):
            values = weighted_auc(np.array(scores), np.array(labels), np.arange(4), weights)
            for column, drawn in enumerate(weights.T.astype(int)):
                expected = auc(np.repeat(scores, drawn), np.repeat(labels, drawn))
                assert math.isnan(values[column]) if expected is None else values[column] == pytest.approx(expected)


def test_block_size_has_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=300).round(1), (rng.random(300) < 0.2).astype(np.float32)
    user, weights = rng.integers(0, 40, 300), resample_weights(40, 50)
    full = weighted_auc(scores, labels, user, weights)
    monkeypatch.setattr(bootstrap, "_BLOCK", 1)
    np.testing.assert_array_equal(weighted_auc(scores, labels, user, weights), full)


def test_weighted_mean_equals_mean_of_repeated_rows() -> None:
    rng = np.random.default_rng(1)
    values, user = rng.normal(size=30), rng.integers(0, 6, 30)
    weights = resample_weights(7, 30)  # the last user has no row
    for column, mean in enumerate(weighted_mean(values, user, weights)):
        assert mean == pytest.approx(direct(values, user, weights[:, column]).mean())
    assert np.isnan(weighted_mean(values[:0], user[:0], weights)).all()


def test_every_resample_draws_the_number_of_users() -> None:
    weights = resample_weights(30, 400)
    assert (weights.sum(0) == 30).all()
    assert (resample_weights(30, 400) == weights).all()
    assert (resample_weights(30, 400, seed=1) != weights).any()
    # Drawn with replacement: a user's weight is binomial, of mean 1 and variance 1 - 1/30.
    assert weights.mean() == 1
    assert weights.var() == pytest.approx(29 / 30, rel=0.05)


def test_intervals_have_nominal_coverage() -> None:
    """Of a mean over users who differ, whose rows do not: resampling rows would take them for far more certain."""
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(100):
        user = np.repeat(np.arange(60), 5)
        values = np.repeat(rng.normal(size=60), 5)
        low, high = percentile_interval(weighted_mean(values, user, resample_weights(60, 300, trial))) or (
            math.nan,
            math.nan,
        )
        covered += low < 0 < high
    assert 86 <= covered <= 99


def test_intervals_and_p_values_of_known_resamples() -> None:
    values = np.append(np.arange(-10, 91), math.nan)  # 101 known ones
    assert percentile_interval(values, 0.9) == pytest.approx((-5, 85))
    assert p_value(values) == pytest.approx(2 * (11 + 1) / 102), "-10 to 0 are not above 0"
    assert p_value(-values) == p_value(values)
    assert p_value(values + 100) == pytest.approx(2 / 102)
    assert p_value(np.zeros(9)) == 1
    assert percentile_interval(np.full(3, math.nan)) is p_value(np.full(3, math.nan)) is None


@pytest.mark.parametrize("spread", [0.0, 1.0])
@pytest.mark.parametrize(
    ("users", "low", "high"), [(2, 0.45, 0.53), (5, 0.13, 0.21), (20, 0.05, 0.12), (50, 0.04, 0.09)]
)
def test_false_positives_of_intervals_over_noise(users: int, low: float, high: float, spread: float) -> None:
    """Means of noise over users with equal and with very different numbers of impressions."""
    rng, weights = np.random.default_rng(3), resample_weights(users, 500).astype(float)
    impressions = np.ceil(rng.lognormal(3, spread, (1500, users)))
    totals = rng.normal(size=(1500, users)) * impressions
    intervals = [percentile_interval(values) for values in (totals @ weights) / (impressions @ weights)]
    rate = np.mean([interval is not None and not interval[0] <= 0 <= interval[1] for interval in intervals])
    assert low <= rate <= high
    assert (rate <= 0.12) == (users >= MIN_USERS)


def excludes_zero(rng: np.random.Generator, runs: tuple[int, int], user_std: float, seed_std: float) -> bool:
    """Return whether the interval of two equal models excludes 0: noise of shared users and of every training run."""
    users, resamples = 60, 400
    weights = rng.multinomial(users, np.full(users, 1 / users), resamples).T / users
    by_user = rng.normal(0, user_std * math.sqrt(users), (2, users)) @ weights
    models = [values + rng.normal(0, seed_std, (count, 1)) for values, count in zip(by_user, runs, strict=True)]
    differences = add_seed_error(models[0].mean(0) - models[1].mean(0), models, rng)
    low, high = percentile_interval(differences) or (math.nan, math.nan)
    return not low <= 0 <= high


@pytest.mark.parametrize("runs", [(3, 3), (3, 5)])
@pytest.mark.parametrize(("user_std", "seed_std"), [(0.05, 1.0), (0.7, 1.0), (1.0, 0.05)])
def test_intervals_over_few_seeds_cover_noise(runs: tuple[int, int], user_std: float, seed_std: float) -> None:
    """With 3 runs drawn with replacement instead, up to 21% of the intervals exclude 0."""
    rng = np.random.default_rng(7)
    share = np.mean([excludes_zero(rng, runs, user_std, seed_std) for _ in range(400)])
    assert 0.005 <= share <= 0.085


def test_error_of_seeds() -> None:
    rng, values = np.random.default_rng(0), np.zeros(20_000)
    one, equal = np.ones((1, 20_000)), np.ones((3, 20_000))
    assert add_seed_error(values, [one, one], rng) is values, "a single run has no known error"
    assert (add_seed_error(values, [equal, one], rng) == 0).all(), "equal runs have no error"
    three = np.array([[-1.0], [0.0], [1.0]]) * equal
    error = add_seed_error(values, [three], rng)
    # Student's t with 2 degrees of freedom: 4.303 is its 97.5% quantile.
    assert np.quantile(error, 0.975) == pytest.approx(4.303 * math.sqrt(1 / 3), rel=0.1)
    both = add_seed_error(values, [three, 2 + three], rng)
    assert np.quantile(both, 0.975) == pytest.approx(2.776 * math.sqrt(2 / 3), rel=0.1)  # 4 degrees of freedom
    three[:, 0] = math.nan
    assert np.isnan(add_seed_error(values, [three], rng)).sum() == 1
