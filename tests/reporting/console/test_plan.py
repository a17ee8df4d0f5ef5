import io
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from a2gen_rec.reporting.console.plan import print_comparison, print_plan, print_sweep
from tests.helpers.plans import GB, infeasible_report, plan_report, renamed


def printed(print_to: Callable[[Console], None], width: int = 100) -> str:
    out = io.StringIO()
    print_to(Console(file=out, width=width, highlight=False))
    return out.getvalue()


def characters(text: str) -> Counter[str]:
    """Characters of a text, independent of line breaks."""
    return Counter("".join(text.split()).replace("─", ""))


def rows(text: str, name: str) -> list[str]:
    """Lines that start with ``name``, with runs of spaces collapsed."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return [line for line in lines if line.startswith(f"{name} ")]


def test_prints_a_feasible_plan() -> None:
    report = plan_report()
    text = printed(lambda console: print_plan(console, report))
    assert text.splitlines()[0] == "fits on h200_8x8: 64 ranks on 8 hosts, cuda"
    placement, memory, cost, options = rows(text, "item_id")
    assert placement == "item_id 10 billion 64 fp32 row_wise fused 64"
    assert memory == "item_id 2.56 TB 40.0 GB 1.31 GB 40.6 GB 40,000"
    assert cost == "item_id 0.013 0.050 0.025 0.056 0.144"
    assert options == "item_id row_wise, fused 64 40.6 GB 0.144 chosen"
    assert rows(text, "column_wise, fused")[0] == "column_wise, fused 2 1.28 TB 0.288 too large"
    assert rows(text, "table_row_wise, fused_uvm_caching")[0].endswith("0.575 4.00")
    assert rows(text, "5.25") == ["5.25 2.73 kB 42 B 1.34 kB 1.34 kB"]
    assert rows(text, "slowest rank") == ["slowest rank 0.825 3.30 1.65 3.71 9.49"]


def test_prefetch_column_is_optional() -> None:
    report = plan_report()
    assert "prefetch" not in printed(lambda console: print_plan(console, report))
    first, *others = report.tables
    cached = replace(first, chosen=replace(first.chosen, cost=replace(first.chosen.cost, prefetch=0.5)))
    text = printed(lambda console: print_plan(console, replace(report, tables=[cached, *others])))
    assert rows(text, "item_id")[2] == "item_id 0.500 0.013 0.050 0.025 0.056 0.644"


def test_lists_each_of_few_ranks() -> None:
    report = plan_report(world_size=16, device="cpu")
    text = printed(lambda console: print_plan(console, report))
    assert [int(line.split()[0]) for line in text.splitlines() if "400 GB" in line] == list(range(16))
    assert "195 GB 400 GB 49%" in rows(text, "9 1")[0]
    assert "HBM" not in text


def test_summarizes_many_ranks_and_names_extremes() -> None:
    report = plan_report(world_size=512)
    ranks = list(report.ranks)
    ranks[301] = replace(ranks[301], cost=replace(ranks[301].cost, forward_comms=50.0))
    ranks[17] = replace(ranks[17], hbm=119 * GB)
    text = printed(lambda console: print_plan(console, replace(report, ranks=ranks)))
    assert rows(text, "slowest: rank 301, host 37")[0].endswith("50.0")
    assert "119 GB 120 GB 99%" in rows(text, "fullest: rank 17, host 2")[0]
    assert "119 GB 120 GB 99% 50.0" in rows(text, "max")[0]
    equal = replace(report, ranks=[report.ranks[0]] * 512)
    assert "rank 0" not in printed(lambda console: print_plan(console, equal))


def test_lists_unplaced_tables_and_suggested_changes() -> None:
    text = printed(lambda console: print_plan(console, infeasible_report()), width=120)
    assert text.splitlines()[0] == "does not fit on h200_1x8: 8 ranks on 1 host, cuda"
    assert rows(text, "item_id")[0] == "item_id HBM 322 GB 111 GB 211 GB"
    assert rows(text, "user_id")[0] == "user_id HBM 64.0 GB 111 GB –"
    assert rows(text, "together") == ["together HBM 386 GB 111 GB 275 GB"]
    assert rows(text, "32 ranks") == ["32 ranks --topology.ranks 32 7.89"]
    assert "--sharding.compute-kernels '[fused, fused_uvm_caching]'" in text
    assert rows(text, "--sharding.dtype") == ["--sharding.dtype fp16"]
    none = printed(lambda console: print_plan(console, replace(infeasible_report(), remedies=[])))
    assert "no change was found" in none


def test_sweep_has_one_line_per_number_of_ranks() -> None:
    text = printed(lambda console: print_sweep(console, [infeasible_report(), plan_report(64), plan_report(512)]))
    assert rows(text, "8") == ["8 1 does not fit – – – –"]
    assert rows(text, "64") == ["64 8 fits 48.8 GB 41% 9.49 2.73 kB"]
    assert rows(text, "512")[0].startswith("512 64 fits 6.18 GB 5%")


def test_compares_two_plans_side_by_side() -> None:
    other = renamed(plan_report(512), {"action": "music"})
    text = printed(lambda console: print_comparison(console, plan_report(64), other))
    assert text.splitlines()[:2] == [
        "A: fits on h200_8x8: 64 ranks on 8 hosts, cuda",
        "B: fits on h200_64x8: 512 ranks on 64 hosts, cuda",
    ]
    assert rows(text, "HBM") == ["HBM 48.8 GB · 41% 6.18 GB · 5%"]
    assert rows(text, "item_id") == ["item_id row_wise, fused 64 0.144 row_wise, fused 512 0.018"]
    assert rows(text, "action") == ["action table_wise, fused 1 0.002 – – –"]
    assert rows(text, "music") == ["music – – – table_wise, fused 1 0.002"]


def test_compares_a_plan_with_an_infeasible_one() -> None:
    text = printed(lambda console: print_comparison(console, plan_report(), infeasible_report()))
    assert rows(text, "item_id") == ["item_id row_wise, fused 64 0.144 – – –"]


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_terminal_without_truncation(width: int) -> None:
    sweep = [infeasible_report(), plan_report(64), plan_report(512)]
    for print_to in (
        lambda console: print_plan(console, plan_report(8)),
        lambda console: print_plan(console, plan_report(512)),
        lambda console: print_plan(console, infeasible_report()),
        lambda console: print_sweep(console, sweep),
        lambda console: print_comparison(console, plan_report(64), plan_report(512)),
    ):
        text = printed(print_to, width)
        assert max(len(line.rstrip()) for line in text.splitlines()) <= width
        assert characters(text) == characters(printed(print_to, width=400))


def test_names_are_not_parsed_as_markup() -> None:
    names = {"item_id": "[red]item[/red]"}
    assert printed(lambda console: print_plan(console, renamed(plan_report(), names))).count("[red]item[/red]") == 4
    assert "[red]item[/red]" in printed(lambda console: print_plan(console, renamed(infeasible_report(), names)))
