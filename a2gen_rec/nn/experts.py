"""Experts, gates and towers of multi-task rankers: MMoE (KDD 2018) and PLE (RecSys 2020), METHODS §7.

Every task mixes its experts by its own softmax gate, and its own tower maps the mixture to the prediction. All experts
of one input are one matrix product; all task-specific layers are one batched product over the tasks.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from a2gen_rec.nn.attention import small_softmax
from a2gen_rec.nn.dropout import Dropout


class TaskLinear(nn.Module):
    """One linear layer per task, initialized like ``nn.Linear``.

    Args:
        num_tasks: Number of tasks.
        d_in: Width of the input.
        d_out: Width of the output.
    """

    def __init__(self, num_tasks: int, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tasks, d_in, d_out).uniform_(-(d_in**-0.5), d_in**-0.5))
        self.bias = nn.Parameter(torch.empty(num_tasks, 1, d_out).uniform_(-(d_in**-0.5), d_in**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        """[n, tasks, d_in] -> [n, tasks, d_out]"""
        return torch.baddbmm(self.bias, x.transpose(0, 1), self.weight).transpose(0, 1)


class SharedBottom(nn.Module):
    """One hidden layer shared by all tasks."""

    def __init__(self, d_in: int, dim: int, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.norm = nn.LayerNorm(d_in)
        self.hidden = nn.Linear(d_in, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[n, d_in] -> [n, tasks, dim], equal for all tasks."""
        return F.gelu(self.hidden(self.norm(x)))[:, None].expand(-1, self.num_tasks, -1)


class MMoE(nn.Module):
    """Experts shared by all tasks, with one softmax gate per task.

    Args:
        d_in: Width of the input.
        dim: Width of an expert.
        num_tasks: Number of tasks.
        num_experts: Number of experts; at least 1.
    """

    def __init__(self, d_in: int, dim: int, num_tasks: int, num_experts: int) -> None:
        super().__init__()
        self.num_tasks, self.num_experts = num_tasks, num_experts
        self.norm = nn.LayerNorm(d_in)
        self.experts = nn.Linear(d_in, num_experts * dim)
        self.gates = nn.Linear(d_in, num_tasks * num_experts)

    def forward(self, x: Tensor) -> Tensor:
        """[n, d_in] -> [n, tasks, dim]"""
        x = self.norm(x)
        experts = F.gelu(self.experts(x)).unflatten(-1, (self.num_experts, -1))
        return small_softmax(self.gates(x).unflatten(-1, (self.num_tasks, -1))) @ experts


class CustomizedGateControl(nn.Module):
    """One level of PLE: shared and task-specific experts; a task's gate covers the shared ones and its own.

    Args:
        d_in: Width of the inputs.
        dim: Width of an expert.
        num_tasks: Number of tasks.
        shared: Number of experts shared by all tasks.
        task_specific: Number of experts of each task; not 0 if ``shared`` is 0.
        has_shared_output: Whether the shared path continues to another level, by a gate over all experts.
    """

    def __init__(
        self, d_in: int, dim: int, num_tasks: int, shared: int, task_specific: int, has_shared_output: bool
    ) -> None:
        super().__init__()
        self.num_tasks, self.shared, self.task_specific, self.dim = num_tasks, shared, task_specific, dim
        self.shared_experts = nn.Linear(d_in, shared * dim) if shared else None
        self.task_experts = TaskLinear(num_tasks, d_in, task_specific * dim) if task_specific else None
        self.gates = TaskLinear(num_tasks, d_in, shared + task_specific)
        self.shared_gate = nn.Linear(d_in, shared + num_tasks * task_specific) if has_shared_output else None

    def forward(self, shared_input: Tensor, task_inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs of the next level.

        Args:
            shared_input: [n, d_in] of the shared path.
            task_inputs: [n, tasks, d_in].

        Returns:
            [n, dim] of the shared path (``shared_input`` if it does not continue), and [n, tasks, dim] of the tasks.
        """
        n = len(task_inputs)
        shared = task_inputs.new_zeros(n, 0, self.dim)
        specific = task_inputs.new_zeros(n, self.num_tasks, 0, self.dim)
        if self.shared_experts is not None:
            shared = F.gelu(self.shared_experts(shared_input)).unflatten(-1, (self.shared, self.dim))
        if self.task_experts is not None:
            specific = F.gelu(self.task_experts(task_inputs)).unflatten(-1, (self.task_specific, self.dim))
        gate = small_softmax(self.gates(task_inputs))
        mixed = gate[..., : self.shared] @ shared
        mixed = mixed + (gate[..., self.shared :, None] * specific).sum(2)
        if self.shared_gate is None:
            return shared_input, mixed
        experts = torch.cat([shared, specific.flatten(1, 2)], dim=1)
        return (small_softmax(self.shared_gate(shared_input))[:, None] @ experts).squeeze(1), mixed


class PLE(nn.Module):
    """Progressive layered extraction: levels of shared and task-specific experts; the last level has no shared output.

    Args:
        d_in: Width of the input.
        dim: Width of an expert.
        num_tasks: Number of tasks.
        shared: Number of shared experts per level.
        task_specific: Number of experts per task and level.
        levels: Number of levels.
    """

    def __init__(self, d_in: int, dim: int, num_tasks: int, shared: int, task_specific: int, levels: int = 2) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.norm = nn.LayerNorm(d_in)
        # Without shared experts, the next level does not use the shared path.
        self.levels = nn.ModuleList(
            CustomizedGateControl(
                dim if level else d_in, dim, num_tasks, shared, task_specific, shared > 0 and level < levels - 1
            )
            for level in range(levels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[n, d_in] -> [n, tasks, dim]"""
        shared = self.norm(x)
        tasks = shared[:, None].expand(-1, self.num_tasks, -1)
        for level in self.levels:
            shared, tasks = level(shared, tasks)
        return tasks


class TaskTowers(nn.Module):
    """One MLP with one output per task.

    Args:
        num_tasks: Number of tasks.
        dim: Width of the inputs.
        hidden_dim: Width of the hidden layer.
        dropout: Dropout rate after the hidden layer.
    """

    def __init__(self, num_tasks: int, dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.hidden = TaskLinear(num_tasks, dim, hidden_dim)
        self.dropout = Dropout(dropout)
        self.last = TaskLinear(num_tasks, hidden_dim, 1)

    @torch.no_grad()
    def init_output_bias(self, output: Tensor) -> None:
        """Initialize the towers to output ``output`` [tasks] for every input."""
        nn.init.zeros_(self.last.weight)
        self.last.bias.copy_(output[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """[n, tasks, dim] -> [n, tasks]"""
        return self.last(self.dropout(F.gelu(self.hidden(x)))).squeeze(-1)


def scatter_timed(times: Tensor, is_timed: Tensor) -> Tensor:
    """Return [n, actions] with the times [n, timed actions] where ``is_timed`` [actions], 0 elsewhere."""
    return times.new_zeros(len(times), len(is_timed)).masked_scatter(is_timed, times)
