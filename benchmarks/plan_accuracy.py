"""Does the memory of each rank match the sharding plan?

Tables are planned and sharded over processes of this machine. Each process looks up and updates as many rows as the
plan expects. The planned bytes of each rank are compared with

- the bytes of the tensors in the fused kernels: weights and optimizer states;
- the growth of the process's memory from before sharding to after the step, buffers included (on CUDA: allocated
  memory).

Under torchrun, the ranks are those of the job.
"""

import gc
import os
import uuid
from dataclasses import dataclass, field
from itertools import chain, product
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from harness import CellValue, Goal, Report, ReportTable, main
from torch import nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torchrec import JaggedTensor, KeyedJaggedTensor
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan

from a2gen_rec.config import Config, ModelConfig, PlannerFeature, ShardingConfig, WorkloadConfig
from a2gen_rec.sharding.planner import EMBEDDINGS, PlanningProblem, make_plan, make_sharders, meta_embeddings
from a2gen_rec.sharding.report_builder import describe_plan
from a2gen_rec.sharding.saved_plan import SavedPlan
from a2gen_rec.sharding.topology import Cluster
from a2gen_rec.sharding.workload import workload_from_features
from a2gen_rec.utils.distributed import DistributedContext, all_gather_object, process_group
from a2gen_rec.utils.warning_filters import silence_known_warnings

MIB = 2**20
TOLERANCE = 0.10
SHARDING_TYPES: list[list[str]] = [
    ["table_wise"],
    ["row_wise"],
    ["column_wise"],
    ["table_wise", "row_wise", "column_wise"],
]


@dataclass
class Settings:
    """Sizes of the tables and batches.

    Attributes:
        ranks: number of processes; ignored under torchrun.
        items: rows of the item table. In fp32, a row takes 4 × dim bytes, and 4 for its optimizer state.
        users: rows of the user table.
        authors: rows of the author table.
        tags: rows of the tag table.
        dim: width of the tables.
        windows: user windows of each rank's batch.
        impressions: impressions of each rank's batch.
        dtypes: data types of the table weights.
    """

    ranks: int = 2
    items: int = 5_000_000
    users: int = 3_000_000
    authors: int = 500_000
    tags: int = 50_000
    dim: int = 64
    windows: int = 256
    impressions: int = 28_160
    dtypes: list[Literal["fp32", "fp16"]] = field(default_factory=lambda: ["fp32", "fp16"])


QUICK = {"items": 1_500_000, "users": 1_000_000, "authors": 100_000, "tags": 10_000, "dtypes": ["fp32"]}


@dataclass(frozen=True)
class RankBytes:
    """Planned and measured bytes of one rank.

    Attributes:
        planned_tables: planned weights and optimizer states.
        allocated_tables: weights and optimizer states in the fused kernels.
        planned_total: planned total, buffers included.
        process_growth: growth of the process's memory, buffers included.
    """

    planned_tables: int
    allocated_tables: int
    planned_total: int
    process_growth: int


def table_bytes(module: nn.Module) -> int:
    """Return the bytes of all tensors in the fused kernels of a sharded module in this process."""
    lookups = chain.from_iterable(
        child._lookups for child in module.modules() if isinstance(child, ShardedEmbeddingCollection)
    )
    children = chain.from_iterable(lookup.modules() for lookup in lookups)
    kernels = [child for child in children if isinstance(child, SplitTableBatchedEmbeddingBagsCodegen)]
    tensors = chain.from_iterable(chain(kernel.parameters(), kernel.buffers()) for kernel in kernels)
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


def process_bytes(device: torch.device) -> int:
    """Return the current resident memory of this process, on CUDA the allocated memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def make_problem(settings: Settings, types: list[str], dtype: str, process: DistributedContext) -> PlanningProblem:
    """Build the planning problem of one sharding and dtype on this job's ranks."""
    features = {
        "user_id": PlannerFeature("user", settings.users),
        "item_id": PlannerFeature("item", settings.items, zipf_exponent=0.8),
        "author_id": PlannerFeature("item", settings.authors, zipf_exponent=0.8),
        "tag": PlannerFeature("item", settings.tags, zipf_exponent=0.8),
    }
    sharding = ShardingConfig(sharding_types=types, dtype=dtype)  # type: ignore[arg-type]
    config = Config(model=ModelConfig(dim=settings.dim), sharding=sharding)
    counts = WorkloadConfig(
        settings.windows, settings.impressions, targets_per_batch=settings.impressions // 11, num_actions=8
    )
    cluster = Cluster.from_local_process(process.device, process.world_size, process.local_world_size, sharding)
    return PlanningProblem(workload_from_features(features, counts, config), cluster, config)


