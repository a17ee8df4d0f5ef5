"""Comparison of the policies of a backtest: metrics by day and model age, paired differences, costs, table rows."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from a2gen_rec.data.card import DatasetCard
from a2gen_rec.experiments.backtest.day_metrics import (
    SUBSETS,
    AveragedOutcomes,
    DayMetrics,
    DayPredictions,
    check_same_targets,
    count_users,
    measure_day,
    subset_masks,
)
from a2gen_rec.experiments.backtest.runner import Backtest, StepRecord
from a2gen_rec.experiments.backtest.steps import BASE
from a2gen_rec.experiments.bootstrap import mean_known, resample_weights
from a2gen_rec.experiments.differences import Difference, MeanStd, difference_of
from a2gen_rec.utils import paths


@dataclass(frozen=True)
class PolicyCost:
    """Cost of a policy over all days, without the training that all policies share.

    Attributes:
        trainings: Number of trainings.
        training_s: Seconds of their optimizer steps.
        prepare_s: Seconds of preparing its datasets.
        bytes: Size of the datasets and runs.
    """

    trainings: int
    training_s: float
    prepare_s: float
    bytes: int


@dataclass(frozen=True)
class PolicyResult:
    """Results of a policy; means are over days.

    Attributes:
        name: Name of the policy.
        days: Metrics of its models.
        auc: Subset -> mean AUC.
        mae_log: Subset -> mean MAE of times, log1p seconds.
        auc_differences: Other policy -> subset -> difference of the mean AUC to it; None if undefined.
        mae_differences: The same of the mean MAE.
        auc_by_age: Age in days -> difference of the mean AUC to the reference policy; empty for models of age 1.
        cost: Cost of its datasets and trainings.
    """

    name: str
    days: list[DayMetrics]
    auc: dict[str, float]
    mae_log: dict[str, float]
    auc_differences: dict[str, dict[str, Difference | None]]
    mae_differences: dict[str, dict[str, Difference | None]]
    auc_by_age: dict[int, Difference | None]
    cost: PolicyCost


@dataclass(frozen=True)
class TableRows:
    """Rows of a feature's table after a day.

    Attributes:
        day: Day as text; ``base`` for the first dataset.
        feature: Name of the feature.
        rows: Rows of the table.
        values: Values with a row.
        admitted: Values that got a row on the day.
        reused: Those whose row a retired value had.
        retired: Values that lost their row.
        waiting: Values without a free row.
    """

    day: str
    feature: str
    rows: int
    values: int
    admitted: int
    reused: int
    retired: int
    waiting: int


@dataclass(frozen=True)
class BacktestComparison:
    """Comparison of all policies.

    Attributes:
        policies: Results in the order of the settings.
        reference: Policy that ages are compared with: the first whose models are a day old; empty if there is none.
        novelty_policy: Policy whose models decide which items and users are new.
        averaged: Outcomes that enter the means.
        outcomes: Actions and labels.
        times: Timed actions.
        users: Number of users.
        num_resamples: Number of resamples of users.
        first_training_s: Seconds of the training that all policies share.
        tables: Rows in use by day.
    """

    policies: list[PolicyResult]
    reference: str
    novelty_policy: str
    averaged: AveragedOutcomes
    outcomes: list[str]
    times: list[str]
    users: int
    num_resamples: int
    first_training_s: float
    tables: list[TableRows]

    def policy(self, name: str) -> PolicyResult | None:
        """Return the result of a policy; None if it was not run."""
        return next((policy for policy in self.policies if policy.name == name), None)


def compare_policies(
    backtest: Backtest, num_resamples: int = 500, log: Callable[[str], None] = lambda line: None
) -> BacktestComparison:
    """Compare the policies of a finished backtest.

    Args:
        backtest: The backtest.
        num_resamples: Number of resamples of users, for intervals.
        log: Called with a line per evaluation before it is resampled.

    Raises:
        DataError: A file cannot be read, or policies were evaluated on other targets.
    """
    evaluations, novelty_policy = backtest.plan.evaluations, _novelty_policy(backtest.settings.policies)
    novelty_evaluations = [each for each in evaluations if each.policy == novelty_policy]
    novelty_days = {each.day: DayPredictions.read(each.predictions) for each in novelty_evaluations}
    test = json.loads(paths.read_text(novelty_evaluations[0].evaluation))
    outcomes, times = list(test["actions"]), list(test["time"])
    averaged = AveragedOutcomes.from_days(list(novelty_days.values()), outcomes, times)
    users = np.unique(np.concatenate([day.predictions.user for day in novelty_days.values()]))
    ones = np.ones((len(users), 1), np.float32)
    weights = np.concatenate([ones, resample_weights(len(users), num_resamples)], axis=1)
    masks = {day: subset_masks(predictions.predictions) for day, predictions in novelty_days.items()}
    measured: dict[tuple[str, Any], DayMetrics] = {}
    days: dict[str, list[DayMetrics]] = {name: [] for name in backtest.settings.policies}
    for each in evaluations:
        log(f"{each.policy}, {each.day}")
        key = each.predictions, each.day
        if key not in measured:
            day = DayPredictions.read(each.predictions)
            check_same_targets(day, novelty_days[each.day])
            measured[key] = measure_day(each, day, masks[each.day], users, weights, averaged, outcomes, times)
        metrics = vars(measured[key]) | {"policy": each.policy, "age": each.age}
        days[each.policy].append(DayMetrics(**metrics))
    counts = count_users(list(novelty_days.values()), list(masks.values()), averaged)
    reference = _reference(backtest)
    return BacktestComparison(
        [_policy(backtest, name, days, reference, counts) for name in days],
        reference,
        novelty_policy,
        averaged,
        outcomes,
        times,
        len(users),
        num_resamples,
        backtest.records[f"train {BASE}"].seconds,
        _table_rows(backtest),
    )


def _novelty_policy(policies: Sequence[str]) -> str:
    """Return the policy whose models decide what is new: the one that knows most."""
    return next(name for name in ("warm", "replay", "retrain", "frozen") if name in policies)


def _reference(backtest: Backtest) -> str:
    """Return the first policy other than ``frozen`` whose models are a day old; empty if there is none."""
    evaluations = backtest.plan.evaluations
    return next(
        (
            name
            for name in backtest.settings.policies
            if name != "frozen" and all(each.age == 1 for each in evaluations if each.policy == name)
        ),
        "",
    )


def _policy(
    backtest: Backtest, name: str, days: dict[str, list[DayMetrics]], reference: str, users: Mapping[str, int]
) -> PolicyResult:
    policy_days = days[name]
    ages = sorted({day.age for day in policy_days if day.age > 1})

    def differences(metric: str) -> dict[str, dict[str, Difference | None]]:
        return {
            other: {subset: _difference(policy_days, days[other], metric, subset, users[subset]) for subset in SUBSETS}
            for other in days
            if other != name
        }

    return PolicyResult(
        name,
        policy_days,
        {subset: float(_mean_over_days(policy_days, "mean_auc", subset)[0]) for subset in SUBSETS},
        {subset: float(_mean_over_days(policy_days, "mean_mae", subset)[0]) for subset in SUBSETS},
        differences("mean_auc"),
        differences("mean_mae"),
        {age: _difference_at_age(policy_days, days[reference], age, users["all"]) for age in ages if reference},
        _cost(backtest, name),
    )


def _difference(
    policy_days: Sequence[DayMetrics], others: Sequence[DayMetrics], metric: str, subset: str, users: int
) -> Difference | None:
    """Return the difference of the mean over days."""
    values, other = (_mean_over_days(days, metric, subset) for days in (policy_days, others))
    if not (math.isfinite(values[0]) and math.isfinite(other[0])):
        return None
    means = MeanStd(float(values[0]), None), MeanStd(float(other[0]), None)
    return difference_of(*means, values[None, 1:], other[None, 1:], users)


def _difference_at_age(
    policy_days: Sequence[DayMetrics], reference: Sequence[DayMetrics], age: int, users: int
) -> Difference | None:
    pairs = [(day, other) for day, other in zip(policy_days, reference, strict=True) if day.age == age]
    return _difference([day for day, _ in pairs], [other for _, other in pairs], "mean_auc", "all", users)


def _mean_over_days(days: Sequence[DayMetrics], metric: str, subset: str) -> np.ndarray:
    return mean_known(np.stack([getattr(day, metric)[subset] for day in days]))


def _cost(backtest: Backtest, policy: str) -> PolicyCost:
    """Return the cost of the trainings of a policy and of what they need."""
    steps, needed = backtest.plan.steps, set[str]()
    open_steps = [f"train {each.run}" for each in backtest.plan.evaluations if each.policy == policy]
    while open_steps:
        name = open_steps.pop()
        if name not in needed:
            needed.add(name)
            open_steps += steps[name].needs
    shared = {f"train {BASE}", f"prepare {BASE}"}

    def records(kind: str) -> list[StepRecord]:
        return [backtest.records[name] for name in needed - shared if steps[name].kind == kind]

    training, preparation = records("train"), records("prepare")
    return PolicyCost(
        len(training),
        sum(record.seconds for record in training),
        sum(record.seconds for record in preparation),
        sum(record.bytes for record in training + preparation),
    )


def _table_rows(backtest: Backtest) -> list[TableRows]:
    """Return the rows in use of the first lineage, by day and feature."""
    result = []
    for day in (BASE, *(str(day) for day in backtest.log.days)):
        step = backtest.plan.steps.get(f"prepare {day}")
        if step is None:  # no policy reads the day
            continue
        card = DatasetCard.load(step.output)
        rows = {feature.name: feature.cardinality for feature in card.features}
        result += [
            TableRows(day, name, rows[name], x.values, x.admitted, x.reused, x.retired, x.waiting)
            for name, x in card.vocabularies.items()
        ]
    return result
