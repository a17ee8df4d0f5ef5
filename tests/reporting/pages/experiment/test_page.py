"""Experiment reports: complete and self-contained for full and minimal suites."""

import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from a2gen_rec.cli.main import main
from a2gen_rec.evaluation.prediction_file import read_predictions
from a2gen_rec.experiments.curves import calibration_curve, learning_curve, predicted_curves
from a2gen_rec.experiments.results import read_experiment
from a2gen_rec.reporting import charts
from a2gen_rec.reporting.pages.experiment.page import ReportFiles, write_experiment_report
from tests.helpers.experiments import CARD, plain_card, write_experiment

pytestmark = pytest.mark.training

TWO = {"a2gen": 1.0, "mmoe": 0.3}
TUNING = {
    "trials": 4,
    "search": "random",
    "select": "auc",
    "space": {"model.dropout": [0.1, 0.2]},
    "per_model_space": {},
}


class Page(HTMLParser):
    """Titles, tables by title, and ids of a page. All tags must be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.titles: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.best: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "meta":
            return
        self.open.append(tag)
        attributes = dict(attrs)
        self.ids += [attributes["id"] or ""] if "id" in attributes else []
        if tag in ("h3", "summary"):
            self.titles.append("")
        if tag == "table":
            self.tables[self.titles[-1]] = []
        if tag == "tr":
            self.tables[self.titles[-1]].append([])
        if tag in ("td", "th"):
            self.tables[self.titles[-1]][-1].append("")
            self.is_best = attributes.get("class") == "best"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h3", "summary"):
            self.titles[-1] += data
        if self.open and self.open[-1] in ("td", "th", "small"):
            self.tables[self.titles[-1]][-1][-1] += data
            if self.is_best:
                self.best.add(data)


def write_report(folder: Path, **options: Any) -> tuple[str, str, ReportFiles]:
    report = write_experiment_report(str(folder), num_resamples=options.pop("num_resamples", 20), **options)
    return Path(report.files[0]).read_text(), Path(report.files[1]).read_text(), report


@pytest.fixture
def empty_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave charts empty in tests of tables: drawing takes nearly all of a report's time."""
    monkeypatch.setattr(charts, "_draw", lambda figure: ElementTree.Element("svg"))


def add_sequences(folder: Path) -> None:
    """Add sequences to the evaluations of the first model."""
    for run in read_experiment(str(folder)).runs_of("one", "a2gen"):
        rows = [{"actions": ["like", "exit"], "observed": 0.4, "expected": 0.3}]
        sequences = {
            "targets": 300,
            "stride": 1,
            "beam_width": 16,
            "covered_mass": 0.99,
            "distinct": {"observed": 9, "generated": 4},
        }
        test = run.test | {"sequences": sequences | {"most_frequent": rows}}
        (Path(run.folder) / "test.json").write_text(json.dumps(test))


def write_validations(folder: str, aucs: list[float], interval: int) -> None:
    with SummaryWriter(f"{folder}/tensorboard") as writer:
        for index, auc in enumerate(aucs, start=1):
            writer.add_scalar("valid/auc", auc, index * interval)


def test_report_of_a_full_experiment(tmp_path: Path) -> None:
    failed = [{"phase": "training", "run": {"dataset": "two", "model": "ple", "seed": 1}, "error": "it broke"}]
    best_settings = {"one": {"a2gen": {"model.dropout": 0.2}}}
    folder = write_experiment(
        tmp_path,
        TWO,
        {"plain": 0.5, "no gate": 0.1},
        (0, 1),
        ("one", "two"),
        best_settings=best_settings,
        failed=failed,
    )
    file = folder / "results.json"
    file.write_text(file.read_text().replace('"tuning": null', f'"tuning": {json.dumps(TUNING)}'))
    add_sequences(folder)
    for run in read_experiment(str(folder)).runs:
        write_validations(run.folder, [0.5, 0.6], 10)
    page, markdown, report = write_report(folder)
    assert "http" not in page
    assert "<script" not in page
    assert not re.search(r'(?:src|href)="(?!#)', page)
    parsed = Page(page)
    assert len(parsed.ids) == len(set(parsed.ids)) > 10
    assert "difference to a2gen" in page
    charts = ["ablations", "calibration", "action times", "accuracy and cost", "learning curves"]
    assert {f"{dataset}: {chart}" for dataset in ("one", "two") for chart in charts} <= set(parsed.titles)
    assert "one: generated action sequences" in parsed.titles
    assert "two: generated action sequences" not in parsed.titles
    for text in ("training of two, ple, seed 1: it broke", "a2gen experiment --out here", "epochs: 2"):
        assert text in page
    for text in ("4 trials per model (random)", "model.dropout: 0.1, 0.2", "validation mean AUC", "2 seeds"):
        assert text in page
        assert text in markdown
    with_ablations = {title for title, rows in parsed.tables.items() if any(row[0] == "plain" for row in rows)}
    assert with_ablations == {"Ablations", "Cost", "Time MAE given the preceding actions, log1p s"}

    chart_files = re.findall(r"!\[[^]]*\]\(([^)]+)\)", markdown)
    assert len(chart_files) == len(set(chart_files)) == 2 * len(charts) + 1
    assert [str(folder / file_name) for file_name in chart_files] == report.files[2:]
    assert all((folder / file_name).read_text().startswith("<svg") for file_name in chart_files)
    assert markdown.count("\n## ") == 3


