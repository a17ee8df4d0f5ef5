"""Models compared on a dataset: means over seeds, and differences over resampled users and seeds (METHODS §8)."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from a2gen_rec.errors import DataError
from a2gen_rec.evaluation.prediction_file import read_predictions
from a2gen_rec.experiments.bootstrap import p_value, percentile_interval, resample_weights, weighted_auc, weighted_mean
from a2gen_rec.experiments.results import EvaluatedRun, ExperimentResults

MIN_COUNT = 100
"""Of positives, negatives or known times: an outcome with fewer would be the noise of a mean, and is left out."""
SCORE_METRICS = ("auc", "gauc", "ne", "calibration")
TIME_METRICS = ("mae_log", "mae_s")
REFERENCES = {
    "oracle": "oracle (true probabilities)",
    "item_rate": "item's rate in training",
    "base_rate": "base rate",
    "median_time": "median time in training",
}


@dataclass(frozen=True)
class MeanStd:
    """A metric's mean and sample standard deviation over seeds; no deviation of a single one."""

    mean: float
    std: float | None


@dataclass(frozen=True)
class Difference:
    """A model's metric less its reference's, 95 % interval and two-sided p-value over resampled users and seeds."""

    value: float
    low: float
    high: float
    p: float
    p_is_bound: bool
    """Whether 0 is passed in no resample: then p is at most that."""

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class MetricsRow:
    """A row of the comparison: a model, or a trivial reference.

    Attributes:
        outcomes: action, label or objective -> ``OF_SCORE`` -> value; times: timed action -> ``OF_TIME`` -> value,
            next_times: the same given the steps before each action, empty where that was not measured.
        auc: mean over actions and labels; mae_log, mae_s: mean over timed actions, in log1p seconds and seconds; all
            of them without what has fewer than ``LEAST``.
    """

    name: str
    outcomes: dict[str, dict[str, MeanStd | None]]
    times: dict[str, dict[str, MeanStd | None]]
    times_given_prefix: dict[str, dict[str, MeanStd | None]]
    auc: MeanStd | None
    mae_log: MeanStd | None
    mae_s: MeanStd | None


@dataclass(frozen=True)
class ModelResult(MetricsRow):
    """A model over its seeds.

    Attributes:
        of: the model it is an ablation of, or empty; reference: what it is compared with, or empty.
        overrides: what its settings differ in; seeds: of its runs.
        auc_interval, mae_interval: 95 % interval of ``auc`` and ``mae_log`` over resampled users and seeds.
        auc_difference, mae_difference: to the reference's.
        targets_per_s: training speed of the fastest seed; seconds: median training time of those that trained in one
            go; None where no seed tells.
    """

    ablation_of: str
    reference: str
    overrides: dict[str, Any]
    seeds: tuple[int, ...]
    auc_interval: tuple[float, float] | None
    mae_interval: tuple[float, float] | None
    auc_difference: Difference | None
    mae_difference: Difference | None
    parameters: dict[str, int]
    targets_per_s: float | None
    seconds: float | None


class AveragedOutcomes(NamedTuple):
    """What means are over: actions and labels, and timed actions, of which the test split has ``LEAST``.

    All of them where it has that many of none. ``left_out``: the others.
    """

    outcomes: list[str]
    times: list[str]
    left_out: list[str]

    @classmethod
    def from_test(cls, test: Mapping[str, Any]) -> "AveragedOutcomes":
        most = test["targets"] - MIN_COUNT
        outcomes = [name for name, row in test["actions"].items() if MIN_COUNT <= row["positives"] <= most]
        times = [name for name, row in test["time"].items() if row["count"] >= MIN_COUNT]
        outcomes, times = outcomes or list(test["actions"]), times or list(test["time"])
        return cls(
            outcomes, times, [name for name in {**test["actions"], **test["time"]} if name not in outcomes + times]
        )


@dataclass(frozen=True)
class Comparison:
    """All models of a dataset, in the suite's order: the first is what the others are compared with.

    Attributes:
        targets: impressions of the test split, of so many ``users``.
        scored: outcomes that all models predict; positives: of each; timed: action -> number of known times.
        averaged: of those, what the means are over.
    """

    dataset: str
    targets: int
    users: int
    num_resamples: int
    scored: list[str]
    positives: dict[str, int]
    timed: dict[str, int]
    averaged: AveragedOutcomes
    models: list[ModelResult]
    references: list[MetricsRow]

    @property
    def full_models(self) -> list[ModelResult]:
        """The models that are no ablations."""
        return [model for model in self.models if not model.ablation_of]

    def model(self, name: str) -> ModelResult | None:
        return next((model for model in self.models if model.name == name), None)


