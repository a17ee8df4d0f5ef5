import re
from html.parser import HTMLParser

import pytest

from a2gen_rec.reporting.pages.plan.page import render_plan_page
from a2gen_rec.sharding.report import PlanReport
from tests.helpers.plans import infeasible_report, plan_report, renamed

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Text and tags of a page. Every tag must be closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "svg" and "aria-hidden" not in dict(attrs) and self.open.count("svg") == 1:
            assert dict(attrs)["role"] == "img"
            assert dict(attrs)["aria-label"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


SWEEP = [plan_report(512), infeasible_report(8), plan_report(64)]


@pytest.mark.parametrize(
    ("report", "sweep"),
    [
        (plan_report(8), []),
        (plan_report(512), SWEEP),
        (plan_report(32, 2, "cpu"), []),
        (infeasible_report(), SWEEP),
        (infeasible_report(), []),
    ],
)
def test_page_is_well_formed_and_self_contained(report: PlanReport, sweep: list[PlanReport]) -> None:
    html = render_plan_page(report, sweep)
    page = Page(html)
    assert page.tags.count("title") >= 1
    assert not re.search(r"https?:|//|url\(|@import|src=|href=", html)
    assert "script" not in page.tags


def test_page_shows_figures_of_a_feasible_plan() -> None:
    text = Page(render_plan_page(plan_report(64), [])).text
    assert "Fits on h200_8x8 64 ranks on 8 hosts, cuda · planned in 3.2 s" in text
    assert "9.49 ms estimated per step" in text
    assert "HBM, fullest rank 41% 48.8 GB of 120 GB" in text
    assert "item_id 10 billion 64 fp32 row_wise fused 64 2.56 TB 40.0 GB 1.31 GB 40,000" in text
    assert "column_wise fused 2 1.28 TB 0.288 too large" in text
    assert "row_wise fused 64 40.6 GB 0.144 ● chosen" in text
    assert "exchanged per target impression 2.73 kB ids 42 B, rows 1.34 kB, gradients 1.34 kB" in text
    assert "tag, rank 2: 46.5 MB" in text
    assert "slowest rank, forward comms: 3.30 ms" in text
    assert "Other numbers of ranks" not in text


def test_page_names_unplaced_tables_and_options() -> None:
    page = Page(render_plan_page(infeasible_report(), []))
    assert "Does not fit on h200_1x8" in page.text
    assert "item_id HBM 322 GB 111 GB 211 GB" in page.text
    assert "32 ranks --topology.ranks 32 7.89" in page.text
    assert "svg" not in page.tags


def test_sweep_is_sorted_by_ranks() -> None:
    text = Page(render_plan_page(infeasible_report(), SWEEP)).text
    lines = ["8 1 do not fit –", "64 8 fit 48.8 GB 41% 9.49 2.73 kB", "512 64 fit 6.18 GB 5%"]
    offsets = [text.index(line) for line in lines]
    assert offsets == sorted(offsets)
    assert text.count("8 64 512 ranks (log scale)") == 2


def test_names_are_escaped() -> None:
    name = '<script>alert("x")</script>&'
    for report in (renamed(plan_report(), {"item_id": name}), renamed(infeasible_report(), {"item_id": name})):
        html = render_plan_page(report, [])
        assert "<script" not in html
        assert name in Page(html).text
