"""Losses against loops over lists and pairs, behavior weights against known cases and brute_force force."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from a2gen_rec.ensemble.losses import (
    bounded_min_norm_weights,
    combined_relevance,
    gradient_gram_matrix,
    listwise,
    min_norm_weights,
    pairwise,
    pointwise,
    update_pareto_weights,
)
from a2gen_rec.errors import ConfigError
from tests.helpers.properties import examples

LOSSES = {"pointwise": pointwise, "listwise": listwise, "pairwise": pairwise}


def lists(seed: int, n: int = 4, candidates: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores, relevances with ties and zeros, and a mask with empty to full lists."""
    rng = torch.Generator().manual_seed(seed)
    score = torch.randn(n, candidates, generator=rng, dtype=torch.float64)
    labels = torch.rand(n, candidates, 2, generator=rng) < 0.3
    relevance = combined_relevance(labels, torch.tensor([0.7, 0.3], dtype=torch.float64))
    size = torch.randint(0, candidates + 1, (n,), generator=rng)
    return score.requires_grad_(), relevance, torch.arange(candidates) < size[:, None]


def reference_terms(name: str, score: Tensor, relevance: Tensor, mask: Tensor) -> list[Tensor]:
    """Return every term of the loss, list by list, without padding."""
    terms = []
    for s, r, inside in zip(score, relevance, mask, strict=True):
        s, r = s[inside], r[inside]
        if name == "pointwise":
            terms += [(a - b) ** 2 for a, b in zip(s, r, strict=True)]
        elif name == "listwise":
            terms += [-b * torch.log(torch.exp(a) / torch.exp(s).sum()) for a, b in zip(s, r, strict=True)]
        elif name == "pairwise":
            terms += [
                torch.log(1 + torch.exp(s[j] - s[i]))
                for i, j in itertools.permutations(range(len(s)), 2)
                if r[i] > r[j]
            ]
    return terms


def test_relevance_is_the_weighted_sum_of_labels() -> None:
    labels = torch.tensor([[[1, 0], [1, 1], [0, 0]]])
    expected = torch.tensor([[0.75, 1.0, 0.0]])
    torch.testing.assert_close(combined_relevance(labels, torch.tensor([0.75, 0.25])), expected)


@examples(40)
@given(name=st.sampled_from(sorted(LOSSES)), seed=st.integers(0, 999), candidates=st.integers(1, 6))
def test_losses_and_gradients_equal_loops(name: str, seed: int, candidates: int) -> None:
    score, relevance, mask = lists(seed, candidates=candidates)
    loss, terms = LOSSES[name](score, relevance, mask), reference_terms(name, score, relevance, mask)
    count = float(relevance[mask].sum()) if name == "listwise" else len(terms)
    assert float(loss.count) == pytest.approx(count)
    (fast,) = torch.autograd.grad(loss.total, score, materialize_grads=True)
    if not terms:
        assert loss.total == loss.mean == 0
        assert not fast.any()
        return
    expected = torch.stack(terms)
    torch.testing.assert_close(loss.total, expected.sum())
    torch.testing.assert_close(loss.mean, expected.sum() / (count or 1))
    torch.testing.assert_close(fast, torch.autograd.grad(expected.sum(), score)[0])


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("garbage", [torch.inf, torch.nan, 1e30])
def test_padding_has_no_effect(name: str, garbage: float) -> None:
    score, relevance, mask = lists(3)
    dirty_score = score.detach().masked_fill(~mask, garbage).requires_grad_()
    dirty = LOSSES[name](dirty_score, relevance.masked_fill(~mask, garbage), mask)
    clean = LOSSES[name](score, relevance, mask)
    assert 0 < mask.sum() < mask.numel()
    assert dirty.total == clean.total
    assert dirty.count == clean.count
    gradient = torch.autograd.grad(dirty.total, dirty_score)[0]
    assert torch.equal(gradient, torch.autograd.grad(clean.total, score)[0])


