"""Saved plans: equal to TorchRec's, unchanged by a round trip, and rejected for other problems."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torchrec.distributed.planner.planners import to_sharding_plan

from a2gen_rec.errors import DataError, UserError
from a2gen_rec.models.embedding_tables import module_key
from a2gen_rec.sharding.planner import EMBEDDINGS, Plan, PlanningProblem, make_plan
from a2gen_rec.sharding.report_builder import describe_plan
from a2gen_rec.sharding.saved_plan import SavedPlan
from tests.helpers.planning_problems import HOST, cpu_cluster, problem

MIXED = {"user_id": "row_wise", "item_id": "column_wise", "author_id": "table_wise", "city": "row_wise"}


def mixed_plan(case: PlanningProblem) -> tuple[Plan, SavedPlan]:
    """Return a plan with all sharding types."""
    plans = {kind: make_plan(with_types(case, kind)) for kind in ("row_wise", "column_wise", "table_wise")}
    chosen = {name: plans[MIXED.get(name, "table_wise")].chosen[name] for name in plans["row_wise"].chosen}
    plan = replace(plans["row_wise"], chosen=chosen)
    return plan, SavedPlan.from_plan(plan, case)


def with_types(case: PlanningProblem, *types: str) -> PlanningProblem:
    sharding = replace(case.config.sharding, sharding_types=list(types))  # type: ignore[arg-type]
    return replace(case, config=replace(case.config, sharding=sharding))


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_equals_torchrecs_sharding_plan(ranks: int, device: str) -> None:
    cluster = replace(HOST, device=device, ranks=ranks, hbm_gb=40.0, ddr_gb=80.0)
    plan, placement = mixed_plan(problem(cluster))
    ours = placement.to_torchrec(torch.device(device), cluster.local_ranks)
    theirs = to_sharding_plan(list(plan.chosen.values()), plan.topology).plan[EMBEDDINGS]
    assert ours.keys() == theirs.keys()
    for name, table in ours.items():
        for field in ("sharding_type", "compute_kernel", "ranks", "cache_params", "output_dtype"):
            assert getattr(table, field) == getattr(theirs[name], field), (name, field)
        left, right = table.sharding_spec.shards, theirs[name].sharding_spec.shards
        for shard, expected in zip(left, right, strict=True):
            assert (shard.shard_offsets, shard.shard_sizes) == (expected.shard_offsets, expected.shard_sizes)
            assert shard.placement == expected.placement


def test_cached_tables_keep_their_load_factor() -> None:
    case = problem(replace(HOST, hbm_gb=3.0), compute_kernels=["fused", "fused_uvm_caching"], cache_load_factor=0.1)
    ours = SavedPlan.from_plan(make_plan(case), case).to_torchrec(torch.device("cuda"), 4)
    caches = {name: table.cache_params for name, table in ours.items()}
    assert caches[module_key("item_id")].load_factor == 0.1
    assert caches[module_key("city")] is None


def test_round_trip_preserves_the_plan_and_its_report(tmp_path: Path) -> None:
    case = problem(HOST.with_ranks(8))
    plan, placement = mixed_plan(case)
    file = str(tmp_path / "plan.yaml")
    placement.save(file)
    assert SavedPlan.load(file) == placement
    applied = describe_plan(case, placement.apply(case, file))
    expected = describe_plan(case, plan)
    assert applied.ranks == expected.ranks
    assert [table.shards for table in applied.tables] == [table.shards for table in expected.tables]


def test_file_of_a_large_plan_is_short(tmp_path: Path) -> None:
    case = with_types(problem(HOST.with_ranks(512)), "row_wise")
    file = tmp_path / "plan.yaml"
    SavedPlan.from_plan(make_plan(case), case).save(str(file))
    assert len(file.read_text().splitlines()) < 60
    assert SavedPlan.load(str(file)).tables["item_id"].ranks == tuple(range(512))


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (lambda case: replace(case, cluster=case.cluster.with_ranks(8)), "4 ranks, this job has 8"),
        (lambda case: problem(dim=16), "32 model.dim, this job has 16"),
        (lambda case: problem(dtype="fp16"), "fp32 sharding.dtype, this job has fp16"),
        (
            lambda case: replace(case, workload=case.workload.with_rows({"city": 301})),
            "300 rows of city, this job has 301",
        ),
        (
            lambda case: replace(case, workload=replace(case.workload, tables=case.workload.tables[1:])),
            "20000000 rows of user_id, this job has none",
        ),
    ],
)
def test_rejects_a_plan_for_another_problem(other: Any, difference: str) -> None:
    _, placement = mixed_plan(problem())
    placement.check(problem(), "plan.yaml")
    with pytest.raises(UserError, match=r"plan\.yaml: plan was made for " + difference):
        placement.check(other(problem()), "plan.yaml")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ({"format_version": 1}, "unsupported format version 1, expected 3"),
        ({"world_size": "many"}, "not a sharding plan"),
        ({"world_size": 0}, "not a sharding plan"),
        ({"dim": 0}, "not a sharding plan"),
        ({"tables": None}, "not a sharding plan"),
        ({"surprise": 1}, "not a sharding plan"),
        ({"block": [7, 32]}, "field 'tables.city': blocks, kernel and ranks do not cover the table"),
        ({"ranks": [0, 1, 2, 9]}, "field 'tables.city': blocks, kernel and ranks do not cover the table"),
        ({"sharding": "diagonal"}, "not a sharding plan"),
        ({"kernel": "dense"}, "field 'tables.city': blocks, kernel and ranks do not cover the table"),
        ({"rows": 10}, "field 'tables.city': blocks, kernel and ranks do not cover the table"),
    ],
)
def test_rejects_invalid_files(damage: dict, reason: str, tmp_path: Path) -> None:
    _, placement = mixed_plan(problem())
    file = tmp_path / "plan.yaml"
    placement.save(str(file))
    raw = yaml.safe_load(file.read_text())
    for name, value in damage.items():
        (raw["tables"]["city"] if name in raw["tables"]["city"] else raw)[name] = value
    file.write_text(yaml.safe_dump(raw))
    with pytest.raises(DataError) as caught:
        SavedPlan.load(str(file))
    assert str(file) in str(caught.value)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_gpu_plan_applies_on_cpu_except_for_gpu_kernels() -> None:
    case, cpu = (
        problem(replace(HOST, hbm_gb=3.0), compute_kernels=["fused", "fused_uvm_caching"]),
        problem(cpu_cluster(4)),
    )
    _, placement = mixed_plan(problem())
    placement.check(cpu, "plan.yaml")
    with pytest.raises(UserError, match=r"plan\.yaml: table item_id has kernel fused_uvm_caching, which is not"):
        SavedPlan.from_plan(make_plan(case), case).check(cpu, "plan.yaml")