@dataclass(frozen=True)
class _Resampled:
    """Mean AUC and mean MAE (log1p s) of a model in every resample [resamples], means over seeds drawn anew."""

    auc: np.ndarray
    mae: np.ndarray


def compare(
    results: ExperimentResults, dataset: str, num_resamples: int = 1000, log: Callable[[str], None] = lambda line: None
) -> Comparison:
    """Compare the models of a recorded experiment on one of its datasets.

    Args:
        tell: takes the name of each model before its predictions are resampled.

    Raises:
        UserError: predictions cannot be read, or are not of the same users for all models.
    """
    runs = [run for run in results.runs if run.dataset == dataset]
    names = list(dict.fromkeys(run.model for run in runs))
    first = runs[0]
    users = np.unique(read_predictions(first.predictions)[0].user)
    weights, averaged = resample_weights(len(users), num_resamples), AveragedOutcomes.from_test(first.test)
    drawn = {}
    for number, name in enumerate(names):
        log(name)
        seeds = np.random.default_rng([number, num_resamples])
        drawn[name] = _resample(results.runs_of(dataset, name), users, weights, averaged, seeds)
    scored = _scored(runs)
    models = []
    for name in names:
        own = results.runs_of(dataset, name)
        reference = own[0].ablation_of or names[0]
        known = reference in names and reference != name
        compared = results.runs_of(dataset, reference) if known else []
        models.append(_model(own, scored, averaged, drawn, compared))
    counts = {**first.test["objectives"], **first.test["actions"]}
    return Comparison(
        dataset=dataset,
        targets=int(first.test["targets"]),
        users=len(users),
        num_resamples=num_resamples,
        scored=scored,
        positives={name: int(counts[name]["positives"]) for name in scored},
        timed={name: int(row["count"]) for name, row in first.test["time"].items()},
        averaged=averaged,
        models=models,
        references=_references(first.test, scored, averaged),
    )


def mean_std(values: Iterable[float | None]) -> MeanStd | None:
    """Mean and deviation over seeds; None if any is unknown, or there are none."""
    values = list(values)
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known or len(known) < len(values):
        return None
    return MeanStd(float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None)


def mean_of(rows: Mapping[str, Mapping[str, Any]], names: Sequence[str], metric: str) -> float | None:
    """Mean of a metric over those outcomes, or times, of an evaluation that have it."""
    known = [rows[name][metric] for name in names if rows.get(name, {}).get(metric) is not None]
    return float(np.mean(known)) if known else None


def _scored(runs: Sequence[EvaluatedRun]) -> list[str]:
    """Actions and labels, and the objectives that all models predict."""
    first = runs[0].test
    shared = [
        name
        for name in first["objectives"]
        if all(name in run.test["objectives"] for run in runs if not run.ablation_of)
    ]
    return [*first["actions"], *(name for name in shared if name not in first["actions"])]


def _model(
    runs: Sequence[EvaluatedRun],
    scored: Sequence[str],
    averaged: AveragedOutcomes,
    drawn: Mapping[str, _Resampled],
    compared: Sequence[EvaluatedRun],
) -> ModelResult:
    """The result of a model's ``runs``, compared with the runs of another, if any."""
    tests, own = [run.test for run in runs], drawn[runs[0].model]
    reference = compared[0].model if compared else ""
    speeds = [run.targets_per_s for run in runs if run.targets_per_s is not None]
    seconds = [run.seconds for run in runs if run.seconds is not None]
    measured = _measured(runs[0].model, tests, scored, averaged)
    differences: list[Difference | None] = [None, None]
    if compared:
        base, other = _measured(reference, [run.test for run in compared], scored, averaged), drawn[reference]
        differences = [
            _difference(measured.auc, base.auc, own.auc - other.auc),
            _difference(measured.mae_log, base.mae_log, own.mae - other.mae),
        ]
    return ModelResult(
        **vars(measured),
        ablation_of=runs[0].ablation_of,
        reference=reference,
        overrides=runs[0].overrides,
        seeds=tuple(run.seed for run in runs),
        auc_interval=percentile_interval(own.auc),
        mae_interval=percentile_interval(own.mae),
        auc_difference=differences[0],
        mae_difference=differences[1],
        parameters=runs[0].parameters,
        targets_per_s=max(speeds, default=None),
        seconds=float(np.median(seconds)) if seconds else None,
    )


