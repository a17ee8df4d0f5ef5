"""Where each table's rows live: TorchRec's planner under the constraints the stack needs.

Nothing here needs a process group, a GPU or the tables' memory: they are declared on the meta device.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
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
from a2gen_rec.models.embedding_tables import DTYPES
from a2gen_rec.sharding.topology import GB, Cluster
from a2gen_rec.sharding.workload import Workload

TABLE_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}
WEIGHT_BYTES = {"fp32": 4, "fp16": 2}
ROW_BYTES = 4  # a number of a looked-up row, of its gradient or of an optimizer state is fp32, whatever the weights are

EMBEDDINGS = "embeddings"

_NARROWEST = 16  # columns of a shard: 64 bytes, what a GPU reads at least
_GRID = 4_096  # combinations of options that may be tried, times the ranks each of them fills: a second at most


@dataclass(frozen=True)
class PlanningProblem:
    """What is to be placed, where, and under which settings (``config.sharding``)."""

    workload: Workload
    cluster: Cluster
    config: Config


@dataclass(frozen=True)
class Plan:
    """The option chosen for each table, and all there were.

    Attributes:
        topology: memory of each rank, less the reserve.
    """

    chosen: dict[str, ShardingOption]
    options: dict[str, list[ShardingOption]]
    topology: Topology

    @property
    def rank_perf(self) -> list[Perf]:
        """Estimated milliseconds per step of each rank: its shards one after another."""
        perf = [Perf(0.0, 0.0, 0.0, 0.0) for _ in self.topology.devices]
        for option in self.chosen.values():
            for shard in non_empty_shards(option):
                perf[shard.rank] += shard.perf
        return perf


class InfeasiblePlanError(UserError):
    """The tables do not fit; ``options`` are what was tried, as in :class:`Plan`."""

    def __init__(self, reason: str, options: dict[str, list[ShardingOption]], topology: Topology) -> None:
        super().__init__(reason)
        self.options, self.topology = options, topology

    def __reduce__(self) -> tuple[type[UserError], tuple[str]]:
        return UserError, (str(self),)  # other ranks are sent the reason alone


def make_sharders() -> list[ModuleSharder[nn.Module]]:
    """What can be sharded: the embedding collection."""
    return [EmbeddingCollectionSharder()]


def plan(problem: PlanningProblem) -> Plan:
    """Place every table so that the slowest rank is estimated fastest.

    Raises:
        NoFit: the tables do not fit.
        ConfigError: a kernel is allowed that CPU does not have.
    """
    enumerator, best = _Enumerator(problem), _Best()
    planner = EmbeddingShardingPlanner(
        topology=enumerator.topology,
        batch_size=1,
        enumerator=enumerator,
        storage_reservation=FixedPercentageStorageReservation(0.0),
        # All combinations where there are few, else along each table's options in order of cost or of memory.
        proposer=[
            GridSearchProposer(_GRID // problem.cluster.ranks),
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
        raise _no_fit(problem, enumerator) from error
    return Plan({option.name: option for option in best.plan}, enumerator.found, enumerator.topology)


def enumerate_options(problem: PlanningProblem) -> Plan:
    """Every option of every table, none chosen; raises as :func:`plan`."""
    enumerator = _Enumerator(problem)
    enumerator.enumerate(meta_embeddings(problem), make_sharders())
    return Plan({}, enumerator.found, enumerator.topology)


def non_empty_shards(option: ShardingOption) -> list[Shard]:
    """The shards that hold anything: a table with fewer rows than ranks leaves some of them empty."""
    return [shard for shard in option.shards if shard.size[0]]


def column_width(dim: int, ranks: int) -> int:
    """Columns of a column-wise shard: a multiple of 4 that divides ``dim``, so that as many ranks as possible share."""
    widths = [width for width in range(4, dim + 1, 4) if dim % width == 0]
    return next((width for width in widths if width >= max(_NARROWEST, dim / ranks)), dim)


class _Enumerator(EmbeddingEnumerator):
    """TorchRec's enumerator in an order that is the same in every process; keeps what it found, by table."""

    def __init__(self, problem: PlanningProblem) -> None:
        cluster, sharding = problem.cluster, problem.config.sharding
        if cluster.device == "cpu" and set(sharding.compute_kernels) != {"fused"}:
            kernels = ", ".join(sharding.compute_kernels)
            raise ConfigError(f"sharding.compute_kernels {kernels}: on CPU ({cluster.name}) there is only fused")
        self.topology, self.constraints = cluster.topology(sharding.storage_reservation), _constraints(problem)
        estimators = [kind(self.topology, self.constraints) for kind in (_PerfEstimator, _StorageEstimator)]
        super().__init__(self.topology, batch_size=1, constraints=self.constraints, estimator=estimators)
        self.found: dict[str, list[ShardingOption]] = {}

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        found = defaultdict(list)
        for option in super().enumerate(module, sharders):
            found[option.name].append(option)
        for options in found.values():
            options.sort(key=lambda option: (option.sharding_type, option.compute_kernel))
        self.found = dict(found)
        return [option for options in self.found.values() for option in options]


