"""Metrics of models on single days, and their resamples over users."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from a2gen_rec.errors import DataError
from a2gen_rec.evaluation.predict import Predictions
from a2gen_rec.evaluation.prediction_file import read_predictions
from a2gen_rec.experiments.backtest.steps import EvaluatedDay
from a2gen_rec.experiments.bootstrap import mean_known, weighted_auc, weighted_mean
from a2gen_rec.experiments.resampling import MIN_COUNT

SUBSETS = ("all", "new items", "known items", "new users", "known users")


@dataclass(frozen=True)
class DayPredictions:
    """Predictions of a model on a day, by user and then by time.

    Attributes:
        predictions: Predictions of all targets.
        names: Outcomes, which are the columns.
        file: File of the predictions, for messages.
    """

    predictions: Predictions
    names: list[str]
    file: str

    @classmethod
    def read(cls, file: str) -> "DayPredictions":
        predictions, names = read_predictions(file)
        return cls(predictions.take(np.lexsort((predictions.ts_ms, predictions.user))), names, file)


@dataclass(frozen=True)
class AveragedOutcomes:
    """Outcomes that enter the means: those with ``MIN_COUNT`` positives, negatives or known times a day on average.

    If none has that many, all are used.

    Attributes:
        outcomes: Actions and labels.
        times: Timed actions.
    """

    outcomes: list[str]
    times: list[str]

    @classmethod
    def from_days(
        cls, days: Sequence[DayPredictions], outcomes: Sequence[str], times: Sequence[str]
    ) -> "AveragedOutcomes":
        """Select among the ``outcomes`` and ``times`` of a model by the predictions of all days."""
        minimum = MIN_COUNT * len(days)

        def count(name: str, value: int) -> int:
            return sum(int((day.predictions.occurred[:, day.names.index(name)] == value).sum()) for day in days)

        def known(name: str) -> int:
            return sum(int(np.isfinite(day.predictions.observed_time[:, day.names.index(name)]).sum()) for day in days)

        frequent = [name for name in outcomes if min(count(name, 0), count(name, 1)) >= minimum]
        timed = [name for name in times if known(name) >= minimum]
        return cls(frequent or list(outcomes), timed or list(times))


@dataclass(frozen=True)
class DayMetrics:
    """Metrics of a model on a day.

    Attributes:
        policy: Name of the policy.
        day: Day as text.
        age: Age of the model in days.
        targets: Subset of impressions -> their number.
        auc: Outcome -> AUC; NaN without both classes.
        mae_log: Timed action -> MAE, log1p seconds.
        mean_auc: Subset -> [1 + resamples] mean AUC over the averaged outcomes, the first without resampling.
        mean_mae: Subset -> [1 + resamples] mean MAE over the averaged timed actions.
    """

    policy: str
    day: str
    age: int
    targets: dict[str, int]
    auc: dict[str, float]
    mae_log: dict[str, float]
    mean_auc: dict[str, np.ndarray]
    mean_mae: dict[str, np.ndarray]


def subset_masks(predictions: Predictions) -> dict[str, np.ndarray]:
    """Return [n] bool per subset of ``SUBSETS``; new items and users have row 0 for the model."""
    new_item, new_user = predictions.item == 0, predictions.user_row == 0
    masks = (np.ones(len(new_item), bool), new_item, ~new_item, new_user, ~new_user)
    return dict(zip(SUBSETS, masks, strict=True))


def count_users(
    days: Sequence[DayPredictions], masks: Sequence[Mapping[str, np.ndarray]], averaged: AveragedOutcomes
) -> dict[str, int]:
    """Return subset -> number of users with each class of each averaged outcome on some day, the minimum over them."""

    def users_with(name: str, subset: str, value: int) -> int:
        users = []
        for day, of_day in zip(days, masks, strict=True):
            included = of_day[subset] & (day.predictions.occurred[:, day.names.index(name)] == value)
            users.append(day.predictions.user[included])
        return len(np.unique(np.concatenate(users)))

    pairs = [(name, value) for name in averaged.outcomes for value in (0, 1)]
    return {subset: min((users_with(name, subset, value) for name, value in pairs), default=0) for subset in SUBSETS}


def measure_day(
    evaluated: EvaluatedDay,
    day: DayPredictions,
    masks: Mapping[str, np.ndarray],
    users: np.ndarray,
    weights: np.ndarray,
    averaged: AveragedOutcomes,
    outcomes: Sequence[str],
    times: Sequence[str],
) -> DayMetrics:
    """Return the metrics of a model on a day.

    Args:
        evaluated: Policy, day and age of the model.
        day: Its predictions.
        masks: Subset -> [n] bool.
        users: Keys of all users of the backtest, ascending.
        weights: [users, 1 + resamples] number of draws of each user; the first column is 1.
        averaged: Outcomes that enter the means.
        outcomes: Actions and labels.
        times: Timed actions.
    """
    predictions, user = day.predictions, np.searchsorted(users, day.predictions.user)

    def auc(name: str, mask: np.ndarray, draws: np.ndarray) -> np.ndarray:
        column = day.names.index(name)
        score, occurred = predictions.probability[:, column], predictions.occurred[:, column]
        known = mask & np.isfinite(score) & np.isfinite(occurred)
        return weighted_auc(score[known], occurred[known], user[known], draws)

    def mae(name: str, mask: np.ndarray, draws: np.ndarray) -> np.ndarray:
        column = day.names.index(name)
        error = np.abs(predictions.time[:, column] - predictions.observed_time[:, column])
        known = mask & np.isfinite(error)
        return weighted_mean(error[known], user[known], draws)

    all_rows, ones = masks["all"], weights[:, :1]
    return DayMetrics(
        evaluated.policy,
        str(evaluated.day),
        evaluated.age,
        {name: int(mask.sum()) for name, mask in masks.items()},
        {name: float(auc(name, all_rows, ones)[0]) for name in outcomes},
        {name: float(mae(name, all_rows, ones)[0]) for name in times},
        {key: _mean([auc(name, mask, weights) for name in averaged.outcomes]) for key, mask in masks.items()},
        {key: _mean([mae(name, mask, weights) for name in averaged.times]) for key, mask in masks.items()},
    )


def _mean(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mean over rows without NaN; NaN without any."""
    return mean_known(np.stack(rows)) if rows else np.full(1, math.nan)


def check_same_targets(day: DayPredictions, other: DayPredictions) -> None:
    """Raise DataError unless both have the same users and times."""
    first, second = day.predictions, other.predictions
    if not (np.array_equal(first.user, second.user) and np.array_equal(first.ts_ms, second.ts_ms)):
        raise DataError(f"has other targets than {Path(other.file).parent.name}", file=day.file)
