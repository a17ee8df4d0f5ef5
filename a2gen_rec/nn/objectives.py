"""Multi-objective prediction: METHODS §5; experts and gates after Progressive Layered Extraction (PLE), RecSys 2020.

Every task mixes shared experts and its own experts by its own softmax gate, and its own tower maps the mixture to the
prediction. All experts are one matrix product, all towers one batched product.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from a2gen_rec.nn.attention import small_softmax
from a2gen_rec.nn.dropout import Dropout


class ObjectivePredictions(NamedTuple):
    """Predictions of targets.

    Attributes:
        logits: [targets, objectives] of the binary objectives.
        watch_time: [targets] log1p seconds; None if it is not predicted.
    """

    logits: Tensor
    watch_time: Tensor | None


class MultiObjectiveHead(nn.Module):
    """One extraction level of shared and task-specific experts, and one tower per task.

    A task is a binary objective or, last, the watch time.

    Args:
        d_context: Width of the generator's context.
        dim: Width of an expert.
        num_objectives: Number of binary objectives.
        predict_watch_time: Whether to predict the watch time.
        shared: Number of experts shared by all tasks; 0 for independent tasks.
        task_specific: Number of experts of each task; 0 leaves shared experts with one gate per task (MMoE).
        tower_ratio: Hidden width of a tower as a multiple of ``dim``.
        dropout: Dropout rate inside the towers.
    """

    def __init__(
        self,
        d_context: int,
        dim: int,
        num_objectives: int,
        predict_watch_time: bool = True,
        shared: int = 2,
        task_specific: int = 1,
        tower_ratio: float = 2.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_objectives, self.shared, self.task_specific = num_objectives, shared, task_specific
        self.num_tasks = num_tasks = num_objectives + predict_watch_time
        hidden_dim = int(dim * tower_ratio)
        self.norm = nn.LayerNorm(d_context)
        self.experts = nn.Linear(d_context, (shared + num_tasks * task_specific) * dim)
        self.gates = nn.Linear(d_context, num_tasks * (shared + task_specific))
        self.tower_weight = nn.Parameter(_uniform(num_tasks, dim, hidden_dim, fan_in=dim))
        self.tower_bias = nn.Parameter(_uniform(num_tasks, 1, hidden_dim, fan_in=dim))
        self.last_weight = nn.Parameter(_uniform(num_tasks, hidden_dim, 1, fan_in=hidden_dim))
        self.last_bias = nn.Parameter(_uniform(num_tasks, 1, 1, fan_in=hidden_dim))
        self.dropout = Dropout(dropout)

    @torch.no_grad()
    def init_output_bias(self, rate: Tensor, watch_time: float = float("nan")) -> None:
        """Initialize the towers to base rates and a typical watch time, for every context.

        Args:
            rate: [objectives] base rates.
            watch_time: Typical watch time in log1p seconds; NaN counts as 0.
        """
        nn.init.zeros_(self.last_weight)
        output = torch.cat([torch.logit(rate, eps=1e-4), rate.new_tensor([watch_time]).nan_to_num(0.0)])
        self.last_bias.copy_(output[: self.num_tasks, None, None])

    def forward(self, context: Tensor) -> ObjectivePredictions:
        """Return predictions for contexts [targets, d_context]."""
        x = self.norm(context)
        experts = F.gelu(self.experts(x)).unflatten(-1, (self.shared + self.num_tasks * self.task_specific, -1))
        gate = small_softmax(self.gates(x).unflatten(-1, (self.num_tasks, -1)))
        specific = experts[:, self.shared :].unflatten(1, (self.num_tasks, self.task_specific))
        mixed = (gate[..., self.shared :, None] * specific).sum(2)
        # Few shared experts: on CPU a quarter of the time of one tiny matrix product per target.
        for expert in range(self.shared):
            mixed = torch.addcmul(mixed, gate[..., expert, None], experts[:, None, expert])
        hidden = F.gelu(torch.baddbmm(self.tower_bias, mixed.transpose(0, 1), self.tower_weight))
        predicted = torch.baddbmm(self.last_bias, self.dropout(hidden), self.last_weight).squeeze(-1).T
        return ObjectivePredictions(
            predicted[:, : self.num_objectives],
            predicted[:, -1] if self.num_tasks > self.num_objectives else None,
        )


def _uniform(*shape: int, fan_in: int) -> Tensor:
    """Return uniform values in ±1/√fan_in, the initialization of ``nn.Linear``."""
    return torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5)
