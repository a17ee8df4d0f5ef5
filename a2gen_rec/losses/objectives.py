"""Losses of the objectives as sums and counts, and uncertainty weighting: METHODS §5.

Sums and counts add up over batches and ranks; a term is its sum divided by the count of the global batch.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def binary_loss_sums(logits: Tensor, outcomes: Tensor) -> Tensor:
    """Return the binary cross-entropy [outcomes], summed over targets with a known outcome.

    Args:
        logits: [targets, outcomes].
        outcomes: [targets, outcomes] 0 or 1; NaN if unknown.
    """
    known = torch.isfinite(outcomes)
    target = torch.where(known, outcomes, 0).to(logits.dtype)
    losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return torch.where(known, losses, 0).sum(0)


def objective_losses(
    logits: Tensor,
    watch_time: Tensor | None,
    labels: Tensor,
    watch_s: Tensor,
    time_loss: Literal["mse", "mae"] = "mse",
) -> tuple[Tensor, Tensor]:
    """Return the binary cross-entropy of every objective and the error of the watch time in log1p seconds.

    Args:
        logits: [targets, objectives].
        watch_time: [targets] predicted log1p seconds; None if the watch time is not predicted.
        labels: [targets, objectives] 0 or 1; NaN if unknown.
        watch_s: [targets] seconds; NaN if unknown.
        time_loss: Form of the watch-time error.

    Returns:
        Sums and counts over known values, each [terms]: one per objective, then one for a predicted watch time.
    """
    sums, counts = binary_loss_sums(logits, labels), torch.isfinite(labels).sum(0)
    if watch_time is None:
        return sums, counts
    known = torch.isfinite(watch_s)
    # float32 even if the prediction was made under autocast.
    error = watch_time - torch.where(known, torch.log1p(watch_s), 0)
    losses = error.square() if time_loss == "mse" else error.abs()
    total, count = torch.where(known, losses, 0).sum(), known.sum()
    return torch.cat([sums, total[None]]), torch.cat([counts, count[None]])


class UncertaintyWeighting(nn.Module):
    """Homoscedastic-uncertainty weighting of loss terms (Kendall et al., CVPR 2018).

    The log variance s of every term is learned: ``Σ e^{-s} L + s / 2``, with ``L / 2`` for a squared error, whose
    likelihood contains the factor 1/2.

    Args:
        squared: Whether each term is a squared error.
        world_size: Number of ranks. The penalty ``s / 2`` is divided by it, as the sums in L are split over ranks.
    """

    factor: Tensor

    def __init__(self, squared: Sequence[bool], world_size: int = 1) -> None:
        super().__init__()
        self.world_size = world_size
        self.log_variance = nn.Parameter(torch.zeros(len(squared)))
        factor = torch.tensor([0.5 if is_squared else 1.0 for is_squared in squared])
        self.register_buffer("factor", factor, persistent=False)

    def forward(self, terms: Tensor, counts: Tensor) -> Tensor:
        """Return the weighted sum of the terms.

        Args:
            terms: [terms] sums of this rank, divided by the global counts.
            counts: [terms] global counts. A term with count 0 has no penalty: the penalty alone would increase the
                term's weight without bound.
        """
        penalty = 0.5 * self.log_variance * (counts > 0) / self.world_size
        return (self.factor * torch.exp(-self.log_variance) * terms + penalty).sum()
