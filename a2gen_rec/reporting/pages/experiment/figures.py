"""The charts of an experiment's report, a function each; None where there is nothing to show."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from a2gen_rec.experiments.comparison import Comparison, Difference, ModelResult
from a2gen_rec.experiments.curves import QUANTILES, LearningCurve, PredictionCurves
from a2gen_rec.reporting import charts

_WIDTH = 13.0  # inches of a chart as wide as the page
_ACROSS = 5
_OBSERVED = "observed"


@dataclass(frozen=True)
class Chart:
    """A figure, the name of its file, and what a reader should see in it."""

    name: str
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class LineStyle:
    """A model's colour, marker and stroke in all charts of a dataset."""

    color: str
    marker: str
    linestyle: Any


def model_styles(names: Sequence[str]) -> dict[str, LineStyle]:
    """One for each model, the same in every chart; they repeat after the eighth."""
    several = list(zip(charts.SERIES, charts.MARKERS, charts.STROKES, strict=True))
    return {name: LineStyle(*several[place % len(several)]) for place, name in enumerate(names)}


def ablation_chart(comparison: Comparison) -> Chart | None:
    """What each ablation costs, with intervals, the costliest first."""
    found = [(model, model.auc_difference, model.mae_difference) for model in comparison.models if model.ablation_of]
    rows = [row for row in found if row[1] is not None or row[2] is not None]
    if not rows:
        return None
    rows.sort(key=lambda row: (row[1].value if row[1] else math.inf, row[0].name))
    title = f"{comparison.dataset}: what the ablations cost"
    timed = any(mae is not None for _, _, mae in rows)
    figure = charts.new_figure(title, _WIDTH, 0.9 + 0.32 * len(rows))
    panels = figure.subplots(1, 1 + timed, sharey=True, squeeze=False)[0]
    of = {model.ablation_of for model, _, _ in rows}
    names = [model.name if len(of) == 1 else f"{model.name} ({model.ablation_of})" for model, _, _ in rows]
    _differences(panels[0], [auc for _, auc, _ in rows], "difference of mean AUC  (left is worse)")
    panels[0].set_yticks(range(len(rows)), names)
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    if timed:
        _differences(panels[1], [mae for _, _, mae in rows], "difference of mean time MAE, log1p s  (right is worse)")
    for panel in panels:
        panel.tick_params(axis="y", length=0, labelcolor=charts.TEXT_COLOR)
    caption = (
        f"Each ablation less the full model ({', '.join(sorted(of))}), with 95 % intervals over "
        f"{comparison.num_resamples:,} resamples of users. Filled: the interval leaves out 0; hollow: it does not, and "
        "nothing is shown either way. The costliest in AUC stand on top."
    )
    return Chart("ablations", title, caption, figure)


def calibration_chart(dataset: str, found: Sequence[PredictionCurves], styles: Mapping[str, LineStyle]) -> Chart | None:
    """Predicted against observed rates, a panel per outcome."""
    names = list(dict.fromkeys(name for each in found for name in each.calibration))
    if not names:
        return None
    title = f"{dataset}: calibration"
    figure, panels = _panels(title, len(names), 2.5)
    for place, (panel, name) in enumerate(zip(panels, names, strict=False)):
        across = [each.calibration[name] for each in found if name in each.calibration]
        both = np.concatenate([np.concatenate([c.predicted, c.observed[c.observed > 0]]) for c in across])
        low, high = max(float(both.min()), 1e-6) / 1.5, min(float(both.max()) * 1.5, 1.5)
        panel.plot([low, high], [low, high], color=charts.MUTED, linewidth=0.8)
        for each in found:
            if name in each.calibration:
                curve, look = each.calibration[name], styles[each.model]
                seen = curve.observed > 0  # a logarithm knows no 0
                panel.plot(curve.predicted[seen], curve.observed[seen], **vars(look), linewidth=1.4, markersize=4)
        panel.set(xlim=(low, high), ylim=(low, high))
        edge = place + _ACROSS >= len(names)
        charts.style_axes(panel, name, "predicted" if edge else "", "" if place % _ACROSS else _OBSERVED, grid="both")
        charts.log_axis(panel.xaxis)
        charts.log_axis(panel.yaxis)
    _model_legend(figure, [each.model for each in found], styles)
    count = float(np.median(np.concatenate([curve.count for each in found for curve in each.calibration.values()])))
    caption = (
        f"Rates in bins of equally many predictions of all seeds, about {count:,.0f} a bin; both axes are logarithmic. "
        "On the diagonal a predicted probability is the rate that follows; below it, it is too high. Bins without a "
        "positive are left out."
    )
    return Chart("calibration", title, caption, figure)


