"""Charts of a dataset's statistics."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from a2gen_rec.reporting.charts import (
    MARKERS,
    MUTED,
    SERIES,
    STROKES,
    TEXT_COLOR,
    heatmap,
    legend,
    log_axis,
    new_figure,
    style_axes,
)
from a2gen_rec.reporting.pages.dataset.statistics import DataStatistics, LengthGroup, SplitNumbers
from a2gen_rec.reporting.pages.dataset.value_counts import ValueCounts, log_histogram

COLUMNS = 3
MAX_ACTIONS = 10
"""Most actions of a heat map whose cells can be read."""
FEW_VALUES = 10
"""Targets with two actions, below which a cell's number tells little and has no tone."""


def rate_charts(splits: Mapping[str, SplitNumbers], names: Sequence[str]) -> Figure:
    """Bars of the training rates, log axis, and the other splits' as marks; a name without positives has none."""
    figure = new_figure("Rates of actions, labels and objectives", height=0.9 + 0.3 * len(names))
    axes = figure.subplots()
    place = np.arange(len(names))
    shown = {split: numbers for split, numbers in splits.items() if numbers.counts.targets}
    found = {split: np.array([rate_bars(numbers, name) for name in names]) for split, numbers in shown.items()}
    marks: list[Any] = [axes.barh(place, found["train"], height=0.62, color=SERIES[0], alpha=0.55)]
    for number, (split, values) in enumerate(list(found.items())[1:], start=1):
        (dots,) = axes.plot(values, place, MARKERS[number], color=SERIES[number], markersize=6, label=split)
        marks.append(dots)
    positive = np.concatenate(list(found.values()))
    positive = positive[positive > 0]
    low = 10.0 ** math.floor(math.log10(positive.min() / 1.5)) if len(positive) else 0.001
    axes.set(xlim=(low, 1), ylim=(len(names) - 0.4, -0.6))
    style_axes(axes, x="share of impressions, logarithmic", grid="x")
    log_axis(axes.xaxis)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    axes.set_yticks(place, names)
    axes.tick_params(axis="y", labelcolor=TEXT_COLOR, length=0)
    legend(figure, marks, list(found))
    return figure


def rate_bars(numbers: SplitNumbers, name: str) -> float:
    """Share of a split's targets, of those where it is known, that have an action, label or objective."""
    known = numbers.counts.num_known[name]
    return numbers.counts.positives[name] / known if known else math.nan


def percent(share: float) -> str:
    """A share to a tenth of a percent, small ones to two digits: 37.0%, 4.2%, 0.50%, 0.013%."""
    if math.isnan(share):
        return "–"
    return f"{100 * share:.1f}%" if share >= 0.00995 else f"{100 * share:#.2g}%" if share else "0%"


def activity_charts(found: DataStatistics) -> Figure:
    """Impressions per user, the long tail of items, actions per impression."""
    figure = new_figure("Impressions per user, share of the most shown items, actions per impression", height=2.5)
    users, items, actions = figure.subplots(1, 3)
    histogram(users, found.per_user, "Users", "impressions of a user")
    tail = found.per_item
    shares = np.unique(np.rint(np.geomspace(1, tail.total, 60))) / tail.total
    items.plot(shares, [tail.top_share(share) for share in shares], color=SERIES[0], linewidth=1.8)
    style_axes(items, "Items", "most shown items", "of impressions", grid="both")
    items.set(ylim=(0, 1.02))
    log_axis(items.xaxis)
    items.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    items.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    counted = found.per_impression
    actions.bar(counted.value, counted.count / max(counted.total, 1), width=0.7, color=SERIES[0], alpha=0.55)
    style_axes(actions, "Impressions", "actions inside", "of impressions", grid="y")
    actions.set_xticks(counted.value[:: math.ceil(len(counted.value) / 8)])
    log_axis(actions.yaxis)
    actions.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    return figure


def histogram(axes: Axes, counted: ValueCounts, title: str, x: str, marks: Sequence[tuple[float, str]] = ()) -> None:
    """A distribution on a log axis, equal areas for equal numbers, with its median and further ``marks``."""
    if not counted.total:
        axes.set_axis_off()
        return
    edges, count = log_histogram(counted)
    density = count / np.diff(np.log10(edges))
    axes.bar(edges[:-1], density / density.max(), np.diff(edges), align="edge", color=SERIES[0], alpha=0.55)
    for value, name in [(counted.median, ""), *marks]:
        if edges[0] <= value <= edges[-1]:
            axes.axvline(
                value, color=SERIES[1] if name else TEXT_COLOR, linewidth=1.4, linestyle=STROKES[1 if name else 0]
            )
            if name:
                place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
                axes.annotate(name, (value, 1.0), (3, -3), va="top", color=MUTED, fontsize=9, **place)
    style_axes(axes, title, x)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlim(edges[0], edges[-1])
    log_axis(axes.xaxis)


