from dataclasses import replace

from a2gen_rec.reporting import plan_summary
from a2gen_rec.sharding.report import Option, UnplacedTable
from tests.helpers.plans import plan_report


def test_imbalance() -> None:
    assert plan_summary.imbalance([1.0, 1.0, 4.0]) == 2.0
    assert plan_summary.imbalance([0.0, 0.0]) == 1.0


def test_alternatives_include_an_expensive_choice() -> None:
    table = plan_report().tables[0]
    most_expensive = table.options[-1]
    options = plan_summary.alternatives(replace(table, chosen=most_expensive), max_options=3)
    assert options == [table.options[0], table.options[1], most_expensive]
    assert plan_summary.alternatives(table, max_options=3) == table.options[:3]


def test_combines_only_tables_that_lack_the_same_memory() -> None:
    item, user = UnplacedTable("item_id", 90, 100), UnplacedTable("user_id", 30, 100)
    assert plan_summary.combined_unplaced([item, user]) == [UnplacedTable("together", 120, 100)]
    assert (
        plan_summary.combined_unplaced([item])
        == plan_summary.combined_unplaced([item, replace(user, memory="ddr")])
        == []
    )


def test_too_large_refers_to_an_empty_rank() -> None:
    report = plan_report()
    rank = report.ranks[0]
    option: Option = replace(report.tables[0].chosen, hbm=rank.hbm_free, ddr=rank.ddr_free)
    assert not plan_summary.is_too_large(option, report)
    assert plan_summary.is_too_large(replace(option, hbm=rank.hbm_free + 1), report)
    assert plan_summary.is_too_large(replace(option, ddr=rank.ddr_free + 1), report)
