"""Sharding plans of the embedding tables, by TorchRec's planner under the constraints of this stack.

Planning needs no process group, no GPU and no memory for the tables: they are on the meta device.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import EmbeddingCollection, EmbeddingConfig
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.proposers import GreedyProposer, GridSearchProposer, UniformProposer
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    ParameterConstraints,
    Perf,
    PlannerError,
    Shard,
    SharderDataMap,
    ShardingOption,
    Stats,
    Storage,
)
from torchrec.distributed.types import CacheParams, ModuleSharder
from torchrec.modules.embedding_configs import DataType
from torchrec.optim import RowWiseAdagrad

from a2gen_rec.config import Config
from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.models.embedding_tables import DTYPES, module_key, table_of_key
from a2gen_rec.sharding.topology import GB, Cluster
from a2gen_rec.sharding.workload import Workload

TABLE_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}
WEIGHT_BYTES = {"fp32": 4, "fp16": 2}
VALUE_BYTES = 4  # looked-up rows, their gradients and optimizer states are fp32 for any dtype of the weights

EMBEDDINGS = "embeddings"

_MIN_COLUMNS = 16  # per shard: 64 bytes, the smallest read of a GPU
_MAX_GRID_SIZE = 4_096  # combinations of options times ranks; takes one second at most


@dataclass(frozen=True)
class PlanningProblem:
    """Input of the planner: tables with their lookups, hardware, and settings (``config.sharding``)."""

    workload: Workload
    cluster: Cluster
    config: Config


@dataclass(frozen=True)
class Plan:
    """Chosen option of each table, and all enumerated options.

    Attributes:
        chosen: Chosen option by table.
        options: Enumerated options by table, the chosen one included.
        topology: Hardware; the memory of each rank excludes the storage reservation.
    """

    chosen: dict[str, ShardingOption]
    options: dict[str, list[ShardingOption]]
    topology: Topology

    @property
    def rank_costs(self) -> list[Perf]:
        """Estimated milliseconds per step of each rank, its shards executed sequentially."""
        perf = [Perf(0.0, 0.0, 0.0, 0.0) for _ in self.topology.devices]
        for option in self.chosen.values():
            for shard in non_empty_shards(option):
                perf[shard.rank] += shard.perf
        return perf


class InfeasiblePlanError(UserError):
    """The tables do not fit.

    Attributes:
        options: Enumerated options by table, as in :class:`Plan`.
        topology: Hardware, as in :class:`Plan`.
    """

    def __init__(self, reason: str, options: dict[str, list[ShardingOption]], topology: Topology) -> None:
        super().__init__(reason)
        self.options, self.topology = options, topology

    def __reduce__(self) -> tuple[type[UserError], tuple[str]]:
        return UserError, (str(self),)  # other ranks receive the message only


def make_sharders(sparse_weight_decay: bool = False) -> list[ModuleSharder[nn.Module]]:
    """Return the sharders of all shardable modules: the embedding collection.

    Args:
        sparse_weight_decay: Decay looked-up rows by the optimizer's ``weight_decay``. TorchRec 1.8 and 1.9 ignore it
            without a mode, and implement modes for row-wise Adagrad only.
    """
    fused = {"weight_decay_mode": WeightDecayMode.DECOUPLE} if sparse_weight_decay else None
    return [EmbeddingCollectionSharder(fused_params=fused)]


def precision_warning(device: str, dtype: str) -> str:
    """Return one line about lost updates of fp16 tables; empty if none are lost."""
    if device != "cpu" or dtype != "fp16":
        return ""
    return (
        "sharding.dtype fp16 on CPU rounds every update to the nearest value and loses updates smaller than half a "
        "unit in the last place; use fp32"
    )


def make_plan(problem: PlanningProblem) -> Plan:
    """Return the plan that minimizes the estimated time of the slowest rank.

    Raises:
        InfeasiblePlanError: The tables do not fit.
        ConfigError: A compute kernel is not available on CPU.
    """
    enumerator, best = _Enumerator(problem), _PlanRecorder()
    planner = EmbeddingShardingPlanner(
        topology=enumerator.topology,
        batch_size=1,
        enumerator=enumerator,
        storage_reservation=FixedPercentageStorageReservation(0.0),
        # All combinations if there are few, else each table's options in ascending order of cost or memory.
        proposer=[
            GridSearchProposer(_MAX_GRID_SIZE // problem.cluster.ranks),
            GreedyProposer(),
            GreedyProposer(use_depth=False),
            UniformProposer(),
        ],
        stats=best,
        constraints=enumerator.constraints,
    )
    try:
        planner.plan(meta_embeddings(problem), make_sharders())
    except PlannerError as error:
        raise _infeasible_error(problem, enumerator) from error
    return Plan(
        {table_of_key(option.name): option for option in best.plan}, enumerator.options_by_table, enumerator.topology
    )


def enumerate_options(problem: PlanningProblem) -> Plan:
    """Return all options of all tables without choosing any. Raises the same errors as :func:`plan`."""
    enumerator = _Enumerator(problem)
    enumerator.enumerate(meta_embeddings(problem), make_sharders())
    return Plan({}, enumerator.options_by_table, enumerator.topology)


def non_empty_shards(option: ShardingOption) -> list[Shard]:
    """Return the shards with at least one row; a table with fewer rows than ranks has empty shards."""
    return [shard for shard in option.shards if shard.size[0]]


def column_width(dim: int, ranks: int) -> int:
    """Return the columns per column-wise shard: the multiple of 4 that divides ``dim`` and uses most ranks."""
    widths = [width for width in range(4, dim + 1, 4) if dim % width == 0]
    return next((width for width in widths if width >= max(_MIN_COLUMNS, dim / ranks)), dim)


class _Enumerator(EmbeddingEnumerator):
    """TorchRec's enumerator with the same order of options in every process; records the options by table."""

    def __init__(self, problem: PlanningProblem) -> None:
        cluster, sharding = problem.cluster, problem.config.sharding
        if cluster.device == "cpu" and set(sharding.compute_kernels) != {"fused"}:
            kernels = ", ".join(sharding.compute_kernels)
            raise ConfigError(f"sharding.compute_kernels {kernels}: CPU ({cluster.name}) supports only fused")
        self.topology, self.constraints = cluster.topology(sharding.storage_reservation), _constraints(problem)
        estimators = [kind(self.topology, self.constraints) for kind in (_PerfEstimator, _StorageEstimator)]
        super().__init__(self.topology, batch_size=1, constraints=self.constraints, estimator=estimators)
        self.options_by_table: dict[str, list[ShardingOption]] = {}

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        by_table = defaultdict(list)
        for option in super().enumerate(module, sharders):
            by_table[table_of_key(option.name)].append(option)
        for options in by_table.values():
            options.sort(key=lambda option: (option.sharding_type, option.compute_kernel))
        self.options_by_table = dict(by_table)
        return [option for options in self.options_by_table.values() for option in options]


