"""What every benchmark shares: its options, interleaved timing, and its results as tables and as JSON.

A benchmark is a script with a dataclass of settings and a function that measures::

    if __name__ == "__main__":
        main(__file__, __doc__, Settings, QUICK, measure)
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jsonargparse import ArgumentParser
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

from a2gen_rec import paths
from a2gen_rec.quiet import quiet
from a2gen_rec.training.process import Process, process_group

Cell = str | int | float | None
Settings = TypeVar("Settings")


@dataclass
class Table:
    """Rows to print; numbers as they are, units in the names of the columns."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    note: str = ""


@dataclass
class Target:
    """A speed that the benchmark must show, and whether it did."""

    claim: str
    wanted: str
    measured: str
    met: bool


@dataclass
class Report:
    """What a benchmark found. ``figures`` are single numbers for programs, at the top level of the JSON."""

    tables: list[Table]
    targets: list[Target] = field(default_factory=list)
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
    """
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
    measure: Callable[[Settings, Process], Report],
) -> None:
    """Read the command line, measure, print, and write JSON. Under torchrun, all ranks measure and the first reports.

    Args:
        script: the benchmark's file; question: what it answers, in its first line.
        kind: dataclass of settings; ``quick``: values of some of them for ``--quick``.
    """
    quiet()
    question = (question or "").strip()
    parser = ArgumentParser(prog=Path(script).name, description=question.splitlines()[0])
    parser.add_argument("--json", type=str, default="", help="also write the results to this file")
    parser.add_argument("--device", type=Literal["cpu", "cuda"], default="cpu", help="where to run")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, a minute at most")
    parser.add_class_arguments(kind)
    if "--quick" in sys.argv:
        parser.set_defaults(dict(quick))
    options = parser.parse_args()
    settings = kind(**{item.name: options[item.name] for item in fields(kind)})  # type: ignore[arg-type]
    with process_group(options.device) as process:
        report = measure(settings, process)
        leads, device = process.leads, process.device
    if leads:
        console = Console(highlight=False)
        show(console if console.is_terminal else Console(highlight=False, width=120), question, report)
        if options.json:
            result = {
                "benchmark": Path(script).stem,
                "question": question,
                "quick": options.quick,
                "settings": asdict(settings),  # type: ignore[call-overload]
                "machine": machine(device),
                **asdict(report),
                **report.figures,
            }
            paths.make_folder(paths.parent(options.json))
            paths.write_text(options.json, json.dumps(result, indent=1) + "\n")


def show(console: Console, question: str, report: Report) -> None:
    """Print a report."""
    console.print(f"[bold]{question.splitlines()[0]}[/]")
    for table in report.tables:
        shown = RichTable(
            title=f"\n{table.title}",
            title_justify="left",
            caption=table.note or None,
            caption_justify="left",
            box=SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
        )
        for place, name in enumerate(table.columns):
            number = any(isinstance(row[place], int | float) for row in table.rows)
            shown.add_column(name, justify="right" if number else "left")
        for row in table.rows:
            shown.add_row(*map(cell, row))
        console.print(shown)
    for target in report.targets:
        mark = "[green]met[/]" if target.met else "[red]missed[/]"
        console.print(f"{mark}  {target.claim}: wanted {target.wanted}, measured {target.measured}")


def cell(value: Cell) -> str:
    """A number with three significant digits or as many as it has before the point."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what the figures were made."""
    import fbgemm_gpu
    import torchrec

    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchrec": torchrec.__version__,
        "fbgemm_gpu": fbgemm_gpu.__version__,
    }


def commit() -> str:
    """The checkout's commit, marked where files differ from it; empty outside one."""
    folder = Path(__file__).parent
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"], cwd=folder, capture_output=True, text=True
    )
    return found.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
