"""`a2gen benchmark`: running the scripts of a checkout."""

import json
import shutil
from pathlib import Path

import pytest

from a2gen_rec.cli.main import main
from a2gen_rec.launch import benchmark_scripts

pytestmark = pytest.mark.processes

MEASURING = """
'''How far?

By counting.'''
import json, sys
def measure(): ...
options = sys.argv[1:]
print("counted", *options)
facts = ("cpu", "threads", "date", "commit", "python", "torch", "torchrec", "fbgemm_gpu")
result = {
    "question": __doc__.strip(), "command": "", "quick": "--quick" in options, "ranks": 1, "settings": {"x": options},
    "machine": dict.fromkeys(facts, "0") | {"device": "cpu", "cores": 1}, "tables": [], "goals": [],
}
with open(options[options.index("--json") + 1], "w") as file:
    json.dump(result, file)
"""


@pytest.fixture
def benchmarks_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout's benchmarks: one that counts, one that fails, and the shared scripts."""
    source, benchmarks = benchmark_scripts.BENCHMARKS_DIR, tmp_path / "benchmarks"
    benchmarks.mkdir()
    for shared in ("harness.py", "results.py"):
        shutil.copy(source / shared, benchmarks)
    (benchmarks / "count.py").write_text(MEASURING)
    (benchmarks / "break.py").write_text("'''Does it break?'''\ndef measure(): ...\nraise SystemExit(3)")
    monkeypatch.setattr(benchmark_scripts, "BENCHMARKS_DIR", benchmarks)
    monkeypatch.chdir(tmp_path)
    return benchmarks


def code_of(*arguments: str) -> object:
    with pytest.raises(SystemExit) as ended:
        main(["benchmark", *arguments])
    return ended.value.code


def test_runs_one_benchmark(benchmarks_dir: Path) -> None:
    main(["benchmark", "count", "--quick", "--", "--sizes", "[1, 2]", "--name=x y", "--", "-3"])
    result = json.loads(Path("benchmark_results/count.json").read_text())
    shared = ["--device", "cpu", "--json", "benchmark_results/count.json", "--quick"]
    assert result["settings"]["x"] == [*shared, "--sizes", "[1, 2]", "--name=x y", "--", "-3"]
    main(["benchmark", "--device", "cuda", "--out", "gpu", "count"])
    result = json.loads(Path("gpu/count-cuda.json").read_text())
    assert result["settings"]["x"] == ["--device", "cuda", "--json", "gpu/count-cuda.json"]
    assert code_of("break") == 3


def test_continues_after_a_failed_benchmark(benchmarks_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert code_of("all", "--quick", "--out", "new/results") == 1
    printed = capfd.readouterr()
    steps = ("[1/2] break", "break: failed with exit code 3", "[2/2] count", "counted", "count: done", "1 of 2")
    positions = [printed.out.index(text) for text in steps]
    assert positions == sorted(positions)
    assert printed.err == "a2gen: error: failed: break\n"
    page = Path("new/results/RESULTS.md").read_text()
    assert "| [count](#count) | How far? | – |" in page
    assert ", quick\n" in page
    (benchmarks_dir / "break.py").unlink()
    main(["benchmark", "all", "--out", "new/results"])
    assert ", full\n" in Path("new/results/RESULTS.md").read_text()


def test_help_lists_benchmarks_and_questions(benchmarks_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("--help") == 0
    assert capsys.readouterr().out.endswith("benchmarks:\n  break: Does it break?\n  count: How far?\n")


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["harness"], 2, "unknown benchmark 'harness'; choose one of break, count"),
        (["all", "--", "--sizes", "3"], 2, "all: --sizes is an option of one benchmark"),
        (["all", "--out", "benchmarks/count.py/x"], 1, "benchmarks/count.py/x: cannot write to directory"),
        (["count", "--out", "benchmarks/count.py/x"], 1, "benchmarks/count.py/x: cannot write to directory"),
    ],
)
def test_rejects_invalid_arguments(
    arguments: list[str], code: int, reason: str, benchmarks_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert code_of(*arguments) == code
    printed = capfd.readouterr()
    assert printed.err.startswith(f"a2gen: error: {reason}")
    assert (printed.out, printed.err.count("\n")) == ("", 1)


@pytest.mark.parametrize("name", ["all", "count"])
def test_requires_a_checkout(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark_scripts, "BENCHMARKS_DIR", tmp_path / "benchmarks")
    monkeypatch.chdir(tmp_path)
    assert code_of(name) == 1
    assert "come with the source checkout" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_checkout_benchmarks_have_questions() -> None:
    questions = benchmark_scripts.list_benchmarks()
    assert "prepare" in questions
    assert not {"harness", "results"} & set(questions)
    for name, question in questions.items():
        assert question.endswith("?"), name
