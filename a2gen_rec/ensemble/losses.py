"""What the ensemble is trained for: losses over session lists, and the behaviours' weights in them (METHODS §6).

A session list is a user's candidates of one session; lists are padded at the end. Every loss is a sum and what it
is the mean over, so that means over the lists of several batches or ranks are exact.
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
    """A loss as two scalars: the sum of its terms, and their number."""

    total: Tensor
    count: Tensor

    @property
    def mean(self) -> Tensor:
        return self.total / torch.where(self.count > 0, self.count, 1)


def combined_relevance(labels: Tensor, weights: Tensor) -> Tensor:
    """r = Σ_m ω_m y_m: labels [n, C, M] of the behaviours, weights [M] -> [n, C]."""
    return labels.to(weights.dtype) @ weights


def pointwise(score: Tensor, relevance: Tensor, mask: Tensor) -> WeightedMean:
    """(s − r)² of every valid candidate (UMRE); all arguments [n, C], ``valid`` bool."""
    error = (score - relevance).masked_fill(~mask, 0)
    return WeightedMean(error.square().sum(), mask.sum())


def listwise(score: Tensor, relevance: Tensor, mask: Tensor) -> WeightedMean:
    """Softmax cross-entropy over each list, every candidate's term weighed by its relevance.

    With relevances as shares of their list's sum it would be ListNet's top one, and a list with one rare behaviour no
    more than one with a common one: the behaviours' weights would act within lists alone [ours]. The mean is over the
    relevance there is.

    Args:
        score, relevance: [n, C], relevance ≥ 0; valid: [n, C] bool.
    """
    log_share = torch.log_softmax(score.masked_fill(~mask, torch.finfo(score.dtype).min), dim=-1)
    relevance = relevance.masked_fill(~mask, 0)
    return WeightedMean(-(relevance * log_share).sum(), relevance.sum())


def pairwise(score: Tensor, relevance: Tensor, mask: Tensor) -> WeightedMean:
    """log(1 + exp(s_j − s_i)) over the pairs of a list where i is more relevant than j (RankNet).

    Args:
        score, relevance: [n, C]; valid: [n, C] bool.
    """
    ordered = (relevance[:, :, None] > relevance[:, None]) & mask[:, :, None] & mask[:, None]
    behind = score[:, None] - score[:, :, None]
    return WeightedMean(F.softplus(behind.masked_fill(~ordered, 0)).masked_fill(~ordered, 0).sum(), ordered.sum())


def update_pareto_weights(
    weights: np.ndarray,
    previous_uauc: np.ndarray,
    uauc: np.ndarray,
    step_size: float,
    bounds: tuple[float, float],
) -> np.ndarray:
    """The Pareto scheduler: behaviours whose user AUC fell weigh more, those whose rose weigh less.

    ω_m ← ω_m · exp(−η ΔUAUC_m / UAUC_m), clipped to ``bounds``, of sum 1 [exact rule ours].

    Args:
        weights: [M] ω; before, after: [M] validation UAUC of the two last epochs, NaN where no user has both
            classes: such a behaviour keeps its weight until the sum is made 1.
        rate: η ≥ 0; bounds: least and greatest weight before the sum is made 1.
    """
    change = np.nan_to_num((uauc - previous_uauc) / previous_uauc)
    moved = np.clip(weights * np.exp(-step_size * change), *bounds)
    return moved / moved.sum()


def gradient_gram_matrix(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> np.ndarray:
    """[M, M] float64 inner products of the losses' gradients by the parameters; keeps the graph of the losses."""
    rows = []
    for loss in losses:
        parts = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([part.flatten() for part in parts]).double())
    gradients = torch.stack(rows)
    return (gradients @ gradients.T).cpu().numpy()


def min_norm_weights(gram: np.ndarray, tolerance: float = 1e-10, max_steps: int = 10_000) -> np.ndarray:
    """Weights of sum 1 for which Σ_m ω_m g_m is shortest (MGDA, Désidéri 2012; Sener & Koltun 2018).

    Pairwise Frank–Wolfe: weight moves from the worst loss that has any to the best, by the exact step between the
    two, so two losses take one step, the closed form.

    Args:
        products: [M, M] from :func:`gradient_products`.
        tolerance: of the duality gap, relative to the largest product; steps: bound on their number.

    Returns:
        [M], no one negative.
    """
    weights = np.full(len(gram), 1 / len(gram))
    largest = gram.diagonal().max()
    for _ in range(max_steps):
        slope = gram @ weights
        best, worst = int(slope.argmin()), int(np.where(weights > 0, slope, -np.inf).argmax())
        if slope[worst] - slope[best] <= tolerance * largest:
            break
        curvature = gram[best, best] + gram[worst, worst] - 2 * gram[best, worst]
        # Nearly equal gradients leave rounding alone in the curvature, which could then be zero or negative.
        curvature = max(curvature, np.finfo(np.float64).eps * largest)
        step = min(weights[worst], (slope[worst] - slope[best]) / curvature)
        weights[[best, worst]] += step, -step
    return weights


def bounded_min_norm_weights(gram: np.ndarray, min_weights: np.ndarray, previous_weights: np.ndarray) -> np.ndarray:
    """:func:`min_norm_weights` with a lower bound per loss (Pareto-efficient, PE-LTR: Lin et al. 2019).

    With ω = c + (1 − Σ c) α and α of sum 1 it is the problem without bounds, for the gradients
    Σ_j c_j g_j + (1 − Σ c) g_m.

    A loss without a gradient, of a behaviour that the batch has no positive of, would take all there is to choose and
    leave nothing to step along. The problem is therefore that of the others: such a loss keeps what it had of α, next
    to their solution, before the sum is made 1 [ours].

    Args:
        products: [M, M] from :func:`gradient_products`; least: [M] bounds c.
        before: [M] ω of sum 1 until now.

    Raises:
        ConfigError: a bound is negative, or they leave nothing to choose.
    """
    free = 1 - min_weights.sum()
    if (min_weights < 0).any() or free < 0:
        raise ConfigError(f"least weights {min_weights.tolist()} must not be negative, nor their sum above 1")
    there = gram.diagonal() > 0
    if not there.any():
        return previous_weights
    share = np.maximum(previous_weights - min_weights, 0)
    share /= share.sum() or 1
    part = 1 / (1 + share[~there].sum())  # of all α, that of the losses there
    mixed = min_weights[there, None] + free * part * np.eye(there.sum())
    share[there] = min_norm_weights(mixed.T @ gram[np.ix_(there, there)] @ mixed)
    weights: np.ndarray = min_weights + free * part * share
    return weights