def times_chart(dataset: str, found: Sequence[PredictionCurves], styles: Mapping[str, LineStyle]) -> Chart | None:
    """Distributions of the times of actions, a panel per action."""
    names = list(dict.fromkeys(name for each in found for name in each.times))
    if not names:
        return None
    title = f"{dataset}: when actions happen"
    figure, panels = _panels(title, len(names), 2.3)
    share = 100 * QUANTILES
    marks: list[Any] = []
    for place, (panel, name) in enumerate(zip(panels, names, strict=False)):
        (first, *_) = of_name = [(each.model, each.times[name]) for each in found if name in each.times]
        marks = panel.plot(first[1].observed.clip(0.1), share, color=charts.TEXT_COLOR, linewidth=2.2)
        for model, times in of_name:
            look = styles[model]
            panel.plot(times.predicted.clip(0.1), share, color=look.color, linestyle=look.linestyle, linewidth=1.4)
        edge = place + _ACROSS >= len(names)
        of = f"{name} ({first[1].count:,})"
        charts.style_axes(panel, of, "seconds" if edge else "", "" if place % _ACROSS else "% earlier", grid="both")
        charts.log_axis(panel.xaxis)
    _model_legend(figure, [each.model for each in found], styles, marks)
    caption = (
        "Share of impressions in which the action had happened by then, of those in which it happened (how many: in "
        "brackets). A prediction is one time, the likely one: its curve is steeper than that of what was observed, and "
        "where it crosses the middle says whether a model is early or late."
    )
    return Chart("times", title, caption, figure)


def sequences_chart(
    dataset: str, found: Mapping[str, Sequence[Mapping[str, Any]]], styles: Mapping[str, LineStyle]
) -> Chart | None:
    """Observed against generated frequencies of whole sequences.

    Args:
        found: model -> the ``sequences`` of its evaluations, one per seed.
    """
    if not found:
        return None
    (first, *_), *_ = found.values()
    rows = [tuple(row["actions"]) for row in first["most_frequent"]]
    title = f"{dataset}: generated action sequences"
    figure = charts.new_figure(title, _WIDTH, 1.1 + 0.32 * len(rows))
    panel = figure.subplots()
    place = np.arange(len(rows))
    observed = [100 * row["observed"] for row in first["most_frequent"]]
    marks: list[Any] = panel.plot(observed, place, "|", color=charts.TEXT_COLOR, markersize=16, markeredgewidth=2.5)
    for model, reports in found.items():
        means = []
        for actions in rows:
            known = [
                row["expected"] for each in reports for row in each["most_frequent"] if tuple(row["actions"]) == actions
            ]
            means.append(100 * float(np.mean(known)) if known else math.nan)
        look = styles[model]
        marks += panel.plot(means, place, color=look.color, marker=look.marker, linestyle="none", markersize=7)
    charts.style_axes(panel, "", "% of impressions", grid="both")
    charts.log_axis(panel.xaxis)
    panel.set_yticks(place, [" → ".join(actions) for actions in rows])
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.tick_params(axis="y", length=0, labelcolor=charts.TEXT_COLOR)
    charts.legend(figure, marks, [_OBSERVED, *(f"expected by {model}" for model in found)])
    covered = float(np.mean([each["covered_mass"] for reports in found.values() for each in reports]))
    every = "" if first["stride"] == 1 else f", one of every {first['stride']}"
    distinct, targets = first["distinct"]["observed"], first["targets"]
    caption = (
        f"The {len(rows)} most frequent of {distinct:,} observed sequences, of {targets:,} impressions{every}. "
        f"Expected: mean probability of exactly that sequence; beams cover {covered:.1%} of it, and what they "
        "leave out counts as 0. A point on its bar: as often as it happens."
    )
    return Chart("sequences", title, caption, figure)


