"""Results of a backtest as one self-contained HTML page, as Markdown with charts and as JSON."""

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np

from a2gen_rec.experiments.backtest.advice import advice, advised_policy
from a2gen_rec.experiments.backtest.comparison import BacktestComparison
from a2gen_rec.experiments.backtest.runner import Backtest
from a2gen_rec.reporting import charts
from a2gen_rec.reporting.formatting import plural
from a2gen_rec.reporting.pages import templates
from a2gen_rec.reporting.pages.backtest.sections import backtest_sections
from a2gen_rec.reporting.pages.section import Section
from a2gen_rec.utils import paths

PAGE, MARKDOWN, RESULTS = "report.html", "report.md", "results.json"


def write_backtest_report(backtest: Backtest, comparison: BacktestComparison, markdown: str = "") -> list[str]:
    """Write the report of a backtest.

    Args:
        backtest: The backtest.
        comparison: Comparison of its policies.
        markdown: Markdown file; by default ``report.md`` in the backtest. Its charts are in a directory with its name.

    Returns:
        Paths of ``report.html``, the Markdown, and ``results.json``.
    """
    days, machine, sections = backtest.log.days, backtest.machine, backtest_sections(comparison)
    page: dict[str, Any] = {
        "title": f"{backtest.log.source}, day by day",
        "about": [
            f"{days[0]} to {days[-1]} ({plural(len(days), 'day')})",
            f"{machine['cpu']}, {plural(machine['cores'], 'core')}, {machine['date']}",
            f"commit {machine['commit'] or 'unknown'}",
        ],
        "command": backtest.command,
        "sections": sections,
    }
    html, results = (paths.join(backtest.out, name) for name in (PAGE, RESULTS))
    markdown = markdown or paths.join(backtest.out, MARKDOWN)
    chart_dir = markdown.removesuffix(".md") if markdown.endswith(".md") else f"{markdown}-charts"
    for directory in (paths.dirname(markdown), chart_dir):
        paths.ensure_writable_dir(directory)

    def chart_name(section: Section) -> str:
        return section.title.lower().replace(" ", "-")

    for section in sections:
        for number, (figure, _) in enumerate(section.charts, 1):
            file = paths.join(chart_dir, f"{chart_name(section)}-{number}.svg")
            paths.write_text(file, charts.to_standalone_svg(figure))
    content = {
        "advice": advice(comparison),
        "advised_policy": None if (advised := advised_policy(comparison)) is None else advised.name,
        "command": backtest.command,
        "machine": machine,
        **_to_json(asdict(comparison)),
    }
    heading = {"kind": "Backtest", "heading": page["title"]}
    paths.write_text(html, templates.render("sections.html.j2", charts=charts, **heading, **page))
    folder = chart_dir.rpartition("/")[2]
    text = templates.render(
        "sections.md.j2", chart_path=lambda section: f"{folder}/{chart_name(section)}", is_generated=True, **page
    )
    paths.write_text(markdown, text)
    paths.write_text(results, json.dumps(content, indent=1) + "\n")
    return [html, markdown, results]


def _to_json(value: Any) -> Any:
    """Return plain data: of resamples only the value without resampling; None for NaN."""
    if isinstance(value, np.ndarray):
        value = float(value[0])
    if isinstance(value, dict):
        return {str(key): _to_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
