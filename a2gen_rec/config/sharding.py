"""Settings of table placement, and descriptions of tables and batches for planning without data."""

import itertools
from dataclasses import dataclass, field
from typing import Literal

from a2gen_rec.config.checks import NON_NEGATIVE, POSITIVE, check_fields
from a2gen_rec.errors import ConfigError

MAX_HBM_GB, MAX_DDR_GB = 2_000.0, 20_000.0
"""Maximum memory per rank in GB; larger numbers are bytes or MiB."""


@dataclass
class ShardingConfig:
    """Options of the sharding planner and memory of the hardware."""

    plan_file: str = ""
    """Sharding plan to apply, from ``a2gen plan --save``; empty computes one."""
    sharding_types: list[Literal["table_wise", "row_wise", "column_wise"]] = field(
        default_factory=lambda: ["table_wise", "row_wise"]
    )
    """Sharding types that the planner may choose from."""
    compute_kernels: list[Literal["fused", "fused_uvm_caching", "fused_uvm"]] = field(default_factory=lambda: ["fused"])
    """Compute kernels that the planner may choose from. ``fused`` keeps a table in device memory, ``fused_uvm`` in host
    memory, ``fused_uvm_caching`` in host memory with a device cache. CPU supports ``fused`` only."""
    cache_load_factor: float = 0.2
    """Fraction of a cached table's rows in its device cache."""
    dtype: Literal["fp32", "fp16"] = "fp32"
    """Data type of table weights; looked-up rows and optimizer states are always fp32."""
    hbm_gb: float = 0.0
    """Device memory per rank in GB (10^9 bytes); 0 uses the device's or the topology's."""
    ddr_gb: float = 0.0
    """Host memory per rank in GB (10^9 bytes); 0 uses the machine's or the topology's."""
    storage_reservation: float = 0.2
    """Fraction of memory reserved for the dense part and activations."""

    def __post_init__(self) -> None:
        if not self.sharding_types:
            raise ConfigError("sharding.sharding_types must name at least one sharding type")
        if not self.compute_kernels:
            raise ConfigError("sharding.compute_kernels must name at least one kernel")
        check_fields("sharding", self, "in (0, 1)", lambda value: 0 < value < 1, "cache_load_factor")
        for name, limit in (("hbm_gb", MAX_HBM_GB), ("ddr_gb", MAX_DDR_GB)):
            rule = f"from 0 to {limit:,.0f} GB (10^9 bytes) per rank"
            check_fields("sharding", self, rule, lambda value, limit=limit: 0 <= value <= limit, name)  # type: ignore[misc]
        check_fields("sharding", self, "in [0, 1)", lambda value: 0 <= value < 1, "storage_reservation")


@dataclass
class PlannerFeature:
    """A feature of a planned dataset (``a2gen plan`` without ``--data``)."""

    level: Literal["user", "item", "context"]
    """Level of the feature: one id per window (``user``), or per impression (``item``, ``context``)."""
    rows: int
    """Number of table rows, row 0 ("unknown") included."""
    zipf_exponent: float = 0.0
    """Zipf exponent of the id frequencies; 0 is uniform, the worst case for distinct ids."""
    mean_values: float = 1.0
    """Mean number of ids per window or impression; above 1 for multi-valued features."""

    def __post_init__(self) -> None:
        check_fields("feature", self, *POSITIVE, "rows")
        check_fields("feature", self, "at least 1", lambda value: value >= 1, "mean_values")
        check_fields("feature", self, "in [0, 4]", lambda value: 0 <= value <= 4, "zipf_exponent")


@dataclass
class WorkloadConfig:
    """Batch of one rank, for ``a2gen plan`` without ``--data``; with data, the loader's limits determine it."""

    windows_per_batch: int = 0
    """Expected number of windows in a batch; each has at least one target."""
    impressions_per_batch: int = 0
    """Expected number of impressions in a batch, history and targets together."""
    targets_per_batch: int = 0
    """Expected number of targets in a batch."""
    num_actions: int = 0
    """Size of the action vocabulary, ``start`` and ``exit`` included."""

    def __post_init__(self) -> None:
        names = ("windows_per_batch", "impressions_per_batch", "targets_per_batch", "num_actions")
        check_fields("workload", self, *NON_NEGATIVE, *names)
        check_fields("workload", self, "at most 10^9", lambda value: value <= 10**9, *names)
        sizes = ("windows_per_batch", "targets_per_batch", "impressions_per_batch")
        for smaller, larger in itertools.pairwise(sizes):
            low, high = getattr(self, smaller), getattr(self, larger)
            if low > high > 0:
                raise ConfigError(f"workload.{smaller} {low} must be at most workload.{larger} {high}")
