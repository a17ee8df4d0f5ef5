"""Losses as functions of (output, batch): METHODS §4.

Every term is a sum over its own valid steps; dividing by the global batch's counts makes the mean the same on any
number of ranks.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from a2gen_rec.config import LossConfig
from a2gen_rec.data.batch import COUNTS, WindowBatch
from a2gen_rec.models.a2gen import A2GenOutput
from a2gen_rec.nn.generator import Steps

TERMS = ("action", "time", "order", "label", "draft_action", "draft_time")
_MEAN_OVER = tuple(
    COUNTS.index(name) for name in ("steps", "timed_steps", "ordered_pairs", "labels", "steps", "timed_steps")
)


def loss_sums(output: A2GenOutput, batch: WindowBatch, config: LossConfig) -> Tensor:
    """Sums of the loss terms over this batch.

    Returns:
        [6], in the order of ``TERMS``; terms that do not apply are 0.
    """
    label, time = batch.step_label, batch.step_time
    order, base = _order_sum(output.steps, label, time, batch, config.order_power), output.context.sum() * 0
    draft_action, draft_time = (base, base) if output.draft is None else _step_sums(output.draft, label, time, config)
    return torch.stack(
        [
            *_step_sums(output.steps, label, time, config),
            order,
            _label_sum(output.label_logits, batch.labels),
            draft_action,
            draft_time,
        ]
    )


def means(sums: Tensor, counts: Tensor) -> Tensor:
    """[6] terms as means, given ``sums`` [6] and ``counts`` [5] of the same (global) batches."""
    return sums / counts[list(_MEAN_OVER)].clamp(min=1).to(sums)


def total(terms: Tensor, config: LossConfig) -> Tensor:
    """The weighted sum of terms [6]."""
    auxiliary = config.auxiliary
    weights = [config.action, config.time, config.order, config.label, auxiliary, auxiliary * config.time]
    return (terms * terms.new_tensor(weights)).sum()  # as a matrix product, autocast would round it


class Loss(nn.Module):
    """The training loss as a leaf module, so that pipelines need not look into it.

    Args:
        world: number of ranks; undoes the averaging of gradients over them, the counts being global already.
    """

    def __init__(self, config: LossConfig, world: int = 1) -> None:
        super().__init__()
        self.config, self.world = config, world

    def forward(self, output: A2GenOutput, batch: WindowBatch) -> tuple[Tensor, tuple[Tensor, A2GenOutput]]:
        """The loss to differentiate, and (detached sums of the terms [6], output)."""
        sums = loss_sums(output, batch, self.config)
        loss = total(means(sums, batch.counts), self.config) * self.world
        return loss, (sums.detach(), output)


def _step_sums(steps: Steps, label: Tensor, time: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    action = F.cross_entropy(steps.logits, label, reduction="sum")
    known = torch.isfinite(time)
    error = _at(steps.time, label) - torch.where(known, time, 0)
    if steps.log_scale is not None:
        log_scale = _at(steps.log_scale, label)
        each = 0.5 * (error / log_scale.exp()).square() + log_scale
    else:
        each = error.square() if config.time_error == "squared" else error.abs()
    return action, torch.where(known, each, 0).sum()


def _order_sum(steps: Steps, label: Tensor, time: Tensor, batch: WindowBatch, power: float) -> Tensor:
    """Σ max(t̂_{i−1} − t̂_i, 0)^p over neighbouring steps of one target whose times are both recorded."""
    predicted = _at(steps.time, label)
    back = F.relu(predicted[:-1] - predicted[1:])
    # The power's gradient at 0 is not finite for p < 1 and costs a NaN when masked afterwards.
    return torch.where(batch.timed_pairs & (back > 0), back.clamp(min=torch.finfo(back.dtype).tiny) ** power, 0).sum()


def _label_sum(logits: Tensor, labels: Tensor) -> Tensor:
    known = torch.isfinite(labels)
    target = torch.where(known, labels, 0).to(logits.dtype)
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return torch.where(known, each, 0).sum()


def _at(values: Tensor, label: Tensor) -> Tensor:
    return values.gather(1, label[:, None]).squeeze(1)
