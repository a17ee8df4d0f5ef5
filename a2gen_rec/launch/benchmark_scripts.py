"""Benchmarks of the source checkout, each run as a separate program (``a2gen benchmark``)."""

import ast
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.utils import paths

BENCHMARKS_DIR = Path(__file__).parents[2] / "benchmarks"
NOT_BENCHMARKS = (
    f"no benchmarks in {BENCHMARKS_DIR}: they come with the source checkout, not with the installed package"
)


def list_benchmarks() -> dict[str, str]:
    """Return name -> question of every benchmark, in alphabetical order; empty outside a checkout.

    A benchmark is a script that defines ``measure``; its question is the first line of its docstring. No script is
    imported.
    """
    questions = {}
    for file in sorted(BENCHMARKS_DIR.glob("*.py")):
        module = ast.parse(file.read_text(encoding="utf-8"), file.name)
        if any(isinstance(node, ast.FunctionDef) and node.name == "measure" for node in module.body):
            questions[file.stem] = (ast.get_docstring(module) or "").partition("\n")[0]
    return questions


def script_path(name: str) -> Path:
    """Return the script of a benchmark.

    Raises:
        UserError: This is not a checkout.
        ConfigError: The benchmark is unknown.
    """
    known = list_benchmarks()
    if not known:
        raise UserError(NOT_BENCHMARKS)
    if name not in known:
        raise ConfigError(f"unknown benchmark {name!r}; choose one of {', '.join(known)}")
    return BENCHMARKS_DIR / f"{name}.py"


def run_benchmark(name: str, out: str, quick: bool, device: str, options: Sequence[str]) -> int:
    """Run one benchmark and return its exit code. It prints its tables and writes JSON into the directory ``out``.

    Args:
        options: Arguments of the benchmark itself.

    Raises:
        UserError: This is not a checkout, or ``out`` is not writable.
        ConfigError: The benchmark is unknown.
    """
    script = script_path(name)
    paths.ensure_writable_dir(out)
    # Results on GPU are kept next to those on CPU.
    result = f"{name}.json" if device == "cpu" else f"{name}-{device}.json"
    shared = ["--device", device, "--json", paths.join(out, result), *(["--quick"] if quick else [])]
    return subprocess.run([sys.executable, str(script), *shared, *options]).returncode


def run_all_benchmarks(out: str, quick: bool, device: str) -> None:
    """Run every benchmark in turn, then write ``RESULTS.md`` for all results in the directory ``out``.

    Raises:
        UserError: This is not a checkout, ``out`` is not writable, or a benchmark failed; the others are still run.
    """
    names = list(list_benchmarks())
    if not names:
        raise UserError(NOT_BENCHMARKS)
    paths.ensure_writable_dir(out)
    failed = []
    start_time = time.monotonic()
    for index, name in enumerate(names, start=1):
        print(f"\n[{index}/{len(names)}] {name}", flush=True)
        started = time.monotonic()
        code = run_benchmark(name, out, quick, device, ())
        print(
            f"{name}: {f'failed with exit code {code}' if code else 'done'} in {_format_elapsed(started)}", flush=True
        )
        if code:
            failed.append(name)
    print(f"\n{len(names) - len(failed)} of {len(names)} benchmarks done in {_format_elapsed(start_time)}", flush=True)
    if (
        len(failed) < len(names)
        and subprocess.run([sys.executable, str(BENCHMARKS_DIR / "results.py"), out]).returncode
    ):
        failed.append("results.py")
    if failed:
        raise UserError(f"failed: {', '.join(failed)}")


def _format_elapsed(since: float) -> str:
    minutes, seconds = divmod(round(time.monotonic() - since), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
