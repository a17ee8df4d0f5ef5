"""Charts of dataset statistics."""

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
    new_panels,
    style_axes,
)
from a2gen_rec.reporting.formatting import format_range
from a2gen_rec.reporting.pages.dataset.statistics import DataStatistics, DurationGroup, SplitStatistics
from a2gen_rec.reporting.pages.dataset.value_counts import ValueCounts, log_histogram

WIDTH = 8.0  # inches
COLUMNS = 3
MAX_ACTIONS = 10
"""Maximum number of actions in a readable heat map."""
MIN_PAIR_COUNT = 10
"""Targets with both actions below which a cell is not significant and has no color."""


def rate_charts(splits: Mapping[str, SplitStatistics], names: Sequence[str]) -> Figure:
    """Return bars of the training rates on a log axis, with markers for the other splits; none without positives."""
    figure = new_figure("Rates of actions, labels and objectives", height=0.9 + 0.3 * len(names))
    axes = figure.subplots()
    positions = np.arange(len(names))
    non_empty = {split: statistics for split, statistics in splits.items() if statistics.counts.targets}
    rates = {
        split: np.array([positive_rate(statistics, name) for name in names]) for split, statistics in non_empty.items()
    }
    marks: list[Any] = [axes.barh(positions, rates["train"], height=0.62, color=SERIES[0], alpha=0.55)]
    for index, (split, values) in enumerate(list(rates.items())[1:], start=1):
        (dots,) = axes.plot(values, positions, MARKERS[index], color=SERIES[index], markersize=6, label=split)
        marks.append(dots)
    positive = np.concatenate(list(rates.values()))
    positive = positive[positive > 0]
    low = 10.0 ** math.floor(math.log10(positive.min() / 1.5)) if len(positive) else 0.001
    axes.set(xlim=(low, 1), ylim=(len(names) - 0.4, -0.6))
    style_axes(axes, x="share of impressions (log scale)", grid="x")
    log_axis(axes.xaxis)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    axes.set_yticks(positions, names)
    axes.tick_params(axis="y", labelcolor=TEXT_COLOR, length=0)
    legend(figure, marks, list(rates))
    return figure


def positive_rate(statistics: SplitStatistics, name: str) -> float:
    """Return the share of positives among a split's targets with a known value; NaN without any."""
    known = statistics.counts.num_known[name]
    return statistics.counts.positives[name] / known if known else math.nan


def activity_charts(statistics: DataStatistics) -> Figure:
    """Return impressions per user, the long tail of items, and actions per impression."""
    figure = new_figure("Impressions per user, share of the most frequent items, actions per impression", height=2.5)
    users, items, actions = figure.subplots(1, 3)
    histogram(users, statistics.impressions_per_user, "Users", "impressions per user")
    per_item = statistics.impressions_per_item
    shares = np.unique(np.rint(np.geomspace(1, per_item.total, 60))) / per_item.total
    items.plot(shares, [per_item.top_share(share) for share in shares], color=SERIES[0], linewidth=1.8)
    style_axes(items, "Items", "most frequent items", "of impressions", grid="both")
    items.set(ylim=(0, 1.02))
    log_axis(items.xaxis)
    items.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    items.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    per_impression = statistics.actions_per_impression
    actions.bar(
        per_impression.values,
        per_impression.counts / max(per_impression.total, 1),
        width=0.7,
        color=SERIES[0],
        alpha=0.55,
    )
    style_axes(actions, "Impressions", "actions per impression", "of impressions", grid="y")
    actions.set_xticks(per_impression.values[:: math.ceil(len(per_impression.values) / 8)])
    log_axis(actions.yaxis)
    actions.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    return figure


def histogram(
    axes: Axes, distribution: ValueCounts, title: str, x: str, marks: Sequence[tuple[float, str]] = ()
) -> None:
    """Draw a distribution on a log axis with its median and further ``marks``; equal areas are equal counts."""
    if not distribution.total:
        axes.set_axis_off()
        return
    edges, count = log_histogram(distribution)
    density = count / np.diff(np.log10(edges))
    axes.bar(edges[:-1], density / np.max(density), np.diff(edges), align="edge", color=SERIES[0], alpha=0.55)
    for value, name in [(distribution.median, ""), *marks]:
        if edges[0] <= value <= edges[-1]:
            axes.axvline(
                value, color=SERIES[1] if name else TEXT_COLOR, linewidth=1.4, linestyle=STROKES[1 if name else 0]
            )
            if name:
                anchor: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
                axes.annotate(name, (value, 1.0), (3, -3), va="top", color=MUTED, fontsize=9, **anchor)
    style_axes(axes, title, x)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlim(edges[0], edges[-1])
    log_axis(axes.xaxis)


