"""Saved plans: they say what TorchRec's do, come back as they were, and are refused where they do not belong."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torchrec.distributed.planner.planners import to_sharding_plan

from a2gen_rec.errors import DataError, UserError
from a2gen_rec.sharding.planner import EMBEDDINGS, Plan, PlanningProblem, plan
from a2gen_rec.sharding.report_builder import describe_plan
from a2gen_rec.sharding.saved_plan import SavedPlan
from tests.helpers.planning_problems import HOST, on_cpu, problem

MIXED = {"user_id": "row_wise", "item_id": "column_wise", "author_id": "table_wise", "city": "row_wise"}


def mixed(asked: PlanningProblem) -> tuple[Plan, SavedPlan]:
    """A plan with every kind of sharding."""
    plans = {kind: plan(with_types(asked, kind)) for kind in ("row_wise", "column_wise", "table_wise")}
    chosen = {name: plans[MIXED.get(name, "table_wise")].chosen[name] for name in plans["row_wise"].chosen}
    found = replace(plans["row_wise"], chosen=chosen)
    return found, SavedPlan.from_plan(found, asked)


def with_types(asked: PlanningProblem, *types: str) -> PlanningProblem:
    sharding = replace(asked.config.sharding, sharding_types=list(types))  # type: ignore[arg-type]
    return replace(asked, config=replace(asked.config, sharding=sharding))


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_it_is_the_plan_torchrec_would_follow(ranks: int, device: str) -> None:
    cluster = replace(HOST, device=device, ranks=ranks, hbm_gb=40.0, ddr_gb=80.0)
    found, placement = mixed(problem(cluster))
    ours = placement.to_torchrec(torch.device(device), cluster.local_ranks)
    theirs = to_sharding_plan(list(found.chosen.values()), found.topology).plan[EMBEDDINGS]
    assert ours.keys() == theirs.keys()
    for name, table in ours.items():
        for field in ("sharding_type", "compute_kernel", "ranks", "cache_params", "output_dtype"):
            assert getattr(table, field) == getattr(theirs[name], field), (name, field)
        left, right = table.sharding_spec.shards, theirs[name].sharding_spec.shards
        for mine, other in zip(left, right, strict=True):
            assert (mine.shard_offsets, mine.shard_sizes) == (other.shard_offsets, other.shard_sizes)
            assert mine.placement == other.placement


def test_cached_tables_keep_their_cache() -> None:
    asked = problem(replace(HOST, hbm_gb=3.0), kernels=["fused", "fused_uvm_caching"], cache_load_factor=0.1)
    ours = SavedPlan.from_plan(plan(asked), asked).to_torchrec(torch.device("cuda"), 4)
    caches = {name: table.cache_params for name, table in ours.items()}
    assert caches["item_id"].load_factor == 0.1
    assert caches["city"] is None


def test_what_is_saved_is_read_back_and_explained_alike(tmp_path: Path) -> None:
    asked = problem(HOST.with_ranks(8))
    found, placement = mixed(asked)
    file = str(tmp_path / "plan.yaml")
    placement.save(file)
    assert SavedPlan.load(file) == placement
    followed = describe_plan(asked, placement.apply(asked, file))
    direct = describe_plan(asked, found)
    assert followed.ranks == direct.ranks
    assert [table.shards for table in followed.tables] == [table.shards for table in direct.tables]


def test_a_large_plan_is_short_to_read(tmp_path: Path) -> None:
    asked = with_types(problem(HOST.with_ranks(512)), "row_wise")
    file = tmp_path / "plan.yaml"
    SavedPlan.from_plan(plan(asked), asked).save(str(file))
    assert len(file.read_text().splitlines()) < 60
    assert SavedPlan.load(str(file)).tables["item_id"].ranks == tuple(range(512))


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (lambda asked: replace(asked, cluster=asked.cluster.with_ranks(8)), "has 4 ranks, here it is 8"),
        (lambda asked: problem(dim=16), "has 32 model.dim, here it is 16"),
        (lambda asked: problem(dtype="fp16"), "has fp32 sharding.dtype, here it is fp16"),
        (
            lambda asked: replace(asked, workload=asked.workload.with_rows({"city": 301})),
            "has 300 rows of city, here it is 301",
        ),
        (
            lambda asked: replace(asked, workload=replace(asked.workload, tables=asked.workload.tables[1:])),
            "has 20000000 rows of user_id, here it is none",
        ),
    ],
)
def test_a_plan_for_something_else_is_refused(other: Any, difference: str) -> None:
    _, placement = mixed(problem())
    placement.check(problem(), "plan.yaml")
    with pytest.raises(UserError, match=r"plan\.yaml: this plan " + difference):
        placement.check(other(problem()), "plan.yaml")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ({"format_version": 2}, "field 'format_version': is 2, this version reads 1"),
        ({"world": "many"}, "not a plan by"),
        ({"world": 0}, "not a plan by"),
        ({"dim": 0}, "not a plan by"),
        ({"tables": None}, "not a plan by"),
        ({"surprise": 1}, "not a plan by"),
        ({"block": [7, 32]}, "field 'tables.city': its blocks, kernel and ranks do not make up the table"),
        ({"ranks": [0, 1, 2, 9]}, "field 'tables.city': its blocks, kernel and ranks do not make up the table"),
        ({"sharding": "diagonal"}, "not a plan by"),
        ({"kernel": "dense"}, "field 'tables.city': its blocks, kernel and ranks do not make up the table"),
        ({"rows": 10}, "field 'tables.city': its blocks, kernel and ranks do not make up the table"),
    ],
)
def test_a_damaged_file_is_refused(damage: dict, reason: str, tmp_path: Path) -> None:
    _, placement = mixed(problem())
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


def test_a_plan_for_gpus_holds_on_cpu_but_for_their_kernels() -> None:
    asked, cpu = problem(replace(HOST, hbm_gb=3.0), kernels=["fused", "fused_uvm_caching"]), problem(on_cpu(4))
    _, placement = mixed(problem())
    placement.check(cpu, "plan.yaml")
    with pytest.raises(UserError, match=r"plan\.yaml: this plan has kernel fused_uvm_caching for item_id, which CPU"):
        SavedPlan.from_plan(plan(asked), asked).check(cpu, "plan.yaml")
