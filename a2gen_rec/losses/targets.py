"""Observed outcomes of the targets of a batch; losses and metrics compare them with predictions."""

import torch
from torch import Tensor

from a2gen_rec.data.batch import WindowBatch


def target_outcomes(batch: WindowBatch, num_actions: int) -> tuple[Tensor, Tensor]:
    """Return whether each action occurred, [targets, actions] 0/1, and its log1p seconds (NaN if unknown)."""
    occurred = batch.offset_s.new_zeros(len(batch.target), num_actions)
    time = torch.full_like(occurred, torch.nan)
    target = batch.step_target_index
    occurred[target, batch.step_label] = 1
    time[target, batch.step_label] = batch.step_time
    return occurred, time
