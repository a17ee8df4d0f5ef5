"""What every benchmark shares: its options, interleaved timing, and its results as tables and as JSON.

A benchmark is a script with a dataclass of settings and a function that measures::

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

from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.utils import paths
from a2gen_rec.utils.distributed import DistributedContext, process_group
from a2gen_rec.utils.environment import collect_env
from a2gen_rec.utils.warning_filters import silence_known_warnings

Cell = str | int | float | None
Settings = TypeVar("Settings")

WRITTEN = ("benchmarks/results", "benchmarks/RESULTS.md")
"""What benchmarks write into the checkout."""


@dataclass
class ReportTable:
    """Rows to print; numbers as they are, units in the names of the columns."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    note: str = ""


@dataclass
class Goal:
    """A speed that the benchmark must show, and whether it did."""

    claim: str
    wanted: str
    measured: str
    met: bool


@dataclass
class Report:
    """What a benchmark found. ``figures`` are single numbers for programs, at the top level of the JSON."""

    tables: list[ReportTable]
    targets: list[Goal] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)


@dataclass
class Timing:
    """Seconds of the repeated runs of one form."""

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
    forms: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 2, device: torch.device | None = None
) -> dict[str, Timing]:
    """Time several forms in turn, A B C A B C …, so that a machine whose speed drifts treats them alike.

    Args:
        forms: name -> what to run once.
        warmup: rounds that are not counted, first.
        device: waited for before each clock reading, if it is CUDA.

    Raises:
        ConfigError: nothing is to be timed.
    """
    if repeats < 1:
        raise ConfigError(f"repeats {repeats} must be at least 1")
    wait = torch.cuda.synchronize if device is not None and device.type == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(warmup + repeats):
        for name, run in forms.items():
            wait()
            began = time.perf_counter()
            run()
            wait()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return {name: Timing(values) for name, values in seconds.items()}


def main(
    script: str,
    question: str | None,
    kind: type[Settings],
    quick: Mapping[str, Any],
    measure: Callable[[Settings, DistributedContext], Report],
) -> None:
    """Read the command line, measure, print, and write JSON. Under torchrun, all ranks measure and the first reports.

    What the user can mend ends with one line: exit code 1 for unusable input, 2 for unusable settings.

    Args:
        script: the benchmark's file; question: what it answers, in its first line.
        kind: dataclass of settings; ``quick``: values of some of them for ``--quick``.
    """
    silence_known_warnings()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else torch's profiler announces every start and stop
    name, question = Path(script).stem, (question or "").strip()
    try:
        options = _options(name, question, kind, quick)
        settings = kind(**{item.name: options[item.name] for item in fields(kind)})  # type: ignore[arg-type]
        if options.json:
            paths.ensure_writable_dir(paths.dirname(options.json))
        with process_group(options.device) as process:
            report = measure(settings, process)
        if not process.is_main:
            return
        console = Console(highlight=False)
        show(console if console.is_terminal else Console(highlight=False, width=120), question, report)
        if options.json:
            result = {
                "benchmark": name,
                "question": question,
                "command": command(name, process.world_size),
                "quick": options.quick,
                "ranks": process.world_size,
                "settings": asdict(settings),  # type: ignore[call-overload]
                "machine": collect_env(process.device, WRITTEN),
                **asdict(report),
                **report.figures,
            }
            paths.write_text(options.json, json.dumps(result, indent=1) + "\n")
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)


def _options(name: str, question: str, kind: type[Any], quick: Mapping[str, Any]) -> Namespace:
    parser = ArgumentParser(prog=f"{name}.py", description=question.partition("\n")[0], exit_on_error=False)
    parser.add_argument("--json", type=str, default="", help="also write the results to this file")
    parser.add_argument("--device", type=Literal["cpu", "cuda"], default="cpu", help="where to run")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, a minute at most")
    parser.add_class_arguments(kind)
    if "--quick" in sys.argv:
        parser.set_defaults(dict(quick))
    try:
        return parser.parse_args()
    except ArgumentError as error:
        raise ConfigError(str(error)) from error


def command(name: str, ranks: int) -> str:
    """How to measure the same again, from the checkout's folder."""
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--json")
    known.add_argument("--quick", action="append_const", const="--quick", default=[])
    known.add_argument("--device", default="cpu")
    given, others = known.parse_known_args(sys.argv[1:])
    shared = [*given.quick, *(["--device", given.device] if given.device != "cpu" else [])]
    if ranks == 1:
        return shlex.join(["a2gen", "benchmark", name, *shared, *(["--", *others] if others else [])])
    job = ["torchx", "run", "-s", "local_cwd", "torchx_apps/benchmark.py:benchmark", "--name", name]
    options = [*shared, *others]
    return shlex.join([*job, "--ranks", str(ranks), *(["--", *options] if options else [])])


def show(console: Console, question: str, report: Report) -> None:
    """Print a report."""
    console.print(f"[bold]{escape(question.splitlines()[0])}[/]")
    for table in report.tables:
        shown = RichTable(
            title=f"\n{escape(table.title)}",
            title_justify="left",
            caption=escape(table.note) or None,
            caption_justify="left",
            box=SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
        )
        for place, name in enumerate(table.columns):
            if numeric(table, place):
                widest = max(len(cell(row[place])) for row in table.rows)
                shown.add_column(escape(name), justify="right", overflow="fold", min_width=widest)
            else:
                shown.add_column(escape(name), overflow="fold")
        for row in table.rows:
            shown.add_row(*(escape(cell(value)) for value in row))
        console.print(shown)
    for target in report.targets:
        mark = "[green]met[/]" if target.met else "[red]missed[/]"
        outcome = f"{target.claim}: wanted {target.wanted}, measured {target.measured}"
        console.print(f"{mark}  {escape(outcome)}")


def numeric(table: ReportTable, place: int) -> bool:
    """Whether a column holds numbers."""
    return any(isinstance(row[place], int | float) for row in table.rows)


def cell(value: Cell) -> str:
    """A number with three significant digits or as many as it has before the point."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value
