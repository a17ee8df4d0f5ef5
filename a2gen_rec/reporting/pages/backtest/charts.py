"""Charts of a backtest: metrics by day, loss by model age, rows in use, training time."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from a2gen_rec.experiments.backtest.comparison import BacktestComparison, TableRows
from a2gen_rec.experiments.backtest.day_metrics import DayMetrics
from a2gen_rec.reporting.charts import MARKERS, MUTED, SERIES, STROKES, legend, new_figure, new_panels, style_axes

WIDTH = 8.0  # inches
MAX_TICKS = 8


def days_chart(
    comparison: BacktestComparison, title: str, panels: Mapping[str, Callable[[DayMetrics], float]]
) -> Figure:
    """Return curves over days, a panel per metric and a line per policy."""
    figure, axes_of = new_panels(title, len(panels), 2, WIDTH, 2.5, 0.4)
    marks = []
    for axes, (name, metric) in zip(axes_of, panels.items(), strict=True):
        marks = [
            axes.plot(
                range(len(policy.days)),
                [metric(day) for day in policy.days],
                color=SERIES[index],
                linestyle=STROKES[index],
                marker=MARKERS[index],
                markersize=4,
                linewidth=1.6,
            )[0]
            for index, policy in enumerate(comparison.policies)
        ]
        style_axes(axes, name, grid="y")
        _day_ticks(axes, [day.day for day in comparison.policies[0].days])
    legend(figure, marks, [policy.name for policy in comparison.policies])
    return figure


def age_chart(comparison: BacktestComparison) -> Figure | None:
    """Return the difference of the mean AUC by model age, with intervals; None if all models are a day old."""
    policies = [policy for policy in comparison.policies if policy.auc_by_age]
    if not policies:
        return None
    figure = new_figure("Loss of AUC by model age", WIDTH, 3.0)
    axes = figure.subplots()
    marks = []
    for index, policy in enumerate(policies):
        known = [(age, each) for age, each in policy.auc_by_age.items() if each is not None]
        ages = np.array([age for age, _ in known], float) + 0.06 * (index - (len(policies) - 1) / 2)
        values = np.array([each.value for _, each in known])
        errors = np.array([[each.value - each.low, each.high - each.value] for _, each in known]).reshape(-1, 2).T
        marks.append(
            axes.errorbar(
                ages, values, errors, color=SERIES[index], marker=MARKERS[index], markersize=5, capsize=3, linewidth=1.4
            )[0]
        )
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.set_xticks(sorted({age for policy in policies for age in policy.auc_by_age}))
    style_axes(axes, x="days since the last day that the model has learned", y="difference of mean AUC", grid="y")
    legend(figure, marks, [f"{policy.name} − {comparison.reference}" for policy in policies])
    return figure


def rows_chart(tables: Sequence[TableRows]) -> Figure:
    """Return values with a row and rows of each table over days."""
    names = list(dict.fromkeys(table.feature for table in tables))
    figure, panels = new_panels("Table rows in use", len(names), 3, WIDTH, 1.9, 0.4)
    marks = []
    for axes, name in zip(panels, names, strict=True):
        of_feature = [table for table in tables if table.feature == name]
        days = range(len(of_feature))
        marks = [
            axes.plot(days, [table.rows for table in of_feature], color=MUTED, linewidth=1.2, drawstyle="steps-post")[
                0
            ],
            axes.plot(days, [table.values + 1 for table in of_feature], color=SERIES[0], marker="o", markersize=3.5)[0],
        ]
        style_axes(axes, name, grid="y")
        axes.set_ylim(bottom=0)
        _day_ticks(axes, [table.day for table in of_feature], 3)
    legend(figure, marks, ["rows of the table", "rows in use"])
    return figure


def cost_chart(comparison: BacktestComparison) -> Figure:
    """Return the training time of the policies after the first training."""
    policies = [policy for policy in comparison.policies if policy.cost.trainings]
    figure = new_figure("Training time", WIDTH, 0.8 + 0.4 * max(len(policies), 1))
    axes = figure.subplots()
    positions = np.arange(len(policies))
    axes.barh(positions, [policy.cost.training_s for policy in policies], height=0.6, color=SERIES[0], alpha=0.55)
    axes.set_yticks(positions, [policy.name for policy in policies])
    axes.set_ylim(len(policies) - 0.4, -0.6)
    style_axes(axes, x="seconds of optimizer steps, all days after the first training", grid="x")
    return figure


def _day_ticks(axes: Axes, days: Sequence[str], max_ticks: int = MAX_TICKS) -> None:
    """Label days by month and day."""
    step = -(-len(days) // max_ticks)
    shown = range(0, len(days), step)
    axes.set_xticks(list(shown), [days[index][5:] if days[index][:1].isdigit() else days[index] for index in shown])
