"""The report of an experiment: a self-contained HTML page, and Markdown with chart files."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from a2gen_rec.errors import ConfigError
from a2gen_rec.experiments.comparison import Comparison, compare
from a2gen_rec.experiments.curves import learning_curve, predicted_curves
from a2gen_rec.experiments.results import ExperimentResults, read_experiment
from a2gen_rec.experiments.runner import DEFAULT_NUM_SEQUENCES
from a2gen_rec.reporting import charts
from a2gen_rec.reporting.pages import templates
from a2gen_rec.reporting.pages.experiment import figures, tables
from a2gen_rec.reporting.pages.experiment.figures import Chart
from a2gen_rec.reporting.pages.experiment.tables import ComparisonTable
from a2gen_rec.utils import paths

HTML, MARKDOWN = "report.html", "report.md"
VERSIONS = ("python", "torch", "torchrec", "fbgemm_gpu")
_MAX_BASELINES = 2  # next to the first model in charts of predictions, for legibility


@dataclass(frozen=True)
class Section:
    """The part of a dataset in the report."""

    comparison: Comparison
    tables: list[ComparisonTable]
    further_tables: list[ComparisonTable]
    charts: list[Chart]


@dataclass(frozen=True)
class ReportFiles:
    """Files of a report, and the comparison of each dataset."""

    files: list[str]
    comparisons: list[Comparison]


def write_experiment_report(
    experiment_dir: str,
    out: str = "",
    markdown: str = "",
    num_resamples: int = 1000,
    log: Callable[[str], None] = lambda _: None,
) -> ReportFiles:
    """Write the report of an experiment.

    Args:
        experiment_dir: Directory of the experiment.
        out: Directory of ``report.html`` and ``report.md``; by default ``experiment_dir``.
        markdown: File to write the Markdown to instead. Its charts are next to it, in a directory with its name.
        num_resamples: Bootstrap resamples of users.
        log: Receives a line of progress per dataset and model.

    Raises:
        ConfigError: ``num_resamples`` is not positive.
        UserError: The experiment cannot be read (see ``read_experiment``), or a file cannot be written.
    """
    if num_resamples < 1:
        raise ConfigError(f"--bootstrap-resamples {num_resamples} must be at least 1")
    results = read_experiment(experiment_dir)
    page = paths.join(out or experiment_dir, HTML)
    markdown = markdown or paths.join(out or experiment_dir, MARKDOWN)
    chart_dir = markdown.removesuffix(".md") if markdown.endswith(".md") else f"{markdown}-charts"
    for directory in (paths.dirname(page), paths.dirname(markdown), chart_dir):
        paths.ensure_writable_dir(directory)
    sections = [section(results, dataset, num_resamples, log) for dataset in results.datasets]
    paths.write_text(page, render_html(results, sections))
    files = [page, markdown]
    for part in sections:
        for chart in part.charts:
            file = paths.join(chart_dir, f"{_file_name(part, chart)}.svg")
            paths.write_text(file, charts.to_standalone_svg(chart.figure))
            files.append(file)
    paths.write_text(markdown, render_markdown(results, sections, chart_dir.rpartition("/")[2]))
    return ReportFiles(files, [part.comparison for part in sections])


def section(results: ExperimentResults, dataset: str, num_resamples: int, log: Callable[[str], None]) -> Section:
    """Return the part of a dataset."""
    comparison = compare(results, dataset, num_resamples, lambda model: log(f"{dataset}: {model}"))
    return Section(
        comparison,
        tables.dataset_tables(comparison),
        tables.further_tables(comparison),
        _charts(results, comparison),
    )


def render_html(results: ExperimentResults, sections: Sequence[Section]) -> str:
    """Return the HTML page with inline charts."""
    values = _header(results) | {"sections": sections, "svg": charts.to_svg, "theme": charts.THEME}
    return templates.render("experiment/page.html.j2", **values)


def render_markdown(results: ExperimentResults, sections: Sequence[Section], chart_dir: str) -> str:
    """Return the Markdown; ``chart_dir`` is the directory of its charts, relative to it."""

    def chart_path(part: Section, chart: Chart) -> str:
        return f"{chart_dir}/{_file_name(part, chart)}.svg"

    values = _header(results) | {"sections": sections, "chart_path": chart_path}
    return templates.render("experiment/page.md.j2", **values)


def _charts(results: ExperimentResults, comparison: Comparison) -> list[Chart]:
    dataset = comparison.dataset
    names = [model.name for model in comparison.full_models]
    styles = figures.model_styles(names)
    runs = {name: results.runs_of(dataset, name) for name in names}
    predicted = [predicted_curves(runs[name]) for name in _models_of_prediction_charts(comparison)]
    generated = {
        name: [run.test["sequences"] for run in model_runs]
        for name, model_runs in runs.items()
        if all(run.test.get("sequences") for run in model_runs)
    }
    aucs, losses = (
        [curve for name in names if (curve := learning_curve(runs[name], metric)) is not None]
        for metric in ("auc", "loss")
    )
    candidates = [
        figures.ablation_chart(comparison),
        figures.calibration_chart(dataset, predicted, styles),
        figures.times_chart(dataset, predicted, styles),
        figures.sequences_chart(dataset, generated, styles),
        figures.cost_chart(comparison, styles),
        figures.learning_chart(dataset, aucs, losses, styles),
    ]
    return [chart for chart in candidates if chart is not None]


def _models_of_prediction_charts(comparison: Comparison) -> list[str]:
    """Return the first model and the best of the others."""
    first, *others = comparison.full_models
    others.sort(key=lambda model: -model.auc.mean if model.auc else 0.0)
    return [first.name, *(model.name for model in others[:_MAX_BASELINES])]


def _header(results: ExperimentResults) -> dict[str, Any]:
    """Return the template values of the report's header."""
    suite = results.suite
    settings = {dataset["name"]: dataset["settings"] for dataset in suite["datasets"]}
    return {
        "results": results,
        "datasets": [dataset["name"] for dataset in suite["datasets"]],
        "full_models": [model["name"] for model in results.models if not model["ablation_of"]],
        "ablations": [model["name"] for model in results.models if model["ablation_of"]],
        "seeds": suite["seeds"],
        "tuning": suite["tuning"],
        "best_settings": tables.best_settings_table(results.best_settings),
        "settings": yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).strip(),
        "machine": results.machine,
        "commits": list(dict.fromkeys(run.commit for run in results.runs)),
        "versions": VERSIONS,
        "commands": _commands(results),
        "failed": [_failure(failure) for failure in results.failed],
        "mark": tables.BEST_MARK,
    }


def _commands(results: ExperimentResults) -> list[str]:
    """Return the commands that reproduce the results: the experiment, and its commands for each run."""
    evaluation = f"--json RUN/test.json --predictions RUN/test.parquet --num-top-sequences {DEFAULT_NUM_SEQUENCES}"
    return [
        *([results.command] if results.command else []),
        "a2gen train --config RUN/settings.yaml --data DATA --run RUN",
        f"a2gen evaluate --run RUN --data DATA --split test {evaluation}",
        shlex.join(["a2gen", "report", "experiment", results.folder]),
    ]


def _failure(failure: dict[str, Any]) -> dict[str, str]:
    run = failure["run"]
    parts = [str(run[name]) for name in ("dataset", "model") if name in run]
    seed = [f"seed {run['seed']}"] if "seed" in run else []
    return {"phase": str(failure["phase"]), "run": ", ".join([*parts, *seed]), "error": str(failure["error"])}


def _file_name(part: Section, chart: Chart) -> str:
    return f"{part.comparison.dataset}-{chart.name}".replace(" ", "-").replace("/", "-")
