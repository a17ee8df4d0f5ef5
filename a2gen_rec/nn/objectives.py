"""Multi-objective prediction: METHODS §5; experts and gates after Progressive Layered Extraction (PLE), RecSys 2020.

Objectives share what helps them all and keep apart what does not: every task mixes experts that all tasks see with
experts of its own, by a softmax gate of its own, and reads its prediction off the mixture through its own tower.
All experts are one matrix product, all towers one batched product.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from a2gen_rec.nn.attention import small_softmax


class ObjectivePredictions(NamedTuple):
    """Predictions of targets.

    Attributes:
        logits: [targets, objectives] of the binary objectives.
        watch_time: [targets] in log1p seconds; None if it is not predicted.
    """

    logits: Tensor
    watch_time: Tensor | None


class MultiObjectiveHead(nn.Module):
    """One extraction level of shared and own experts, and a tower per task.

    A task is a binary objective or, last, the watch time.

    Args:
        d_context: width of the generator's context.
        dim: width of an expert.
        objectives: number of binary objectives.
        watch_time: also predict the watch time.
        shared: experts that all tasks see; 0 keeps tasks apart.
        own: experts of each task; 0 leaves shared experts under a gate per task (MMoE).
        tower_ratio: hidden width of a tower as a multiple of ``dim``.
        dropout: rate inside the towers.
    """

    def __init__(
        self,
        d_context: int,
        dim: int,
        objectives: int,
        watch_time: bool = True,
        shared: int = 2,
        own: int = 1,
        tower_ratio: float = 2.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.objectives, self.shared, self.own = objectives, shared, own
        self.tasks = tasks = objectives + watch_time
        hidden = int(dim * tower_ratio)
        self.norm = nn.LayerNorm(d_context)
        self.experts = nn.Linear(d_context, (shared + tasks * own) * dim)
        self.gates = nn.Linear(d_context, tasks * (shared + own))
        self.tower_weight = nn.Parameter(_uniform(tasks, dim, hidden, fan_in=dim))
        self.tower_bias = nn.Parameter(_uniform(tasks, 1, hidden, fan_in=dim))
        self.last_weight = nn.Parameter(_uniform(tasks, hidden, 1, fan_in=hidden))
        self.last_bias = nn.Parameter(_uniform(tasks, 1, 1, fan_in=hidden))
        self.dropout = nn.Dropout(dropout)

    @torch.no_grad()
    def init_output_bias(self, rate: Tensor, watch_time: float = float("nan")) -> None:
        """Begin at what is known before training, whatever the context.

        Args:
            rate: [objectives] base rates; watch_time: a typical one in log1p seconds, NaN counts as 0.
        """
        nn.init.zeros_(self.last_weight)
        start = torch.cat([torch.logit(rate, eps=1e-4), rate.new_tensor([watch_time]).nan_to_num(0.0)])
        self.last_bias.copy_(start[: self.tasks, None, None])

    def forward(self, context: Tensor) -> ObjectivePredictions:
        """Predictions for contexts [targets, d_context]."""
        x = self.norm(context)
        experts = F.gelu(self.experts(x)).unflatten(-1, (self.shared + self.tasks * self.own, -1))
        gate = small_softmax(self.gates(x).unflatten(-1, (self.tasks, -1)))
        own = experts[:, self.shared :].unflatten(1, (self.tasks, self.own))
        mixed = (gate[..., self.shared :, None] * own).sum(2)
        for place in range(self.shared):  # a few: on CPU a quarter of the time of a tiny matrix product per target
            mixed = torch.addcmul(mixed, gate[..., place, None], experts[:, None, place])
        hidden = F.gelu(torch.baddbmm(self.tower_bias, mixed.transpose(0, 1), self.tower_weight))
        predicted = torch.baddbmm(self.last_bias, self.dropout(hidden), self.last_weight).squeeze(-1).T
        return ObjectivePredictions(
            predicted[:, : self.objectives], predicted[:, -1] if self.tasks > self.objectives else None
        )


def _uniform(*shape: int, fan_in: int) -> Tensor:
    """Uniform in ±1/√fan_in, as ``nn.Linear`` begins."""
    return torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5)
