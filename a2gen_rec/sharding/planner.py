"""Where each table's rows live: TorchRec's planner under the constraints the stack needs."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    ParameterConstraints,
    PlannerError,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ModuleSharder, ShardingPlan

from a2gen_rec.config import ShardingConfig
from a2gen_rec.errors import UserError

GIB = 2**30


def sharders() -> list[ModuleSharder[nn.Module]]:
    """What can be sharded: the embedding collection."""
    return [EmbeddingCollectionSharder()]


def topology(config: ShardingConfig, device: torch.device, world: int, local_world: int) -> Topology:
    """The hardware that the planner plans for; memory per rank is the device's own unless configured."""
    hbm = int(config.hbm_gb * GIB)
    if device.type == "cuda" and not hbm:
        hbm = torch.cuda.get_device_properties(device).total_memory
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    ddr = int(config.ddr_gb * GIB) or host // local_world
    return TopologyFactory.create_topology(
        TrainerConfig(world_size=world, local_world_size=local_world),
        HardwareConfig(hbm_cap_bytes=hbm or None, ddr_cap_bytes=ddr),
        KernelConfig(compute_device=device.type),
    )


def plan(
    model: nn.Module, tables: list[str], config: ShardingConfig, device: torch.device, world: int, local_world: int
) -> ShardingPlan:
    """A sharding plan for ``model``, made by rank 0 and given to all.

    Only the fused kernel is offered: on these versions the others leave an embedding collection's table untrained
    or misread on CPU.

    Raises:
        UserError: the tables do not fit.
    """
    constraint = ParameterConstraints(sharding_types=list(config.types), compute_kernels=["fused"])
    planner = EmbeddingShardingPlanner(
        topology=topology(config, device, world, local_world),
        batch_size=1,
        storage_reservation=FixedPercentageStorageReservation(config.reserve),
        constraints=dict.fromkeys(tables, constraint),
    )
    made: list[ShardingPlan | UserError | None] = [None]
    if dist.get_rank() == 0:
        try:
            made[0] = planner.plan(model, sharders())
        except PlannerError as error:
            reason = " ".join(str(error).split())
            made[0] = UserError(f"the embedding tables do not fit on {world} rank(s): {reason[:400]}")
    dist.broadcast_object_list(made, src=0)
    if not isinstance(made[0], ShardingPlan):
        raise made[0] or UserError("the planner made no plan")
    return made[0]
