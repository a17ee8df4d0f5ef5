"""Sections of a backtest's page."""

import math
from collections.abc import Callable
from functools import partial

from a2gen_rec.experiments.backtest.advice import advice, format_difference
from a2gen_rec.experiments.backtest.comparison import BacktestComparison, PolicyResult
from a2gen_rec.experiments.backtest.day_metrics import SUBSETS, DayMetrics
from a2gen_rec.experiments.differences import Difference
from a2gen_rec.reporting.formatting import MISSING, format_bytes, format_duration
from a2gen_rec.reporting.pages.backtest.charts import age_chart, cost_chart, days_chart, rows_chart
from a2gen_rec.reporting.pages.section import Section, SectionTable

POLICY_TEXTS = {
    "frozen": "trained once, before the first day",
    "retrain": "trained from scratch on earlier days",
    "warm": "continued with each day",
    "replay": "continued with each day, and with windows of the day before",
}


def backtest_sections(comparison: BacktestComparison) -> list[Section]:
    """Return all sections of the page."""
    parts = [
        Section("Advice", advice(comparison).replace("`", "")),
        _summary(comparison),
        _days(comparison),
        _ages(comparison),
        _new(comparison),
        _outcomes(comparison),
    ]
    return [part for part in [*parts, _cost(comparison), _tables(comparison)] if part is not None]


def _summary(comparison: BacktestComparison) -> Section:
    """Return the means of all policies over days."""
    others = [name for name in ("retrain", "frozen") if comparison.policy(name) is not None]
    columns = [*(f"difference to {name}" for name in others), "training, s", "trainings"]
    tables = []
    for title, means, differences, names in (
        ("mean AUC", "auc", "auc_differences", comparison.averaged.outcomes),
        ("mean MAE, log1p s", "mae_log", "mae_differences", comparison.averaged.times),
    ):
        rows = [
            [
                policy.name,
                _decimals(getattr(policy, means)["all"]),
                *(_difference(getattr(policy, differences), name) for name in others),
                f"{policy.cost.training_s:,.0f}",
                f"{policy.cost.trainings}",
            ]
            for policy in comparison.policies
        ]
        if names:
            tables.append(SectionTable(["", title, *columns], rows, f"Means over days and over {', '.join(names)}."))
    policies = "; ".join(f"{policy.name}: {POLICY_TEXTS[policy.name]}" for policy in comparison.policies)
    text = (
        f"{policies}. Every model is evaluated on a day before it learns from it. Differences have 95% intervals over "
        f"{comparison.num_resamples:,} resamples of {comparison.users:,} users, without the error of random seeds; "
        f"*: the interval excludes 0. The first training, of {format_duration(comparison.first_training_s)}, is shared "
        "and not counted."
    )
    return Section("Policies", text, [], tables)


def _days(comparison: BacktestComparison) -> Section:
    metrics: dict[str, Callable[[DayMetrics], float]] = {"mean AUC": partial(_mean_auc, subset="all")}
    if comparison.averaged.times:
        metrics["mean MAE of times, log1p s"] = lambda day: float(day.mean_mae["all"][0])
    figure = days_chart(comparison, "Metrics by day", metrics)
    return Section("Days", "Each day, before the model learns from it.", [(figure, "Days differ in difficulty.")])


def _ages(comparison: BacktestComparison) -> Section | None:
    figure = age_chart(comparison)
    if figure is None:
        return None
    caption = f"Difference to {comparison.reference} on the same days, with 95% intervals over users."
    rows = [
        [policy.name, f"{age}", MISSING if each is None else format_difference(each)]
        for policy in comparison.policies
        for age, each in policy.auc_by_age.items()
    ]
    table = SectionTable(["", "age, days", "difference of mean AUC"], rows)
    return Section("Model age", "What a model loses until it is trained again.", [(figure, caption)], [table])


