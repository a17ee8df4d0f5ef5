"""Do ranks take the memory that the sharding planner says?

Tables are planned, and then sharded as planned over processes of this machine, which look up as many rows as the plan
expects, and update them. Beside the planned bytes of each rank stand

- those of the tensors that the fused kernels hold: weights and optimizer states;
- the growth of the process's memory from before the tables to after the step, buffers included (on CUDA: of what the
  allocator has given out).

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
from harness import Cell, Goal, Report, ReportTable, main
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
KINDS: list[list[str]] = [["table_wise"], ["row_wise"], ["column_wise"], ["table_wise", "row_wise", "column_wise"]]


@dataclass
class Settings:
    """Sizes.

    Attributes:
        ranks: processes; passed over under torchrun, where they are given.
        items, users, authors, tags: rows of the tables; all of them take 4 × dim bytes a row, and 4 for its moment.
        windows, impressions: of each rank's batch.
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
    """What a rank was planned to take and took: ``held`` for good, ``grown`` with what is in flight."""

    planned_held: int
    held: int
    planned: int
    grown: int


def table_bytes(module: nn.Module) -> int:
    """Bytes of all tensors that the fused kernels of a sharded module hold in this process."""
    lookups = chain.from_iterable(
        part._lookups for part in module.modules() if isinstance(part, ShardedEmbeddingCollection)
    )
    parts = chain.from_iterable(lookup.modules() for lookup in lookups)
    kernels = [part for part in parts if isinstance(part, SplitTableBatchedEmbeddingBagsCodegen)]
    tensors = chain.from_iterable(chain(kernel.parameters(), kernel.buffers()) for kernel in kernels)
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


def process_bytes(device: torch.device) -> int:
    """Memory of this process now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def problem(settings: Settings, types: list[str], dtype: str, process: DistributedContext) -> PlanningProblem:
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


def one_step(module: nn.Module, asked: PlanningProblem, process: DistributedContext) -> dict[str, JaggedTensor]:
    """Look up and update as many rows of each table as the plan expects; what was looked up."""
    generator = torch.Generator().manual_seed(process.rank)
    ids = [torch.randint(table.rows, (round(table.lookups),), generator=generator) for table in asked.workload.tables]
    batch = KeyedJaggedTensor(
        keys=[table.name for table in asked.workload.tables],
        values=torch.cat(ids),
        lengths=torch.tensor([len(own) for own in ids]),
    ).to(process.device)
    rows = module(batch)
    torch.stack([jagged.values().sum() for jagged in rows.values()]).sum().backward()
    return rows


def run_on_ranks(settings: Settings, process: DistributedContext) -> list[list[RankBytes]]:
    """Plan, shard, step and compare on the ranks of this job, for every kind of plan; every rank gets all results."""
    take(problem(settings, KINDS[0], settings.dtypes[0], process), process)  # what first use loads is no table's
    return [
        all_gather_object(take(problem(settings, types, dtype, process), process))
        for dtype in settings.dtypes
        for types in KINDS
    ]


def take(asked: PlanningProblem, process: DistributedContext) -> RankBytes:
    """Place the tables as planned, step once, and count."""
    found = all_gather_object(make_plan(asked) if process.is_main else None)[0]
    shards = [
        shard for table in describe_plan(asked, found).tables for shard in table.shards if shard.rank == process.rank
    ]
    placement = SavedPlan.from_plan(found, asked).to_torchrec(process.device, process.local_world_size)
    gc.collect()  # what was sharded before refers to itself
    before = process_bytes(process.device)
    module = DistributedModelParallel(
        _Lookup(asked), device=process.device, plan=ShardingPlan({EMBEDDINGS: placement}), sharders=make_sharders()
    )
    rows = one_step(module, asked, process)
    grown = process_bytes(process.device) - before
    del rows
    return RankBytes(
        planned_held=sum(shard.weights + shard.optimizer for shard in shards),
        held=table_bytes(module),
        planned=sum(shard.hbm + shard.ddr for shard in shards),
        grown=grown,
    )


class _Lookup(nn.Module):
    """The planned tables, and nothing after them."""

    def __init__(self, asked: PlanningProblem) -> None:
        super().__init__()
        self.embeddings = meta_embeddings(asked)[EMBEDDINGS]

    def forward(self, batch: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        return self.embeddings(batch)


def as_rank(settings: Settings, device: str) -> list[list[RankBytes]]:
    """:func:`run_on_ranks` in a process that has just been started as a rank."""
    silence_known_warnings()
    with process_group(device) as process:  # type: ignore[arg-type]
        torch.set_num_threads(1)
        return run_on_ranks(settings, process)


def start(settings: Settings, process: DistributedContext) -> list[list[RankBytes]]:
    """Compare on the ranks of this job, or on new processes of this machine."""
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
    return elastic_launch(launch, as_rank)(settings, process.device.type)[0]


def measure(settings: Settings, process: DistributedContext) -> Report:
    rows: list[list[Cell]] = []
    held, grown = [], []
    cases = product(settings.dtypes, KINDS)
    for (dtype, types), ranks in zip(cases, start(settings, process), strict=True):
        for rank, found in enumerate(ranks):
            ratios = [found.held / found.planned_held, found.grown / found.planned]
            held.append(ratios[0])
            grown.append(ratios[1])
            sizes = [found.planned_held, found.held, found.planned, found.grown]
            rows.append([types[0] if len(types) == 1 else "any", dtype, rank, *(size / MIB for size in sizes), *ratios])
    worst = {"held": max(held, key=off), "grown": max(grown, key=off)}
    columns = ["sharding", "dtype", "rank", "planned MiB", "held MiB", "with buffers MiB", "grown MiB"]
    table = ReportTable(
        "Bytes of each rank, planned and taken",
        [*columns, "held / planned", "grown / with buffers"],
        rows,
        "held: weights and optimizer states; grown: the process's memory, from before the tables to after a step.",
    )
    claims = {"held": "weights and optimizer states", "grown": "growth of the process"}
    targets = [
        Goal(
            f"{claim} against the plan, furthest off",
            f"within {TOLERANCE:.0%}",
            f"{worst[name]:.3f} of it",
            off(worst[name]) <= TOLERANCE,
        )
        for name, claim in claims.items()
    ]
    return Report([table], targets, {f"{name}_over_planned": value for name, value in worst.items()})


def off(ratio: float) -> float:
    return abs(ratio - 1)


if __name__ == "__main__":
    main(__file__, __doc__, Settings, QUICK, measure)
