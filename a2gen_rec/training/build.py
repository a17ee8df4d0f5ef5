"""Construction of the sharded model and its optimizers on one rank."""

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
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.errors import ConfigError
from a2gen_rec.losses.loss import Loss, validate_objective_weights
from a2gen_rec.models.base import RankingModel, TargetEncoding
from a2gen_rec.models.factory import build_model
from a2gen_rec.sharding.planner import TABLE_OPTIMIZERS, PlanningProblem, make_plan, make_sharders
from a2gen_rec.sharding.saved_plan import SavedPlan
from a2gen_rec.sharding.topology import Cluster
from a2gen_rec.sharding.workload import workload_from_dataset
from a2gen_rec.training.adatask import AdaTask, TaskAdam
from a2gen_rec.utils.distributed import DistributedContext, all_gather_object, sync_errors

EMBEDDINGS_FQN = "model.embeddings"
"""Name of the embedding tables in :class:`ModelWithLoss`."""


class ModelWithLoss(nn.Module):
    """Model and loss in one module, as training pipelines require."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: WindowBatch) -> tuple[torch.Tensor, tuple[torch.Tensor, TargetEncoding]]:
        return self.loss(self.model(batch), batch)


@dataclass
class TrainingModel:
    """Sharded model with its optimizers.

    Attributes:
        model_parallel: Sharded :class:`ModelWithLoss`.
        optimizer: Dense and table optimizers; the table update runs inside the backward pass.
        plan: Sharding plan of the tables.
        adatask: Backward passes per task; None if all tasks share one.
    """

    model_parallel: DistributedModelParallel
    optimizer: CombinedOptimizer
    plan: ShardingPlan
    adatask: AdaTask | None = None

    def backward(self, loss: torch.Tensor) -> None:
        """Run the backward pass of the loss of ``model_parallel``, which also updates the tables."""
        if self.adatask is None:
            loss.backward()
        else:
            self.adatask.backward(loss)

    @property
    def model(self) -> RankingModel:
        """Model inside its wrappers; call its forward through ``model_parallel``."""
        return self.model_parallel.module.model


def build_training_model(
    card: DatasetCard, config: Config, process: DistributedContext, sharding_plan: ShardingPlan | None = None
) -> TrainingModel:
    """Build and shard the model, and create its optimizers.

    Args:
        card: Dataset card.
        config: Resolved configuration.
        process: Process group and device of this rank.
        sharding_plan: Sharding plan; by default that of ``config.sharding.plan_file``, or a new one.

    Raises:
        ConfigError: ``optim.multitask`` is ``adatask``, but the model has no tower per task.
        UserError: The tables do not fit the cluster, or the saved plan is incompatible.
    """
    torch.manual_seed(config.train.seed)
    model = build_model(card, config, device=torch.device("meta"))
    has_task_losses = config.optim.multitask == "adatask"
    if has_task_losses and not model.ranker.num_towers:
        raise ConfigError(f"optim.multitask adatask: model {config.model.name} has no tower per task")
    apply_optimizer_in_backward(
        TABLE_OPTIMIZERS[config.optim.sparse_optimizer], model.embeddings.parameters(), _table_options(config.optim)
    )
    tasks = model.ranker.objective_tasks
    validate_objective_weights(config.loss, tasks)
    timed_actions = model.ranker.timed_actions if has_task_losses else None
    task = ModelWithLoss(model, Loss(config.loss, process.world_size, tasks, timed_actions))
    if sharding_plan is None:
        sharding_plan = ShardingPlan(
            {EMBEDDINGS_FQN: _resolve_plan(card, config, process).to_torchrec(process.device, process.local_world_size)}
        )
    model.ranker.to(process.device)  # the tables stay on the meta device until they are sharded
    task.loss.to(process.device)
    # Each rank initializes its own shards: with one seed, all shards of a table would have equal values.
    torch.manual_seed(config.train.seed * 1_000_003 + process.rank + 1)
    model_parallel = DistributedModelParallel(
        task,
        device=process.device,
        plan=sharding_plan,
        sharders=make_sharders(config.optim.sparse_weight_decay > 0),
        init_data_parallel=not has_task_losses,  # DDP averages gradients in a single backward pass only
    )
    if not has_task_losses:
        return TrainingModel(
            model_parallel,
            _combine_optimizers(model_parallel, _dense_optimizer(model_parallel, config.optim)),
            sharding_plan,
        )
    adam, dense = _task_adam(model_parallel, config.optim, model.ranker.num_towers)
    return TrainingModel(
        model_parallel,
        _combine_optimizers(model_parallel, dense),
        sharding_plan,
        AdaTask(adam, model_parallel.fused_optimizer),
    )


def _resolve_plan(card: DatasetCard, config: Config, process: DistributedContext) -> SavedPlan:
    """Return the saved plan, or a new one; the same on all ranks."""
    resolved = None
    with sync_errors():
        if process.is_main:
            cluster = Cluster.from_local_process(
                process.device, process.world_size, process.local_world_size, config.sharding
            )
            problem, file = (
                PlanningProblem(workload_from_dataset(card, config), cluster, config),
                config.sharding.plan_file,
            )
            resolved = SavedPlan.load(file) if file else SavedPlan.from_plan(make_plan(problem), problem)
            resolved.check(problem, file)
    return all_gather_object(resolved)[0]


def _table_options(config: OptimConfig) -> dict[str, Any]:
    options: dict[str, Any] = {"lr": config.sparse_lr}
    if config.sparse_weight_decay:
        options["weight_decay"] = config.sparse_weight_decay
    return options


def _dense_optimizer(model_parallel: DistributedModelParallel, config: OptimConfig) -> KeyedOptimizer:
    optimizer_class = torch.optim.AdamW if config.dense_optimizer == "adamw" else torch.optim.Adam

    parameters = dict(in_backward_optimizer_filter(model_parallel.named_parameters()))
    # No decay for learned loss weights: it would pull them to 1.
    loss_parameters = [parameter for name, parameter in parameters.items() if name.startswith("loss.")]
    model_parameters = [parameter for name, parameter in parameters.items() if not name.startswith("loss.")]

    def make(_: Any) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [{"params": model_parameters}]
        if loss_parameters:
            groups.append({"params": loss_parameters, "weight_decay": 0.0})
        return optimizer_class(groups, lr=config.dense_lr, weight_decay=config.weight_decay)

    dense: KeyedOptimizer = KeyedOptimizerWrapper(parameters, make)
    dense.init_state()
    if config.max_grad_norm:
        dense = GradientClippingOptimizer(dense, GradientClipping.NORM, config.max_grad_norm)
    return dense


def _task_adam(
    model_parallel: DistributedModelParallel, config: OptimConfig, tasks: int
) -> tuple[TaskAdam, KeyedOptimizerWrapper]:
    parameters = dict(in_backward_optimizer_filter(model_parallel.named_parameters()))
    adam = TaskAdam(parameters.values(), tasks, config.dense_lr, config.weight_decay, config.max_grad_norm)
    return adam, KeyedOptimizerWrapper(parameters, lambda _: adam)


def _combine_optimizers(model_parallel: DistributedModelParallel, dense: KeyedOptimizer) -> CombinedOptimizer:
    optimizer = CombinedOptimizer([model_parallel.fused_optimizer, dense])
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def set_lr_scale(optimizer: CombinedOptimizer, scale: float) -> None:
    """Set every learning rate to ``scale`` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = scale * group["peak_lr"]