def learning_chart(
    dataset: str, aucs: Sequence[LearningCurve], losses: Sequence[LearningCurve], styles: Mapping[str, LineStyle]
) -> Chart | None:
    """Validation over training steps."""
    if not aucs and not losses:
        return None
    title = f"{dataset}: learning curves"
    figure = charts.new_figure(title, _WIDTH, 3.4)
    named = [(each, label) for each, label in ((aucs, "validation mean AUC"), (losses, "validation loss")) if each]
    several = False
    for panel, (curves, label) in zip(figure.subplots(1, len(named), squeeze=False)[0], named, strict=True):
        for curve in curves:
            look = styles[curve.model]
            panel.plot(curve.step, curve.median, **vars(look), linewidth=1.4, markersize=4)
            if (curve.max > curve.min).any():
                several = True
                panel.fill_between(curve.step, curve.min, curve.max, color=look.color, alpha=0.18, linewidth=0)
        charts.style_axes(panel, "", "training step", label, grid="both")
    _model_legend(figure, [curve.model for curve in named[0][0]], styles)
    caption = "Each point is a validation; the tested checkpoint is a model's best one."
    caption += " Lines: median over seeds, shaded: from the least to the largest." if several else ""
    caption += " Losses of models with other terms are on other scales." if losses else ""
    return Chart("learning", title, caption, figure)


def cost_chart(comparison: Comparison, styles: Mapping[str, LineStyle]) -> Chart | None:
    """Quality over training speed."""
    shown = [model for model in comparison.full_models if model.auc is not None and model.targets_per_s]
    if len(shown) < 2:
        return None
    title = f"{comparison.dataset}: quality and cost"
    figure = charts.new_figure(title, 0.6 * _WIDTH, 3.4)
    panel = figure.subplots()
    for model in shown:
        _dot(panel, model, styles[model.name])
    speeds = [model.targets_per_s or 1.0 for model in shown]
    panel.set_xlim(min(speeds) / 1.4, max(speeds) * 1.4)
    charts.style_axes(panel, "", "training speed, targets/s", "test mean AUC", grid="both")
    charts.log_axis(panel.xaxis)
    _model_legend(figure, [model.name for model in shown], styles, stroke=False)
    caption = (
        "Further up is better, further right is cheaper to train. Bars: 95 % interval over resampled users. They "
        "overlap more than the differences above warrant, which are paired."
    )
    return Chart("cost", title, caption, figure)


def _dot(panel: Axes, model: ModelResult, look: LineStyle) -> None:
    mean = model.auc.mean if model.auc else math.nan
    low, high = model.auc_interval or (mean, mean)
    around = [[max(mean - low, 0)], [max(high - mean, 0)]]
    speed = model.targets_per_s or 1.0
    panel.errorbar([speed], [mean], yerr=around, color=look.color, marker=look.marker, markersize=7, linewidth=1.2)


def _differences(panel: Axes, found: Sequence[Difference | None], label: str) -> None:
    panel.axvline(0, color=charts.MUTED, linewidth=0.8)
    for place, each in enumerate(found):
        if each is None:
            continue
        # Of few users the interval of resamples need not hold the difference itself.
        around = [[max(each.value - each.low, 0)], [max(each.high - each.value, 0)]]
        colour = charts.SERIES[0]
        face = colour if each.significant else charts.PAGE
        panel.errorbar(
            [each.value],
            [place],
            xerr=around,
            color=colour,
            marker="o",
            markersize=6,
            markerfacecolor=face,
            linewidth=1.2,
        )
    charts.style_axes(panel, "", label, grid="x")
    panel.locator_params(axis="x", nbins=6)


def _panels(title: str, number: int, height: float) -> tuple[Figure, list[Axes]]:
    """Small multiples, as many beside each other as there is room for."""
    across, down = min(number, _ACROSS), math.ceil(number / _ACROSS)
    width = _WIDTH * max(across, 2) / _ACROSS
    figure = charts.new_figure(title, width, height * down + 0.4)
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for panel in panels[number:]:
        panel.set_axis_off()
    return figure, panels[:number]


def _model_legend(
    figure: Figure,
    names: Sequence[str],
    styles: Mapping[str, LineStyle],
    observed: Sequence[Any] = (),
    stroke: bool = True,
) -> None:
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], **vars(styles[name]) | ({} if stroke else {"linestyle": "none"})) for name in names]
    first = [_OBSERVED] if observed else []
    charts.legend(figure, [*observed, *marks], [*first, *names], ncols=min(len(names) + len(first), 5))