class _PerfEstimator(EmbeddingPerfEstimator):
    """TorchRec's estimator, called once per shard size, because hundreds of ranks have shards of the same size."""

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: SharderDataMap) -> None:
        all_shards = [option.shards for option in sharding_options]
        for option in sharding_options:
            option.shards = list({tuple(shard.size): shard for shard in option.shards}.values())
        super().estimate(sharding_options, sharder_data_map)
        for option, shards in zip(sharding_options, all_shards, strict=True):
            perf = {tuple(shard.size): shard.perf for shard in option.shards}
            option.shards = shards
            for shard in shards:
                shard.perf = perf[tuple(shard.size)]


class _StorageEstimator(EmbeddingStorageEstimator):
    """TorchRec's estimator, corrected for fp32 optimizer states and one row-wise state per column shard."""

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: SharderDataMap) -> None:
        super().estimate(sharding_options, sharder_data_map)
        for option in sharding_options:
            (kind,) = option.tensor._optimizer_classes
            dim, width = option.tensor.shape[1], option.tensor.element_size()
            assumed = {RowWiseAdagrad: 1 / dim, torch.optim.SGD: 0}.get(kind, 1)
            for shard in option.shards:
                rows, columns = shard.size
                missing = optimizer_bytes(kind, rows, columns) - round(rows * columns * width * assumed)
                on_host = self._topology.compute_device == "cpu" or option.compute_kernel != "fused"
                shard.storage += Storage(hbm=0, ddr=missing) if on_host else Storage(hbm=missing, ddr=0)


