"""Results of a backtest as one self-contained HTML page and as JSON."""

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
from a2gen_rec.utils import paths

PAGE, RESULTS = "report.html", "results.json"


def write_backtest_report(backtest: Backtest, comparison: BacktestComparison) -> list[str]:
    """Write ``report.html`` and ``results.json`` of a backtest and return their paths."""
    days = backtest.log.days
    machine = backtest.machine
    page = templates.render(
        "sections.html.j2",
        title=f"Backtest: {backtest.log.source}",
        kind="Backtest",
        heading=f"{backtest.log.source}, day by day",
        about=[
            f"{days[0]} to {days[-1]} ({plural(len(days), 'day')})",
            f"{machine['cpu']}, {plural(machine['cores'], 'core')}, {machine['date']}",
            f"commit {machine['commit'] or 'unknown'}",
        ],
        command=backtest.command,
        sections=backtest_sections(comparison),
        charts=charts,
    )
    results = {
        "advice": advice(comparison),
        "advised_policy": advised_policy(comparison).name,
        "command": backtest.command,
        "machine": machine,
        **_to_json(asdict(comparison)),
    }
    files = [paths.join(backtest.out, name) for name in (PAGE, RESULTS)]
    for file, text in zip(files, (page, json.dumps(results, indent=1) + "\n"), strict=True):
        paths.write_text(file, text)
    return files


def _to_json(value: Any) -> Any:
    """Return plain data: of resamples only the value without resampling; None for NaN."""
    if isinstance(value, np.ndarray):
        value = float(value[0])
    if isinstance(value, dict):
        return {str(key): _to_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
