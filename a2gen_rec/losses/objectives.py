"""Losses of the objectives as sums and counts, and their weighting by learned uncertainty: METHODS §5.

Sums and counts add up over batches and ranks; a term is its sum over the global batch's count.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def objective_losses(
    logits: Tensor,
    watch_time: Tensor | None,
    labels: Tensor,
    watch_s: Tensor,
    time_error: Literal["mse", "mae"] = "mse",
) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy of every objective, then the error of the watch time in log1p seconds.

    Args:
        logits: [targets, objectives]; watch_time: [targets] predicted log1p seconds, None if it is not predicted.
        labels: [targets, objectives] 0 or 1; watch_s: [targets] seconds; NaN where unknown.

    Returns:
        Sums and counts over what is known, each [terms]: one per objective, and one for a predicted watch time.
    """
    known = torch.isfinite(labels)
    target = torch.where(known, labels, 0).to(logits.dtype)
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    sums, counts = torch.where(known, each, 0).sum(0), known.sum(0)
    if watch_time is None:
        return sums, counts
    known = torch.isfinite(watch_s)
    error = watch_time - torch.where(known, torch.log1p(watch_s), 0)  # float32 though autocast made the prediction
    each = error.square() if time_error == "mse" else error.abs()
    total, count = torch.where(known, each, 0).sum(), known.sum()
    return torch.cat([sums, total[None]]), torch.cat([counts, count[None]])


class UncertaintyWeighting(nn.Module):
    """Homoscedastic-uncertainty weighting of loss terms (Kendall et al., CVPR 2018).

    The log variance s of every term is learned: ``Σ e^{-s} L + s / 2``, with ``L / 2`` for a squared error, whose
    likelihood has the half.

    Args:
        squared: for every term, whether it is a squared error.
        world: number of ranks among which the penalty ``s / 2`` is shared out, as the sums in L are.
    """

    factor: Tensor

    def __init__(self, squared: Sequence[bool], world: int = 1) -> None:
        super().__init__()
        self.world = world
        self.log_variance = nn.Parameter(torch.zeros(len(squared)))
        self.register_buffer("factor", torch.tensor([0.5 if each else 1.0 for each in squared]), persistent=False)

    def forward(self, terms: Tensor, counts: Tensor) -> Tensor:
        """The weighted sum of the terms.

        Args:
            terms: [terms] this rank's sums over the global counts; counts: [terms] those counts. A term of which
                nothing is known has no penalty either: alone, it would drive the term's weight up without bound.
        """
        penalty = 0.5 * self.log_variance * (counts > 0) / self.world
        return (self.factor * torch.exp(-self.log_variance) * terms + penalty).sum()