def test_large_scores_give_finite_losses() -> None:
    relevance, mask = torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool)
    for name, expected in (("listwise", 2000.0), ("pairwise", 2000.0)):
        loss = LOSSES[name](torch.tensor([[-1000.0, 1000.0]]), relevance, mask)
        assert loss.total == pytest.approx(expected)


def test_pareto_raises_the_weight_of_a_behavior_that_fell() -> None:
    weights, before = np.array([0.5, 0.3, 0.2]), np.array([0.6, 0.5, 0.8])
    after = np.array([0.54, 0.55, 0.8])
    moved = update_pareto_weights(weights, before, after, step_size=2.0, bounds=(0.01, 1.0))
    raw = [0.5 * math.exp(0.2), 0.3 * math.exp(-0.2), 0.2]  # −2 · (−0.06 / 0.6), −2 · 0.05 / 0.5, nothing
    np.testing.assert_allclose(moved, np.array(raw) / sum(raw))


def test_pareto_weights_are_clipped_and_ignore_missing_aucs() -> None:
    weights, before = np.array([0.6, 0.3, 0.1]), np.array([0.5, np.nan, 0.9])
    moved = update_pareto_weights(weights, before, np.array([0.1, 0.7, 0.999]), step_size=50.0, bounds=(0.05, 0.9))
    np.testing.assert_allclose(moved, np.array([0.9, 0.3, 0.05]) / 1.25)
    unchanged = update_pareto_weights(weights, before, before, step_size=50.0, bounds=(0.05, 0.9))
    np.testing.assert_allclose(unchanged, weights)


def test_gram_matrix_equals_products_of_gradients() -> None:
    a, b, unused = (torch.randn(shape, requires_grad=True) for shape in ((2, 3), (4,), (2,)))
    losses = [(a * 2).sum() + b.square().sum(), b.sum() * 3]
    length, total = b.square().sum().item(), b.sum().item()
    expected = [[4 * 6 + 4 * length, 6 * total], [6 * total, 9 * 4]]
    for _ in range(2):  # the losses can be differentiated again
        np.testing.assert_allclose(gradient_gram_matrix(losses, [a, b, unused]), expected, rtol=1e-5)


def products(*gradients: list[float]) -> np.ndarray:
    return np.array(gradients) @ np.array(gradients).T


@pytest.mark.parametrize(
    ("gradients", "weights"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], [0.5, 0.5]),
        ([[2.0, 0.0], [0.0, 1.0]], [0.2, 0.8]),  # (|b|² − a·b) / |a − b|²
        ([[1.0, 1.0], [3.0, 1.0]], [1.0, 0.0]),  # the shorter one if the other extends beyond it
        ([[1.0, 0.0], [-3.0, 0.0]], [0.75, 0.25]),  # opposite directions cancel
        ([[1.0, 2.0], [1.0, 2.0]], [0.5, 0.5]),
        ([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], [1 / 3, 1 / 3, 1 / 3]),
        ([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 4.0]], [16 / 21, 4 / 21, 1 / 21]),  # ∝ 1 / |g|²
    ],
)
def test_min_norm_weights_of_known_cases(gradients: list[list[float]], weights: list[float]) -> None:
    np.testing.assert_allclose(min_norm_weights(products(*gradients)), weights, atol=1e-8)


def brute_force(gram: np.ndarray, min_weights: np.ndarray, parts: int) -> float:
    """Return the minimum squared norm on a grid of all weights of sum 1 within the bounds."""
    m, free = len(gram), 1 - min_weights.sum()
    cuts = itertools.combinations(range(parts + m - 1), m - 1)
    bars = np.array([(-1, *cut, parts + m - 1) for cut in cuts])
    weights = min_weights + free * (np.diff(bars, axis=1) - 1) / parts
    return float(np.einsum("ni,ij,nj->n", weights, gram, weights).min())


