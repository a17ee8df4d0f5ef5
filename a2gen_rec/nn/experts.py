"""Experts, gates and towers of multi-task rankers: MMoE (KDD 2018) and PLE (RecSys 2020), METHODS §7.

Every task mixes the experts it may see by a softmax gate of its own and reads its prediction off the mixture through
its own tower. All experts of one input are one matrix product, and what tasks have each of their own is one batched
product over them.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from a2gen_rec.nn.attention import small_softmax


class TaskLinear(nn.Module):
    """A linear layer per task, begun as ``nn.Linear`` begins.

    Args:
        tasks: number of them; d_in, d_out: widths of each.
    """

    def __init__(self, tasks: int, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tasks, d_in, d_out).uniform_(-(d_in**-0.5), d_in**-0.5))
        self.bias = nn.Parameter(torch.empty(tasks, 1, d_out).uniform_(-(d_in**-0.5), d_in**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        """[n, tasks, d_in] -> [n, tasks, d_out]"""
        return torch.baddbmm(self.bias, x.transpose(0, 1), self.weight).transpose(0, 1)


class SharedBottom(nn.Module):
    """One hidden layer that all tasks share."""

    def __init__(self, d_in: int, dim: int, tasks: int) -> None:
        super().__init__()
        self.tasks = tasks
        self.norm = nn.LayerNorm(d_in)
        self.hidden = nn.Linear(d_in, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[n, d_in] -> [n, tasks, dim], the same for all tasks."""
        return F.gelu(self.hidden(self.norm(x)))[:, None].expand(-1, self.tasks, -1)


class MMoE(nn.Module):
    """Experts that all tasks share, under a softmax gate per task.

    Args:
        d_in: width of the input; dim: of an expert.
        experts: how many; at least 1.
    """

    def __init__(self, d_in: int, dim: int, tasks: int, experts: int) -> None:
        super().__init__()
        self.tasks, self.count = tasks, experts
        self.norm = nn.LayerNorm(d_in)
        self.experts = nn.Linear(d_in, experts * dim)
        self.gates = nn.Linear(d_in, tasks * experts)

    def forward(self, x: Tensor) -> Tensor:
        """[n, d_in] -> [n, tasks, dim]"""
        x = self.norm(x)
        experts = F.gelu(self.experts(x)).unflatten(-1, (self.count, -1))
        return small_softmax(self.gates(x).unflatten(-1, (self.tasks, -1))) @ experts


class CustomizedGateControl(nn.Module):
    """One level of PLE: shared experts and experts of each task; a task's gate sees the shared ones and its own.

    Args:
        d_in: width of the inputs; dim: of an expert.
        shared: experts that all tasks see; own: experts of each task. Not both 0.
        passes_on: whether the shared path goes on to another level, by a gate over all experts.
    """

    def __init__(
        self, d_in: int, dim: int, tasks: int, shared: int, task_specific: int, has_shared_output: bool
    ) -> None:
        super().__init__()
        self.tasks, self.shared, self.own, self.dim = tasks, shared, task_specific, dim
        self.shared_experts = nn.Linear(d_in, shared * dim) if shared else None
        self.own_experts = TaskLinear(tasks, d_in, task_specific * dim) if task_specific else None
        self.gates = TaskLinear(tasks, d_in, shared + task_specific)
        self.shared_gate = nn.Linear(d_in, shared + tasks * task_specific) if has_shared_output else None

    def forward(self, common: Tensor, each: Tensor) -> tuple[Tensor, Tensor]:
        """The next level's inputs.

        Args:
            common: [n, d_in] of the shared path; each: [n, tasks, d_in] of the tasks.

        Returns:
            [n, dim] of the shared path (as it came where it does not go on), and [n, tasks, dim] of the tasks.
        """
        n = len(each)
        shared, own = each.new_zeros(n, 0, self.dim), each.new_zeros(n, self.tasks, 0, self.dim)
        if self.shared_experts is not None:
            shared = F.gelu(self.shared_experts(common)).unflatten(-1, (self.shared, self.dim))
        if self.own_experts is not None:
            own = F.gelu(self.own_experts(each)).unflatten(-1, (self.own, self.dim))
        gate = small_softmax(self.gates(each))
        mixed = gate[..., : self.shared] @ shared
        mixed = mixed + (gate[..., self.shared :, None] * own).sum(2)
        if self.shared_gate is None:
            return common, mixed
        everyone = torch.cat([shared, own.flatten(1, 2)], dim=1)
        return (small_softmax(self.shared_gate(common))[:, None] @ everyone).squeeze(1), mixed


class PLE(nn.Module):
    """Progressive layered extraction: levels of shared and own experts, the last one for the tasks alone.

    Args:
        d_in: width of the input; dim: of an expert.
        shared, own: experts per level, as :class:`ExtractionLevel` takes.
    """

    def __init__(self, d_in: int, dim: int, tasks: int, shared: int, task_specific: int, levels: int = 2) -> None:
        super().__init__()
        self.tasks = tasks
        self.norm = nn.LayerNorm(d_in)
        # Without shared experts a level has no use for the shared path of the one before.
        self.levels = nn.ModuleList(
            CustomizedGateControl(
                dim if level else d_in, dim, tasks, shared, task_specific, shared > 0 and level < levels - 1
            )
            for level in range(levels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[n, d_in] -> [n, tasks, dim]"""
        common = self.norm(x)
        each = common[:, None].expand(-1, self.tasks, -1)
        for level in self.levels:
            common, each = level(common, each)
        return each


class TaskTowers(nn.Module):
    """An MLP with one output per task.

    Args:
        dim: width of its input; hidden: of its hidden layer; dropout: rate inside.
    """

    def __init__(self, tasks: int, dim: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.hidden = TaskLinear(tasks, dim, hidden)
        self.dropout = nn.Dropout(dropout)
        self.last = TaskLinear(tasks, hidden, 1)

    @torch.no_grad()
    def init_output_bias(self, output: Tensor) -> None:
        """Begin at ``output`` [tasks], whatever the input."""
        nn.init.zeros_(self.last.weight)
        self.last.bias.copy_(output[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """[n, tasks, dim] -> [n, tasks]"""
        return self.last(self.dropout(F.gelu(self.hidden(x)))).squeeze(-1)
