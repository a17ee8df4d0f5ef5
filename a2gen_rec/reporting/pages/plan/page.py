"""A sharding plan as one self-contained HTML page: no script, no further file, no network."""

import shlex
from collections.abc import Callable, Sequence

from a2gen_rec.reporting import formatting, plan_summary
from a2gen_rec.reporting.pages import templates
from a2gen_rec.reporting.pages.plan import charts
from a2gen_rec.sharding.report import PlanReport

MAX_OPTIONS = 6


def render_plan_page(report: PlanReport, sweep: Sequence[PlanReport]) -> str:
    """Return the HTML page of a plan, or of the tables that do not fit.

    Args:
        report: The plan.
        sweep: Plans of the same tables on other numbers of ranks; may be empty.
    """
    filters: dict[str, Callable[..., str]] = {
        "bytes": formatting.format_bytes,
        "count": formatting.format_count,
        "ms": formatting.format_ms,
        "options": shlex.join,
    }
    return templates.render(
        "plan/page.html.j2",
        filters,
        report=report,
        sweep=sorted(sweep, key=lambda plan: plan.world_size),
        format=formatting,
        summary=plan_summary,
        charts=charts,
        max_options=MAX_OPTIONS,
    )