class _PerfEstimator(EmbeddingPerfEstimator):
    """TorchRec's estimator, asked once for all shards of one size: hundreds of ranks have the same."""

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: SharderDataMap) -> None:
        every = [option.shards for option in sharding_options]
        for option in sharding_options:
            option.shards = list({tuple(shard.size): shard for shard in option.shards}.values())
        super().estimate(sharding_options, sharder_data_map)
        for option, shards in zip(sharding_options, every, strict=True):
            perf = {tuple(shard.size): shard.perf for shard in option.shards}
            option.shards = shards
            for shard in shards:
                shard.perf = perf[tuple(shard.size)]


class _StorageEstimator(EmbeddingStorageEstimator):
    """TorchRec's estimator, with optimizer states in fp32 and one row-wise state per column shard."""

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: SharderDataMap) -> None:
        super().estimate(sharding_options, sharder_data_map)
        for option in sharding_options:
            (kind,) = option.tensor._optimizer_classes
            dim, width = option.tensor.shape[1], option.tensor.element_size()
            assumed = {RowWiseAdagrad: 1 / dim, torch.optim.SGD: 0}.get(kind, 1)
            for shard in option.shards:
                rows, columns = shard.size
                more = optimizer_bytes(kind, rows, columns) - round(rows * columns * width * assumed)
                on_host = self._topology.compute_device == "cpu" or option.compute_kernel != "fused"
                shard.storage += Storage(hbm=0, ddr=more) if on_host else Storage(hbm=more, ddr=0)


class _Best(Stats):
    """Takes the plan from TorchRec's planner, which hands it to its statistics only."""

    plan: list[ShardingOption]

    def log(self, *, best_plan: list[ShardingOption], **_: Any) -> None:
        self.plan = best_plan


def optimizer_bytes(kind: type[torch.optim.Optimizer], rows: int, columns: int) -> int:
    """Bytes of the optimizer's state for a shard."""
    if kind is torch.optim.SGD:
        return 0
    return rows * ROW_BYTES * (1 if kind is RowWiseAdagrad else columns)


def meta_embeddings(problem: PlanningProblem) -> nn.ModuleDict:
    """The tables as training has them, on the meta device: they take no memory. They are at :data:`EMBEDDINGS`."""
    config = problem.config
    embeddings = EmbeddingCollection(
        device=torch.device("meta"),
        tables=[
            EmbeddingConfig(
                name=table.name,
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
    """What TorchRec may do with each table.

    Kernels that are not offered leave an embedding collection's table untrained or misread on these versions.
    """
    sharding, cached = problem.config.sharding, "fused_uvm_caching" in problem.config.sharding.compute_kernels
    return {
        table.name: ParameterConstraints(
            sharding_types=list(sharding.sharding_types),
            compute_kernels=list(sharding.compute_kernels),
            min_partition=column_width(problem.config.model.dim, problem.cluster.ranks),
            pooling_factors=[table.lookups],
            cache_params=CacheParams(load_factor=sharding.cache_load_factor) if cached else None,
            output_dtype=DataType.FP32,
        )
        for table in problem.workload.tables
    }


def _no_fit(problem: PlanningProblem, tried: _Enumerator) -> InfeasiblePlanError:
    config, kind = problem.config, TABLE_OPTIMIZERS[problem.config.optim.sparse_optimizer]
    dim, width = config.model.dim, WEIGHT_BYTES[config.sharding.dtype]
    needs = sum(table.rows * dim * width + optimizer_bytes(kind, table.rows, dim) for table in problem.workload.tables)
    free = sum((device.storage for device in tried.topology.devices), Storage(0, 0))
    memory = f"{free.hbm / GB:,.4g} GB of HBM and " if problem.cluster.device == "cuda" else ""
    return InfeasiblePlanError(
        f"the embedding tables do not fit on {problem.cluster.ranks} rank(s): with their optimizer states they are "
        f"{needs / GB:,.4g} GB, {memory}{free.ddr / GB:,.4g} GB of DDR are free for them, and each rank's share must "
        "fit in its own; `a2gen plan` tells what would help",
        tried.found,
        tried.topology,
    )