@examples(60)
@given(m=st.integers(1, 4), width=st.integers(1, 5), seed=st.integers(0, 9999), bounded=st.booleans())
def test_min_norm_weights_equal_brute_force(m: int, width: int, seed: int, bounded: bool) -> None:
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(m, width)) * rng.lognormal(0, 1, (m, 1))
    gram = gradients @ gradients.T
    min_weights = rng.dirichlet(np.ones(m)) * rng.random() if bounded else np.zeros(m)
    weights = bounded_min_norm_weights(gram, min_weights, np.full(m, 1 / m)) if bounded else min_norm_weights(gram)
    assert weights.sum() == pytest.approx(1)
    assert (weights >= min_weights - 1e-12).all()
    length, best = weights @ gram @ weights, brute_force(gram, min_weights, 40)
    assert length <= best + 1e-8 * gram.diagonal().max()
    # Karush–Kuhn–Tucker: no weight above its bound has a larger slope than any other.
    slope = gram @ weights
    shrinks = weights > min_weights + 1e-6
    assert slope[shrinks].max(initial=-np.inf) <= slope.min() + 1e-6 * gram.diagonal().max()


def test_bounds_limit_the_weights() -> None:
    gram = products([2.0, 0.0], [0.0, 1.0])  # [0.2, 0.8] without bounds
    for min_weights, expected in (([0.1, 0.1], [0.2, 0.8]), ([0.4, 0.1], [0.4, 0.6]), ([0.7, 0.3], [0.7, 0.3])):
        weights = bounded_min_norm_weights(gram, np.array(min_weights), np.array([0.9, 0.1]))
        np.testing.assert_allclose(weights, expected, atol=1e-8)


def test_losses_without_gradient_keep_their_weight() -> None:
    """The two losses with a gradient get [0.2, 0.8]; the third keeps its weight before normalization."""
    gram, none = products([2.0, 0.0], [0.0, 1.0], [0.0, 0.0]), np.zeros(3)
    for before, expected in (
        ([0.3, 0.3, 0.4], [0.2, 0.8, 0.4]),
        ([0, 0, 1], [0.2, 0.8, 1]),
        ([1, 0, 0], [0.2, 0.8, 0]),
    ):
        weights = bounded_min_norm_weights(gram, none, np.array(before, float))
        np.testing.assert_allclose(weights, np.array(expected) / sum(expected), atol=1e-8)
    before = np.array([0.5, 0.1, 0.4])
    np.testing.assert_array_equal(bounded_min_norm_weights(np.zeros((3, 3)), none, before), before)


@examples(60)
@given(m=st.integers(2, 4), seed=st.integers(0, 9999), scale=st.sampled_from([0.0, 0.5, 1.0]))
def test_bounds_hold_for_losses_without_gradient(m: int, seed: int, scale: float) -> None:
    """The combination of the other losses is optimal: no small exchange of weight shortens it."""
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(m, 3))
    gradients[rng.integers(m)] = 0
    gram, min_weights, before = (
        gradients @ gradients.T,
        rng.dirichlet(np.ones(m)) * scale * (1 - 1e-12),
        rng.dirichlet(np.ones(m)),
    )
    weights = bounded_min_norm_weights(gram, min_weights, before)
    assert weights.sum() == pytest.approx(1)
    assert (weights >= min_weights - 1e-12).all()
    nonzero = gram.diagonal() > 0
    slope, shrinks = gram @ weights, nonzero & (weights > min_weights + 1e-6)
    assert slope[shrinks].max(initial=-np.inf) <= slope[nonzero].min() + 1e-6 * gram.diagonal().max()


@pytest.mark.parametrize("min_weights", [[0.7, 0.4], [-0.1, 0.5]])
def test_rejects_infeasible_bounds(min_weights: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"minimum weights .* must be at least 0"):
        bounded_min_norm_weights(np.eye(2), np.array(min_weights), np.ones(2) / 2)
