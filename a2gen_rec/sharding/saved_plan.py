"""Sharding plans as files: the blocks of each table and their ranks, independent of the device.

Every sharding type cuts a table into equal blocks; the last ones may be smaller or empty::

    format_version: 3
    cluster: h200_64x8
    world_size: 512
    dim: 64
    dtype: fp32
    cache_load_factor: 0.2
    tables:
      item_id:
        rows: 10000000000
        sharding: row_wise
        kernel: fused
        block: [19531250, 64]
        ranks: all
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import yaml
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torchrec.distributed.sharding_plan import placement
from torchrec.distributed.types import CacheParams, EmbeddingModuleShardingPlan, ParameterSharding
from torchrec.modules.embedding_configs import DataType

from a2gen_rec.config import ShardingConfig
from a2gen_rec.data.identity import DataIdentity
from a2gen_rec.errors import DataError, UserError
from a2gen_rec.models.embedding_tables import module_key
from a2gen_rec.sharding.planner import Plan, PlanningProblem, column_width, enumerate_options
from a2gen_rec.utils import paths

FORMAT_VERSION = 3
ALL_RANKS = "all"  # one block per rank, in order
KERNELS = ("fused", "fused_uvm", "fused_uvm_caching")


@dataclass(frozen=True)
class TablePlacement:
    """Blocks of one table.

    Attributes:
        rows: Rows of the table.
        sharding: TorchRec's name of the sharding type.
        kernel: TorchRec's name of the compute kernel.
        block: Rows and columns of each block; the last ones may have fewer rows.
        ranks: Rank of each block.
    """

    rows: int
    sharding: str
    kernel: str
    block: tuple[int, int]
    ranks: tuple[int, ...]

    @property
    def shards(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Offset (row, column) and size (rows, columns) of each block, in the order of ``ranks``."""
        height, width = self.block
        if self.sharding == "column_wise":
            return [((0, index * width), (height, width)) for index in range(len(self.ranks))]
        first_rows = [min(index * height, self.rows) for index in range(len(self.ranks))]
        return [((row, 0), (min(height, self.rows - row), width)) for row in first_rows]

    def covers_table(self, dim: int, world_size: int) -> bool:
        """Return whether the blocks equal TorchRec's shards of a table with ``dim`` columns on ``world_size`` ranks."""
        width = column_width(dim, world_size)
        blocks = {
            "table_wise": (1, (self.rows, dim)),
            "row_wise": (world_size, (-(-self.rows // world_size), dim)),
            "column_wise": (dim // width, (self.rows, width)),
        }
        in_order = self.sharding != "row_wise" or self.ranks == tuple(range(world_size))
        known = self.kernel in KERNELS and all(rank in range(world_size) for rank in self.ranks)
        return in_order and known and (len(self.ranks), self.block) == blocks[self.sharding]


@dataclass(frozen=True)
class SavedPlan:
    """Placement of all tables on ``world_size`` ranks.

    Attributes:
        cluster: Name of the topology.
        world_size: Number of ranks.
        dim: Embedding dimension.
        dtype: Dtype of the weights.
        cache_load_factor: Cached share of the rows of tables with kernel ``fused_uvm_caching``.
        tables: Placement by table.
        identity: Identity of the dataset that was planned for; empty for described features.
    """

    cluster: str
    world_size: int
    dim: int
    dtype: str
    cache_load_factor: float
    tables: Mapping[str, TablePlacement]
    identity: DataIdentity = field(default_factory=DataIdentity)

    @classmethod
    def from_plan(cls, plan: Plan, problem: PlanningProblem) -> "SavedPlan":
        """Return the placement of a plan."""
        config = problem.config
        return cls(
            cluster=problem.cluster.name,
            world_size=problem.cluster.ranks,
            dim=config.model.dim,
            dtype=config.sharding.dtype,
            cache_load_factor=config.sharding.cache_load_factor,
            tables={
                name: TablePlacement(
                    rows=option.tensor.shape[0],
                    sharding=option.sharding_type,
                    kernel=option.compute_kernel,
                    block=tuple(option.shards[0].size),
                    ranks=tuple(shard.rank for shard in option.shards),
                )
                for name, option in plan.chosen.items()
            },
            identity=problem.workload.identity,
        )

    def apply(self, problem: PlanningProblem, file: str) -> Plan:
        """Return the plan of a problem with this placement, whether it fits or not.

        Args:
            problem: Tables, hardware and settings.
            file: File name for errors.

        Raises:
            UserError: The plan was made for another problem (see :meth:`check`).
        """
        self.check(problem, file)
        plan = enumerate_options(_allow_placement(problem, self))
        chosen = {}
        for name, table in self.tables.items():
            kind = (table.sharding, table.kernel)
            option = next(o for o in plan.options[name] if (o.sharding_type, o.compute_kernel) == kind)
            for shard, rank in zip(option.shards, table.ranks, strict=True):
                shard.rank = rank
            chosen[name] = option
        return replace(plan, chosen=chosen)

    def to_torchrec(self, device: torch.device, ranks_per_host: int) -> EmbeddingModuleShardingPlan:
        """Return TorchRec's plan of an embedding collection on ranks of this device."""
        plan = EmbeddingModuleShardingPlan()
        for name, table in self.tables.items():
            shards = [
                ShardMetadata(list(offset), list(size), placement(device.type, rank, ranks_per_host))
                for (offset, size), rank in zip(table.shards, table.ranks, strict=True)
            ]
            cached = table.kernel == "fused_uvm_caching"
            plan[module_key(name)] = ParameterSharding(
                sharding_type=table.sharding,
                compute_kernel=table.kernel,
                ranks=list(table.ranks),
                sharding_spec=EnumerableShardingSpec(shards),
                cache_params=CacheParams(load_factor=self.cache_load_factor) if cached else None,
                output_dtype=DataType.FP32,
            )
        return plan

    def save(self, file: str) -> None:
        """Write the plan file.

        Raises:
            UserError: The file cannot be written.
        """
        raw = {"format_version": FORMAT_VERSION, **asdict(self)}
        for table in raw["tables"].values():
            table["block"] = list(table["block"])
            table["ranks"] = ALL_RANKS if table["ranks"] == tuple(range(self.world_size)) else list(table["ranks"])
        text = yaml.safe_dump(raw, sort_keys=False, default_flow_style=None, width=100)
        paths.write_text(file, f"# Written by `a2gen plan`; pass it to `a2gen train --plan`.\n{text}")

    @classmethod
    def load(cls, file: str) -> "SavedPlan":
        """Read a file written by :meth:`save`.

        Raises:
            DataError: The file is not a plan, or its blocks do not cover the tables.
            UserError: The file cannot be read, or is not YAML.
        """
        return cls.from_dict(paths.read_yaml(file), file)

    @classmethod
    def from_dict(cls, raw: Any, file: str) -> "SavedPlan":
        """Return the placement in the plain data of a file; see :meth:`load`."""
        try:
            version = raw["format_version"]
            if version != FORMAT_VERSION:
                raise DataError(f"unsupported format version {version}, expected {FORMAT_VERSION}", file=file)
            all_ranks = tuple(range(raw["world_size"]))
            tables = {
                name: TablePlacement(
                    **{
                        **table,
                        "block": tuple(table["block"]),
                        "ranks": all_ranks if table["ranks"] == ALL_RANKS else tuple(table["ranks"]),
                    }
                )
                for name, table in raw["tables"].items()
            }
            fields = {name: value for name, value in raw.items() if name != "format_version"}
            plan = cls(**{**fields, "tables": tables, "identity": DataIdentity.from_dict(raw["identity"])})
            for name, table in tables.items():
                if not table.covers_table(plan.dim, plan.world_size):
                    reason = "blocks, kernel and ranks do not cover the table"
                    raise DataError(reason, file=file, field=f"tables.{name}")
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise DataError(f"not a sharding plan ({error!r})", file=file) from error
        return plan

    def check(self, problem: PlanningProblem, file: str) -> None:
        """Check that the plan was made for these tables and this number of ranks.

        Raises:
            UserError: Names the first difference.
        """
        config = problem.config
        expected = {
            "ranks": problem.cluster.ranks,
            "model.dim": config.model.dim,
            "sharding.dtype": config.sharding.dtype,
        }
        planned = {"ranks": self.world_size, "model.dim": self.dim, "sharding.dtype": self.dtype}
        expected |= {f"rows of {table.name}": table.rows for table in problem.workload.tables}
        planned |= {f"rows of {name}": table.rows for name, table in self.tables.items()}
        for name in expected | planned:
            if expected.get(name) != planned.get(name):
                raise UserError(
                    f"{file}: plan was made for {planned.get(name, 'no')} {name}, this job has "
                    f"{expected.get(name, 'none')}; re-plan, or pass --sharding.plan-file ''"
                )
        identity = problem.workload.identity
        if self.identity.lineage and identity.lineage and (difference := identity.difference(self.identity)):
            raise UserError(
                f"{file}: plan was made for another lineage than this job's data: {difference}; "
                "re-plan, or pass --sharding.plan-file ''"
            )
        for name, table in self.tables.items():
            if problem.cluster.device == "cpu" and table.kernel != "fused":
                raise UserError(f"{file}: table {name} has kernel {table.kernel}, which is not available on CPU")


def _allow_placement(problem: PlanningProblem, placement: SavedPlan) -> PlanningProblem:
    """Return the problem with the placement's sharding types and kernels added to the allowed ones."""
    sharding = problem.config.sharding
    allowed = asdict(sharding) | {
        "sharding_types": sorted({*sharding.sharding_types, *(table.sharding for table in placement.tables.values())}),
        "compute_kernels": sorted({*sharding.compute_kernels, *(table.kernel for table in placement.tables.values())}),
        "cache_load_factor": placement.cache_load_factor,
    }
    return replace(problem, config=replace(problem.config, sharding=ShardingConfig(**allowed)))
