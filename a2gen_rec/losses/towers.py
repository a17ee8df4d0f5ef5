"""Losses of rankers with a tower per task, as sums over a batch: METHODS §7.

The times are those that the generator's loss is over: every action that happened at a known time, ``exit`` among them.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.losses.targets import target_outcomes


def occurrence_bce(logits: Tensor, happened: Tensor) -> Tensor:
    """[events] sums over targets of the binary cross-entropy of whether each action happens.

    Args:
        logits: [targets, events]; happened: [targets, actions], of which ``start`` and ``exit`` are no events.
    """
    target = happened[:, 1:-1].to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(0)


def tower_loss_sums(
    logits: Tensor, time: Tensor, batch: WindowBatch, time_error: Literal["mse", "mae"] = "mse"
) -> tuple[Tensor, Tensor]:
    """Sums over the targets of a batch, one per tower.

    Args:
        logits: [targets, events] that each action happens; time: [targets, actions] predicted log1p seconds.

    Returns:
        [events] :func:`event_errors`; [actions] error of the times in log1p seconds, 0 where the log does not record
        them.
    """
    happened, observed_time = target_outcomes(batch, time.shape[1])
    known = torch.isfinite(observed_time)
    error = time - torch.where(known, observed_time, 0).to(time.dtype)
    each = error.square() if time_error == "mse" else error.abs()
    return occurrence_bce(logits, happened), torch.where(known, each, 0).sum(0)