def _new(comparison: BacktestComparison) -> Section:
    metrics = {name: partial(_mean_auc, subset=name) for name in SUBSETS[1:]}
    figure = days_chart(comparison, "Mean AUC of new and known items and users", metrics)
    rows = [[policy.name, *(_decimals(policy.auc[name]) for name in SUBSETS[1:])] for policy in comparison.policies]
    other = next((name for name in ("frozen", "retrain") if comparison.policy(name)), "")
    for policy in comparison.policies:
        if other and policy.name != other:
            cells = [_difference_of(policy.auc_differences[other][name]) for name in SUBSETS[1:]]
            rows.append([f"{policy.name} − {other}", *cells])
    days = comparison.policies[0].days
    shares = {
        name: sum(day.targets[name] for day in days) / sum(day.targets["all"] for day in days) for name in SUBSETS
    }
    caption = "Share of the impressions: " + ", ".join(f"{name} {shares[name]:.1%}" for name in SUBSETS[1:]) + "."
    table = SectionTable(["mean AUC", *SUBSETS[1:]], rows)
    text = f"New is what the models of {comparison.novelty_policy} have no table row for: new or rare values."
    return Section("New items and users", text, [(figure, caption)], [table])


def _outcomes(comparison: BacktestComparison) -> Section:
    def means(policy: PolicyResult, metric: str, names: list[str]) -> list[str]:
        return [_decimals(_mean([getattr(day, metric)[name] for day in policy.days])) for name in names]

    tables = [
        SectionTable(
            ["AUC", *comparison.outcomes],
            [[policy.name, *means(policy, "auc", comparison.outcomes)] for policy in comparison.policies],
        )
    ]
    if comparison.times:
        rows = [[policy.name, *means(policy, "mae_log", comparison.times)] for policy in comparison.policies]
        tables.append(SectionTable(["MAE, log1p s", *comparison.times], rows))
    return Section("Actions", "Means over days of every action and label.", [], tables)


def _cost(comparison: BacktestComparison) -> Section:
    rows = [
        [
            policy.name,
            f"{policy.cost.trainings}",
            f"{policy.cost.training_s:,.1f}",
            f"{policy.cost.prepare_s:,.1f}",
            format_bytes(policy.cost.bytes),
        ]
        for policy in comparison.policies
    ]
    columns = ["", "trainings", "training, s", "preparation, s", "written"]
    caption = (
        "Trainings and the datasets that they read, without the first ones. A part of a log is read by a scan of all "
        "of it. Concurrent commands slow each other down."
    )
    return Section("Cost", "", [(cost_chart(comparison), caption)], [SectionTable(columns, rows)])


def _tables(comparison: BacktestComparison) -> Section | None:
    """Return the rows in use of the tables whose values change."""
    first = {table.feature: table for table in reversed(comparison.tables)}
    changing = {
        table.feature for table in comparison.tables if table.admitted + table.retired and table != first[table.feature]
    }
    tables = [table for table in comparison.tables if table.feature in changing]
    if not tables:
        return None
    columns = ["day", "table", "rows", "values", "admitted", "rows reused", "retired", "waiting"]
    counts = ("rows", "values", "admitted", "reused", "retired", "waiting")
    rows = [[each.day, each.feature, *(f"{getattr(each, name):,}" for name in counts)] for each in tables]
    caption = "Row 0, of unknown values, is among the rows in use."
    table = SectionTable(columns, rows, text_columns=("table",))
    text = "Of the increments of the first dataset, for tables whose values change."
    return Section("Table rows", text, [(rows_chart(tables), caption)], [table])


def _mean_auc(day: DayMetrics, subset: str) -> float:
    return float(day.mean_auc[subset][0])


def _difference(differences: dict[str, dict[str, Difference | None]], other: str) -> str:
    return _difference_of(differences[other]["all"]) if other in differences else MISSING


def _difference_of(difference: Difference | None) -> str:
    if difference is None:
        return MISSING
    return format_difference(difference) + ("*" if difference.significant else "")


def _decimals(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else MISSING


def _mean(values: list[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan
