"""Metrics of objectives and watch time on small known predictions."""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.schema import Feature, FeedbackRule
from a2gen_rec.evaluation.objective_metrics import DURATION_GROUPS, _equal_groups, _median_watch_s, objective_metrics
from a2gen_rec.evaluation.predict import Predictions, outcome_columns
from tests.helpers.cards import make_card

NAN = float("nan")
# Duration buckets: under 10 s, 10–20, 20–40 and over. Minimum of an effective view: 9 s for unknown durations, 5 s
# for videos under 20 s, else 12 s.
CARD = replace(
    make_card(),
    features=[*make_card().features, Feature("length", "item", "buckets", 5, [10.0, 20.0, 40.0])],
    objectives=["glance", "effective", "negative"],
    feedback=FeedbackRule(3.0, ["comment", "follow"], "length", [20.0], [9.0, 5.0, 12.0]),
    negative_actions=["comment", "follow"],
)
WATCH, HEAD = [2.0, 4.0, 1.0, 30.0, 8.0, 6.0], [1.0, 3.0, 2.0, 60.0, 20.0, 6.0]  # predicted seconds
ACTUAL = [1.0, 2.0, 4.0, 50.0, NAN, 5.0]


def predictions(heads: bool = True, card: DatasetCard = CARD) -> Predictions:
    """Return six targets of users 0 and 1, with durations unknown, <10, <10, 10–20, 20–40 and ≥40 s."""
    names = outcome_columns(card)
    n = 6
    occurred, chance = (np.full((n, len(names)), NAN, np.float32) for _ in range(2))
    time, actual = (np.full((n, len(card.actions) - 1), NAN, np.float32) for _ in range(2))
    time[:, names["exit"]], actual[:, names["exit"]] = np.log1p(WATCH), np.log1p(ACTUAL)
    for name, p in (("like", 0.5), ("comment", [0.1, 0.2, 0.3, 0.1, 0.1, 0.5]), ("follow", [0.1, 0.5, 0.1, 0.4, 0, 0])):
        chance[:, names[name]], occurred[:, names[name]] = p, 0
    values = {
        "glance": ([1, 1, 0, 0, NAN, 0], [0.9, 0.8, 0.85, 0.1, 0.99, 0.2]),
        "effective": ([0, 0, 0, 1, NAN, 1], [0.1, 0.2, 0.3, 0.4, 0.5, 0.05]),
        "negative": ([0, 1, 0, 1, 0, 0], [0.2, 0.3, 0.5, 0.6, 0.1, 0.4]),
    }
    for name in card.objectives:
        occurred[:, names[name]] = values[name][0]
        if heads:
            chance[:, names[name]] = values[name][1]
    return Predictions(
        user=np.array([0, 0, 0, 1, 1, 1]),
        ts_ms=np.arange(n),
        user_row=np.array([0, 0, 0, 2, 2, 2]),
        item=np.arange(n),
        duration_bucket=np.array([0, 1, 1, 2, 3, 4]),
        probability=chance,
        occurred=occurred,
        time=time,
        observed_time=actual,
        time_given_prefix=np.full_like(actual, NAN),
        watch_time=np.log1p(HEAD).astype(np.float32) if heads else np.full(n, NAN, np.float32),
        oracle=np.zeros((n, 0), np.float32),
        unexplored_mass=np.zeros(n, np.float32),
    )


def report(measured: Predictions | None = None, card: DatasetCard = CARD) -> dict[str, Any]:
    result = objective_metrics(predictions() if measured is None else measured, outcome_columns(card), card)
    json.dumps(result, allow_nan=False)  # plain data
    return result


