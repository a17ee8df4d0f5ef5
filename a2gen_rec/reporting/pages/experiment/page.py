"""The report of an experiment: an HTML page that needs nothing else, and Markdown with its charts beside."""

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
from a2gen_rec.reporting.pages.experiment.tables import ReportTable
from a2gen_rec.utils import paths

HTML, MARKDOWN = "report.html", "report.md"
VERSIONS = ("python", "torch", "torchrec", "fbgemm_gpu")
_BASELINES = 2  # beside the first model in charts of predictions, to stay legible


@dataclass(frozen=True)
class Section:
    """A dataset's part of the report."""

    comparison: Comparison
    tables: list[ReportTable]
    further: list[ReportTable]
    charts: list[Chart]


@dataclass(frozen=True)
class ReportFiles:
    """The files of a report, and what was compared."""

    files: list[str]
    comparisons: list[Comparison]


def write_experiment_report(
    folder: str, out: str = "", markdown: str = "", resamples: int = 1000, tell: Callable[[str], None] = lambda _: None
) -> ReportFiles:
    """Write the report of the experiment in ``folder``.

    Args:
        out: folder of ``report.html`` and ``report.md``; by default the experiment's own.
        markdown: file to write the Markdown to instead. Its charts lie beside it, in a folder of its name.
        tell: takes a line of progress per dataset and model.

    Raises:
        ConfigError: ``resamples`` is not positive.
        UserError: the experiment cannot be read (as ``read_experiment``), or a place is not writable.
    """
    if resamples < 1:
        raise ConfigError(f"--bootstrap-resamples {resamples} must be at least 1")
    recorded = read_experiment(folder)
    page = paths.join(out or folder, HTML)
    markdown = markdown or paths.join(out or folder, MARKDOWN)
    pictures = markdown.removesuffix(".md") if markdown.endswith(".md") else f"{markdown}-charts"
    for place in (paths.dirname(page), paths.dirname(markdown), pictures):
        paths.ensure_writable_dir(place)
    sections = [section(recorded, dataset, resamples, tell) for dataset in recorded.datasets]
    paths.write_text(page, render_html(recorded, sections))
    written = [page, markdown]
    for part in sections:
        for chart in part.charts:
            file = paths.join(pictures, f"{_file_name(part, chart)}.svg")
            paths.write_text(file, charts.to_standalone_svg(chart.figure))
            written.append(file)
    paths.write_text(markdown, render_markdown(recorded, sections, pictures.rpartition("/")[2]))
    return ReportFiles(written, [part.comparison for part in sections])


def section(recorded: ExperimentResults, dataset: str, resamples: int, tell: Callable[[str], None]) -> Section:
    """All that is shown of a dataset."""
    comparison = compare(recorded, dataset, resamples, lambda model: tell(f"{dataset}: {model}"))
    return Section(
        comparison,
        tables.dataset_tables(comparison),
        tables.further_tables(comparison),
        _charts(recorded, comparison),
    )


def render_html(recorded: ExperimentResults, sections: Sequence[Section]) -> str:
    """The page, with its charts inside."""
    values = _about(recorded) | {"sections": sections, "svg": charts.to_svg, "theme": charts.THEME}
    return templates.render("experiment/page.html.j2", **values)


def render_markdown(recorded: ExperimentResults, sections: Sequence[Section], pictures: str) -> str:
    """The same in Markdown; ``pictures``: the folder of its charts, seen from it."""
    values = _about(recorded) | {"sections": sections, "place": lambda *of: f"{pictures}/{_file_name(*of)}.svg"}
    return templates.render("experiment/page.md.j2", **values)


def _charts(recorded: ExperimentResults, comparison: Comparison) -> list[Chart]:
    dataset = comparison.dataset
    names = [model.name for model in comparison.full_models]
    styles = figures.model_styles(names)
    runs = {name: recorded.runs_of(dataset, name) for name in names}
    predicted = [predicted_curves(runs[name]) for name in _legible(comparison)]
    generated = {
        name: [run.test["sequences"] for run in of_model]
        for name, of_model in runs.items()
        if all(run.test.get("sequences") for run in of_model)
    }
    learned = [
        [curve for name in names if (curve := learning_curve(runs[name], metric)) is not None]
        for metric in ("auc", "loss")
    ]
    made = [
        figures.ablation_chart(comparison),
        figures.calibration_chart(dataset, predicted, styles),
        figures.times_chart(dataset, predicted, styles),
        figures.sequences_chart(dataset, generated, styles),
        figures.cost_chart(comparison, styles),
        figures.learning_chart(dataset, learned[0], learned[1], styles),
    ]
    return [chart for chart in made if chart is not None]


def _legible(comparison: Comparison) -> list[str]:
    """The first model and the best of the others."""
    first, *others = comparison.full_models
    others.sort(key=lambda model: -model.auc.mean if model.auc else 0.0)
    return [first.name, *(model.name for model in others[:_BASELINES])]


def _about(recorded: ExperimentResults) -> dict[str, Any]:
    """What the head of the report says."""
    suite = recorded.suite
    settings = {dataset["name"]: dataset["settings"] for dataset in suite["datasets"]}
    return {
        "recorded": recorded,
        "datasets": [dataset["name"] for dataset in suite["datasets"]],
        "whole": [model["name"] for model in recorded.models if not model["ablation_of"]],
        "ablations": [model["name"] for model in recorded.models if model["ablation_of"]],
        "seeds": suite["seeds"],
        "tuning": suite["tuning"],
        "chosen": tables.chosen_table(recorded.best_settings),
        "settings": yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).strip(),
        "machine": recorded.machine,
        "commits": list(dict.fromkeys(run.commit for run in recorded.runs)),
        "versions": VERSIONS,
        "commands": _commands(recorded),
        "failed": [_failure(failure) for failure in recorded.failed],
        "mark": tables.BEST_MARK,
    }


def _commands(recorded: ExperimentResults) -> list[str]:
    """What made the results: the experiment, and what it ran of each run."""
    evaluation = f"--json RUN/test.json --predictions RUN/test.parquet --num-top-sequences {DEFAULT_NUM_SEQUENCES}"
    return [
        *([recorded.command] if recorded.command else []),
        "a2gen train --config RUN/settings.yaml --data DATA --run RUN",
        f"a2gen evaluate --run RUN --data DATA --split test {evaluation}",
        shlex.join(["a2gen", "report", "experiment", recorded.folder]),
    ]


def _failure(failure: dict[str, Any]) -> dict[str, str]:
    run = failure["run"]
    parts = [str(run[name]) for name in ("dataset", "model") if name in run]
    seed = [f"seed {run['seed']}"] if "seed" in run else []
    return {"phase": str(failure["phase"]), "what": ", ".join([*parts, *seed]), "error": str(failure["error"])}


def _file_name(part: Section, chart: Chart) -> str:
    return f"{part.comparison.dataset}-{chart.name}".replace(" ", "-").replace("/", "-")
