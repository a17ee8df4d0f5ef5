"""AdaTask (Yang et al., AAAI 2023): every task moves shared parameters by an adaptive step of its own, METHODS §7.

Adam and Adagrad divide a gradient by the size that gradients had. Where tasks share a parameter, the task with the
largest gradients sets that size for all. Here moments are kept per task, and the tasks' steps are summed. What only
one task reads has a gradient of 0 for the others, whose steps are then 0: no parameter needs to be named shared.
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
    """Adam with moments per task, and decoupled weight decay once per step (AdamW). Of one task, it is AdamW.

    Args:
        tasks: how many there are.
        clip_norm: bound on the norm of each task's gradient; 0 leaves them alone.

    Attributes:
        gradients: [tasks, ...] of every parameter, for the next step, which uses them up.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        tasks: int,
        lr: float,
        weight_decay: float = 0.0,
        clip_norm: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})
        self.tasks, self.clip_norm = tasks, clip_norm
        self.gradients: dict[nn.Parameter, Tensor] = {}
        for parameter in self.parameters():  # not at the first step: checkpoints are loaded in place
            moments = {name: parameter.new_zeros(tasks, *parameter.shape) for name in ("exp_avg", "exp_avg_sq")}
            self.state[parameter] = {"step": torch.zeros(()), **moments}

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def collect_gradients(self, task: int) -> None:
        """Move the gradients of one task's backward pass from ``grad`` to :attr:`gradients`."""
        for parameter in self.parameters():
            if parameter not in self.gradients:
                self.gradients[parameter] = parameter.new_zeros(self.tasks, *parameter.shape)
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
        """Bound each task's gradient for itself: a bound on their sum would let one task's outlier stop them all."""
        if not self.clip_norm:
            return
        squared = torch.stack([gradient.flatten(1).square().sum(1) for gradient in self.gradients.values()])
        share = (self.clip_norm / (squared.sum(0).sqrt() + 1e-6)).clamp(max=1.0)
        for gradient in self.gradients.values():
            gradient.mul_(share.view(-1, *[1] * (gradient.dim() - 1)))


class PerTaskTableState:
    """States of the sharded tables' optimizer, a set for each task.

    TorchRec's fused optimizers update rows inside the backward pass, by whatever state they find: a task's state is
    put there before its pass and fetched after it. Steps of Adagrad do not depend on the rows themselves, so that
    those of the tasks one after another are their sum.

    Args:
        fused: the tables' optimizer.
    """

    def __init__(self, fused: KeyedOptimizer, tasks: int) -> None:
        self.tasks = tasks
        self.live: dict[str, ShardedTensor] = {
            name: state for states in fused.state.values() for name, state in states.items()
        }
        self.kept = {
            name: [[shard.tensor.clone() for shard in state.local_shards()] for _ in range(tasks)]
            for name, state in self.live.items()
        }

    def load(self, task: int) -> None:
        """Make the task's states those of the next backward pass."""
        for name, state in self.live.items():
            for shard, kept in zip(state.local_shards(), self.kept[name][task], strict=True):
                shard.tensor.data.copy_(kept)  # as fused updates do: autograd is not to take the pass for outdated

    def store(self, task: int) -> None:
        """Take the task's states as its backward pass has left them."""
        for name, state in self.live.items():
            for shard, kept in zip(state.local_shards(), self.kept[name][task], strict=True):
                kept.copy_(shard.tensor)

    def tensors(self) -> dict[str, dict[str, ShardedTensor]]:
        """State -> task -> its values, as checkpoints save them and load them in place."""
        return {
            name: {
                str(task): ShardedTensor._init_from_local_shards_and_global_metadata(
                    [Shard(kept, shard.metadata) for kept, shard in zip(own, state.local_shards(), strict=True)],
                    state.metadata(),
                )
                for task, own in enumerate(self.kept[name])
            }
            for name, state in self.live.items()
        }


class AdaTask:
    """A backward pass per task over a sharded model.

    Args:
        dense: the optimizer of what is not sharded, replicated on all ranks; fused: that of the tables.
    """

    def __init__(self, dense: TaskAdam, fused: KeyedOptimizer) -> None:
        self.dense, self.tables = dense, PerTaskTableState(fused, dense.tasks)

    def backward(self, losses: Tensor) -> None:
        """Update the tables, and leave the dense gradients [tasks, ...], means over the ranks, to the optimizer.

        Args:
            losses: [tasks] of this rank. All ranks call it together.
        """
        last = len(losses) - 1
        for task, loss in enumerate(losses):
            self.tables.load(task)
            loss.backward(retain_graph=task < last)
            self.tables.store(task)
            self.dense.collect_gradients(task)
        self._average()

    def _average(self) -> None:
        world = dist.get_world_size()
        if world == 1:
            return
        gradients = list(self.dense.gradients.values())
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= world
        for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


class TaskPipeline(TrainPipelineSparseDist):
    """TorchRec's pipeline with a backward pass per task. ``adatask``, then the pipeline's own arguments."""

    def __init__(self, adatask: AdaTask, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.adatask = adatask

    def _backward(self, losses: Tensor) -> None:
        with record_function("## backward per task ##"):
            self.adatask.backward(losses)
