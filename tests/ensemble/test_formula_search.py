"""Search for the formula's parameters: recovery of a planted order, and sampling."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from a2gen_rec.ensemble import formula_search
from a2gen_rec.ensemble.formula_search import TunedFormula, random_formula, tune_formula
from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.models.ensemble.baselines import PowerFormula

LOWER_IS_BETTER = [False, True, False]
K = len(LOWER_IS_BETTER)


def planted() -> tuple[Tensor, Callable[[Tensor], float]]:
    """Return predictions of a rare, a common and a noise objective, and a measure of agreement with a planted order."""
    rng = torch.Generator().manual_seed(3)
    value = torch.tensor([-6.0, 0.0, 0.0]) + torch.tensor([1.5, 1.0, 2.0]) * torch.randn(300, K, generator=rng)
    target = 1000 * torch.sigmoid(value[:, 0]) - torch.sigmoid(value[:, 1])

    def measure(score: Tensor) -> float:
        agree = (score[:, None] > score) == (target[:, None] > target)
        return agree.float().mean().item()

    return value, measure


def tune(trials: int, seed: int = 0, measure: Callable[[Tensor], float] | None = None) -> TunedFormula:
    value, agreement = planted()
    return tune_formula(value, measure or agreement, LOWER_IS_BETTER, torch.zeros(K), torch.ones(K), trials, seed)


def test_finds_a_planted_order() -> None:
    value, measure = planted()
    tuned = tune(100)
    start = PowerFormula(torch.ones(K), torch.ones(K), LOWER_IS_BETTER, torch.zeros(K), torch.ones(K))
    assert tuned.baseline_measure == measure(start.score(value)) < 0.6
    assert tuned.measure == measure(tuned.formula.score(value)) > 0.9


def test_is_deterministic_and_more_trials_never_hurt() -> None:
    """The first trial has α = β = 1. The best is never worse than any trial."""
    measured: list[float] = []
    _, measure = planted()

    def recorded(score: Tensor) -> float:
        measured.append(measure(score))
        return measured[-1]

    tuned = tune(40, measure=recorded)
    assert len(measured) == 40
    assert (tuned.baseline_measure, tuned.measure) == (measured[0], max(measured))
    again, other = tune(40), tune(40, seed=1)
    assert torch.equal(again.formula.alpha, tuned.formula.alpha)
    assert not torch.equal(other.formula.alpha, tuned.formula.alpha)
    only = tune(1)
    assert only.measure == only.baseline_measure
    assert only.formula.alpha.tolist() == [1, 1, 1]
    assert only.formula.exponent.tolist() == [1, -1, 1]


def test_second_half_of_trials_is_near_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    near_arguments: list[Tensor | None] = []
    drawn, measures = [torch.ones(2, K)], []
    _, measure = planted()

    def recorded_draw(rng: torch.Generator, objectives: int, near: Tensor | None = None) -> Tensor:
        near_arguments.append(near)
        drawn.append(random_formula(rng, objectives, near))
        return drawn[-1]

    monkeypatch.setattr(formula_search, "random_formula", recorded_draw)
    tune(20, measure=lambda score: measures.append(measure(score)) or measures[-1])  # type: ignore[func-returns-value]
    assert near_arguments[:9] == [None] * 9  # after the first trial, nine global trials
    for trial, near in enumerate(near_arguments[9:], 10):
        assert near is drawn[measures.index(max(measures[:trial]))]


def test_random_formulas_cover_their_ranges_or_stay_near() -> None:
    rng = torch.Generator().manual_seed(0)
    drawn = torch.stack([random_formula(rng, 2) for _ in range(2000)]).log10()
    low, high = torch.tensor([-1.0, -2.0]), torch.tensor([4.0, 1.0])
    torch.testing.assert_close(drawn.amin((0, 2)), low, atol=0.02, rtol=0)
    torch.testing.assert_close(drawn.amax((0, 2)), high, atol=0.02, rtol=0)
    torch.testing.assert_close(drawn.mean((0, 2)), (low + high) / 2, atol=0.1, rtol=0)
    near = torch.tensor([[10.0, 1e4], [1.0, 0.01]])
    near_draws = torch.stack([random_formula(rng, 2, near) for _ in range(2000)])
    assert near_draws[:, :, 0].log().std(0).tolist() == pytest.approx([0.7, 0.7], rel=0.1)
    assert near_draws[:, 0].max() <= 1e4 * (1 + 1e-5)
    assert near_draws[:, 1].min() >= 0.01 * (1 - 1e-5)


def test_rejects_searches_without_a_result() -> None:
    with pytest.raises(ConfigError, match="num_trials 0 must be at least 1"):
        tune(0)
    with pytest.raises(UserError, match="none of 3 formulas"):
        tune(3, measure=lambda score: math.nan)
