"""Plans: estimates equal TorchRec's, bytes are exact, and plans are deterministic."""

from dataclasses import replace

import pytest
import torch
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator

from a2gen_rec.errors import ConfigError
from a2gen_rec.models.factory import build_model
from a2gen_rec.sharding import planner
from a2gen_rec.sharding.planner import (
    EMBEDDINGS,
    InfeasiblePlanError,
    PlanningProblem,
    column_width,
    enumerate_options,
    make_plan,
    meta_embeddings,
)
from a2gen_rec.sharding.report_builder import describe_plan, plan_and_describe
from a2gen_rec.sharding.workload import workload_from_dataset
from tests.helpers.cards import make_card, small_config
from tests.helpers.planning_problems import FEATURES, HOST, cpu_cluster, problem

ALL_OPTIONS = {
    "sharding_types": ["table_wise", "row_wise", "column_wise"],
    "compute_kernels": ["fused", "fused_uvm", "fused_uvm_caching"],
}


def test_estimate_per_shard_size_equals_torchrecs_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    case = problem(HOST.with_ranks(8), **ALL_OPTIONS)  # on two hosts; the 300 rows of city are split unevenly
    ours = enumerate_options(case).options
    monkeypatch.setattr(planner, "_PerfEstimator", EmbeddingPerfEstimator)
    reference = enumerate_options(case).options
    assert ours.keys() == reference.keys()
    for name, options in ours.items():
        assert len(options) == 9
        for option, expected in zip(options, reference[name], strict=True):
            assert (option.sharding_type, option.compute_kernel) == (expected.sharding_type, expected.compute_kernel)
            assert [shard.perf for shard in option.shards] == [shard.perf for shard in expected.shards]
            assert [shard.storage for shard in option.shards] == [shard.storage for shard in expected.shards]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize(("optimizer", "state"), [("rowwise_adagrad", 4), ("adagrad", 32 * 4), ("sgd", 0)])
def test_bytes_are_weights_states_and_buffers(optimizer: str, state: int, dtype: str) -> None:
    report = describe_plan(case := problem(optimizer=optimizer, dtype=dtype, storage_reservation=0.0), make_plan(case))
    for table in report.tables:
        assert table.weights == table.rows * 32 * (4 if dtype == "fp32" else 2)
        assert table.optimizer == table.rows * state
        share = 3 / 4 if table.name == "action" else 1  # 6 rows in blocks of 2 leave the last rank empty
        in_flight = share * case.cluster.ranks * table.lookups_per_batch * (8 + 4 * 32)
        assert table.chosen.ranks == (4 * share if table.chosen.sharding == "row_wise" else 1)
        assert table.buffers == pytest.approx(in_flight, rel=0.01, abs=40)
    used = sum(rank.hbm for rank in report.ranks)
    assert used == sum(table.weights + table.optimizer + table.buffers for table in report.tables)


def test_column_shards_each_have_a_state() -> None:
    report = describe_plan(case := problem(sharding_types=["column_wise"]), make_plan(case))
    for table in report.tables:
        assert [shard.columns for shard in table.shards] == [(0, 16), (16, 32)]
        assert table.optimizer == 2 * table.rows * 4


def test_column_width_uses_most_ranks() -> None:
    widths = {(dim, ranks): column_width(dim, ranks) for dim in (4, 8, 32, 48, 64, 200) for ranks in (1, 2, 3, 8, 512)}
    for (dim, ranks), width in widths.items():
        assert dim % width == 0
        assert width % 4 == 0
        assert dim / width <= ranks
    assert [widths[64, ranks] for ranks in (1, 2, 3, 8, 512)] == [64, 32, 32, 16, 16]
    assert widths[8, 2] == 8


def test_plan_is_deterministic_and_faster_than_fixed_types() -> None:
    case = problem(**ALL_OPTIONS)
    first, second = (describe_plan(case, make_plan(case)) for _ in range(2))
    assert first == second
    for sharding_type in ("table_wise", "row_wise", "column_wise"):
        other, _ = plan_and_describe(
            problem(sharding_types=[sharding_type], compute_kernels=ALL_OPTIONS["compute_kernels"]), with_remedies=False
        )
        assert not other.fits or first.cost.total <= other.cost.total * (1 + 1e-9)


