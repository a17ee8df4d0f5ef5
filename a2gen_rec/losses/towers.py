"""Losses of rankers with one tower per task, as sums over a batch: METHODS §7.

The time loss covers the same times as the generator's: every action that occurred at a known time, including ``exit``.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.losses.targets import target_outcomes


def occurrence_bce(logits: Tensor, occurred: Tensor, trained: Tensor | None = None) -> Tensor:
    """Return the binary cross-entropy of each action's occurrence, [events] sums over targets.

    Args:
        logits: [targets, events].
        occurred: [targets, actions]; the first and last, ``start`` and ``exit``, are ignored.
        trained: [actions] bool, actions with positives in training; the sums of others are 0. None for all.
    """
    target = occurred[:, 1:-1].to(logits.dtype)
    sums = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(0)
    return sums if trained is None else torch.where(trained[1:-1], sums, 0)


def tower_loss_sums(
    logits: Tensor,
    time: Tensor,
    batch: WindowBatch,
    time_loss: Literal["mse", "mae"] = "mse",
    trained: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the sums over the targets of a batch, one per tower.

    Args:
        logits: [targets, events] of each action's occurrence.
        time: [targets, actions] predicted log1p seconds.
        batch: Batch with the observed actions.
        time_loss: Form of the time error.
        trained: As in :func:`occurrence_bce`.

    Returns:
        [events] from :func:`occurrence_bce`; [actions] time errors in log1p seconds, 0 for actions without recorded
        times.
    """
    occurred, observed_time = target_outcomes(batch, time.shape[1])
    known = torch.isfinite(observed_time)
    if trained is not None:
        known = known & trained
    error = time - torch.where(known, observed_time, 0)  # float32 even if predicted under autocast
    losses = error.square() if time_loss == "mse" else error.abs()
    return occurrence_bce(logits, occurred, trained), torch.where(known, losses, 0).sum(0)
