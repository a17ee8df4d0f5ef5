"""Losses of the ensemble over session lists, and the weights of behaviors in them (METHODS §6).

A session list holds a user's candidates of one session; lists are padded at the end. Every loss returns a sum and its
count, so that means over several batches or ranks are exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from a2gen_rec.errors import ConfigError


@dataclass(frozen=True)
class WeightedMean:
    """Loss as two scalars: the sum of its terms and their number."""

    total: Tensor
    count: Tensor

    @property
    def mean(self) -> Tensor:
        return self.total / torch.where(self.count > 0, self.count, 1)


def combined_relevance(labels: Tensor, weights: Tensor) -> Tensor:
    """Return r = Σ_m ω_m y_m [n, C] from labels [n, C, M] of the behaviors and weights [M]."""
    return labels.to(weights.dtype) @ weights


def pointwise(score: Tensor, relevance: Tensor, mask: Tensor) -> WeightedMean:
    """Squared error (s − r)² of every candidate in the mask (UMRE).

    Args:
        score: [n, C] scores.
        relevance: [n, C] relevances.
        mask: [n, C] bool, False at padding.
    """
    error = (score - relevance).masked_fill(~mask, 0)
    return WeightedMean(error.square().sum(), mask.sum())


def listwise(score: Tensor, relevance: Tensor, mask: Tensor) -> WeightedMean:
    """Softmax cross-entropy over each list, with each candidate's term weighted by its relevance.

    If relevances were normalized per list, this would be ListNet's top-one loss. A list with one rare behavior would
    then count as much as a list with a common one, and behavior weights would act within lists only. Therefore they
    are not normalized [ours]; the mean is over the total relevance.

    Args:
        score: [n, C] scores.
        relevance: [n, C] relevances ≥ 0.
        mask: [n, C] bool, False at padding.
    """
    log_softmax = torch.log_softmax(score.masked_fill(~mask, torch.finfo(score.dtype).min), dim=-1)
    relevance = relevance.masked_fill(~mask, 0)
    return WeightedMean(-(relevance * log_softmax).sum(), relevance.sum())


def pairwise(score: Tensor, relevance: Tensor, mask: Tensor) -> WeightedMean:
    """Logistic loss log(1 + exp(s_j − s_i)) over pairs of a list where i is more relevant than j (RankNet).

    Args:
        score: [n, C] scores.
        relevance: [n, C] relevances.
        mask: [n, C] bool, False at padding.
    """
    ordered = (relevance[:, :, None] > relevance[:, None]) & mask[:, :, None] & mask[:, None]
    margin = score[:, None] - score[:, :, None]
    return WeightedMean(F.softplus(margin.masked_fill(~ordered, 0)).masked_fill(~ordered, 0).sum(), ordered.sum())


def update_pareto_weights(
    weights: np.ndarray,
    previous_uauc: np.ndarray,
    uauc: np.ndarray,
    step_size: float,
    bounds: tuple[float, float],
) -> np.ndarray:
    """Pareto scheduler: increase weights of behaviors whose user AUC fell, decrease those whose user AUC rose.

    ω_m ← ω_m · exp(−η ΔUAUC_m / UAUC_m), clipped to ``bounds``, then normalized to sum 1 [exact rule ours].

    Args:
        weights: [M] weights ω.
        previous_uauc: [M] validation UAUC of the previous epoch; NaN if no user has both classes. The weight of such a
            behavior changes only by the normalization.
        uauc: [M] validation UAUC of the last epoch; NaN as above.
        step_size: η ≥ 0.
        bounds: Minimum and maximum weight before the normalization.
    """
    change = np.nan_to_num((uauc - previous_uauc) / previous_uauc)
    moved = np.clip(weights * np.exp(-step_size * change), *bounds)
    return moved / moved.sum()


def gradient_gram_matrix(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> np.ndarray:
    """Return [M, M] float64 inner products of the losses' gradients; retains the graph of the losses."""
    rows = []
    for loss in losses:
        parts = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([part.flatten() for part in parts]).double())
    gradients = torch.stack(rows)
    return (gradients @ gradients.T).cpu().numpy()


def min_norm_weights(gram: np.ndarray, tolerance: float = 1e-10, max_steps: int = 10_000) -> np.ndarray:
    """Return weights of sum 1 that minimize |Σ_m ω_m g_m| (MGDA, Désidéri 2012; Sener & Koltun 2018).

    Pairwise Frank–Wolfe: weight moves from the worst loss with positive weight to the best, by exact line search
    between the two. Two losses need one step, the closed form.

    Args:
        gram: [M, M] from :func:`gradient_gram_matrix`.
        tolerance: Tolerance of the duality gap, relative to the largest diagonal entry.
        max_steps: Maximum number of steps.

    Returns:
        [M] non-negative weights.
    """
    weights = np.full(len(gram), 1 / len(gram))
    max_diagonal = gram.diagonal().max()
    for _ in range(max_steps):
        slope = gram @ weights
        best, worst = int(slope.argmin()), int(np.argmax(np.where(weights > 0, slope, -np.inf)))
        if slope[worst] - slope[best] <= tolerance * max_diagonal:
            break
        curvature = gram[best, best] + gram[worst, worst] - 2 * gram[best, worst]
        # For nearly equal gradients the curvature is rounding error and could be zero or negative.
        curvature = max(curvature, np.finfo(np.float64).eps * max_diagonal)
        step = min(weights[worst], (slope[worst] - slope[best]) / curvature)
        weights[[best, worst]] += step, -step
    return weights


def bounded_min_norm_weights(gram: np.ndarray, min_weights: np.ndarray, previous_weights: np.ndarray) -> np.ndarray:
    """Return :func:`min_norm_weights` with a lower bound per loss (Pareto-efficient, PE-LTR: Lin et al. 2019).

    Substituting ω = c + (1 − Σ c) α with Σ α = 1 gives the unbounded problem for the gradients
    Σ_j c_j g_j + (1 − Σ c) g_m.

    A loss with zero gradient belongs to a behavior without positives in the batch. It would take all free weight and
    leave no descent direction. Therefore only the other losses are optimized. The loss keeps its previous α next to
    their solution, before the normalization to sum 1 [ours].

    Args:
        gram: [M, M] from :func:`gradient_gram_matrix`.
        min_weights: [M] lower bounds c.
        previous_weights: [M] previous ω of sum 1.

    Raises:
        ConfigError: A bound is negative, or the bounds sum to more than 1.
    """
    free = 1 - min_weights.sum()
    if (min_weights < 0).any() or free < 0:
        raise ConfigError(f"minimum weights {min_weights.tolist()} must be at least 0 and sum to at most 1")
    nonzero = gram.diagonal() > 0
    if not nonzero.any():
        return previous_weights
    alpha = np.maximum(previous_weights - min_weights, 0)
    alpha /= alpha.sum() or 1
    fraction = 1 / (1 + alpha[~nonzero].sum())  # fraction of α for the losses with a gradient
    mixed = min_weights[nonzero, None] + free * fraction * np.eye(nonzero.sum())
    alpha[nonzero] = min_norm_weights(mixed.T @ gram[np.ix_(nonzero, nonzero)] @ mixed)
    weights: np.ndarray = min_weights + free * fraction * alpha
    return weights
