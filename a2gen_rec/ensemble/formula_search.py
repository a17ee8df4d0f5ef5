"""Random search for the parameters of the formula baseline on validation: METHODS §6."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.models.ensemble.baselines import PowerFormula

_ALPHA = (1e-1, 1e4)  # lower end: linear in p within 1 % at rates of .1; upper end: log p down to rates of 1e-3
_BETA = (1e-2, 1e1)
_STEP = 0.7  # standard deviation of the log parameters in local trials: factors of about 2


@dataclass(frozen=True)
class TunedFormula:
    """Best formula of a search.

    Attributes:
        formula: Best formula.
        measure: Measure of the best formula.
        baseline_measure: Measure of the first trial, with α = β = 1.
    """

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
    """Search for a formula at random: first α = β = 1, then global trials, in the second half trials near the best.

    Args:
        predictions: [..., K] predictions of the validation lists' candidates.
        measure: Returns the measure of scores [...]; higher is better, NaN never wins.
        lower_is_better: [K] as in :class:`PowerFormula`.
        mean: [K] as in :class:`PowerFormula`.
        scale: [K] as in :class:`PowerFormula`.
        num_trials: Number of trials, at least 1.
        seed: Random seed of the trials.

    Raises:
        ConfigError: ``num_trials`` < 1.
        UserError: No trial could be measured.
    """
    if num_trials < 1:
        raise ConfigError(f"num_trials {num_trials} must be at least 1")
    rng = torch.Generator().manual_seed(seed)

    def formula(parameters: Tensor) -> PowerFormula:
        alpha, beta = parameters
        return PowerFormula(alpha, beta, lower_is_better, mean, scale).to(predictions.device)

    start = torch.ones(2, len(lower_is_better))
    best, best_measure, first = start, float("-inf"), float("nan")
    for trial in range(num_trials):
        near = None if 2 * trial < num_trials else best
        parameters = start if trial == 0 else random_formula(rng, len(lower_is_better), near)
        value = measure(formula(parameters).score(predictions))
        first = value if trial == 0 else first
        if value > best_measure:
            best, best_measure = parameters, value
    if best_measure == float("-inf"):
        raise UserError(f"none of {num_trials} formulas could be measured: no validation list has both classes")
    return TunedFormula(formula(best), best_measure, first)


def random_formula(rng: torch.Generator, num_objectives: int, near: Tensor | None = None) -> Tensor:
    """Draw α and β [2, K] of a trial: log-uniform in their ranges, or log-normal around ``near`` [2, K]."""
    low, high = torch.tensor([_ALPHA, _BETA]).log().T[:, :, None]
    if near is None:
        return torch.exp(low + (high - low) * torch.rand(2, num_objectives, generator=rng))
    shifted = near.log() + _STEP * torch.randn(2, num_objectives, generator=rng)
    return torch.exp(torch.minimum(torch.maximum(shifted, low), high))
