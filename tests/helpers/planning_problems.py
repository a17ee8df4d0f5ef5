"""Planning problems for tests: a few tables on a small cluster."""

from dataclasses import replace
from typing import Any

from a2gen_rec.config import Config, ModelConfig, OptimConfig, PlannerFeature, ShardingConfig, WorkloadConfig
from a2gen_rec.sharding.planner import PlanningProblem
from a2gen_rec.sharding.topology import Cluster
from a2gen_rec.sharding.workload import workload_from_features

HOST = Cluster(
    name="test_1x4",
    device="cuda",
    ranks=4,
    ranks_per_host=4,
    hbm_gb=10.0,
    ddr_gb=40.0,
    hbm_gbps=3000.0,
    ddr_gbps=70.0,
    intra_host_gbps=400.0,
    inter_host_gbps=40.0,
    hbm_to_ddr_gbps=60.0,
)
FEATURES = {
    "user_id": PlannerFeature("user", 20_000_000),
    "item_id": PlannerFeature("item", 60_000_000, zipf_exponent=0.8),
    "author_id": PlannerFeature("item", 1_000_000, zipf_exponent=0.8),
    "city": PlannerFeature("user", 300),
}


def problem(
    cluster: Cluster = HOST, optimizer: str = "rowwise_adagrad", dim: int = 32, **sharding: Any
) -> PlanningProblem:
    """Return tables of 10.4 GB, optimizer states included, on four ranks with 8 GB for tables each."""
    optim = OptimConfig(sparse_optimizer=optimizer)  # type: ignore[arg-type]
    config = Config(model=ModelConfig(dim=dim), optim=optim, sharding=ShardingConfig(**sharding))
    workload = workload_from_features(
        FEATURES,
        WorkloadConfig(windows_per_batch=64, impressions_per_batch=4000, targets_per_batch=500, num_actions=6),
        config,
    )
    return PlanningProblem(workload, cluster, config)


def cpu_cluster(ranks: int = 2) -> Cluster:
    """Return a cluster of hosts with two CPU ranks."""
    return replace(HOST, name="test_cpu", device="cpu", ranks=ranks, ranks_per_host=2)
