"""Shared benchmark harness: command-line options, interleaved timing, and results as tables and JSON.

A benchmark is a script with a settings dataclass and a measuring function::

    if __name__ == "__main__":
        main(__file__, __doc__, Settings, QUICK, measure)
"""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from a2gen_rec.config.parser_errors import parser_error_text
from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.utils import paths
from a2gen_rec.utils.distributed import DistributedContext, process_group
from a2gen_rec.utils.environment import collect_env
from a2gen_rec.utils.warning_filters import silence_known_warnings

CellValue = str | int | float | None
Settings = TypeVar("Settings")

GENERATED_PATHS = ("benchmarks/results", "benchmarks/RESULTS.md")
"""Paths of the checkout that benchmarks write."""


@dataclass
class ReportTable:
    """Table of unrounded numbers, with units in the column names."""

    title: str
    columns: list[str]
    rows: list[list[CellValue]]
    note: str = ""


@dataclass
class Goal:
    """Required result of a benchmark, and whether the measurement met it."""

    claim: str
    required: str
    measured: str
    met: bool


@dataclass
class Report:
    """Results of a benchmark. ``metrics`` are single numbers for programs, also at the top level of the JSON."""

    tables: list[ReportTable]
    goals: list[Goal] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Timing:
    """Seconds of the repeated runs of one variant."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return self.percentile(50)

    @property
    def p10(self) -> float:
        return self.percentile(10)

    @property
    def p90(self) -> float:
        return self.percentile(90)

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.seconds, q))


def interleave(
    variants: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 2, device: torch.device | None = None
) -> dict[str, Timing]:
    """Time several variants in turn, A B C A B C …, so that drift of the machine's speed affects all equally.

    Args:
        variants: name -> callable of one run.
        repeats: timed rounds.
        warmup: untimed rounds before them.
        device: CUDA device to synchronize before each clock reading.

    Raises:
        ConfigError: ``repeats`` is below 1.
    """
    if repeats < 1:
        raise ConfigError(f"repeats {repeats} must be at least 1")
    synchronize = torch.cuda.synchronize if device is not None and device.type == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_index in range(warmup + repeats):
        for name, run in variants.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            if round_index >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(values) for name, values in seconds.items()}


def main(
    script: str,
    question: str | None,
    settings_type: type[Settings],
    quick: Mapping[str, Any],
    measure: Callable[[Settings, DistributedContext], Report],
) -> None:
    """Parse the command line, measure, print, and write JSON. Under torchrun, all ranks measure and rank 0 reports.

    A user error prints one line and exits with code 1 for invalid input, 2 for invalid settings.

    Args:
        script: file of the benchmark.
        question: docstring of the benchmark; its first line is the question.
        settings_type: dataclass of settings.
        quick: settings that ``--quick`` overrides.
        measure: function that runs the benchmark.
    """
    silence_known_warnings()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # silences the start and stop messages of torch's profiler
    name, question = Path(script).stem, (question or "").strip()
    try:
        options = _parse_options(name, question, settings_type, quick)
        settings = settings_type(**{item.name: options[item.name] for item in fields(settings_type)})  # type: ignore[arg-type]
        if options.json:
            paths.ensure_writable_dir(paths.dirname(options.json))
        with process_group(options.device) as process:
            report = measure(settings, process)
        if not process.is_main:
            return
        console = Console(highlight=False)
        print_report(console if console.is_terminal else Console(highlight=False, width=120), question, report)
        if options.json:
            result = {
                "benchmark": name,
                "question": question,
                "command": rerun_command(name, process.world_size),
                "quick": options.quick,
                "ranks": process.world_size,
                "settings": asdict(settings),  # type: ignore[call-overload]
                "machine": collect_env(process.device, GENERATED_PATHS),
                **asdict(report),
                **report.metrics,
            }
            paths.write_text(options.json, json.dumps(result, indent=1) + "\n")
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)


def _parse_options(name: str, question: str, settings_type: type[Any], quick: Mapping[str, Any]) -> Namespace:
    parser = ArgumentParser(prog=f"{name}.py", description=question.partition("\n")[0], exit_on_error=False)
    parser.add_argument("--json", type=str, default="", help="also write the results to this file")
    parser.add_argument("--device", type=Literal["cpu", "cuda"], default="cpu", help="device to run on")
    parser.add_argument("--quick", action="store_true", help="reduced sizes; takes at most a minute")
    parser.add_class_arguments(settings_type)
    if "--quick" in sys.argv:
        parser.set_defaults(dict(quick))
    try:
        return parser.parse_args()
    except ArgumentError as error:
        raise ConfigError(parser_error_text(error)) from error


def rerun_command(name: str, ranks: int) -> str:
    """Return the command that repeats the measurement, run from the checkout's directory."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json")
    parser.add_argument("--quick", action="append_const", const="--quick", default=[])
    parser.add_argument("--device", default="cpu")
    options, settings = parser.parse_known_args(sys.argv[1:])
    shared = [*options.quick, *(["--device", options.device] if options.device != "cpu" else [])]
    if ranks == 1:
        return shlex.join(["a2gen", "benchmark", name, *shared, *(["--", *settings] if settings else [])])
    job = ["torchx", "run", "-s", "local_cwd", "torchx_apps/benchmark.py:benchmark", "--name", name]
    arguments = [*shared, *settings]
    return shlex.join([*job, "--ranks", str(ranks), *(["--", *arguments] if arguments else [])])


def print_report(console: Console, question: str, report: Report) -> None:
    """Print a report to a console."""
    console.print(f"[bold]{escape(question.splitlines()[0])}[/]")
    for table in report.tables:
        rich_table = RichTable(
            title=f"\n{escape(table.title)}",
            title_justify="left",
            caption=escape(table.note) or None,
            caption_justify="left",
            box=SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
        )
        for column, name in enumerate(table.columns):
            if is_numeric(table, column):
                width = max(len(format_cell(row[column])) for row in table.rows)
                rich_table.add_column(escape(name), justify="right", overflow="fold", min_width=width)
            else:
                rich_table.add_column(escape(name), overflow="fold")
        for row in table.rows:
            rich_table.add_row(*(escape(format_cell(value)) for value in row))
        console.print(rich_table)
    for goal in report.goals:
        mark = "[green]met[/]" if goal.met else "[red]missed[/]"
        outcome = f"{goal.claim}: required {goal.required}, measured {goal.measured}"
        console.print(f"{mark}  {escape(outcome)}")


def is_numeric(table: ReportTable, column: int) -> bool:
    """Return whether a column contains numbers."""
    return any(isinstance(row[column], int | float) for row in table.rows)


def format_cell(value: CellValue) -> str:
    """Format a number with three significant digits, or all digits before the decimal point."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value