@pytest.mark.usefixtures("empty_drawings")
def test_tables_show_results_and_mark_the_best(tmp_path: Path) -> None:
    folder = write_experiment(tmp_path, TWO, seeds=(0, 1, 2))
    page, markdown, report = write_report(folder, num_resamples=200)
    (comparison,) = report.comparisons
    a2gen, mmoe = comparison.models
    assert a2gen.auc is not None
    assert mmoe.auc_difference is not None
    parsed = Page(page)
    header, first, second, *_ = parsed.tables["Overview"]
    assert header[1] == "mean AUC"
    low, high = a2gen.auc_interval or (0, 0)
    mean = f"{a2gen.auc.mean:.4f} ± {a2gen.auc.std:.4f}"
    assert first[:3] == ["a2gen", f"{mean}{low:.4f} to {high:.4f}", ""]
    assert second[2].startswith(f"{mmoe.auc_difference.value:+.4f}*".replace("-", "−"))
    assert mean in parsed.best
    assert f"**{mean}**" in markdown
    positives = parsed.tables["AUC"][-1]
    assert positives == ["positives", *(f"{comparison.positives[name]:,}" for name in comparison.scored)]
    calibration = {name: row["calibration"] for name, row in a2gen.outcomes.items()}
    other = {name: row["calibration"] for name, row in mmoe.outcomes.items()}
    for index, name in enumerate(comparison.scored, start=1):
        rows = [row[index].partition("±")[0].strip() for row in parsed.tables["Calibration"][1:3]]
        assert rows == [f"{value.mean:.3f}" for value in (calibration[name], other[name]) if value is not None]
        assert min(rows, key=lambda text: abs(np.log(float(text)))) in parsed.best


@pytest.mark.usefixtures("empty_drawings")
@pytest.mark.parametrize(("users", "testable"), [(2, False), (19, False), (40, True)])
def test_few_users_have_no_star_and_no_p_value(
    users: int, testable: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_experiment(tmp_path, TWO, {"plain": 0.1}, users=users)
    page, markdown, _ = write_report(folder, num_resamples=200)
    cells = [cell for name in ("Overview", "Ablations") for row in Page(page).tables[name] for cell in row]
    assert any("*" in cell for cell in cells) == testable
    assert any("p =" in cell or "p ≤" in cell for cell in cells) == testable
    for text in (page, markdown):
        assert ("Differences over fewer than 20 users of an outcome have no" in text) != testable
    capsys.readouterr()
    main(["report", "experiment", str(folder), "--bootstrap-resamples", "50"])
    numbers = re.findall(r"[-+−]0[.][0-9]{4}[*]?", capsys.readouterr().out)
    assert numbers
    assert any(number.endswith("*") for number in numbers) == testable


@pytest.mark.parametrize("models", [{"a2gen": 1.0}, {"mmoe": 0.5, "ple": 0.4}])
@pytest.mark.parametrize("card", [plain_card(), replace(CARD, oracle_columns=["like"])], ids=["plain", "oracle"])
def test_report_of_a_minimal_suite(models: dict[str, float], card: Any, tmp_path: Path) -> None:
    """One dataset, one seed, no ablations, no training logs, and one model or no generator."""
    page, markdown, _ = write_report(write_experiment(tmp_path, models, card=card))
    parsed = Page(page)
    charts = {title.removeprefix("one: ") for title in parsed.titles if title.startswith("one: ")}
    expected = {"calibration"} | ({"action times"} if card.timed_actions else set())
    assert charts == expected | ({"accuracy and cost"} if len(models) > 1 else set())
    assert ("Time MAE, log1p s" in parsed.titles) == bool(card.timed_actions)
    assert any(row[0].startswith("oracle") for row in parsed.tables["AUC"]) == bool(card.oracle_columns)
    assert "±" not in page
    assert ("difference to" in page) == (len(models) > 1)
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL).lower()
    assert "nan" not in markdown.lower()


