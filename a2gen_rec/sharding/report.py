"""What a sharding plan says, as plain data: the planner fills it in, tables, pages and JSON are made from it."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cost:
    """Estimated milliseconds of one training step, and their sum ``total``."""

    forward_compute: float
    forward_comms: float
    backward_compute: float
    backward_comms: float
    prefetch: float = 0.0
    total: float = field(init=False)

    def __post_init__(self) -> None:
        parts = self.forward_compute, self.forward_comms, self.backward_compute, self.backward_comms, self.prefetch
        object.__setattr__(self, "total", sum(parts))  # frozen; a field, so that JSON has it


@dataclass(frozen=True)
class Option:
    """One way to place a table.

    Attributes:
        sharding, kernel: TorchRec's names.
        ranks: over which it is spread.
        cost: of its slowest shard.
        hbm, ddr: bytes of its largest shard.
    """

    sharding: str
    kernel: str
    ranks: int
    cost: Cost
    hbm: int
    ddr: int


@dataclass(frozen=True)
class Shard:
    """A piece of a table on one rank: [first, last) rows and columns, bytes, estimated cost.

    Attributes:
        hbm, ddr: all it takes; of it ``weights`` and ``optimizer`` for good, the rest buffers and caches.
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
    """Where one table lives, and what it costs.

    Attributes:
        lookups: distinct ids that one rank looks up per step.
        weights, optimizer, buffers: bytes over all ranks; buffers hold ids and looked-up rows in flight, and
            the rows that a cache on the device holds.
        chosen: the option taken; its alternatives in ``options``, cheapest first, ``chosen`` included.
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
    """One rank's share: bytes of tables, what it has for them (its memory less the reserve), estimated cost."""

    rank: int
    host: int
    hbm: int
    ddr: int
    hbm_free: int
    ddr_free: int
    cost: Cost


@dataclass(frozen=True)
class StepTraffic:
    """Of one training step on one rank.

    Attributes:
        targets, impressions: expected in a batch.
        lookups_per_target: distinct rows looked up, all tables.
        id_bytes_per_target, row_bytes_per_target, gradient_bytes_per_target: that cross between ranks: ids, rows of
            the forward pass, gradients of the backward pass.
    """

    targets: float
    impressions: float
    lookups_per_target: float
    id_bytes_per_target: float
    row_bytes_per_target: float
    gradient_bytes_per_target: float


@dataclass(frozen=True)
class UnplacedTable:
    """A table that finds no place: bytes it needs on a rank at the least, and bytes free there.

    Attributes:
        memory: which is short, ``hbm`` or ``ddr``.
    """

    table: str
    needs: int
    available: int
    memory: str = "hbm"


@dataclass(frozen=True)
class Remedy:
    """A change with which everything fits, found by planning again.

    Attributes:
        change: in words; ``settings``: the same as command-line options.
        cost_ms: estimated embedding time per step after it.
    """

    change: str
    settings: list[str]
    cost_ms: float


@dataclass(frozen=True)
class PlanReport:
    """A plan for one cluster, or why there is none.

    Attributes:
        cluster: the topology's name; ``ranks`` and ``tables`` are empty where nothing fits.
        cost: of the slowest rank.
        planning_s: seconds the planner took.
    """

    cluster: str
    device: str
    world: int
    ranks_per_host: int
    fits: bool
    cost: Cost
    traffic: StepTraffic
    tables: list[TablePlan] = field(default_factory=list)
    ranks: list[RankPlan] = field(default_factory=list)
    misfits: list[UnplacedTable] = field(default_factory=list)
    remedies: list[Remedy] = field(default_factory=list)
    planning_s: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)
