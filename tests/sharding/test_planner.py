"""The plan: TorchRec's estimates where ours are shortcuts, exact bytes, and the same plan every time."""

from dataclasses import replace

import pytest
import torch
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator

from a2gen_rec.errors import ConfigError
from a2gen_rec.models.a2gen import A2Gen
from a2gen_rec.sharding import planner
from a2gen_rec.sharding.planner import (
    EMBEDDINGS,
    InfeasiblePlanError,
    PlanningProblem,
    column_width,
    enumerate_options,
    meta_embeddings,
    plan,
)
from a2gen_rec.sharding.report_builder import describe_plan, plan_and_describe
from a2gen_rec.sharding.workload import workload_from_dataset
from tests.helpers.cards import make_card, small_config
from tests.helpers.planning_problems import FEATURES, HOST, on_cpu, problem

EVERYTHING = {
    "types": ["table_wise", "row_wise", "column_wise"],
    "kernels": ["fused", "fused_uvm", "fused_uvm_caching"],
}


def test_shards_of_one_size_are_estimated_as_each_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = problem(HOST.with_ranks(8), **EVERYTHING)  # on two hosts; the city's 300 rows are cut unevenly
    ours = enumerate_options(asked).options
    monkeypatch.setattr(planner, "_PerfEstimator", EmbeddingPerfEstimator)
    direct = enumerate_options(asked).options
    assert ours.keys() == direct.keys()
    for name, found in ours.items():
        assert len(found) == 9
        for mine, other in zip(found, direct[name], strict=True):
            assert (mine.sharding_type, mine.compute_kernel) == (other.sharding_type, other.compute_kernel)
            assert [shard.perf for shard in mine.shards] == [shard.perf for shard in other.shards]
            assert [shard.storage for shard in mine.shards] == [shard.storage for shard in other.shards]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize(("optimizer", "state"), [("rowwise_adagrad", 4), ("adagrad", 32 * 4), ("sgd", 0)])
def test_bytes_are_weights_states_and_what_is_in_flight(optimizer: str, state: int, dtype: str) -> None:
    report = describe_plan(asked := problem(optimizer=optimizer, dtype=dtype, reserve=0.0), plan(asked))
    for table in report.tables:
        assert table.weights == table.rows * 32 * (4 if dtype == "fp32" else 2)
        assert table.optimizer == table.rows * state
        share = 3 / 4 if table.name == "action" else 1  # 6 rows by 2 leave the last rank without any
        in_flight = share * asked.cluster.ranks * table.lookups_per_batch * (8 + 4 * 32)
        assert table.chosen.ranks == (4 * share if table.chosen.sharding == "row_wise" else 1)
        assert table.buffers == pytest.approx(in_flight, rel=0.01, abs=40)
    used = sum(rank.hbm for rank in report.ranks)
    assert used == sum(table.weights + table.optimizer + table.buffers for table in report.tables)


def test_column_shards_each_have_a_state() -> None:
    report = describe_plan(asked := problem(types=["column_wise"]), plan(asked))
    for table in report.tables:
        assert [shard.columns for shard in table.shards] == [(0, 16), (16, 32)]
        assert table.optimizer == 2 * table.rows * 4


def test_columns_are_shared_by_as_many_ranks_as_can_be() -> None:
    widths = {(dim, ranks): column_width(dim, ranks) for dim in (4, 8, 32, 48, 64, 200) for ranks in (1, 2, 3, 8, 512)}
    for (dim, ranks), width in widths.items():
        assert dim % width == 0
        assert width % 4 == 0
        assert dim / width <= ranks
    assert [widths[64, ranks] for ranks in (1, 2, 3, 8, 512)] == [64, 32, 32, 16, 16]
    assert widths[8, 2] == 8


def test_a_plan_is_the_same_each_time_and_fastest_of_a_kind() -> None:
    asked = problem(**EVERYTHING)
    first, second = (describe_plan(asked, plan(asked)) for _ in range(2))
    assert first == second
    for fixed in ("table_wise", "row_wise", "column_wise"):
        other, _ = plan_and_describe(problem(types=[fixed], kernels=EVERYTHING["kernels"]), with_remedies=False)
        assert not other.fits or first.cost.total <= other.cost.total * (1 + 1e-9)


def test_gpu_kernels_are_refused_on_cpu() -> None:
    with pytest.raises(
        ConfigError, match=r"sharding\.kernels fused, fused_uvm: on CPU \(test_cpu\) there is only fused"
    ):
        plan(problem(on_cpu(), kernels=["fused", "fused_uvm"]))


def test_host_memory_is_used_where_it_is_offered_and_needed() -> None:
    small = replace(HOST, hbm_gb=3.0)
    with pytest.raises(InfeasiblePlanError, match=r"10\.6\d* GB, 9\.6 GB of HBM and 128 GB of DDR are free"):
        plan(problem(small))
    report = describe_plan(
        asked := problem(small, kernels=["fused", "fused_uvm_caching"], cache_load_factor=0.1), plan(asked)
    )
    kernels = {table.name: table.chosen.kernel for table in report.tables}
    assert kernels["item_id"] == "fused_uvm_caching"
    assert kernels["author_id"] == kernels["city"] == "fused"
    assert report.fits
    item = next(table for table in report.tables if table.name == "item_id")
    assert sum(shard.ddr for shard in item.shards) == pytest.approx(item.weights + item.optimizer, rel=1e-6)
    assert 0.1 * item.weights < sum(shard.hbm for shard in item.shards) < 0.2 * item.weights


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_tables_planned_are_those_of_the_model(dtype: str) -> None:
    card, config = make_card(), small_config()
    config.sharding.dtype = dtype  # type: ignore[assignment]
    trained = A2Gen(card, config, device=torch.device("meta")).embeddings
    planned = meta_embeddings(PlanningProblem(workload_from_dataset(card, config), HOST, config))[EMBEDDINGS]
    for left, right in zip(trained.embedding_configs(), planned.embedding_configs(), strict=True):
        for name in ("name", "num_embeddings", "embedding_dim", "data_type", "feature_names"):
            assert getattr(left, name) == getattr(right, name)


def test_traffic_is_what_crosses_between_ranks() -> None:
    asked = problem(types=["row_wise"])
    traffic = describe_plan(asked, plan(asked)).traffic
    lookups = sum(table.lookups for table in asked.workload.tables)
    assert traffic.lookups_per_target == pytest.approx(lookups / 500)
    assert traffic.id_bytes_per_target == pytest.approx(lookups / 500 * 8 * 3 / 4)
    assert traffic.row_bytes_per_target == pytest.approx(lookups / 500 * 32 * 4 * 3 / 4)
    alone = problem(replace(HOST, ranks=1, hbm_gb=20.0))
    assert describe_plan(alone, plan(alone)).traffic.gradient_bytes_per_target == 0
    columns = problem(types=["column_wise"])
    assert describe_plan(columns, plan(columns)).traffic.id_bytes_per_target == pytest.approx(
        2 * traffic.id_bytes_per_target
    )


def test_ranks_sum_up_their_shards() -> None:
    report = describe_plan(asked := problem(HOST.with_ranks(8)), plan(asked))
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
