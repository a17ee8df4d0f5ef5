"""Settings of where tables live, and of tables and batches that are only planned."""

from dataclasses import dataclass, field
from typing import Literal

from a2gen_rec.config.checks import NON_NEGATIVE, POSITIVE, check_fields
from a2gen_rec.errors import ConfigError


@dataclass
class ShardingConfig:
    """What the planner may do, and on what hardware.

    Attributes:
        plan: file of a plan to follow (``a2gen plan --save``); empty makes one.
        types: sharding types the planner may choose from.
        kernels: where a table may live: ``fused`` in the device's memory, ``fused_uvm`` in the host's,
            ``fused_uvm_caching`` in the host's with a cache on the device. CPU has ``fused`` only.
        cache_load_factor: share of a cached table's rows that its cache holds.
        dtype: of the tables' weights; looked-up rows and optimizer states are fp32 in any case.
        hbm_gb, ddr_gb: memory per rank in GB (10^9 bytes); 0 takes the device's own, or the topology's.
        reserve: share of memory kept for the dense part and activations.
        init_scale: embeddings start uniform in ± this.
    """

    plan_file: str = ""
    sharding_types: list[Literal["table_wise", "row_wise", "column_wise"]] = field(
        default_factory=lambda: ["table_wise", "row_wise"]
    )
    compute_kernels: list[Literal["fused", "fused_uvm_caching", "fused_uvm"]] = field(default_factory=lambda: ["fused"])
    cache_load_factor: float = 0.2
    dtype: Literal["fp32", "fp16"] = "fp32"
    hbm_gb: float = 0.0
    ddr_gb: float = 0.0
    storage_reservation: float = 0.2
    init_scale: float = 0.05

    def __post_init__(self) -> None:
        if not self.sharding_types:
            raise ConfigError("sharding.sharding_types must name at least one sharding type")
        if not self.compute_kernels:
            raise ConfigError("sharding.compute_kernels must name at least one kernel")
        check_fields("sharding", self, "in (0, 1)", lambda value: 0 < value < 1, "cache_load_factor")
        check_fields("sharding", self, *NON_NEGATIVE, "hbm_gb", "ddr_gb", "init_scale")
        check_fields("sharding", self, "in [0, 1)", lambda value: 0 <= value < 1, "storage_reservation")


@dataclass
class PlannerFeature:
    """A feature of data that are not there yet (``a2gen plan`` without ``--data``).

    Attributes:
        level: one id per ``user`` window, or per impression (``item``, ``context``).
        rows: of its table, row 0 ("unknown") included.
        zipf: exponent of how often its ids occur; 0 is uniform, which gives the most distinct ids there can be.
    """

    level: Literal["user", "item", "context"]
    rows: int
    zipf_exponent: float = 0.0

    def __post_init__(self) -> None:
        check_fields("feature", self, *POSITIVE, "rows")
        check_fields("feature", self, "in [0, 4]", lambda value: 0 <= value <= 4, "zipf")


@dataclass
class WorkloadConfig:
    """What one rank's batch holds, for ``a2gen plan`` without ``--data``; with data, the loader's bounds tell.

    Attributes:
        windows, impressions, targets: expected in a batch; impressions are history and targets together.
        actions: size of the action vocabulary, ``start`` and ``exit`` included.
    """

    windows_per_batch: int = 0
    impressions_per_batch: int = 0
    targets_per_batch: int = 0
    actions_per_batch: int = 0

    def __post_init__(self) -> None:
        check_fields(
            "workload",
            self,
            *NON_NEGATIVE,
            "windows_per_batch",
            "impressions_per_batch",
            "targets_per_batch",
            "actions_per_batch",
        )
