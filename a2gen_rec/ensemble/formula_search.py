"""The formula baseline's numbers, by random search on validation: METHODS §6."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.models.ensemble.baselines import PowerFormula

_ALPHA = (1e-1, 1e4)  # at most 1 % off linear in p at rates of .1; at the other end log p, down to rates of 1e-3
_BETA = (1e-2, 1e1)
_STEP = 0.7  # of natural logarithms: a trial near another moves its numbers by factors of about 2


@dataclass(frozen=True)
class TunedFormula:
    """The best of :func:`tune_formula`'s trials, what it measures, and what the first trial measured."""

    formula: PowerFormula
    measure: float
    baseline_measure: float


def tune_formula(
    predictions: Tensor,
    measure: Callable[[Tensor], float],
    lower_is_better: Sequence[bool],
    mean: Tensor,
    scale: Tensor,
    num_trials: int,
    seed: int = 0,
) -> TunedFormula:
    """Random search for a formula: the first trial has α = β = 1, half of all are drawn at large, the rest near the
    best so far.

    Args:
        value: [..., K] of the validation lists' candidates.
        measure: of scores [...], higher is better; NaN never wins.
        less, centre, scale: as :class:`Formula` takes.
        trials: number of formulas measured, at least 1.
        seed: the same trials for the same seed.

    Raises:
        ConfigError: trials < 1.
        UserError: no trial could be measured.
    """
    if num_trials < 1:
        raise ConfigError(f"a formula is tuned by 1 or more trials, not {num_trials}")
    rng = torch.Generator().manual_seed(seed)

    def formula(drawn: Tensor) -> PowerFormula:
        alpha, beta = drawn
        return PowerFormula(alpha, beta, lower_is_better, mean, scale).to(predictions.device)

    start = torch.ones(2, len(lower_is_better))
    best, best_measure, first = start, float("-inf"), float("nan")
    for trial in range(num_trials):
        drawn = (
            start if trial == 0 else random_formula(rng, len(lower_is_better), None if 2 * trial < num_trials else best)
        )
        measured = measure(formula(drawn).score(predictions))
        first = measured if trial == 0 else first
        if measured > best_measure:
            best, best_measure = drawn, measured
    if best_measure == float("-inf"):
        raise UserError(f"none of {num_trials} formulas could be measured: the validation lists order nothing")
    return TunedFormula(formula(best), best_measure, first)


def random_formula(rng: torch.Generator, objectives: int, near: Tensor | None = None) -> Tensor:
    """[2, K] α and β of a trial: log-uniform in their ranges, or log-normal around those of ``near`` [2, K]."""
    low, high = torch.tensor([_ALPHA, _BETA]).log().T[:, :, None]
    if near is None:
        return torch.exp(low + (high - low) * torch.rand(2, objectives, generator=rng))
    moved = near.log() + _STEP * torch.randn(2, objectives, generator=rng)
    return torch.exp(torch.minimum(torch.maximum(moved, low), high))
