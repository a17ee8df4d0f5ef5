"""What does not fit, and what would make it fit: every remedy is taken and does."""

from dataclasses import replace
from typing import Any

import pytest

from a2gen_rec.sharding.planner import PlanningProblem
from a2gen_rec.sharding.report import PlanReport, Remedy
from a2gen_rec.sharding.report_builder import plan_and_describe
from tests.helpers.planning_problems import HOST, on_cpu, problem


def report_of(asked: PlanningProblem) -> PlanReport:
    report, found = plan_and_describe(asked)
    assert report.fits == (found is not None)
    return report


def taken(asked: PlanningProblem, remedy: Remedy) -> PlanningProblem:
    """The problem after the remedy's options."""
    given = dict(zip(remedy.settings[::2], remedy.settings[1::2], strict=True))
    sharding: dict[str, Any] = {}
    for option, value in given.items():
        if option == "--ranks":
            asked = replace(asked, cluster=asked.cluster.with_ranks(int(value)))
        elif option.startswith("--num-rows."):
            asked = replace(asked, workload=asked.workload.with_rows({option.removeprefix("--num-rows."): int(value)}))
        else:
            sharding[option.removeprefix("--sharding.")] = value.strip("[]").split(",") if "[" in value else value
    config = replace(asked.config, sharding=replace(asked.config.sharding, **sharding))
    return replace(asked, config=config)


@pytest.mark.parametrize(
    ("memory", "wanted"),
    [
        ({"hbm_gb": 3.0}, ["fp16 weights", "large tables in host memory, cached on the GPU", "8 ranks on 2 hosts"]),
        (
            {"hbm_gb": 1.0, "ddr_gb": 2.4},
            ["fp16 weights, large tables in host memory, cached on the GPU", "16 ranks on 4 hosts"],
        ),
        ({"hbm_gb": 1.0, "ddr_gb": 0.1}, ["16 ranks on 4 hosts"]),
    ],
)
def test_each_remedy_makes_it_fit(memory: dict[str, float], wanted: list[str]) -> None:
    asked = problem(replace(HOST, **memory))
    report = report_of(asked)
    assert not report.fits
    assert not report.tables
    assert not report.ranks
    *changes, fewer = report.remedies
    assert sorted(remedy.change for remedy in changes) == sorted(wanted)
    assert fewer.change.endswith("% of the rows of item_id")
    for remedy in report.remedies:
        after = report_of(taken(asked, remedy))
        assert after.fits
        assert after.cost.total == pytest.approx(remedy.cost_ms)


def test_remedies_on_the_same_hardware_come_first_and_the_fastest_of_them() -> None:
    report = report_of(problem(replace(HOST, hbm_gb=3.0)))
    (first, second, ranks, rows) = report.remedies
    assert first.cost_ms <= second.cost_ms
    assert ranks.settings[0] == "--ranks"
    assert rows.settings[0] == "--num-rows.item_id"


def test_no_more_rows_would_fit() -> None:
    asked = problem(replace(HOST, hbm_gb=3.0))
    remedy = report_of(asked).remedies[-1]
    rows = int(remedy.settings[1])
    assert report_of(replace(asked, workload=asked.workload.with_rows({"item_id": rows}))).fits
    assert not report_of(replace(asked, workload=asked.workload.with_rows({"item_id": rows + 60_000}))).fits


def test_misfits_are_the_fewest_largest_tables_in_the_way() -> None:
    (item,) = report_of(problem(replace(HOST, hbm_gb=2.0))).misfits
    assert (item.table, item.memory) == ("item_id", "hbm")
    assert item.needs == pytest.approx(60_000_000 * 33 * 4 / 4, rel=0.01)
    assert item.available == pytest.approx(1.6e9 - 21_000_000 * 33 * 4 / 4, rel=0.01)
    item, user = report_of(problem(replace(HOST, hbm_gb=0.5))).misfits
    assert (item.table, user.table) == ("item_id", "user_id")
    assert user.needs > user.available


def test_the_memory_that_is_short_is_named() -> None:
    asked = problem(replace(HOST, hbm_gb=1.0, ddr_gb=1.0), kernels=["fused_uvm_caching"])
    assert {misfit.memory for misfit in report_of(asked).misfits} == {"ddr"}
    asked = problem(replace(on_cpu(), ddr_gb=3.0))
    report = report_of(asked)
    assert [(misfit.table, misfit.memory) for misfit in report.misfits] == [("item_id", "ddr")]
    assert not any("GPU" in remedy.change for remedy in report.remedies)


def test_where_nothing_helps_no_remedy_is_named() -> None:
    report = report_of(problem(replace(HOST, hbm_gb=1e-5, ddr_gb=1e-5)))
    assert report.misfits
    assert not [remedy for remedy in report.remedies if not report_of(taken(problem(), remedy)).fits]
    assert "4,096" not in str(report.remedies)