def run_step(module: nn.Module, problem: PlanningProblem, process: DistributedContext) -> dict[str, JaggedTensor]:
    """Look up and update as many rows of each table as the plan expects; return the looked-up rows."""
    generator = torch.Generator().manual_seed(process.rank)
    ids = [torch.randint(table.rows, (round(table.lookups),), generator=generator) for table in problem.workload.tables]
    batch = KeyedJaggedTensor(
        keys=[table.name for table in problem.workload.tables],
        values=torch.cat(ids),
        lengths=torch.tensor([len(table_ids) for table_ids in ids]),
    ).to(process.device)
    rows = module(batch)
    torch.stack([jagged.values().sum() for jagged in rows.values()]).sum().backward()
    return rows


def run_on_ranks(settings: Settings, process: DistributedContext) -> list[list[RankBytes]]:
    """Measure all plans on the ranks of this job; every rank returns the results of all ranks."""
    # Warm-up: memory of the first use belongs to no table.
    measure_plan(make_problem(settings, SHARDING_TYPES[0], settings.dtypes[0], process), process)
    return [
        all_gather_object(measure_plan(make_problem(settings, types, dtype, process), process))
        for dtype in settings.dtypes
        for types in SHARDING_TYPES
    ]


def measure_plan(problem: PlanningProblem, process: DistributedContext) -> RankBytes:
    """Shard the tables as planned, run one step, and count bytes."""
    sharding_plan = all_gather_object(make_plan(problem) if process.is_main else None)[0]
    tables = describe_plan(problem, sharding_plan).tables
    shards = [shard for table in tables for shard in table.shards if shard.rank == process.rank]
    placement = SavedPlan.from_plan(sharding_plan, problem).to_torchrec(process.device, process.local_world_size)
    gc.collect()  # previously sharded modules are reference cycles
    before = process_bytes(process.device)
    module = DistributedModelParallel(
        _Lookup(problem), device=process.device, plan=ShardingPlan({EMBEDDINGS: placement}), sharders=make_sharders()
    )
    rows = run_step(module, problem, process)
    growth = process_bytes(process.device) - before
    del rows
    return RankBytes(
        planned_tables=sum(shard.weights + shard.optimizer for shard in shards),
        allocated_tables=table_bytes(module),
        planned_total=sum(shard.hbm + shard.ddr for shard in shards),
        process_growth=growth,
    )


class _Lookup(nn.Module):
    """Model with only the planned tables."""

    def __init__(self, problem: PlanningProblem) -> None:
        super().__init__()
        self.embeddings = meta_embeddings(problem)[EMBEDDINGS]

    def forward(self, batch: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        return self.embeddings(batch)


def rank_main(settings: Settings, device: str) -> list[list[RankBytes]]:
    """Entry point of a new rank process: set up the process group and call :func:`run_on_ranks`."""
    silence_known_warnings()
    with process_group(device) as process:  # type: ignore[arg-type]
        torch.set_num_threads(1)
        return run_on_ranks(settings, process)


def launch_ranks(settings: Settings, process: DistributedContext) -> list[list[RankBytes]]:
    """Measure on the ranks of this job, or on new processes of this machine."""
    if dist.is_torchelastic_launched():
        return run_on_ranks(settings, process)
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=settings.ranks,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn",
    )
    return elastic_launch(launch, rank_main)(settings, process.device.type)[0]


def measure(settings: Settings, process: DistributedContext) -> Report:
    rows: list[list[CellValue]] = []
    ratios: dict[str, list[float]] = {"tables": [], "process": []}
    cases = product(settings.dtypes, SHARDING_TYPES)
    for (dtype, types), ranks in zip(cases, launch_ranks(settings, process), strict=True):
        for rank, measured in enumerate(ranks):
            ratios["tables"].append(measured.allocated_tables / measured.planned_tables)
            ratios["process"].append(measured.process_growth / measured.planned_total)
            sizes = [
                measured.planned_tables,
                measured.allocated_tables,
                measured.planned_total,
                measured.process_growth,
            ]
            sharding = types[0] if len(types) == 1 else "any"
            rows.append(
                [sharding, dtype, rank, *(size / MIB for size in sizes), *(values[-1] for values in ratios.values())]
            )
    worst = {name: max(values, key=deviation) for name, values in ratios.items()}
    columns = ["sharding", "dtype", "rank", "planned tables MiB", "allocated tables MiB", "planned total MiB"]
    table = ReportTable(
        "Planned and measured memory of each rank",
        [*columns, "process growth MiB", "tables / planned", "process / planned"],
        rows,
        "tables: weights and optimizer states; process growth: from before sharding to after one step.",
    )
    claims = {"tables": "weights and optimizer states", "process": "growth of the process"}
    goals = [
        Goal(
            f"{claim}: largest deviation from the plan",
            f"within {TOLERANCE:.0%}",
            f"{worst[name]:.3f} × planned",
            deviation(worst[name]) <= TOLERANCE,
        )
        for name, claim in claims.items()
    ]
    return Report([table], goals, {f"{name}_over_planned": value for name, value in worst.items()})


def deviation(ratio: float) -> float:
    """Return the distance of a ratio from 1."""
    return abs(ratio - 1)


if __name__ == "__main__":
    main(__file__, __doc__, Settings, QUICK, measure)
