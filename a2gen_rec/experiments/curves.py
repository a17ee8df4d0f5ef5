"""Curves of a model over all its seeds: calibration, times, and learning curves."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from a2gen_rec.evaluation.prediction_file import read_predictions
from a2gen_rec.experiments.records import read_scalars
from a2gen_rec.experiments.results import EvaluatedRun

BINS = 10
"""Bins of a calibration curve."""
QUANTILES = np.linspace(0, 1, 101)
"""Quantiles of a time curve."""


@dataclass(frozen=True)
class CalibrationCurve:
    """Predicted and observed rates of one outcome, [bins] with equal numbers of predictions, by ascending rate."""

    predicted: np.ndarray
    observed: np.ndarray
    count: np.ndarray


@dataclass(frozen=True)
class TimeCurve:
    """Quantiles of predicted and observed times of one action in seconds, over impressions where both are known."""

    predicted: np.ndarray
    observed: np.ndarray
    count: int


@dataclass(frozen=True)
class PredictionCurves:
    """Curves of a model by outcome and by timed action; outcomes that never occurred are left out."""

    model: str
    calibration: dict[str, CalibrationCurve]
    times: dict[str, TimeCurve]


@dataclass(frozen=True)
class LearningCurve:
    """Validation metric of a model over its seeds, [validations] each.

    Attributes:
        model: Name of the model.
        step: Median step of the k-th validation, over seeds with that many validations.
        median: Median over seeds.
        min: Minimum over seeds.
        max: Maximum over seeds.
    """

    model: str
    step: np.ndarray
    median: np.ndarray
    min: np.ndarray
    max: np.ndarray


def predicted_curves(runs: Sequence[EvaluatedRun]) -> PredictionCurves:
    """Return the curves of one model's runs over the predictions of all seeds.

    Raises:
        UserError: Predictions cannot be read.
    """
    parts = [read_predictions(run.predictions) for run in runs]
    test, names = runs[0].test, parts[0][1]
    calibrations, times = {}, {}
    for name in [*test["actions"], *test["objectives"]]:
        column = names.index(name)
        score = np.concatenate([predictions.probability[:, column] for predictions, _ in parts])
        occurred = np.concatenate([predictions.occurred[:, column] for predictions, _ in parts])
        known = np.isfinite(score) & np.isfinite(occurred)
        if occurred[known].any():
            calibrations[name] = calibration_curve(score[known], occurred[known])
    for name in test["time"]:
        column = names.index(name)
        predicted_time = np.concatenate([predictions.time[:, column] for predictions, _ in parts]).astype(np.float64)
        observed_time = np.concatenate([predictions.observed_time[:, column] for predictions, _ in parts]).astype(
            np.float64
        )
        known = np.isfinite(predicted_time) & np.isfinite(observed_time)
        if known.any():
            predicted, observed = (
                np.expm1(np.quantile(values[known], QUANTILES)) for values in (predicted_time, observed_time)
            )
            times[name] = TimeCurve(predicted, observed, int(known.sum()) // len(runs))
    return PredictionCurves(runs[0].model, calibrations, times)


def calibration_curve(scores: np.ndarray, labels: np.ndarray, bins: int = BINS) -> CalibrationCurve:
    """Return mean prediction and observed rate of bins with equal numbers of predictions; ties share a bin."""
    order = np.argsort(scores, kind="stable")
    scores, labels = scores[order].astype(np.float64), labels[order].astype(np.float64)
    # A bin starts at the first prediction equal to its edge.
    edges = scores[np.arange(bins) * len(scores) // bins]
    first = np.unique(np.searchsorted(scores, edges))
    count = np.diff(np.append(first, len(scores)))
    return CalibrationCurve(np.add.reduceat(scores, first) / count, np.add.reduceat(labels, first) / count, count)


def learning_curve(runs: Sequence[EvaluatedRun], metric: str) -> LearningCurve | None:
    """Return the learning curve of a validation metric in the runs of one model; None if nothing was logged."""
    name = f"valid/{metric}"
    logged = [curve for curve in (read_scalars(run.folder, [name])[name] for run in runs) if curve]
    if not logged:
        return None
    # Steps per epoch differ slightly between seeds, so validations are aligned by index.
    columns = [[curve[k] for curve in logged if k < len(curve)] for k in range(max(map(len, logged)))]
    values = [[value for _, value in column] for column in columns]
    return LearningCurve(
        runs[0].model,
        np.array([np.median([step for step, _ in column]) for column in columns]),
        *(np.array([float(reduce(column)) for column in values]) for reduce in (np.median, np.min, np.max)),
    )
