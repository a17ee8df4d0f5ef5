from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2gen_rec.reporting.pages.plan import charts
from a2gen_rec.sharding.report import Cost, Shard
from tests.helpers.plans import infeasible_report, plan_report

COLORS = {5: "q0", 10**6: "q0", 10**9: "q3"}


@given(st.lists(st.sampled_from([0, *COLORS]), min_size=1, max_size=200))
def test_placement_colors_each_rank_by_its_bytes(rank_bytes: list[int]) -> None:
    world_size = len(rank_bytes)
    zero = Cost(0.0, 0.0, 0.0, 0.0)
    shards = [Shard(rank, (0, 1), (0, 1), bytes_, 0, zero) for rank, bytes_ in enumerate(rank_bytes)]
    bars = charts.placement_row(replace(plan_report().tables[0], shards=shards), world_size).bars
    for rank, bytes_ in enumerate(rank_bytes):
        middle = (rank + 0.5) / world_size * 100
        over = [bar.style.split()[0] for bar in bars if bar.x <= middle <= bar.x + bar.width]
        assert over == ([COLORS[bytes_]] if bytes_ else [])


def test_shards_on_one_rank_are_summed() -> None:
    table = plan_report().tables[2]
    twice = replace(table, shards=table.shards * 2)
    assert charts.placement_row(twice, 64).bars[0].title == "tag, rank 2: 93.0 MB"


@pytest.mark.parametrize("world_size", [8, 512])
def test_memory_bars_have_the_height_of_their_bytes(world_size: int) -> None:
    report = plan_report(world_size)
    bars = charts.memory_chart(report, "hbm").bars
    max_bytes = max(max(rank.hbm, rank.hbm_free) for rank in report.ranks)
    for rank in report.ranks:
        middle = (rank.rank + 0.5) / world_size * 100
        free, used = (bar for bar in bars if bar.x <= middle <= bar.x + bar.width)
        assert (free.style, used.style) == ("free", "used")
        assert free.height == pytest.approx(rank.hbm_free / max_bytes * charts.HEIGHT)
        assert used.height == pytest.approx(rank.hbm / max_bytes * charts.HEIGHT)
        assert used.y + used.height == pytest.approx(charts.HEIGHT)


def test_equal_neighbours_share_a_bar_with_many_ranks() -> None:
    few, many = (charts.memory_chart(plan_report(world_size), "hbm").bars for world_size in (64, 512))
    assert len(few) == 2 * 64
    assert len(many) < 20


def test_cost_parts_are_stacked() -> None:
    report = plan_report()
    rows = charts.time_rows(report)
    assert [row.name for row in rows] == ["item_id", "user_id", "tag", "action", "slowest rank"]
    for row, cost in zip(rows, [*(table.chosen.cost for table in report.tables), report.cost], strict=True):
        assert [bar.style for bar in row.bars] == charts.COST_PARTS[:4]
        end = 0.0
        for bar in row.bars:
            assert bar.x == pytest.approx(end)
            assert bar.width == pytest.approx(getattr(cost, bar.style) / report.cost.total * 100)
            end += bar.width


@given(st.floats(1e-6, 1e6))
def test_axis_ticks_are_round_and_cover_the_values(max_value: float) -> None:
    ends = charts._axis(max_value)
    assert 3 <= len(ends) <= 6
    assert ends[0] == 0
    assert 0.6 * max_value <= ends[-1] <= max_value * 1.0001
    assert f"{ends[1]:.3e}"[:5] in ("1.000", "2.000", "5.000")


def test_sweep_marks_feasible_and_infeasible_numbers_of_ranks() -> None:
    memory, time = charts.sweep_charts([infeasible_report(8), plan_report(64), plan_report(512)])
    assert [curve.name for curve in memory.curves] == ["HBM, fullest rank", "HBM, free"]
    fullest, free = memory.curves
    assert [dot.title for dot in fullest.dots] == [
        "HBM, fullest rank, 64 ranks: 48.8 GB",
        "HBM, fullest rank, 512 ranks: 6.18 GB",
    ]
    assert [dot.y for dot in free.dots] == pytest.approx([(1 - 1 / 1.1) * charts.HEIGHT] * 2)
    assert fullest.dots[0].y == pytest.approx((1 - 48.84 / 132) * charts.HEIGHT, abs=0.1)
    for chart in (memory, time):
        assert [cross.title for cross in chart.crosses] == ["8 ranks: does not fit"]
        assert [tick.text for tick in chart.x_ticks] == ["8", "64", "512"]
        left, middle, right = (tick.position for tick in chart.x_ticks)
        assert middle - left == pytest.approx(right - middle)
        assert chart.crosses[0].x == left


def test_draws_a_sweep_of_one_or_no_feasible_plan() -> None:
    for reports in ([plan_report()], [infeasible_report()]):
        memory, time = charts.sweep_charts(reports)
        assert len(memory.x_ticks) == len(time.x_ticks) == 1
