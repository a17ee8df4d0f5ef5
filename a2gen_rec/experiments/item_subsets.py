"""Comparison of models on impressions of new and of known items."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from a2gen_rec.evaluation.predict import Predictions
from a2gen_rec.evaluation.prediction_file import read_predictions
from a2gen_rec.experiments.differences import Difference, MeanStd, difference_of, mean_std
from a2gen_rec.experiments.resampling import MIN_COUNT, AveragedOutcomes, Resampled, resample
from a2gen_rec.experiments.results import EvaluatedRun


@dataclass(frozen=True)
class SubsetRow:
    """Metrics of a model on a subset; differences to the reference model of the comparison.

    Attributes:
        name: Name of the model.
        auc: Mean AUC over outcomes.
        mae_log: Mean MAE over timed actions, log1p seconds.
        auc_difference: Difference of ``auc``.
        mae_difference: Difference of ``mae_log``.
    """

    name: str
    auc: MeanStd | None
    mae_log: MeanStd | None
    auc_difference: Difference | None
    mae_difference: Difference | None


@dataclass(frozen=True)
class ItemSubset:
    """Impressions of new or of known items.

    Attributes:
        is_new: Whether the items have no row in the item table, so that training did not see them.
        targets: Number of impressions.
        averaged: Outcomes that enter the means.
        rows: Metrics of the models.
    """

    is_new: bool
    targets: int
    averaged: AveragedOutcomes
    rows: list[SubsetRow]


def item_subsets(
    runs: Mapping[str, Sequence[EvaluatedRun]], references: Mapping[str, str], users: np.ndarray, weights: np.ndarray
) -> list[ItemSubset]:
    """Return the comparison on new and on known items; empty unless both have ``MIN_COUNT`` impressions.

    Args:
        runs: Model -> its runs, one per seed.
        references: Model -> model of comparison; models without one have no difference.
        users: [users] keys of the test split, ascending.
        weights: [users, resamples] number of draws of each user.
    """
    first = next(iter(runs.values()))[0]
    predictions, names = read_predictions(first.predictions)
    new = is_new_item(predictions)
    if min(new.sum(), (~new).sum()) < MIN_COUNT:
        return []
    subsets = []
    for is_new in (True, False):
        included = new == is_new
        averaged = _averaged(first, predictions, names, included)
        values, resampled = (
            {
                name: resample(of_model, users, draws, averaged, partial(_is_included, is_new))
                for name, of_model in runs.items()
            }
            for draws in (np.ones((len(users), 1), weights.dtype), weights)
        )
        rows = [_row(name, references.get(name, ""), values, resampled) for name in runs]
        subsets.append(ItemSubset(is_new, int(included.sum()), averaged, rows))
    return subsets


def is_new_item(predictions: Predictions) -> np.ndarray:
    """Return [n] bool, whether the target's item has no row in the item table."""
    return predictions.item == 0


def _is_included(is_new: bool, predictions: Predictions) -> np.ndarray:
    included: np.ndarray = is_new_item(predictions) == is_new
    return included


def _averaged(
    run: EvaluatedRun, predictions: Predictions, names: Sequence[str], included: np.ndarray
) -> AveragedOutcomes:
    """Return the outcomes with enough samples in the subset."""
    actions = {
        name: {"positives": np.nansum(predictions.occurred[included, names.index(name)])}
        for name in run.test["actions"]
    }
    known = {
        name: {"count": np.isfinite(predictions.observed_time[included, names.index(name)]).sum()}
        for name in run.test["time"]
    }
    return AveragedOutcomes.from_test({"targets": included.sum(), "actions": actions, "time": known})


def _row(name: str, reference: str, values: Mapping[str, Resampled], resampled: Mapping[str, Resampled]) -> SubsetRow:
    auc, mae = (mean_std(getattr(values[name], metric)[:, 0]) for metric in ("auc", "mae"))
    differences: list[Difference | None] = [None, None]
    if reference:
        mine, other = resampled[name], resampled[reference]
        reference_auc, reference_mae = (mean_std(getattr(values[reference], metric)[:, 0]) for metric in ("auc", "mae"))
        differences = [
            difference_of(auc, reference_auc, mine.auc, other.auc, min(mine.auc_users, other.auc_users)),
            difference_of(mae, reference_mae, mine.mae, other.mae, min(mine.mae_users, other.mae_users)),
        ]
    return SubsetRow(name, auc, mae, *differences)