def test_rejects_gpu_kernels_on_cpu() -> None:
    with pytest.raises(
        ConfigError, match=r"sharding\.compute_kernels fused, fused_uvm: CPU \(test_cpu\) supports only fused"
    ):
        make_plan(problem(cpu_cluster(), compute_kernels=["fused", "fused_uvm"]))


def test_uses_host_memory_if_allowed_and_needed() -> None:
    small = replace(HOST, hbm_gb=3.0)
    with pytest.raises(InfeasiblePlanError, match=r"10\.6\d* GB, 9\.6 GB of HBM and 128 GB of DDR are free"):
        make_plan(problem(small))
    report = describe_plan(
        case := problem(small, compute_kernels=["fused", "fused_uvm_caching"], cache_load_factor=0.1), make_plan(case)
    )
    kernels = {table.name: table.chosen.kernel for table in report.tables}
    assert kernels["item_id"] == "fused_uvm_caching"
    assert kernels["author_id"] == kernels["city"] == "fused"
    assert report.fits
    item = next(table for table in report.tables if table.name == "item_id")
    assert sum(shard.ddr for shard in item.shards) == pytest.approx(item.weights + item.optimizer, rel=1e-6)
    assert 0.1 * item.weights < sum(shard.hbm for shard in item.shards) < 0.2 * item.weights


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_planned_tables_equal_the_models(dtype: str) -> None:
    card, config = make_card(), small_config()
    config.sharding.dtype = dtype  # type: ignore[assignment]
    trained = build_model(card, config, device=torch.device("meta")).embeddings
    planned = meta_embeddings(PlanningProblem(workload_from_dataset(card, config), HOST, config))[EMBEDDINGS]
    for left, right in zip(trained.embedding_configs(), planned.embedding_configs(), strict=True):
        for name in ("name", "num_embeddings", "embedding_dim", "data_type", "feature_names"):
            assert getattr(left, name) == getattr(right, name)


def test_traffic_crosses_between_ranks() -> None:
    case = problem(sharding_types=["row_wise"])
    traffic = describe_plan(case, make_plan(case)).traffic
    lookups = sum(table.lookups for table in case.workload.tables)
    assert traffic.lookups_per_target == pytest.approx(lookups / 500)
    assert traffic.id_bytes_per_target == pytest.approx(lookups / 500 * 8 * 3 / 4)
    assert traffic.row_bytes_per_target == pytest.approx(lookups / 500 * 32 * 4 * 3 / 4)
    one_rank = problem(replace(HOST, ranks=1, hbm_gb=20.0))
    assert describe_plan(one_rank, make_plan(one_rank)).traffic.gradient_bytes_per_target == 0
    column_wise = problem(sharding_types=["column_wise"])
    assert describe_plan(column_wise, make_plan(column_wise)).traffic.id_bytes_per_target == pytest.approx(
        2 * traffic.id_bytes_per_target
    )


def test_ranks_sum_their_shards() -> None:
    report = describe_plan(case := problem(HOST.with_ranks(8)), make_plan(case))
    assert [rank.host for rank in report.ranks] == [0] * 4 + [1] * 4
    shards = [shard for table in report.tables for shard in table.shards]
    for rank in report.ranks:
        assert rank.hbm == sum(shard.hbm for shard in shards if shard.rank == rank.rank)
        cost = sum(shard.cost.total for shard in shards if shard.rank == rank.rank)
        assert rank.cost.total == pytest.approx(cost)
        assert rank.hbm_free == 8 * 10**9
    assert report.cost.total == max(rank.cost.total for rank in report.ranks)
    assert {table.name for table in report.tables} > FEATURES.keys()
    for table in report.tables:
        assert sum(
            (shard.rows[1] - shard.rows[0]) * (shard.columns[1] - shard.columns[0]) for shard in table.shards
        ) == (table.rows * 32)
        assert table.chosen in table.options
