from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2gen_rec.reporting import formatting as figures
from a2gen_rec.sharding.report import Option, UnplacedTable
from tests.helpers.plans import plan_report

BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15}


@given(st.integers(1, 10**17))
def test_size_is_read_back_to_three_digits(number: int) -> None:
    text = figures.format_bytes(number)
    value, unit = text.split()
    assert float(value.replace(",", "")) * BYTES[unit] == pytest.approx(number, rel=0.0051)
    assert len(text) <= 7


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (8, "8"), (12_345, "12,345"), (1_500_000, "1.5 million"), (10**10, "10 billion"), (5.25, "5.25")],
)
def test_count(number: float, text: str) -> None:
    assert figures.format_count(number) == text


@pytest.mark.parametrize(
    ("milliseconds", "text"), [(0.0, "0"), (0.0001, "<0.001"), (0.0234, "0.023"), (5.629, "5.63"), (1234.5, "1,234")]
)
def test_ms(milliseconds: float, text: str) -> None:
    assert figures.format_ms(milliseconds) == text


def test_imbalance() -> None:
    assert figures.imbalance([1.0, 1.0, 4.0]) == 2.0
    assert figures.imbalance([0.0, 0.0]) == 1.0


def test_the_choice_is_among_its_alternatives_however_dear() -> None:
    table = plan_report().tables[0]
    dearest = table.options[-1]
    shown = figures.alternatives(replace(table, chosen=dearest), most=3)
    assert shown == [table.options[0], table.options[1], dearest]
    assert figures.alternatives(table, most=3) == table.options[:3]


def test_only_tables_short_of_the_same_memory_are_added_up() -> None:
    item, user = UnplacedTable("item_id", 90, 100), UnplacedTable("user_id", 30, 100)
    assert figures.join_misfits([item, user]) == [UnplacedTable("together", 120, 100)]
    assert figures.join_misfits([item]) == figures.join_misfits([item, replace(user, memory="ddr")]) == []


def test_too_large_means_for_an_empty_rank() -> None:
    report = plan_report()
    has = report.ranks[0]
    option: Option = replace(report.tables[0].chosen, hbm=has.hbm_free, ddr=has.ddr_free)
    assert not figures.is_too_large(option, report)
    assert figures.is_too_large(replace(option, hbm=has.hbm_free + 1), report)
    assert figures.is_too_large(replace(option, ddr=has.ddr_free + 1), report)