def panels(title: str, number: int, height: float = 1.65) -> tuple[Figure, list[Axes]]:
    """A figure of as many panels, three in a row."""
    across = min(COLUMNS, number)
    down = math.ceil(number / across)
    figure = new_figure(title, 8.0 * max(across, 2) / COLUMNS, 0.3 + height * down)
    every = list(figure.subplots(down, across, squeeze=False).flat)
    for axes in every[number:]:
        axes.set_axis_off()
    return figure, every[:number]


def time_charts(found: Mapping[str, ValueCounts]) -> Figure:
    """When each action happens, in seconds; all on the same axis."""
    figure, every = panels("When actions happen, seconds since the impression began", len(found))
    for axes, (name, counted) in zip(every, found.items(), strict=True):
        histogram(axes, counted, name, "")
    low, high = min(axes.get_xlim()[0] for axes in every), max(axes.get_xlim()[1] for axes in every)
    for axes in every:
        axes.set_xlim(low, high)
        log_axis(axes.xaxis)
    figure.supxlabel("seconds since the impression began, logarithmic", color=MUTED, fontsize=11)
    return figure


def position_chart(found: Mapping[str, ValueCounts], bins: int = 20) -> Figure:
    """When each action happens, as a share of the time watched."""
    figure, every = panels("When actions happen, as a share of the time watched", len(found), 1.45)
    for axes, (name, counted) in zip(every, found.items(), strict=True):
        # A share is rounded to a thousandth: the last bin takes what is 1.
        place = np.minimum((counted.value * bins).astype(int), bins - 1)
        count = np.bincount(place, counted.count, bins)
        axes.bar(np.arange(bins) / bins, count / count.sum(), 1 / bins, align="edge", color=SERIES[0], alpha=0.55)
        axes.axvline(counted.median, color=TEXT_COLOR, linewidth=1.4)
        style_axes(axes, name)
        axes.set(xlim=(0, 1), xticks=(0, 0.5, 1), yticks=[])
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.supxlabel("of the time watched", color=MUTED, fontsize=11)
    return figure


def pair_cells(title: str, names: Sequence[str], values: np.ndarray, texts: np.ndarray) -> Figure:
    """A heat map of pairs of actions; ``values`` and ``texts`` [actions, actions], NaN for cells without a tone."""
    longest = max(map(len, names))
    figure = new_figure(title, 1.3 + 0.085 * longest + 0.62 * len(names), 1.0 + 0.05 * longest + 0.36 * len(names))
    axes = figure.subplots()
    style_axes(axes)
    heatmap(axes, values, texts.tolist(), names, names)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelcolor=TEXT_COLOR)
    axes.set_xticks(range(len(names)), names, rotation=35, ha="left", rotation_mode="anchor")
    return figure


def duration_chart(groups: Sequence[LengthGroup]) -> Figure:
    """Shares of glances, effective views and complete views by length of the video."""
    figure = new_figure("Skips and complete views by length of the video", height=2.9)
    axes = figure.subplots()
    place = np.arange(len(groups))
    marks = []
    for number, name in enumerate(("glance", "effective", "complete")):
        values = [getattr(group, name) for group in groups]
        (line,) = axes.plot(
            place, values, color=SERIES[number], linestyle=STROKES[number], marker=MARKERS[number], markersize=5
        )
        marks.append(line)
    style_axes(axes, x="length of the video, seconds", y="of impressions", grid="y")
    axes.set_xticks(place, [span(group) for group in groups], rotation=30, ha="right", rotation_mode="anchor")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    legend(figure, marks, ["glance (skip)", "effective view", "complete view"])
    return figure


def span(group: LengthGroup) -> str:
    """A range of lengths: < 9.7, 9.7–13.5, ≥ 52."""
    if group.from_s is None:
        return "all" if group.to_s is None else f"< {group.to_s:.3g}"
    return f"≥ {group.from_s:.3g}" if group.to_s is None else f"{group.from_s:.3g}–{group.to_s:.3g}"


def session_charts(gaps: ValueCounts, found: ValueCounts, session_gap_s: float) -> Figure:
    """Gaps between impressions, and impressions per session."""
    figure = new_figure("Gaps between impressions, and impressions per session", height=2.3)
    left, right = figure.subplots(1, 2)
    histogram(left, gaps, "Gaps", "seconds between two begins, logarithmic", [(session_gap_s, "session ends")])
    histogram(right, found, "Sessions", "impressions of a session, logarithmic")
    return figure
