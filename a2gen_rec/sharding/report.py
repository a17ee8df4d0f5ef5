"""Plain data of a sharding plan, written by the report builder and read by tables, pages and JSON."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cost:
    """Estimated milliseconds of one training step by part, and their sum ``total``."""

    forward_compute: float
    forward_comms: float
    backward_compute: float
    backward_comms: float
    prefetch: float = 0.0
    total: float = field(init=False)

    def __post_init__(self) -> None:
        parts = self.forward_compute, self.forward_comms, self.backward_compute, self.backward_comms, self.prefetch
        # fsum, as sum rounds differently from Python 3.12 on. A field of a frozen class, so that JSON contains it.
        object.__setattr__(self, "total", math.fsum(parts))


@dataclass(frozen=True)
class Option:
    """One way to shard a table.

    Attributes:
        sharding: TorchRec's name of the sharding type.
        kernel: TorchRec's name of the compute kernel.
        ranks: Number of ranks with a shard.
        cost: Estimated cost of the slowest shard.
        hbm: HBM bytes of the largest shard.
        ddr: DDR bytes of the largest shard.
    """

    sharding: str
    kernel: str
    ranks: int
    cost: Cost
    hbm: int
    ddr: int


@dataclass(frozen=True)
class Shard:
    """A block of a table on one rank.

    Attributes:
        rank: Rank that holds the block.
        rows: First and last row, [first, last).
        columns: First and last column, [first, last).
        hbm: HBM bytes, buffers and caches included.
        ddr: DDR bytes, buffers and caches included.
        cost: Estimated cost.
        weights: Bytes of weights, part of ``hbm`` and ``ddr``.
        optimizer: Bytes of optimizer state, part of ``hbm`` and ``ddr``.
    """

    rank: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    hbm: int
    ddr: int
    cost: Cost
    weights: int = 0
    optimizer: int = 0


@dataclass(frozen=True)
class TablePlan:
    """Placement and cost of one table.

    Attributes:
        name: Table name.
        rows: Number of rows.
        dim: Embedding dimension.
        dtype: Dtype of the weights.
        lookups_per_batch: Distinct ids that one rank looks up per step.
        weights: Bytes of weights, sum over ranks.
        optimizer: Bytes of optimizer state, sum over ranks.
        buffers: Bytes of ids and looked-up rows in flight and of rows cached on the device, sum over ranks.
        chosen: Chosen option.
        options: All options, ``chosen`` included, cheapest first.
        shards: Blocks of the table.
    """

    name: str
    rows: int
    dim: int
    dtype: str
    lookups_per_batch: float
    weights: int
    optimizer: int
    buffers: int
    chosen: Option
    options: list[Option]
    shards: list[Shard]


@dataclass(frozen=True)
class RankPlan:
    """Load of one rank.

    Attributes:
        rank: Rank.
        host: Index of its host.
        hbm: HBM bytes used by tables.
        ddr: DDR bytes used by tables.
        hbm_free: HBM bytes for tables, the storage reservation excluded.
        ddr_free: DDR bytes for tables, the storage reservation excluded.
        cost: Estimated cost.
    """

    rank: int
    host: int
    hbm: int
    ddr: int
    hbm_free: int
    ddr_free: int
    cost: Cost


@dataclass(frozen=True)
class StepTraffic:
    """Traffic of one training step on one rank.

    Attributes:
        targets: Expected targets per batch.
        impressions: Expected impressions per batch.
        lookups_per_target: Distinct rows looked up, sum over tables.
        id_bytes_per_target: Bytes of ids that cross between ranks.
        row_bytes_per_target: Bytes of rows that cross between ranks in the forward pass.
        gradient_bytes_per_target: Bytes of gradients that cross between ranks in the backward pass.
    """

    targets: float
    impressions: float
    lookups_per_target: float
    id_bytes_per_target: float
    row_bytes_per_target: float
    gradient_bytes_per_target: float


@dataclass(frozen=True)
class UnplacedTable:
    """A table that does not fit.

    Attributes:
        table: Table name.
        required: Minimum bytes required on a rank.
        available: Bytes free on that rank.
        memory: Kind of memory that is short, ``hbm`` or ``ddr``.
    """

    table: str
    required: int
    available: int
    memory: str = "hbm"


@dataclass(frozen=True)
class Remedy:
    """A change with which all tables fit, verified by re-planning.

    Attributes:
        change: Description.
        settings: The change as command-line options.
        cost_ms: Estimated embedding time per step after the change, in milliseconds.
    """

    change: str
    settings: list[str]
    cost_ms: float


@dataclass(frozen=True)
class PlanReport:
    """A plan for one cluster, or the tables that do not fit.

    Attributes:
        cluster: Name of the topology.
        device: ``cuda`` or ``cpu``.
        world_size: Number of ranks.
        ranks_per_host: Ranks on each host.
        fits: Whether all tables fit.
        cost: Estimated cost of the slowest rank.
        traffic: Traffic of a training step.
        tables: Plan of each table; empty if the tables do not fit.
        ranks: Load of each rank; empty if the tables do not fit.
        unplaced: Tables that do not fit.
        remedies: Changes with which all tables fit.
        search_is_complete: Whether the search for remedies ended before its limit of time.
        planning_s: Seconds of planning.
    """

    cluster: str
    device: str
    world_size: int
    ranks_per_host: int
    fits: bool
    cost: Cost
    traffic: StepTraffic
    tables: list[TablePlan] = field(default_factory=list)
    ranks: list[RankPlan] = field(default_factory=list)
    unplaced: list[UnplacedTable] = field(default_factory=list)
    remedies: list[Remedy] = field(default_factory=list)
    planning_s: float = 0.0
    search_is_complete: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)