def time_charts(times: Mapping[str, ValueCounts]) -> Figure:
    """Return the distribution of the time of each action in seconds, on one common axis."""
    title = "Action times, seconds since the start of the impression"
    figure, panels = new_panels(title, len(times), COLUMNS, WIDTH, 1.65, 0.3)
    for axes, (name, distribution) in zip(panels, times.items(), strict=True):
        histogram(axes, distribution, name, "")
    low, high = min(axes.get_xlim()[0] for axes in panels), max(axes.get_xlim()[1] for axes in panels)
    for axes in panels:
        axes.set_xlim(low, high)
        log_axis(axes.xaxis)
    figure.supxlabel("seconds since the start of the impression (log scale)", color=MUTED, fontsize=11)
    return figure


def position_chart(times: Mapping[str, ValueCounts], bins: int = 20) -> Figure:
    """Return the distribution of the time of each action as a share of the watch time."""
    title = "Action times, share of the watch time"
    figure, panels = new_panels(title, len(times), COLUMNS, WIDTH, 1.45, 0.3)
    for axes, (name, distribution) in zip(panels, times.items(), strict=True):
        # Shares are rounded to 0.001; the last bin includes 1.
        bin_index = np.minimum((distribution.values * bins).astype(int), bins - 1)
        count = np.bincount(bin_index, distribution.counts, bins)
        axes.bar(np.arange(bins) / bins, count / count.sum(), 1 / bins, align="edge", color=SERIES[0], alpha=0.55)
        axes.axvline(distribution.median, color=TEXT_COLOR, linewidth=1.4)
        style_axes(axes, name)
        axes.set(xlim=(0, 1), xticks=(0, 0.5, 1), yticks=[])
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.supxlabel("share of the watch time", color=MUTED, fontsize=11)
    return figure


def pair_cells(title: str, names: Sequence[str], values: np.ndarray, texts: np.ndarray) -> Figure:
    """Return a heat map of pairs of actions; ``values`` and ``texts`` [actions, actions], NaN leaves a cell blank."""
    max_length = max(map(len, names))
    figure = new_figure(
        title, 1.3 + 0.085 * max_length + 0.62 * len(names), 1.0 + 0.05 * max_length + 0.36 * len(names)
    )
    axes = figure.subplots()
    style_axes(axes)
    heatmap(axes, values, texts.tolist(), names, names)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelcolor=TEXT_COLOR)
    axes.set_xticks(range(len(names)), names, rotation=35, ha="left", rotation_mode="anchor")
    return figure


def duration_chart(groups: Sequence[DurationGroup]) -> Figure:
    """Return shares of glances, effective views and complete views by video duration."""
    figure = new_figure("Glances and complete views by video duration", height=2.9)
    axes = figure.subplots()
    positions = np.arange(len(groups))
    marks = []
    for index, name in enumerate(("glance", "effective", "complete")):
        values = [getattr(group, name) for group in groups]
        (line,) = axes.plot(
            positions, values, color=SERIES[index], linestyle=STROKES[index], marker=MARKERS[index], markersize=5
        )
        marks.append(line)
    style_axes(axes, x="video duration, seconds", y="of impressions", grid="y")
    labels = [format_range(group.from_s, group.to_s) for group in groups]
    axes.set_xticks(positions, labels, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    legend(figure, marks, ["glance", "effective view", "complete view"])
    return figure


def session_charts(gaps: ValueCounts, per_session: ValueCounts, session_gap_s: float) -> Figure:
    """Return the distributions of gaps between impressions and of impressions per session."""
    figure = new_figure("Gaps between impressions, and impressions per session", height=2.3)
    left, right = figure.subplots(1, 2)
    histogram(left, gaps, "Gaps", "seconds between impressions (log scale)", [(session_gap_s, "session ends")])
    histogram(right, per_session, "Sessions", "impressions per session (log scale)")
    return figure