def test_names_are_escaped(tmp_path: Path) -> None:
    name = "<b>a|b_c* & $x$"
    page, markdown, _ = write_report(write_experiment(tmp_path, {name: 1.0, "_mmoe": 0.3}, {"`plain`": 0.5}))
    assert "<b>" not in page
    assert html.escape(name) in page
    assert "<b>" not in markdown
    assert r"| \<b\>a\|b\_c\* &amp; $x$ |" in markdown
    widths = {line.count(" |") for line in markdown.splitlines() if r"| \_mmoe |" in line}
    assert min(widths) > 1
    Page(page)


def test_calibration_bins_have_equal_counts_and_keep_ties() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.random(1000), (rng.random(1000) < 0.3).astype(np.float32)
    curve = calibration_curve(scores, labels)
    order = np.argsort(scores)
    assert curve.count.tolist() == [100] * 10
    np.testing.assert_allclose(curve.predicted, [scores[part].mean() for part in np.split(order, 10)])
    np.testing.assert_allclose(curve.observed, [labels[part].mean() for part in np.split(order, 10)])
    tied = calibration_curve(np.repeat([0.1, 0.2, 0.9], [70, 5, 25]), np.zeros(100))
    np.testing.assert_allclose(tied.predicted, [0.1, 0.2, 0.9])
    assert tied.count.tolist() == [70, 5, 25]
    assert calibration_curve(np.array([0.5]), np.array([1.0])).count.tolist() == [1]


def test_times_are_quantiles_of_occurrences(tmp_path: Path) -> None:
    (run,) = read_experiment(str(write_experiment(tmp_path, {"a2gen": 1.0}))).runs
    predictions, names = read_predictions(run.predictions)
    times = predicted_curves([run]).times["follow"]
    column = names.index("follow")
    known = np.isfinite(predictions.observed_time[:, column])
    assert times.count == known.sum() == run.test["time"]["follow"]["count"]
    assert times.observed[50] == pytest.approx(np.expm1(np.median(predictions.observed_time[known, column])), rel=1e-4)
    assert times.predicted[-1] == pytest.approx(np.expm1(predictions.time[known, column].max()), rel=1e-4)


def test_learning_curves_aggregate_seeds_by_validation(tmp_path: Path) -> None:
    runs = read_experiment(str(write_experiment(tmp_path, {"a2gen": 1.0}, seeds=(0, 1, 2)))).runs
    assert learning_curve(runs, "auc") is None
    for run, aucs, interval in zip(runs, ([0.5, 0.7], [0.6, 0.65, 0.8], [0.4]), (10, 12, 14), strict=True):
        write_validations(run.folder, aucs, interval)
    curve = learning_curve(runs, "auc")
    assert curve is not None
    assert curve.step.tolist() == [12, 22, 36]
    np.testing.assert_allclose(curve.median, [0.5, 0.675, 0.8])
    np.testing.assert_allclose(curve.min, [0.4, 0.65, 0.8])
    np.testing.assert_allclose(curve.max, [0.6, 0.7, 0.8])


@pytest.mark.usefixtures("empty_drawings")
def test_command_prints_a_table_and_the_report_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_experiment(tmp_path / "experiment", TWO)
    results = tmp_path / "docs" / "results.md"
    main(
        [
            "report",
            "experiment",
            str(folder),
            "--out",
            str(tmp_path / "out"),
            "--markdown",
            str(results),
            "--bootstrap-resamples",
            "9",
        ]
    )
    output = capsys.readouterr().out
    assert f"report: {tmp_path}/out/report.html\n" in output
    assert f"report: {results}\n" in output
    assert re.search(r"^mmoe +0\.\d{4} +−0\.\d{4}", output, re.MULTILINE)
    assert "](results/one-calibration.svg)" in results.read_text()
    assert (tmp_path / "docs" / "results" / "one-calibration.svg").exists()
    assert not (folder / "report.html").exists()


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text('{"suite": 3}')
    for arguments, code in ([], 1), (["--bootstrap-resamples", "0"], 2):
        with pytest.raises(SystemExit) as error:
            main(["report", "experiment", str(tmp_path), *arguments])
        assert error.value.code == code
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"a2gen: error: {tmp_path}/results.json: not a results file of an experiment")
    assert second == "a2gen: error: --bootstrap-resamples 0 must be at least 1"
