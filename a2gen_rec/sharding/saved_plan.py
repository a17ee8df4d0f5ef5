"""A plan as a file: which blocks of which table lie on which ranks, on any backend.

Every sharding cuts a table into equal blocks, of which the last may be smaller or empty::

    format_version: 1
    cluster: h200_64x8
    world: 512
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
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import yaml
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torchrec.distributed.sharding_plan import placement
from torchrec.distributed.types import CacheParams, EmbeddingModuleShardingPlan, ParameterSharding
from torchrec.modules.embedding_configs import DataType

from a2gen_rec.config import ShardingConfig
from a2gen_rec.errors import DataError, UserError
from a2gen_rec.sharding.planner import Plan, PlanningProblem, column_width, enumerate_options
from a2gen_rec.utils import paths

FORMAT_VERSION = 2
ALL_RANKS = "all"  # ranks, in order
KERNELS = ("fused", "fused_uvm", "fused_uvm_caching")


@dataclass(frozen=True)
class TablePlacement:
    """One table's blocks.

    Attributes:
        block: rows and columns of each but the last.
        ranks: of each block.
    """

    rows: int
    sharding: str
    kernel: str
    block: tuple[int, int]
    ranks: tuple[int, ...]

    @property
    def shards(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Offset (row, column) and size (rows, columns) of every block, in the order of ``ranks``."""
        height, width = self.block
        if self.sharding == "column_wise":
            return [((0, place * width), (height, width)) for place in range(len(self.ranks))]
        firsts = [min(place * height, self.rows) for place in range(len(self.ranks))]
        return [((first, 0), (min(height, self.rows - first), width)) for first in firsts]

    def covers_table(self, dim: int, world: int) -> bool:
        """Whether the blocks are as TorchRec cuts a table of ``dim`` columns for ``world`` ranks."""
        width = column_width(dim, world)
        blocks = {
            "table_wise": (1, (self.rows, dim)),
            "row_wise": (world, (-(-self.rows // world), dim)),
            "column_wise": (dim // width, (self.rows, width)),
        }
        in_order = self.sharding != "row_wise" or self.ranks == tuple(range(world))
        there = self.kernel in KERNELS and all(rank in range(world) for rank in self.ranks)
        return in_order and there and (len(self.ranks), self.block) == blocks[self.sharding]


@dataclass(frozen=True)
class SavedPlan:
    """Where every table lives on ``world`` ranks."""

    cluster: str
    world: int
    dim: int
    dtype: str
    cache_load_factor: float
    tables: Mapping[str, TablePlacement]

    @classmethod
    def from_plan(cls, plan: Plan, problem: PlanningProblem) -> "SavedPlan":
        """The placement that a plan chose."""
        config = problem.config
        return cls(
            cluster=problem.cluster.name,
            world=problem.cluster.ranks,
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
        )

    def apply(self, problem: PlanningProblem, file: str) -> Plan:
        """The plan that this placement makes of a problem, fitting or not.

        Raises:
            UserError: it was made for another problem (see :meth:`check`).
        """
        self.check(problem, file)
        found = enumerate_options(_allowing(problem, self))
        chosen = {}
        for name, table in self.tables.items():
            kind = (table.sharding, table.kernel)
            option = next(one for one in found.options[name] if (one.sharding_type, one.compute_kernel) == kind)
            for shard, rank in zip(option.shards, table.ranks, strict=True):
                shard.rank = rank
            chosen[name] = option
        return replace(found, chosen=chosen)

    def to_torchrec(self, device: torch.device, ranks_per_host: int) -> EmbeddingModuleShardingPlan:
        """TorchRec's form, for an embedding collection on ranks of the given device."""
        plan = EmbeddingModuleShardingPlan()
        for name, table in self.tables.items():
            shards = [
                ShardMetadata(list(offset), list(size), placement(device.type, rank, ranks_per_host))
                for (offset, size), rank in zip(table.shards, table.ranks, strict=True)
            ]
            cached = table.kernel == "fused_uvm_caching"
            plan[name] = ParameterSharding(
                sharding_type=table.sharding,
                compute_kernel=table.kernel,
                ranks=list(table.ranks),
                sharding_spec=EnumerableShardingSpec(shards),
                cache_params=CacheParams(load_factor=self.cache_load_factor) if cached else None,
                output_dtype=DataType.FP32,
            )
        return plan

    def save(self, file: str) -> None:
        """Write the file.

        Raises:
            UserError: it cannot be written.
        """
        raw = {"format_version": FORMAT_VERSION, **asdict(self)}
        for table in raw["tables"].values():
            table["block"] = list(table["block"])
            table["ranks"] = ALL_RANKS if table["ranks"] == tuple(range(self.world)) else list(table["ranks"])
        text = yaml.safe_dump(raw, sort_keys=False, default_flow_style=None, width=100)
        paths.write_text(file, f"# Made by `a2gen plan`; `a2gen train --plan` follows it.\n{text}")

    @classmethod
    def load(cls, file: str) -> "SavedPlan":
        """Read a file that :meth:`save` wrote.

        Raises:
            DataError: it is not such a file, or its blocks do not make up the tables.
            UserError: it cannot be read, or is not YAML.
        """
        return cls.from_dict(paths.read_yaml(file), file)

    @classmethod
    def from_dict(cls, raw: Any, file: str) -> "SavedPlan":
        """The placement in a file's plain data; see :meth:`load`."""
        try:
            version = raw["format_version"]
            if version != FORMAT_VERSION:
                raise DataError(f"is {version}, this version reads {FORMAT_VERSION}", file=file, field="format_version")
            everywhere = tuple(range(raw["world"]))
            tables = {
                name: TablePlacement(
                    **{
                        **table,
                        "block": tuple(table["block"]),
                        "ranks": everywhere if table["ranks"] == ALL_RANKS else tuple(table["ranks"]),
                    }
                )
                for name, table in raw["tables"].items()
            }
            fields = {name: value for name, value in raw.items() if name != "format_version"}
            found = cls(**{**fields, "tables": tables})
            for name, table in tables.items():
                if not table.covers_table(found.dim, found.world):
                    where = f"tables.{name}"
                    raise DataError("its blocks, kernel and ranks do not make up the table", file=file, field=where)
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise DataError(f"not a plan by `a2gen plan --save` ({error!r})", file=file) from error
        return found

    def check(self, problem: PlanningProblem, file: str) -> None:
        """Refuse to place other tables, or on another number of ranks, than the plan was made for.

        Raises:
            UserError: naming the first difference.
        """
        config = problem.config
        wanted = {
            "ranks": problem.cluster.ranks,
            "model.dim": config.model.dim,
            "sharding.dtype": config.sharding.dtype,
        }
        planned = {"ranks": self.world, "model.dim": self.dim, "sharding.dtype": self.dtype}
        wanted |= {f"rows of {table.name}": table.rows for table in problem.workload.tables}
        planned |= {f"rows of {name}": table.rows for name, table in self.tables.items()}
        for name in wanted | planned:
            if wanted.get(name) != planned.get(name):
                raise UserError(
                    f"{file}: this plan has {planned.get(name, 'no')} {name}, here it is {wanted.get(name, 'none')}; "
                    "make the plan again, or have one made with --sharding.plan_file ''"
                )
        for name, table in self.tables.items():
            if problem.cluster.device == "cpu" and table.kernel != "fused":
                raise UserError(f"{file}: this plan has kernel {table.kernel} for {name}, which CPU does not have")


def _allowing(problem: PlanningProblem, placement: SavedPlan) -> PlanningProblem:
    """The problem with what the placement uses among what the planner may use."""
    sharding = problem.config.sharding
    allowed = asdict(sharding) | {
        "types": sorted({*sharding.sharding_types, *(table.sharding for table in placement.tables.values())}),
        "kernels": sorted({*sharding.compute_kernels, *(table.kernel for table in placement.tables.values())}),
        "cache_load_factor": placement.cache_load_factor,
    }
    return replace(problem, config=replace(problem.config, sharding=ShardingConfig(**allowed)))
