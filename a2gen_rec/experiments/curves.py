"""What models say against what happened, and how they got there, as curves over all their seeds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from a2gen_rec.evaluation.prediction_file import read_predictions
from a2gen_rec.experiments.records import read_scalars
from a2gen_rec.experiments.results import EvaluatedRun

BINS = 10
QUANTILES = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class CalibrationCurve:
    """Predicted and observed rates of one outcome, [bins]: equally many predictions in each, fewest first."""

    predicted: np.ndarray
    observed: np.ndarray
    count: np.ndarray


@dataclass(frozen=True)
class TimeCurve:
    """Seconds of one action at ``QUANTILES``, of the impressions in which it happened and both are known."""

    predicted: np.ndarray
    observed: np.ndarray
    count: int


@dataclass(frozen=True)
class PredictionCurves:
    """A model's curves, by outcome and by timed action; none of what did not happen."""

    model: str
    calibration: dict[str, CalibrationCurve]
    times: dict[str, TimeCurve]


@dataclass(frozen=True)
class LearningCurve:
    """A model's validations: median, least and largest over its seeds, [validations] each.

    Attributes:
        step: of the k-th validation, the median of the seeds that came so far.
    """

    model: str
    step: np.ndarray
    median: np.ndarray
    min: np.ndarray
    max: np.ndarray


def predicted_curves(runs: Sequence[EvaluatedRun]) -> PredictionCurves:
    """The curves of one model's runs, all seeds' predictions together.

    Raises:
        UserError: predictions cannot be read.
    """
    found = [read_predictions(run.predictions) for run in runs]
    test, names = runs[0].test, found[0][1]
    calibrations, times = {}, {}
    for name in [*test["actions"], *test["objectives"]]:
        column = names.index(name)
        score = np.concatenate([predictions.probability[:, column] for predictions, _ in found])
        happened = np.concatenate([predictions.occurred[:, column] for predictions, _ in found])
        known = np.isfinite(score) & np.isfinite(happened)
        if happened[known].any():
            calibrations[name] = calibration_curve(score[known], happened[known])
    for name in test["time"]:
        column = names.index(name)
        said = np.concatenate([predictions.time[:, column] for predictions, _ in found]).astype(np.float64)
        was = np.concatenate([predictions.observed_time[:, column] for predictions, _ in found]).astype(np.float64)
        known = np.isfinite(said) & np.isfinite(was)
        if known.any():
            predicted, observed = (np.expm1(np.quantile(values[known], QUANTILES)) for values in (said, was))
            times[name] = TimeCurve(predicted, observed, int(known.sum()) // len(runs))
    return PredictionCurves(runs[0].model, calibrations, times)


def calibration_curve(scores: np.ndarray, labels: np.ndarray, bins: int = BINS) -> CalibrationCurve:
    """Mean prediction and rate per bin of equally many predictions; equal predictions share a bin."""
    order = np.argsort(scores, kind="stable")
    scores, labels = scores[order].astype(np.float64), labels[order].astype(np.float64)
    # A bin begins at the first of the predictions that are equal to its edge.
    edges = scores[np.arange(bins) * len(scores) // bins]
    first = np.unique(np.searchsorted(scores, edges))
    count = np.diff(np.append(first, len(scores)))
    return CalibrationCurve(np.add.reduceat(scores, first) / count, np.add.reduceat(labels, first) / count, count)


def learning_curve(runs: Sequence[EvaluatedRun], metric: str) -> LearningCurve | None:
    """How a metric of validation went in the runs of one model; None if none has logged it."""
    name = f"valid/{metric}"
    logged = [curve for curve in (read_scalars(run.folder, [name])[name] for run in runs) if curve]
    if not logged:
        return None
    # Seeds differ a little in the steps of an epoch: what belongs together is the k-th validation.
    columns = [[curve[k] for curve in logged if k < len(curve)] for k in range(max(map(len, logged)))]
    values = [[value for _, value in column] for column in columns]
    return LearningCurve(
        runs[0].model,
        np.array([np.median([step for step, _ in column]) for column in columns]),
        *(np.array([float(of(each)) for each in values]) for of in (np.median, np.min, np.max)),
    )
