"""List metrics against enumerated orders of ties, per list and pair."""

import math
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2gen_rec.errors import ConfigError, DataError
from a2gen_rec.evaluation.list_metrics import hr_and_ndcg, hypervolume, list_metrics, uauc
from tests.helpers.properties import examples

NAN = math.nan


def orders(scores: list[float]) -> list[list[int]]:
    """Return all orders of the candidates by descending score."""
    return [
        list(order)
        for order in permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in pairwise(order))
    ]


def slow_top_k(scores: list[float], labels: list[float], k: int) -> tuple[float, float] | None:
    """Return HR@k and NDCG@k of one list of known labels, averaged over :func:`orders`."""
    if len(set(labels)) < 2:
        return None
    best = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, int(sum(labels))) + 1))
    hits, gains = [], []
    for order in orders(scores):
        top_labels = [labels[c] for c in order[:k]]
        hits.append(float(any(top_labels)))
        gains.append(sum(y / math.log2(rank + 1) for rank, y in enumerate(top_labels, 1)) / best)
    return sum(hits) / len(hits), sum(gains) / len(gains)


# Few distinct scores, so that ties are common; -0.0 ties with 0.0, and infinities are scores like others.
CANDIDATES = st.lists(
    st.tuples(
        st.sampled_from([-0.0, 0.0, 0.5, 2.0, -1.5, math.inf, -math.inf]),
        st.sampled_from([0.0, 1.0, NAN]),
        st.sampled_from([True, True, False]),
    ),
    max_size=6,
)


@examples(150)
@given(st.lists(CANDIDATES, max_size=4), st.integers(1, 8))
def test_top_k_equals_mean_over_orders_of_ties(rows: list, k: int) -> None:
    width = max(map(len, rows), default=0)
    scores, label, mask = (
        np.full((len(rows), width), 9.0),
        np.ones((len(rows), width)),
        np.zeros((len(rows), width), bool),
    )
    for i, row in enumerate(rows):
        for c, candidate in enumerate(row):
            scores[i, c], label[i, c], mask[i, c] = candidate
    hits, ndcg = hr_and_ndcg(scores, label, mask, k)
    assert hits.shape == ndcg.shape == (len(rows),)
    for i, row in enumerate(rows):
        known = [(score, y) for score, y, there in row if there and not math.isnan(y)]
        expected = slow_top_k([score for score, _ in known], [y for _, y in known], k)
        if expected is None:
            assert np.isnan([hits[i], ndcg[i]]).all()
        else:
            assert (hits[i], ndcg[i]) == pytest.approx(expected, abs=1e-12)


def test_top_k_of_a_known_case() -> None:
    scores = np.array([[0.1, 0.9, 0.5, 0.7], [1, 1, 1, 1], [4, 3, 2, 1]], np.float32)
    label = np.array([[1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0]])
    hits, ndcg = hr_and_ndcg(scores, label, np.ones((3, 4), bool), 3)
    third = 1 / math.log2(4)
    # Ranked 0 0 1 1; one positive anywhere among four, so at each of three ranks with probability 1/4; the best order.
    np.testing.assert_allclose(hits, [1, 3 / 4, 1])
    np.testing.assert_allclose(ndcg, [third / (1 + 1 / math.log2(3)), (1 + 1 / math.log2(3) + third) / 4, 1])


@pytest.mark.parametrize("k", [1, 3])
def test_constant_score_equals_mean_of_random_scores(k: int) -> None:
    """The order of the log has no effect; here all positives come first."""
    rng = np.random.default_rng(0)
    label = np.zeros((4000, 7))
    label[:, :2] = 1
    mask = np.arange(7) < rng.integers(3, 8, (4000, 1))
    tied = hr_and_ndcg(np.zeros((4000, 7)), label, mask, k)
    drawn = hr_and_ndcg(rng.random((4000, 7)), label, mask, k)
    for one, other in zip(tied, drawn, strict=True):
        assert one.mean() == pytest.approx(other.mean(), abs=4 * other.std() / 4000**0.5)
        assert one.std() < other.std()