class _PlanRecorder(Stats):
    """Records the best plan; TorchRec's planner passes it only to its ``stats`` object."""

    plan: list[ShardingOption]

    def log(self, *, best_plan: list[ShardingOption], **_: Any) -> None:
        self.plan = best_plan


def optimizer_bytes(kind: type[torch.optim.Optimizer], rows: int, columns: int) -> int:
    """Return the bytes of the optimizer state of a shard."""
    if kind is torch.optim.SGD:
        return 0
    return rows * VALUE_BYTES * (1 if kind is RowWiseAdagrad else columns)


def meta_embeddings(problem: PlanningProblem) -> nn.ModuleDict:
    """Return the tables of training on the meta device, without memory, as submodule :data:`EMBEDDINGS`."""
    config = problem.config
    embeddings = EmbeddingCollection(
        device=torch.device("meta"),
        tables=[
            EmbeddingConfig(
                name=module_key(table.name),
                embedding_dim=config.model.dim,
                num_embeddings=table.rows,
                feature_names=[table.name],
                data_type=DTYPES[config.sharding.dtype],
            )
            for table in problem.workload.tables
        ],
    )
    kind = TABLE_OPTIMIZERS[config.optim.sparse_optimizer]
    apply_optimizer_in_backward(kind, embeddings.parameters(), {"lr": config.optim.sparse_lr})
    return nn.ModuleDict({EMBEDDINGS: embeddings})


def _constraints(problem: PlanningProblem) -> dict[str, ParameterConstraints]:
    """Return the constraints of each table.

    With the installed versions, all other kernels leave the tables of an embedding collection untrained or misread.
    """
    sharding, cached = problem.config.sharding, "fused_uvm_caching" in problem.config.sharding.compute_kernels
    return {
        module_key(table.name): ParameterConstraints(
            sharding_types=list(sharding.sharding_types),
            compute_kernels=list(sharding.compute_kernels),
            min_partition=column_width(problem.config.model.dim, problem.cluster.ranks),
            pooling_factors=[table.lookups],
            cache_params=CacheParams(load_factor=sharding.cache_load_factor) if cached else None,
            output_dtype=DataType.FP32,
        )
        for table in problem.workload.tables
    }


def _infeasible_error(problem: PlanningProblem, enumerator: _Enumerator) -> InfeasiblePlanError:
    config, kind = problem.config, TABLE_OPTIMIZERS[problem.config.optim.sparse_optimizer]
    dim, width = config.model.dim, WEIGHT_BYTES[config.sharding.dtype]
    required = sum(
        table.rows * dim * width + optimizer_bytes(kind, table.rows, dim) for table in problem.workload.tables
    )
    free = sum((device.storage for device in enumerator.topology.devices), Storage(0, 0))
    memory = f"{free.hbm / GB:,.4g} GB of HBM and " if problem.cluster.device == "cuda" else ""
    return InfeasiblePlanError(
        f"the embedding tables do not fit on {problem.cluster.ranks} rank(s): with optimizer states they need "
        f"{required / GB:,.4g} GB, {memory}{free.ddr / GB:,.4g} GB of DDR are free, and each rank's shards must fit "
        "into its memory; run `a2gen plan` for suggested changes",
        enumerator.options_by_table,
        enumerator.topology,
    )
