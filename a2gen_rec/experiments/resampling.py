"""Bootstrap of the mean metrics of a model's runs over users."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from a2gen_rec.errors import DataError
from a2gen_rec.evaluation.predict import Predictions
from a2gen_rec.evaluation.prediction_file import read_predictions
from a2gen_rec.experiments.bootstrap import mean_known, weighted_auc, weighted_mean
from a2gen_rec.experiments.results import EvaluatedRun

MIN_COUNT = 100
"""Minimum number of positives, negatives or known times; outcomes with fewer would add noise to the means."""


class AveragedOutcomes(NamedTuple):
    """Outcomes that enter the means: actions, labels and timed actions with ``MIN_COUNT`` samples on test.

    If no outcome has that many samples, all are used.

    Attributes:
        outcomes: Actions and labels that enter the mean AUC.
        times: Timed actions that enter the mean MAE.
        left_out: Other outcomes.
    """

    outcomes: list[str]
    times: list[str]
    left_out: list[str]

    @classmethod
    def from_test(cls, test: Mapping[str, Any]) -> "AveragedOutcomes":
        """Select outcomes by an evaluation on the test split."""
        max_count = test["targets"] - MIN_COUNT
        outcomes = [name for name, row in test["actions"].items() if MIN_COUNT <= row["positives"] <= max_count]
        times = [name for name, row in test["time"].items() if row["count"] >= MIN_COUNT]
        outcomes, times = outcomes or list(test["actions"]), times or list(test["time"])
        return cls(
            outcomes, times, [name for name in {**test["actions"], **test["time"]} if name not in outcomes + times]
        )


@dataclass(frozen=True)
class Resampled:
    """Mean AUC and mean MAE (log1p s) of a model's runs in every resample of users.

    Attributes:
        auc: [runs, resamples] mean AUC over outcomes.
        mae: [runs, resamples] mean MAE over timed actions.
        auc_users: Minimum over outcomes of the users with positives, and of the users with negatives.
        mae_users: Minimum over timed actions of the users with known times.
    """

    auc: np.ndarray
    mae: np.ndarray
    auc_users: int
    mae_users: int


def resample(
    runs: Sequence[EvaluatedRun],
    users: np.ndarray,
    weights: np.ndarray,
    averaged: AveragedOutcomes,
    is_included: Callable[[Predictions], np.ndarray] | None = None,
) -> Resampled:
    """Return the metrics of all runs of a model in resamples of users.

    Args:
        runs: Runs of the model.
        users: [users] keys of the split, ascending.
        weights: [users, resamples] number of draws of each user.
        averaged: Outcomes that enter the means.
        is_included: Returns whether [n] each prediction counts; by default, all do.
    """
    by_seed = [_resample_run(run, users, weights, averaged, is_included) for run in runs]
    return Resampled(
        np.concatenate([run.auc for run in by_seed]),
        np.concatenate([run.mae for run in by_seed]),
        min(run.auc_users for run in by_seed),
        min(run.mae_users for run in by_seed),
    )


def _resample_run(
    run: EvaluatedRun,
    users: np.ndarray,
    weights: np.ndarray,
    averaged: AveragedOutcomes,
    is_included: Callable[[Predictions], np.ndarray] | None,
) -> Resampled:
    predictions, names = read_predictions(run.predictions)
    user = np.searchsorted(users, predictions.user)
    if not np.array_equal(np.unique(predictions.user), users):
        raise DataError("users differ from those of the dataset's other predictions", file=run.predictions)
    included = np.ones(len(user), bool) if is_included is None else is_included(predictions)
    aucs, maes = [], []
    auc_users = mae_users = len(users)
    for name in averaged.outcomes:
        column = names.index(name)
        score, occurred = predictions.probability[:, column], predictions.occurred[:, column]
        known = included & np.isfinite(score) & np.isfinite(occurred)
        aucs.append(weighted_auc(score[known], occurred[known], user[known], weights))
        auc_users = min(auc_users, *(_count(user[known & (occurred == label)]) for label in (0, 1)))
    for name in averaged.times:
        error = np.abs(predictions.time[:, names.index(name)] - predictions.observed_time[:, names.index(name)])
        known = included & np.isfinite(error)
        maes.append(weighted_mean(error[known], user[known], weights))
        mae_users = min(mae_users, _count(user[known]))
    auc, mae = (mean_known(np.array(parts).reshape(len(parts), weights.shape[1])) for parts in (aucs, maes))
    return Resampled(auc[None], mae[None], auc_users, mae_users)


def _count(user: np.ndarray) -> int:
    return len(np.unique(user))