def mae_log(predicted: list[float], actual: list[float]) -> float:
    return float(np.nanmean(np.abs(np.log1p(predicted) - np.log1p(actual))))


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the rank correlation of values without ties, from the squared differences of ranks."""
    n = len(a)
    squares = sum((sorted(a).index(x) - sorted(b).index(y)) ** 2 for x, y in zip(a, b, strict=True))
    return 1 - 6 * squares / (n * (n * n - 1))


def test_objectives_of_the_heads() -> None:
    result = report()["objectives"]
    assert list(result) == ["glance", "effective", "negative"]
    # 0.9 is above and 0.8 below the 0.85 of a negative; the 0.99 of an unknown label is not counted.
    assert result["glance"]["auc"] == pytest.approx(5 / 6)
    assert result["glance"]["positives"] == 2
    assert result["glance"]["calibration"] == pytest.approx((0.9 + 0.8 + 0.85 + 0.1 + 0.2) / 2)
    assert result["glance"]["gauc"] == pytest.approx(1 / 2), "user 1 has no known glance"
    assert result["effective"]["auc"] == pytest.approx(3 / 6)
    assert result["negative"]["auc"] == pytest.approx(6 / 8)


def test_watch_time_of_generator_and_head() -> None:
    result = report()["generator_vs_head"]["watch_time"]
    assert result["generator"]["count"] == result["head"]["count"] == 5
    assert result["generator"]["mae_s"] == pytest.approx((1 + 2 + 3 + 20 + 1) / 5, rel=1e-5)
    assert result["head"]["mae_s"] == pytest.approx((0 + 1 + 2 + 10 + 1) / 5, rel=1e-5)
    assert result["generator"]["mae_log"] == pytest.approx(mae_log(WATCH, ACTUAL), rel=1e-5)
    assert result["head"]["mae_log"] == pytest.approx(mae_log(HEAD, ACTUAL), rel=1e-5)
    # Ranks of the known times: 2 3 1 5 4 against 1 2 3 5 4: 1 − 6·(1 + 1 + 4) / (5·24).
    assert result["generator"]["rank_correlation"] == pytest.approx(1 - 6 * 6 / 120)
    assert result["head"]["rank_correlation"] == pytest.approx(1.0 - 6 * 2 / 120)
    # Ranks of all six: 2 3 1 6 5 4 against 1 3 2 6 5 4.
    assert result["agreement"] == pytest.approx(1 - 6 * 2 / 210)


def test_objectives_of_generator_and_head() -> None:
    result = report()["generator_vs_head"]
    # Glances with predictions of 2 and 4 s, other views with 1, 30 and 6 s: each glance loses only against 1 s.
    assert result["glance"]["generator"]["auc"] == pytest.approx(4 / 6)
    assert result["glance"]["head"]["auc"] == pytest.approx(5 / 6)
    # Durations of 5, 5, 15, 30 and 40 s represent their buckets; no median watch time exceeds them.
    median_watch_s = np.array([9, 5, 5, 5, 12, 12])
    score = np.log1p(WATCH) - np.log1p(median_watch_s)
    assert result["effective"]["generator"]["auc"] == pytest.approx(
        np.mean([score[a] > score[b] for a in (3, 5) for b in (0, 1, 2)])
    )
    assert 0 < result["effective"]["generator"]["auc"] < 1
    assert result["effective"]["agreement"] == pytest.approx(spearman(score, [0.1, 0.2, 0.3, 0.4, 0.5, 0.05]))
    # Probability of comment or follow: 0.19, 0.6, 0.37, 0.46, 0.1 and 0.5.
    assert result["negative"]["generator"]["auc"] == pytest.approx(7 / 8)
    from_actions, from_head = [0.19, 0.6, 0.37, 0.46, 0.1, 0.5], [0.2, 0.3, 0.5, 0.6, 0.1, 0.4]
    assert result["negative"]["agreement"] == pytest.approx(spearman(from_actions, from_head))


def test_groups_by_duration() -> None:
    result = report()["by_duration"]
    assert [(group["from_s"], group["to_s"]) for group in result] == [(None, 10), (10, 20), (20, 40), (40, None)]
    assert [group["targets"] for group in result] == [2, 1, 1, 1], "no group for unknown durations"
    assert [group["glance"]["rate"] for group in result] == [0.5, 0.0, None, 0.0]
    assert [group["glance"]["generator"]["auc"] for group in result] == [0.0, None, None, None]
    assert [group["glance"]["head"]["auc"] for group in result] == [0.0, None, None, None]
    maes = [group["watch_time"]["generator"]["mae_s"] for group in result]
    assert maes == [pytest.approx(2.5), pytest.approx(20, rel=1e-5), None, pytest.approx(1, rel=1e-5)]
    assert result[1]["watch_time"]["head"]["mae_log"] == pytest.approx(np.log(61 / 51), rel=1e-5)
    assert [group["watch_time"]["head"]["count"] for group in result] == [2, 1, 0, 1]


def test_without_heads_only_the_generator_is_measured() -> None:
    result, full = report(predictions(heads=False)), report()
    assert result["objectives"] == {}
    assert list(result["generator_vs_head"]) == list(full["generator_vs_head"])
    for name, measured in result["generator_vs_head"].items():
        assert measured == {"generator": full["generator_vs_head"][name]["generator"]}, name
    assert len(result["by_duration"]) == len(full["by_duration"])
    for group, other in zip(result["by_duration"], full["by_duration"], strict=True):
        assert "head" not in group["watch_time"]
        assert "head" not in group["glance"]
        assert group["glance"]["generator"] == other["glance"]["generator"]


def test_without_watch_times_objectives_remain() -> None:
    result = report(card=replace(CARD, timed_actions=["like", "follow"]))
    assert result["objectives"] == report()["objectives"]
    assert result["generator_vs_head"] == {}
    assert result["by_duration"] == []
    nothing = replace(CARD, timed_actions=["like"], objectives=[], feedback=None)
    assert report(predictions(card=nothing), nothing) == {"objectives": {}, "generator_vs_head": {}, "by_duration": []}


@pytest.mark.parametrize("duration", ["", "unknown feature"])
def test_without_durations_there_is_one_median_watch_time(duration: str) -> None:
    """A log may have no durations, and a card may lack the duration feature."""
    rule = replace(CARD.feedback, duration_feature=duration, duration_edges_s=[], median_watch_s=[9.0])
    result = report(card=replace(CARD, feedback=rule))
    assert result["by_duration"] == []
    # Effective views of 30 and 6 s, others of 2, 4 and 1 s; all are compared with 9 s.
    assert result["generator_vs_head"]["effective"]["generator"]["auc"] == 1.0


@pytest.mark.parametrize(
    ("edges", "medians", "expected"),
    [
        # Unknown duration: the median; bucket midpoints of 5, 15, 30 and 40 s fall between the rule's edges.
        ([12.0, 35.0], [9.0, 4.0, 8.0, 20.0], [9.0, 4.0, 8.0, 8.0, 20.0]),
        # A video of 5 s is shorter than the median of 7 s, one of 15 s shorter than 18 s.
        ([10.0], [9.0, 7.0, 18.0], [9.0, 5.0, 15.0, 18.0, 18.0]),
        # The median may be a glance, which is not an effective view.
        ([], [2.0, 1.5], [3.0, 3.0, 3.0, 3.0, 3.0]),
    ],
)
def test_minimum_watch_time_of_an_effective_view(
    edges: list[float], medians: list[float], expected: list[float]
) -> None:
    rule = replace(CARD.feedback, duration_edges_s=edges, median_watch_s=medians)
    values = replace(predictions(), duration_bucket=np.arange(5))
    assert _median_watch_s(values, replace(CARD, feedback=rule)).tolist() == expected


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40))
def test_equal_groups_partition_all_buckets_in_order(counts: list[int]) -> None:
    groups = _equal_groups(np.array(counts))
    sizes = [sum(counts[first:last]) for first, last in groups]
    assert sum(sizes) == sum(counts), "groups contain all counts"
    assert all(sizes)
    assert len(groups) <= DURATION_GROUPS
    assert all(a[1] <= b[0] for a, b in pairwise(groups))
    # Both boundaries are as close to the quantiles as the buckets allow.
    assert all(size <= sum(counts) / DURATION_GROUPS + max(counts) for size in sizes)


def test_equal_groups_of_equal_counts() -> None:
    assert _equal_groups(np.full(16, 7)) == [(start, start + 2) for start in range(0, 16, 2)]
    jitter = np.tile([7, 6, 5, 6, 7], 4)[:16]
    assert _equal_groups(jitter) == _equal_groups(np.full(16, 7)), "small differences do not shift the ranges"
    assert _equal_groups(np.array([1, 0, 3])) == [(0, 1), (1, 3)]
    assert _equal_groups(np.zeros(4, int)) == []
