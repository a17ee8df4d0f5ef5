import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import pytest
from harness import Goal, Report, ReportTable, Timing, format_cell, interleave, print_report
from rich.console import Console

from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.utils.distributed import DistributedContext


def test_interleaves_variants_after_warmup(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []

    def variant(name: str, *seconds: float) -> Callable[[], None]:
        durations = iter(seconds)

        def run() -> None:
            order.append(name)
            now[0] += next(durations)

        return run

    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])
    timings = interleave({"a": variant("a", 9, 1, 2, 3), "b": variant("b", 8, 5, 6, 7)}, repeats=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert {name: timing.seconds for name, timing in timings.items()} == {"a": [1, 2, 3], "b": [5, 6, 7]}
    with pytest.raises(ConfigError, match="repeats 0 must be at least 1"):
        interleave({}, repeats=0)


def test_percentiles() -> None:
    timing = Timing([float(value) for value in range(11)])
    assert (timing.p10, timing.median, timing.p90) == (1, 5, 9)


@dataclass
class Settings:
    """Settings of a benchmark that counts.

    Attributes:
        upto: last number.
        words: unused words.
    """

    upto: int = 100
    words: tuple[str, ...] = ("a", "b")


def count(settings: Settings, process: DistributedContext) -> Report:
    if settings.upto < 0:
        raise UserError("upto:\nnegative")
    return Report(
        [ReportTable("counted", ["last"], [[settings.upto]])],
        [Goal("counts", "≥ 1", str(settings.upto), settings.upto >= 1)],
        {"ratio": 2.5},
    )


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["counting.py", *arguments])
    harness.main("somewhere/counting.py", "How far?\n\nBy counting.", Settings, {"upto": 7}, count)


def test_writes_json_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "counting.json"
    run(monkeypatch, "--quick", "--json", str(file), "--words", '["x y"]')
    result = json.loads(file.read_text())
    machine = result.pop("machine")
    assert result == {
        "benchmark": "counting",
        "question": "How far?\n\nBy counting.",
        "command": "a2gen benchmark counting --quick -- --words '[\"x y\"]'",
        "quick": True,
        "ranks": 1,
        "settings": {"upto": 7, "words": ["x y"]},
        "tables": [{"title": "counted", "columns": ["last"], "rows": [[7]], "note": ""}],
        "goals": [{"claim": "counts", "required": "≥ 1", "measured": "7", "met": True}],
        "metrics": {"ratio": 2.5},
        "ratio": 2.5,
    }
    assert machine["cores"] >= 1
    assert machine["torch"] == harness.torch.__version__
    assert {"date", "commit", "cpu", "threads", "python", "torchrec", "fbgemm_gpu"} < set(machine)
    assert "met  counts: required ≥ 1, measured 7" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--upto", "-1"], 1, "counting: error: upto: negative\n"),
        (["--upto", "far"], 2, "counting: error: upto: must be an integer, not 'far'"),
        (["--unknown", "1"], 2, "counting: error: unrecognized arguments: --unknown 1\n"),
        (["--json", "{file}/x.json"], 1, "counting: error: {file}: cannot write to directory"),
    ],
)
def test_user_errors_are_one_line(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit) as exited:
        run(monkeypatch, *(argument.format(file=file) for argument in arguments))
    captured = capsys.readouterr()
    assert exited.value.code == code
    assert captured.err.startswith(message.format(file=file))
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "ranks", "command"),
    [
        ([], 1, "a2gen benchmark x"),
        (["--json=x.json", "--device", "cpu"], 1, "a2gen benchmark x"),
        (["--device=cuda", "--repeats", "3", "--quick"], 1, "a2gen benchmark x --quick --device cuda -- --repeats 3"),
        (["--quick"], 2, "torchx run -s local_cwd torchx_apps/benchmark.py:benchmark --name x --ranks 2 -- --quick"),
    ],
)
def test_rerun_command(arguments: list[str], ranks: int, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x.py", *arguments])
    assert harness.rerun_command("x", ranks) == command


def render(report: Report, width: int) -> str:
    out = io.StringIO()
    print_report(Console(file=out, width=width, highlight=False), "How?", report)
    return out.getvalue()


def test_wide_tables_keep_numbers_unbroken_in_80_columns() -> None:
    columns = ["name of the measured variant", *(f"measurement number {index} in seconds" for index in range(6))]
    values: list[harness.CellValue] = ["factorized [dim]", *range(1234560, 1234564), 0.5, None]
    report = Report(
        [ReportTable("one [b] row", columns, [values], "note " * 30)],
        [Goal("as fast as [x]", "≥ 10", "9", False)],
    )
    text = render(report, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for fragment in (
        "1,234,560",
        "1,234,563",
        "0.5",
        "–",
        "factorized",
        "[dim]",
        "one [b] row",
        "as fast as [x]: required",
    ):
        assert fragment in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), ("a", "a"), (1234567, "1,234,567"), (0.012345, "0.0123"), (12.345, "12.3"), (1234.5, "1,234")],
)
def test_formats_cells(value: Any, text: str) -> None:
    assert format_cell(value) == text