def _measured(
    name: str, tests: Sequence[Mapping[str, Any]], scored: Sequence[str], averaged: AveragedOutcomes
) -> MetricsRow:
    outcomes = [{**test["objectives"], **test["actions"]} for test in tests]
    given = [test.get("time_given_prefix", {}) for test in tests]
    return MetricsRow(
        name=name,
        outcomes=_by_metric(outcomes, scored, SCORE_METRICS),
        times=_by_metric([test["time"] for test in tests], list(tests[0]["time"]), TIME_METRICS),
        times_given_prefix=_by_metric(given, list(given[0]), TIME_METRICS),
        auc=mean_std(mean_of(test["actions"], averaged.outcomes, "auc") for test in tests),
        mae_log=mean_std(mean_of(test["time"], averaged.times, "mae_log") for test in tests),
        mae_s=mean_std(mean_of(test["time"], averaged.times, "mae_s") for test in tests),
    )


def _by_metric(
    tests: Sequence[Mapping[str, Any]], names: Sequence[str], metrics: Sequence[str]
) -> dict[str, dict[str, MeanStd | None]]:
    return {
        name: {metric: mean_std(test.get(name, {}).get(metric) for test in tests) for metric in metrics}
        for name in names
    }


def _references(test: Mapping[str, Any], scored: Sequence[str], averaged: AveragedOutcomes) -> list[MetricsRow]:
    """The trivial references of an evaluation, which are the same for all models."""
    found = []
    for key, name in REFERENCES.items():
        rows = test["reference"].get(key)
        if rows:
            empty: dict[str, Any] = {"actions": {}, "objectives": {}, "time": {}}
            rows = empty | {"time" if key == "median_time" else "actions": rows}
            found.append(_measured(name, [rows], scored, averaged))
    return found


def _same_sign(drawn: np.ndarray) -> bool:
    known = drawn[np.isfinite(drawn)]
    return bool((known > 0).all() or (known < 0).all())


def _difference(own: MeanStd | None, other: MeanStd | None, drawn: np.ndarray) -> Difference | None:
    around, p = percentile_interval(drawn), p_value(drawn)
    if own is None or other is None or around is None or p is None:
        return None
    return Difference(own.mean - other.mean, *around, p, _same_sign(drawn))


def _resample(
    runs: Sequence[EvaluatedRun],
    users: np.ndarray,
    weights: np.ndarray,
    averaged: AveragedOutcomes,
    rng: np.random.Generator,
) -> _Resampled:
    """Seeds are drawn with replacement too: another training is as good a sample as other users."""
    found = [_resample_run(run, users, weights, averaged) for run in runs]
    seeds = rng.integers(len(runs), size=(len(runs), weights.shape[1]))

    def mean(of_seeds: list[np.ndarray]) -> np.ndarray:
        return np.take_along_axis(np.array(of_seeds), seeds, axis=0).mean(0)

    return _Resampled(mean([each.auc for each in found]), mean([each.mae for each in found]))


def _resample_run(run: EvaluatedRun, users: np.ndarray, weights: np.ndarray, averaged: AveragedOutcomes) -> _Resampled:
    predictions, names = read_predictions(run.predictions)
    user = np.searchsorted(users, predictions.user)
    if not np.array_equal(np.unique(predictions.user), users):
        raise DataError("is of other users than the other predictions of its dataset", file=run.predictions)
    aucs = []
    for name in averaged.outcomes:
        column = names.index(name)
        score, happened = predictions.probability[:, column], predictions.occurred[:, column]
        known = np.isfinite(score) & np.isfinite(happened)
        aucs.append(weighted_auc(score[known], happened[known], user[known], weights))
    maes = []
    for name in averaged.times:
        error = np.abs(predictions.time[:, names.index(name)] - predictions.observed_time[:, names.index(name)])
        known = np.isfinite(error)
        maes.append(weighted_mean(error[known], user[known], weights))
    return _Resampled(*(_mean_known(parts, weights.shape[1]) for parts in (aucs, maes)))


def _mean_known(parts: Sequence[np.ndarray], resamples: int) -> np.ndarray:
    """Mean over outcomes [resamples]; those that a resample lacks positives of are left out of it."""
    values = np.array(parts).reshape(len(parts), resamples)
    known = np.isfinite(values)
    count = known.sum(0)
    return np.where(known, values, 0).sum(0) / np.where(count > 0, count, math.nan)
