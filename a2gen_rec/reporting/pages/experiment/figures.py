"""Charts of an experiment report, one function each; a function returns None without data."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from a2gen_rec.experiments.comparison import Comparison, ModelResult
from a2gen_rec.experiments.curves import QUANTILES, LearningCurve, PredictionCurves
from a2gen_rec.experiments.differences import MIN_USERS, Difference
from a2gen_rec.reporting import charts

_WIDTH = 13.0  # inches of a chart of the page's width
_COLUMNS = 5
_OBSERVED = "observed"


@dataclass(frozen=True)
class Chart:
    """A figure with the name of its file, its title and its caption."""

    name: str
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class LineStyle:
    """Color, marker and line style of a model in all charts of a dataset."""

    color: str
    marker: str
    linestyle: Any


def model_styles(names: Sequence[str]) -> dict[str, LineStyle]:
    """Return the style of each model, the same in all charts; styles repeat after eight models."""
    styles = list(zip(charts.SERIES, charts.MARKERS, charts.STROKES, strict=True))
    return {name: LineStyle(*styles[index % len(styles)]) for index, name in enumerate(names)}


def ablation_chart(comparison: Comparison) -> Chart | None:
    """Return the difference of each ablation to its full model, with intervals, largest loss first."""
    differences = [
        (model, model.auc_difference, model.mae_difference) for model in comparison.models if model.ablation_of
    ]
    rows = [row for row in differences if row[1] is not None or row[2] is not None]
    if not rows:
        return None
    rows.sort(key=lambda row: (row[1].value if row[1] else math.inf, row[0].name))
    title = f"{comparison.dataset}: ablations"
    timed = any(mae is not None for _, _, mae in rows)
    figure = charts.new_figure(title, _WIDTH, 0.9 + 0.32 * len(rows))
    panels = figure.subplots(1, 1 + timed, sharey=True, squeeze=False)[0]
    full_names = {model.ablation_of for model, _, _ in rows}
    names = [model.name if len(full_names) == 1 else f"{model.name} ({model.ablation_of})" for model, _, _ in rows]
    _draw_differences(panels[0], [auc for _, auc, _ in rows], "difference of mean AUC (left is worse)")
    panels[0].set_yticks(range(len(rows)), names)
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    if timed:
        _draw_differences(
            panels[1], [mae for _, _, mae in rows], "difference of mean time MAE, log1p s (right is worse)"
        )
    for panel in panels:
        panel.tick_params(axis="y", length=0, labelcolor=charts.TEXT_COLOR)
    caption = (
        f"Difference of each ablation to the full model ({', '.join(sorted(full_names))}), with 95% intervals over "
        f"{comparison.num_resamples:,} resamples of users. Filled: the interval excludes 0; hollow: it includes 0, or "
        f"covers fewer than {MIN_USERS} users, and the difference is not significant. "
        "Ablations with the largest loss of AUC are on top."
    )
    return Chart("ablations", title, caption, figure)


def calibration_chart(
    dataset: str, predictions: Sequence[PredictionCurves], styles: Mapping[str, LineStyle]
) -> Chart | None:
    """Return predicted against observed rates, one panel per outcome."""
    names = list(dict.fromkeys(name for curves in predictions for name in curves.calibration))
    if not names:
        return None
    title = f"{dataset}: calibration"
    figure, panels = charts.new_panels(title, len(names), _COLUMNS, _WIDTH, 2.5, 0.4)
    for index, (panel, name) in enumerate(zip(panels, names, strict=False)):
        curves_of_name = [curves.calibration[name] for curves in predictions if name in curves.calibration]
        rates = np.concatenate([np.concatenate([c.predicted, c.observed[c.observed > 0]]) for c in curves_of_name])
        low, high = max(float(rates.min()), 1e-6) / 1.5, min(float(rates.max()) * 1.5, 1.5)
        panel.plot([low, high], [low, high], color=charts.MUTED, linewidth=0.8)
        for curves in predictions:
            if name in curves.calibration:
                curve, style = curves.calibration[name], styles[curves.model]
                positive = curve.observed > 0  # for the logarithm
                panel.plot(
                    curve.predicted[positive], curve.observed[positive], **vars(style), linewidth=1.4, markersize=4
                )
        panel.set(xlim=(low, high), ylim=(low, high))
        bottom = index + _COLUMNS >= len(names)
        charts.style_axes(
            panel, name, "predicted" if bottom else "", "" if index % _COLUMNS else _OBSERVED, grid="both"
        )
        charts.log_axis(panel.xaxis)
        charts.log_axis(panel.yaxis)
    _model_legend(figure, [curves.model for curves in predictions], styles)
    counts = [curve.count for curves in predictions for curve in curves.calibration.values()]
    count = float(np.median(np.concatenate(counts)))
    caption = (
        f"Rates in bins with equal numbers of predictions of all seeds, about {count:,.0f} per bin, on log scales. On "
        "the diagonal, predicted and observed rates are equal; below it, predictions are too high. Bins without "
        "positives are omitted."
    )
    return Chart("calibration", title, caption, figure)


def times_chart(dataset: str, predictions: Sequence[PredictionCurves], styles: Mapping[str, LineStyle]) -> Chart | None:
    """Return the distributions of action times, one panel per action."""
    names = list(dict.fromkeys(name for curves in predictions for name in curves.times))
    if not names:
        return None
    title = f"{dataset}: action times"
    figure, panels = charts.new_panels(title, len(names), _COLUMNS, _WIDTH, 2.3, 0.4)
    share = 100 * QUANTILES
    marks: list[Any] = []
    for index, (panel, name) in enumerate(zip(panels, names, strict=False)):
        (first, *_) = times_of_name = [
            (curves.model, curves.times[name]) for curves in predictions if name in curves.times
        ]
        marks = panel.plot(first[1].observed.clip(0.1), share, color=charts.TEXT_COLOR, linewidth=2.2)
        for model, times in times_of_name:
            style = styles[model]
            panel.plot(times.predicted.clip(0.1), share, color=style.color, linestyle=style.linestyle, linewidth=1.4)
        bottom = index + _COLUMNS >= len(names)
        panel_title = f"{name} ({first[1].count:,})"
        y_label = "" if index % _COLUMNS else "% earlier"
        charts.style_axes(panel, panel_title, "seconds" if bottom else "", y_label, grid="both")
        charts.log_axis(panel.xaxis)
    _model_legend(figure, [curves.model for curves in predictions], styles, marks)
    caption = (
        "Cumulative share of the action's occurrences (their number is in parentheses) by time. A model predicts a "
        "single typical time, so its curve is steeper than the observed one. The position of the curve at 50% "
        "shows whether a model predicts too early or too late."
    )
    return Chart("times", title, caption, figure)


def sequences_chart(
    dataset: str, sequences: Mapping[str, Sequence[Mapping[str, Any]]], styles: Mapping[str, LineStyle]
) -> Chart | None:
    """Return observed against generated frequencies of full action sequences.

    Args:
        dataset: Dataset name.
        sequences: Model -> the ``sequences`` of its evaluations, one per seed.
        styles: Style of each model.
    """
    if not sequences:
        return None
    (first, *_), *_ = sequences.values()
    rows = [tuple(row["actions"]) for row in first["most_frequent"]]
    title = f"{dataset}: generated action sequences"
    figure = charts.new_figure(title, _WIDTH, 1.1 + 0.32 * len(rows))
    panel = figure.subplots()
    positions = np.arange(len(rows))
    observed = [100 * row["observed"] for row in first["most_frequent"]]
    marks: list[Any] = panel.plot(observed, positions, "|", color=charts.TEXT_COLOR, markersize=16, markeredgewidth=2.5)
    for model, reports in sequences.items():
        means = []
        for actions in rows:
            known = [
                row["expected"]
                for report in reports
                for row in report["most_frequent"]
                if tuple(row["actions"]) == actions
            ]
            means.append(100 * float(np.mean(known)) if known else math.nan)
        style = styles[model]
        marks += panel.plot(means, positions, color=style.color, marker=style.marker, linestyle="none", markersize=7)
    charts.style_axes(panel, "", "% of impressions", grid="both")
    charts.log_axis(panel.xaxis)
    panel.set_yticks(positions, [" → ".join(actions) for actions in rows])
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.tick_params(axis="y", length=0, labelcolor=charts.TEXT_COLOR)
    charts.legend(figure, marks, [_OBSERVED, *(f"expected by {model}" for model in sequences)])
    covered = float(np.mean([report["covered_mass"] for reports in sequences.values() for report in reports]))
    sampling = "" if first["stride"] == 1 else f", a sample of one in {first['stride']}"
    distinct, targets = first["distinct"]["observed"], first["targets"]
    caption = (
        f"The {len(rows)} most frequent of {distinct:,} observed sequences, of {targets:,} impressions{sampling}. "
        f"Expected: mean probability of exactly this sequence. The beams cover {covered:.1%} of the probability; "
        "sequences outside count as 0. A point on its bar means that expected and observed frequencies are equal."
    )
    return Chart("sequences", title, caption, figure)


def learning_chart(
    dataset: str, aucs: Sequence[LearningCurve], losses: Sequence[LearningCurve], styles: Mapping[str, LineStyle]
) -> Chart | None:
    """Return validation metrics over training steps."""
    if not aucs and not losses:
        return None
    title = f"{dataset}: learning curves"
    figure = charts.new_figure(title, _WIDTH, 3.4)
    metrics = ((aucs, "validation mean AUC"), (losses, "validation loss"))
    non_empty = [(curves, label) for curves, label in metrics if curves]
    has_range = False
    for panel, (curves, label) in zip(figure.subplots(1, len(non_empty), squeeze=False)[0], non_empty, strict=True):
        for curve in curves:
            style = styles[curve.model]
            panel.plot(curve.step, curve.median, **vars(style), linewidth=1.4, markersize=4)
            if (curve.max > curve.min).any():
                has_range = True
                panel.fill_between(curve.step, curve.min, curve.max, color=style.color, alpha=0.18, linewidth=0)
        charts.style_axes(panel, "", "training step", label, grid="both")
    _model_legend(figure, [curve.model for curve in non_empty[0][0]], styles)
    caption = "Each point is one validation; the test uses the best checkpoint of a model."
    caption += " Lines: median over seeds; shaded: minimum to maximum." if has_range else ""
    caption += " Losses with different terms are not comparable." if losses else ""
    return Chart("learning", title, caption, figure)


def cost_chart(comparison: Comparison, styles: Mapping[str, LineStyle]) -> Chart | None:
    """Return accuracy over training speed."""
    models = [model for model in comparison.full_models if model.auc is not None and model.targets_per_s]
    if len(models) < 2:
        return None
    title = f"{comparison.dataset}: accuracy and cost"
    figure = charts.new_figure(title, 0.6 * _WIDTH, 3.4)
    panel = figure.subplots()
    for model in models:
        _draw_point(panel, model, styles[model.name])
    speeds = [model.targets_per_s or 1.0 for model in models]
    panel.set_xlim(min(speeds) / 1.4, max(speeds) * 1.4)
    charts.style_axes(panel, "", "training speed, targets/s", "test mean AUC", grid="both")
    charts.log_axis(panel.xaxis)
    _model_legend(figure, [model.name for model in models], styles, has_line=False)
    caption = (
        "Higher is better; further right is cheaper to train. Bars: 95% intervals over resampled users. They overlap "
        "more than the paired differences above suggest."
    )
    return Chart("cost", title, caption, figure)


def _draw_point(panel: Axes, model: ModelResult, style: LineStyle) -> None:
    mean = model.auc.mean if model.auc else math.nan
    low, high = model.auc_interval or (mean, mean)
    error = [[max(mean - low, 0)], [max(high - mean, 0)]]
    speed = model.targets_per_s or 1.0
    panel.errorbar([speed], [mean], yerr=error, color=style.color, marker=style.marker, markersize=7, linewidth=1.2)


def _draw_differences(panel: Axes, differences: Sequence[Difference | None], label: str) -> None:
    panel.axvline(0, color=charts.MUTED, linewidth=0.8)
    for index, difference in enumerate(differences):
        if difference is None:
            continue
        # With few users, the interval of the resamples may exclude the difference itself.
        error = [[max(difference.value - difference.low, 0)], [max(difference.high - difference.value, 0)]]
        color = charts.SERIES[0]
        face_color = color if difference.significant else charts.PAGE
        panel.errorbar(
            [difference.value],
            [index],
            xerr=error,
            color=color,
            marker="o",
            markersize=6,
            markerfacecolor=face_color,
            linewidth=1.2,
        )
    charts.style_axes(panel, "", label, grid="x")
    panel.locator_params(axis="x", nbins=6)


def _model_legend(
    figure: Figure,
    names: Sequence[str],
    styles: Mapping[str, LineStyle],
    observed: Sequence[Any] = (),
    has_line: bool = True,
) -> None:
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], **vars(styles[name]) | ({} if has_line else {"linestyle": "none"})) for name in names]
    first = [_OBSERVED] if observed else []
    charts.legend(figure, [*observed, *marks], [*first, *names], ncols=min(len(names) + len(first), 5))
