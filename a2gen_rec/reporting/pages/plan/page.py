"""A sharding plan as one HTML page that needs nothing else: no script, no file beside it, no network."""

import shlex
from collections.abc import Sequence

from a2gen_rec.reporting import formatting as figures
from a2gen_rec.reporting.pages import templates
from a2gen_rec.reporting.pages.plan import charts as drawings
from a2gen_rec.sharding.report import PlanReport

MAX_OPTIONS = 6


def render_plan_page(report: PlanReport, sweep: Sequence[PlanReport]) -> str:
    """The page of a plan, or of why there is none.

    Args:
        sweep: the same tables on other numbers of ranks; may be empty.
    """
    return templates.render(
        "plan/page.html.j2",
        {"size": figures.format_bytes, "count": figures.format_count, "ms": figures.format_ms, "options": shlex.join},
        report=report,
        sweep=sorted(sweep, key=lambda planned: planned.world),
        figures=figures,
        drawings=drawings,
        most_options=MAX_OPTIONS,
    )
