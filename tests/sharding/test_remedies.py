"""Tables that do not fit, and remedies: applying each remedy makes all tables fit."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from a2gen_rec.sharding import remedies
from a2gen_rec.sharding.planner import InfeasiblePlanError, Plan, PlanningProblem, make_plan
from a2gen_rec.sharding.remedies import RemedySearch
from a2gen_rec.sharding.report import PlanReport, Remedy
from a2gen_rec.sharding.report_builder import plan_and_describe
from tests.helpers.planning_problems import HOST, cpu_cluster, problem


def plan_report(case: PlanningProblem) -> PlanReport:
    report, plan = plan_and_describe(case)
    assert report.fits == (plan is not None)
    return report


def apply_remedy(case: PlanningProblem, remedy: Remedy) -> PlanningProblem:
    """Return the problem with the remedy's options."""
    options = dict(zip(remedy.settings[::2], remedy.settings[1::2], strict=True))
    sharding: dict[str, Any] = {}
    for option, value in options.items():
        if option == "--ranks":
            case = replace(case, cluster=case.cluster.with_ranks(int(value)))
        elif option.startswith("--num-rows."):
            case = replace(case, workload=case.workload.with_rows({option.removeprefix("--num-rows."): int(value)}))
        else:
            sharding[option.removeprefix("--sharding.").replace("-", "_")] = (
                value.strip("[]").split(",") if "[" in value else value
            )
    config = replace(case.config, sharding=replace(case.config.sharding, **sharding))
    return replace(case, config=config)


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        ({"hbm_gb": 3.0}, ["fp16 weights", "large tables in host memory, cached on the GPU", "8 ranks on 2 hosts"]),
        (
            {"hbm_gb": 1.0, "ddr_gb": 2.4},
            ["fp16 weights, large tables in host memory, cached on the GPU", "16 ranks on 4 hosts"],
        ),
        ({"hbm_gb": 1.0, "ddr_gb": 0.1}, ["16 ranks on 4 hosts"]),
    ],
)
def test_each_remedy_makes_all_tables_fit(memory: dict[str, float], expected: list[str]) -> None:
    case = problem(replace(HOST, **memory))
    report = plan_report(case)
    assert not report.fits
    assert not report.tables
    assert not report.ranks
    *changes, fewer = report.remedies
    assert sorted(remedy.change for remedy in changes) == sorted(expected)
    assert fewer.change.endswith("% of the rows of item_id")
    for remedy in report.remedies:
        after = plan_report(apply_remedy(case, remedy))
        assert after.fits
        assert after.cost.total == pytest.approx(remedy.cost_ms)


def test_remedies_on_the_same_hardware_come_first_sorted_by_time() -> None:
    report = plan_report(problem(replace(HOST, hbm_gb=3.0)))
    (first, second, ranks, rows) = report.remedies
    assert first.cost_ms <= second.cost_ms
    assert ranks.settings[0] == "--ranks"
    assert rows.settings[0] == "--num-rows.item_id"


def test_fewer_rows_is_the_largest_share_that_fits() -> None:
    case = problem(replace(HOST, hbm_gb=3.0))
    remedy = plan_report(case).remedies[-1]
    rows = int(remedy.settings[1])
    assert plan_report(replace(case, workload=case.workload.with_rows({"item_id": rows}))).fits
    assert not plan_report(replace(case, workload=case.workload.with_rows({"item_id": rows + 60_000}))).fits


def test_unplaced_tables_are_the_fewest_largest() -> None:
    (item,) = plan_report(problem(replace(HOST, hbm_gb=2.0))).unplaced
    assert (item.table, item.memory) == ("item_id", "hbm")
    assert item.required == pytest.approx(60_000_000 * 33 * 4 / 4, rel=0.01)
    assert item.available == pytest.approx(1.6e9 - 21_000_000 * 33 * 4 / 4, rel=0.01)
    item, user = plan_report(problem(replace(HOST, hbm_gb=0.5))).unplaced
    assert (item.table, user.table) == ("item_id", "user_id")
    assert user.required > user.available


def test_names_the_memory_that_is_short() -> None:
    case = problem(replace(HOST, hbm_gb=1.0, ddr_gb=1.0), compute_kernels=["fused_uvm_caching"])
    assert {table.memory for table in plan_report(case).unplaced} == {"ddr"}
    case = problem(replace(cpu_cluster(), ddr_gb=3.0))
    report = plan_report(case)
    assert [(table.table, table.memory) for table in report.unplaced] == [("item_id", "ddr")]
    assert not any("GPU" in remedy.change for remedy in report.remedies)


def test_suggests_no_remedy_that_does_not_help() -> None:
    report = plan_report(problem(replace(HOST, hbm_gb=1e-5, ddr_gb=1e-5)))
    assert report.unplaced
    assert not [remedy for remedy in report.remedies if not plan_report(apply_remedy(problem(), remedy)).fits]
    assert "4,096" not in str(report.remedies)


def test_search_is_limited_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each plan takes a simulated second: the search ends within its limit and keeps what it has found."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(remedies, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    plan = remedies.make_plan

    def slow_plan(case: PlanningProblem) -> Plan:
        clock.now += 1.0
        return plan(case)

    monkeypatch.setattr(remedies, "make_plan", slow_plan)
    case = problem(replace(HOST, hbm_gb=3.0))
    with pytest.raises(InfeasiblePlanError) as failure:
        make_plan(case)
    counts = []
    for max_s in (0.5, 2.5, 3.5, 100.0):
        clock.now = 0.0
        search = RemedySearch(case, failure.value, plan_s=1.0, max_s=max_s, _start=0.0)
        unplaced = search.unplaced_tables()
        changes, is_complete = search.remedies(unplaced)
        assert [table.table for table in unplaced] == ["item_id"]
        assert clock.now <= max_s or max_s == 100.0
        assert is_complete == (max_s == 100.0)
        counts.append(len(changes))
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 4)


def test_a_search_needs_few_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    case = problem(replace(HOST, hbm_gb=3.0))
    plan, plans = remedies.make_plan, []
    monkeypatch.setattr(remedies, "make_plan", lambda case: (plans.append(case), plan(case))[1])
    assert len(plan_report(case).remedies) == 4
    assert len(plans) <= 8, "bisection from total memory, not from all rows"
