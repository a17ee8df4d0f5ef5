"""What happened in the targets of a batch, as losses and metrics compare it with predictions."""

import torch
from torch import Tensor

from a2gen_rec.data.batch import WindowBatch


def target_outcomes(batch: WindowBatch, actions: int) -> tuple[Tensor, Tensor]:
    """What happened in the targets: [targets, actions] 0/1 and log1p seconds (NaN when unknown)."""
    happened = batch.offset_s.new_zeros(len(batch.target), actions)
    time = torch.full_like(happened, torch.nan)
    owner = step_target_index(batch)
    happened[owner, batch.step_label] = 1
    time[owner, batch.step_label] = batch.step_time
    return happened, time


def step_target_index(batch: WindowBatch) -> Tensor:
    """[steps] target that each step belongs to."""
    begins = torch.ones_like(batch.step_token, dtype=torch.bool)
    begins[1:] = ~batch.same_target
    return begins.cumsum(0) - 1
