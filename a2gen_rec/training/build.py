"""Model, tables and optimizers of one rank, sharded and ready to step."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from a2gen_rec.config import Config, OptimConfig
from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.losses.loss import Loss, validate_objective_weights
from a2gen_rec.models.base import RankingModel, TargetEncoding
from a2gen_rec.models.baselines.towers import TowerRanker
from a2gen_rec.models.factory import build_model
from a2gen_rec.sharding.planner import TABLE_OPTIMIZERS, PlanningProblem, make_sharders, plan
from a2gen_rec.sharding.saved_plan import SavedPlan
from a2gen_rec.sharding.topology import Cluster
from a2gen_rec.sharding.workload import workload_from_dataset
from a2gen_rec.training.adatask import AdaTask, TaskAdam
from a2gen_rec.utils.distributed import DistributedContext, all_gather_object, sync_errors

EMBEDDINGS_FQN = "model.embeddings"  # the tables' place in a task


class ModelWithLoss(nn.Module):
    """Model and loss in one module, the form that training pipelines take."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: WindowBatch) -> tuple[torch.Tensor, tuple[torch.Tensor, TargetEncoding]]:
        return self.loss(self.model(batch), batch)


@dataclass
class TrainingModel:
    """A sharded model with its optimizers.

    Attributes:
        dmp: the sharded :class:`TrainTask`.
        optimizer: dense and table optimizers together; the tables' update runs inside the backward pass.
        plan: which shard of which table is where.
        adatask: backward passes per task, where tasks have steps of their own.
    """

    model_parallel: DistributedModelParallel
    optimizer: CombinedOptimizer
    plan: ShardingPlan
    adatask: AdaTask | None = None

    def backward(self, loss: torch.Tensor) -> None:
        """Differentiate what ``dmp`` gave, of which the tables' update is a part."""
        if self.adatask is None:
            loss.backward()
        else:
            self.adatask.backward(loss)

    @property
    def model(self) -> RankingModel:
        """The model inside its wrappers (its forward must be reached through ``dmp``)."""
        return self.model_parallel.module.model


def build_training_model(
    card: DatasetCard, config: Config, process: DistributedContext, sharding: ShardingPlan | None = None
) -> TrainingModel:
    """Make, shard and equip the model.

    Args:
        sharding: a plan to follow; by default that of ``config.sharding.plan``, or one made here.

    Raises:
        UserError: the tables do not fit, or the saved plan is for others.
    """
    torch.manual_seed(config.train.seed)
    model = build_model(card, config, device=torch.device("meta"))
    apply_optimizer_in_backward(
        TABLE_OPTIMIZERS[config.optim.sparse_optimizer], model.embeddings.parameters(), _table_options(config.optim)
    )
    tasks = model.ranker.objective_tasks
    validate_objective_weights(config.loss, tasks)
    towers = model.ranker if config.optim.multitask == "adatask" and isinstance(model.ranker, TowerRanker) else None
    timed = None if towers is None else towers.timed_action
    task = ModelWithLoss(model, Loss(config.loss, process.world_size, tasks, timed))
    if sharding is None:
        sharding = ShardingPlan(
            {EMBEDDINGS_FQN: _placement(card, config, process).to_torchrec(process.device, process.local_world_size)}
        )
    model.ranker.to(process.device)  # the tables stay on meta until they are sharded
    task.loss.to(process.device)
    # Each rank fills its own shards: with one seed for all, shards of a table would repeat each other.
    torch.manual_seed(config.train.seed * 1_000_003 + process.rank + 1)
    dmp = DistributedModelParallel(
        task,
        device=process.device,
        plan=sharding,
        sharders=make_sharders(),
        init_data_parallel=towers is None,  # it averages gradients over ranks in one backward pass, not in several
    )
    if towers is None:
        return TrainingModel(dmp, _combined(dmp, _dense(dmp, config.optim)), sharding)
    adam, dense = _dense_per_task(dmp, config.optim, towers.outputs)
    return TrainingModel(dmp, _combined(dmp, dense), sharding, AdaTask(adam, dmp.fused_optimizer))


def _placement(card: DatasetCard, config: Config, process: DistributedContext) -> SavedPlan:
    """Where the tables live, the same on all ranks: as saved, or as planned."""
    made = None
    with sync_errors():
        if process.is_main:
            cluster = Cluster.from_local_process(
                process.device, process.world_size, process.local_world_size, config.sharding
            )
            problem, file = (
                PlanningProblem(workload_from_dataset(card, config), cluster, config),
                config.sharding.plan_file,
            )
            made = SavedPlan.load(file) if file else SavedPlan.from_plan(plan(problem), problem)
            made.check(problem, file)
    return all_gather_object(made)[0]


def _table_options(config: OptimConfig) -> dict[str, Any]:
    options: dict[str, Any] = {"lr": config.sparse_lr}
    if config.sparse_weight_decay:
        options["weight_decay"] = config.sparse_weight_decay
    return options


def _dense(dmp: DistributedModelParallel, config: OptimConfig) -> KeyedOptimizer:
    kind = torch.optim.AdamW if config.dense_optimizer == "adamw" else torch.optim.Adam

    parameters = dict(in_backward_optimizer_filter(dmp.named_parameters()))
    # The learned weights of losses are no part of the model: decay would draw them to 1.
    of_losses = [parameter for name, parameter in parameters.items() if name.startswith("loss.")]
    of_model = [parameter for name, parameter in parameters.items() if not name.startswith("loss.")]

    def make(_: Any) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [{"params": of_model}]
        if of_losses:
            groups.append({"params": of_losses, "weight_decay": 0.0})
        return kind(groups, lr=config.dense_lr, weight_decay=config.weight_decay)

    dense: KeyedOptimizer = KeyedOptimizerWrapper(parameters, make)
    dense.init_state()
    if config.max_grad_norm:
        dense = GradientClippingOptimizer(dense, GradientClipping.NORM, config.max_grad_norm)
    return dense


def _dense_per_task(
    dmp: DistributedModelParallel, config: OptimConfig, tasks: int
) -> tuple[TaskAdam, KeyedOptimizerWrapper]:
    parameters = dict(in_backward_optimizer_filter(dmp.named_parameters()))
    adam = TaskAdam(parameters.values(), tasks, config.dense_lr, config.weight_decay, config.max_grad_norm)
    return adam, KeyedOptimizerWrapper(parameters, lambda _: adam)


def _combined(dmp: DistributedModelParallel, dense: KeyedOptimizer) -> CombinedOptimizer:
    optimizer = CombinedOptimizer([dmp.fused_optimizer, dense])
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def set_lr_scale(optimizer: CombinedOptimizer, scale: float) -> None:
    """Set every learning rate to ``scale`` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = scale * group["peak_lr"]
