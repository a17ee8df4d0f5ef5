"""AdaTask (Yang et al., AAAI 2023): adaptive steps per task on shared parameters, METHODS §7.

Adam and Adagrad divide a gradient by the accumulated size of past gradients. For a shared parameter, the task with
the largest gradients determines that size for all tasks. AdaTask keeps moments per task and sums the tasks' steps. A
parameter used by a single task has zero gradients and zero steps for the others, so shared parameters need no list.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.profiler import record_function
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.keyed import KeyedOptimizer


class TaskAdam(torch.optim.Optimizer):
    """Adam with moments per task and decoupled weight decay once per step; with one task it equals AdamW.

    Args:
        parameters: Dense parameters.
        num_tasks: Number of tasks.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        max_grad_norm: Maximum gradient norm of each task; 0 disables clipping.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.

    Attributes:
        gradients: Parameter -> [num_tasks, ...] gradients of the next step, which consumes them.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        num_tasks: int,
        lr: float,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})
        self.num_tasks, self.max_grad_norm = num_tasks, max_grad_norm
        self.gradients: dict[nn.Parameter, Tensor] = {}
        for parameter in self.parameters():  # before the first step, because checkpoints are loaded in place
            moments = {name: parameter.new_zeros(num_tasks, *parameter.shape) for name in ("exp_avg", "exp_avg_sq")}
            self.state[parameter] = {"step": torch.zeros(()), **moments}

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def collect_gradients(self, task: int) -> None:
        """Move the gradients of one task's backward pass from ``grad`` to :attr:`gradients`."""
        for parameter in self.parameters():
            if parameter not in self.gradients:
                self.gradients[parameter] = parameter.new_zeros(self.num_tasks, *parameter.shape)
            if parameter.grad is not None:
                self.gradients[parameter][task] = parameter.grad
                parameter.grad = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self._clip()
        for group in self.param_groups:
            (beta, beta_sq), lr = group["betas"], group["lr"]
            for parameter in group["params"]:
                gradient, state = self.gradients[parameter], self.state[parameter]
                state["step"] += 1
                step = float(state["step"])
                state["exp_avg"].lerp_(gradient, 1 - beta)
                state["exp_avg_sq"].mul_(beta_sq).addcmul_(gradient, gradient, value=1 - beta_sq)
                size = (state["exp_avg_sq"] / (1 - beta_sq**step)).sqrt_().add_(group["eps"])
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.sub_((state["exp_avg"] / size).sum(0), alpha=lr / (1 - beta**step))
        self.gradients.clear()

    def _clip(self) -> None:
        """Clip each task's gradient separately: clipping the sum would let one task's outlier shrink all steps."""
        if not self.max_grad_norm:
            return
        squared = torch.stack([gradient.flatten(1).square().sum(1) for gradient in self.gradients.values()])
        scale = (self.max_grad_norm / (squared.sum(0).sqrt() + 1e-6)).clamp(max=1.0)
        for gradient in self.gradients.values():
            gradient.mul_(scale.view(-1, *[1] * (gradient.dim() - 1)))


class PerTaskTableState:
    """Optimizer states of the sharded tables, one set per task.

    TorchRec's fused optimizers update rows inside the backward pass with the current state. Therefore a task's state
    is loaded before its backward pass and stored after it. Adagrad steps do not depend on the rows, so steps of
    consecutive tasks add up.

    Args:
        fused: Optimizer of the tables.
        num_tasks: Number of tasks.
    """

    def __init__(self, fused: KeyedOptimizer, num_tasks: int) -> None:
        self.num_tasks = num_tasks
        self.live: dict[str, ShardedTensor] = {
            name: state for states in fused.state.values() for name, state in states.items()
        }
        self.saved = {
            name: [[shard.tensor.clone() for shard in state.local_shards()] for _ in range(num_tasks)]
            for name, state in self.live.items()
        }

    def load(self, task: int) -> None:
        """Load the task's states for the next backward pass."""
        for name, state in self.live.items():
            for shard, saved in zip(state.local_shards(), self.saved[name][task], strict=True):
                shard.tensor.data.copy_(saved)  # .data, as fused updates do: autograd must not see a modification

    def store(self, task: int) -> None:
        """Store the task's states after its backward pass."""
        for name, state in self.live.items():
            for shard, saved in zip(state.local_shards(), self.saved[name][task], strict=True):
                saved.copy_(shard.tensor)

    def tensors(self) -> dict[str, dict[str, ShardedTensor]]:
        """Return state -> task -> values, in the form that checkpoints save and load in place."""
        return {
            name: {
                str(task): ShardedTensor._init_from_local_shards_and_global_metadata(
                    [Shard(saved, shard.metadata) for saved, shard in zip(tensors, state.local_shards(), strict=True)],
                    state.metadata(),
                )
                for task, tensors in enumerate(self.saved[name])
            }
            for name, state in self.live.items()
        }


class AdaTask:
    """One backward pass per task over a sharded model.

    Args:
        dense: Optimizer of the dense parameters, replicated on all ranks.
        fused: Optimizer of the tables.
    """

    def __init__(self, dense: TaskAdam, fused: KeyedOptimizer) -> None:
        self.dense, self.tables = dense, PerTaskTableState(fused, dense.num_tasks)

    def backward(self, losses: Tensor) -> None:
        """Update the tables and set the dense gradients [tasks, ...], averaged over ranks. Called by all ranks.

        Args:
            losses: [tasks] losses of this rank.
        """
        last = len(losses) - 1
        for task, loss in enumerate(losses):
            self.tables.load(task)
            loss.backward(retain_graph=task < last)
            self.tables.store(task)
            self.dense.collect_gradients(task)
        self._average()

    def _average(self) -> None:
        world_size = dist.get_world_size()
        if world_size == 1:
            return
        gradients = list(self.dense.gradients.values())
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= world_size
        for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


class TaskPipeline(TrainPipelineSparseDist):
    """TorchRec's pipeline with a backward pass per task.

    Args:
        adatask: Backward passes per task.
        args, options: Arguments of the pipeline.
    """

    def __init__(self, adatask: AdaTask, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.adatask = adatask

    def _backward(self, losses: Tensor) -> None:
        with record_function("## backward per task ##"):
            self.adatask.backward(losses)
