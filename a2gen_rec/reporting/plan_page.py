"""A sharding plan as one HTML page that needs nothing else: no script, no file beside it, no network."""

import shlex
from collections.abc import Sequence
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from a2gen_rec.reporting import plan_drawings as drawings
from a2gen_rec.reporting import plan_figures as figures
from a2gen_rec.sharding.report import PlanReport

OPTIONS = 6


def render(report: PlanReport, sweep: Sequence[PlanReport]) -> str:
    """The page of a plan, or of why there is none.

    Args:
        sweep: the same tables on other numbers of ranks; may be empty.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"size": figures.size, "count": figures.count, "ms": figures.ms, "options": shlex.join}
    template = files(__package__).joinpath("plan.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        report=report,
        sweep=sorted(sweep, key=lambda planned: planned.world),
        figures=figures,
        drawings=drawings,
        most_options=OPTIONS,
    )