def data(seed: int = 0, n: int = 60, width: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return tied scores, partly unknown labels of two behaviors, masks of 0 .. ``width`` candidates and 20 users."""
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random((n, width, 2)) < 0.1, np.nan, rng.random((n, width, 2)) < [0.3, 0.08])
    mask = np.arange(width) < rng.integers(0, width + 1, (n, 1))
    return rng.integers(0, 5, (n, width)) / 4, labels, mask, rng.integers(0, 20, n) + 2**40


def test_list_metrics_equal_loops() -> None:
    scores, labels, mask, users = data()
    got = list_metrics(scores, labels, mask, users, 3, ["like", "follow"], reference=np.array([0.1, 0.2]))
    for m, name in enumerate(["like", "follow"]):
        per_list, positives = [], 0
        pairs: dict[int, list] = {}
        for i in range(len(scores)):
            known = [c for c in range(mask.shape[1]) if mask[i, c] and not math.isnan(labels[i, c, m])]
            positives += sum(labels[i, c, m] for c in known)
            value = slow_top_k([scores[i, c] for c in known], [labels[i, c, m] for c in known], 3)
            if value is not None:
                per_list.append(value)
            pairs.setdefault(int(users[i]), []).extend((scores[i, c], labels[i, c, m]) for c in known)
        aucs = []
        for user_pairs in pairs.values():
            wins = [(p > q) + (p == q) / 2 for p, y in user_pairs if y for q, z in user_pairs if not z]
            if wins:
                aucs.append(sum(wins) / len(wins))
        assert 0 < len(per_list) < 60
        assert len(aucs) > 0
        assert got["behaviors"][name] == {
            "hr": pytest.approx(sum(hit for hit, _ in per_list) / len(per_list)),
            "ndcg": pytest.approx(sum(gain for _, gain in per_list) / len(per_list)),
            "uauc": pytest.approx(sum(aucs) / len(aucs)),
            "lists": len(per_list),
            "positives": positives,
        }
    behaviors = got["behaviors"].values()
    for metric in ("hr", "ndcg", "uauc"):
        assert got[metric] == pytest.approx(sum(behavior[metric] for behavior in behaviors) / 2)
    like, follow = (behavior["ndcg"] for behavior in behaviors)
    assert got["hypervolume"] == pytest.approx((like - 0.1) * (follow - 0.2))
    lengths = [row.sum() for row in mask if row.any()]
    assert got["lists"] == len(lengths)
    assert got["mean_length"] == pytest.approx(sum(lengths) / len(lengths))


def test_padding_and_order_within_lists_have_no_effect() -> None:
    scores, labels, mask, users = data()
    base = list_metrics(scores, labels, mask, users, 3, ["like", "follow"])
    shuffled = np.random.default_rng(1).permutation(10)
    garbage = np.full((60, 2), np.nan)
    wider = (
        np.hstack([np.where(mask, scores, np.nan), garbage])[:, shuffled],
        np.concatenate([labels, np.ones((60, 2, 2))], 1)[:, shuffled],
        np.hstack([mask, np.zeros((60, 2), bool)])[:, shuffled],
    )
    again = list_metrics(*wider, users, 3, ["like", "follow"])
    for name, metrics in base.pop("behaviors").items():
        assert again["behaviors"][name] == pytest.approx(metrics, abs=1e-12)
    again.pop("behaviors")
    assert again == pytest.approx(base, abs=1e-12)


def test_undefined_metrics_are_none_and_excluded_from_means() -> None:
    scores, labels, mask, users = data()
    labels[..., 1] = 0
    got = list_metrics(scores, labels, mask, users, 3, ["like", "follow"])
    assert got["behaviors"]["follow"] == {"hr": None, "ndcg": None, "uauc": None, "lists": 0, "positives": 0}
    assert got["ndcg"] == got["hypervolume"] == got["behaviors"]["like"]["ndcg"]
    nothing = list_metrics(np.zeros((0, 0)), np.zeros((0, 0, 1)), np.zeros((0, 0), bool), np.zeros(0, int), 3, ["like"])
    assert nothing["behaviors"]["like"]["lists"] == nothing["lists"] == 0
    assert {nothing[key] for key in ("hr", "ndcg", "uauc", "hypervolume", "mean_length")} == {None}


def test_uauc_weights_users_equally() -> None:
    """One user with four candidates and all pairs wrong, one with two candidates and the pair right: mean 1/2."""
    scores, label = np.array([[2, 1], [4, 3], [1, 2]]), np.array([[0, 1], [0, 0], [0, 1]])
    mask, users = np.ones((3, 2), bool), np.array([7, 7, 9])
    assert uauc(scores, label, mask, users) == 0.5
    assert uauc(scores, label, mask & (users == 9)[:, None], users) == 1.0
    assert uauc(scores, np.zeros((3, 2)), mask, users) is None


def test_hypervolume_rewards_balance_over_the_reference() -> None:
    assert hypervolume(np.array([0.5, 0.4])) == pytest.approx(0.2)
    assert hypervolume(np.array([0.5, 0.4]), np.array([0.3, 0.3])) == pytest.approx(0.02)
    assert hypervolume(np.array([0.45, 0.45])) > hypervolume(np.array([0.5, 0.4]))
    assert hypervolume(np.array([0.9, 0.2]), 0.2) == hypervolume(np.array([0.1, 0.1]), 0.2) == 0


def test_rejects_invalid_input() -> None:
    scores, labels, mask, users = data()
    scores[np.nonzero(mask)[0][0], 0] = np.nan
    with pytest.raises(DataError, match=rf"1 of {mask.sum()} candidates"):
        list_metrics(scores, labels, mask, users, 3, ["like", "follow"])
    with pytest.raises(ConfigError, match="k 0 must be at least 1"):
        hr_and_ndcg(scores, labels[..., 0], mask, 0)
