"""Comparison of models on a dataset: means over seeds, and bootstrap over users and seeds (METHODS §8)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from a2gen_rec.evaluation.prediction_file import read_predictions
from a2gen_rec.experiments.bootstrap import percentile_interval, resample_weights
from a2gen_rec.experiments.differences import Difference, MeanStd, difference_of, mean_std, with_seed_error
from a2gen_rec.experiments.item_subsets import ItemSubset, item_subsets
from a2gen_rec.experiments.resampling import AveragedOutcomes, Resampled, resample
from a2gen_rec.experiments.results import EvaluatedRun, ExperimentResults

SCORE_METRICS = ("auc", "gauc", "ne", "calibration")
TIME_METRICS = ("mae_log", "mae_s")
REFERENCES = {
    "oracle": "oracle (true probabilities)",
    "item_rate": "item's rate in training",
    "base_rate": "base rate",
    "median_time": "median time in training",
}


@dataclass(frozen=True)
class MetricsRow:
    """Row of the comparison: a model or a trivial baseline.

    Means exclude outcomes with fewer than ``MIN_COUNT`` positives, negatives or known times.

    Attributes:
        name: Name of the model or baseline.
        outcomes: Action, label or objective -> metric of ``SCORE_METRICS`` -> value.
        times: Timed action -> metric of ``TIME_METRICS`` -> value.
        times_given_prefix: As ``times``, given the steps before each action; empty if not measured.
        auc: Mean over actions and labels.
        mae_log: Mean over timed actions, log1p seconds.
        mae_s: Mean over timed actions, seconds.
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
    """Results of a model over its seeds.

    Attributes:
        ablation_of: Full model of an ablation; empty for full models.
        reference: Model of comparison; empty for none.
        overrides: Settings that differ from those of the dataset.
        seeds: Seeds of the runs.
        auc_interval: 95 % bootstrap interval of ``auc``.
        mae_interval: 95 % bootstrap interval of ``mae_log``.
        auc_difference: Difference of ``auc`` to the reference.
        mae_difference: Difference of ``mae_log`` to the reference.
        parameters: Numbers of parameters, ``tables`` and ``dense``.
        targets_per_s: Training speed of the fastest seed; None if unknown.
        seconds: Median training time of uninterrupted runs; None if there are none.
        importance: Column -> mean share of gain over seeds, of a gradient boosted model; empty for others.
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
    importance: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """Comparison of all models on a dataset, in the suite's order; the first model is the reference of the others.

    Attributes:
        dataset: Name of the dataset.
        targets: Impressions of the test split.
        users: Users of the test split.
        num_resamples: Number of bootstrap resamples.
        scored: Outcomes that all models predict.
        positives: Outcome -> number of positives.
        timed: Timed action -> number of known times.
        averaged: Outcomes that enter the means.
        models: Results of the models.
        references: Metrics of the trivial baselines.
        subsets: Comparisons on new and on known items; empty without enough impressions of both.
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
    subsets: list[ItemSubset]

    @property
    def full_models(self) -> list[ModelResult]:
        """Return the models that are not ablations."""
        return [model for model in self.models if not model.ablation_of]

    def model(self, name: str) -> ModelResult | None:
        """Return a model by name; None if it is missing."""
        return next((model for model in self.models if model.name == name), None)


def compare(
    results: ExperimentResults, dataset: str, num_resamples: int = 1000, log: Callable[[str], None] = lambda line: None
) -> Comparison:
    """Compare the models of an experiment on one dataset.

    Args:
        results: Results of the experiment.
        dataset: Name of the dataset.
        num_resamples: Number of bootstrap resamples.
        log: Called with the name of each model before its predictions are resampled.

    Raises:
        UserError: Predictions cannot be read, or models were tested on different users.
    """
    runs = [run for run in results.runs if run.dataset == dataset]
    names = list(dict.fromkeys(run.model for run in runs))
    first = runs[0]
    users = np.unique(read_predictions(first.predictions)[0].user)
    weights, averaged = resample_weights(len(users), num_resamples), AveragedOutcomes.from_test(first.test)
    resampled = {}
    for name in names:
        log(name)
        resampled[name] = resample(results.runs_of(dataset, name), users, weights, averaged)
    scored = _scored(runs)
    runs_by_name = {name: results.runs_of(dataset, name) for name in names}
    references = {name: model_runs[0].ablation_of or names[0] for name, model_runs in runs_by_name.items()}
    references = {name: other for name, other in references.items() if other in names and other != name}
    models = [
        _model(model_runs, scored, averaged, resampled, runs_by_name.get(references.get(name, ""), []))
        for name, model_runs in runs_by_name.items()
    ]
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
        subsets=item_subsets(runs_by_name, references, users, weights),
    )


def mean_of(rows: Mapping[str, Mapping[str, Any]], names: Sequence[str], metric: str) -> float | None:
    """Return the mean of a metric over the named rows of an evaluation that have it; None if there are none."""
    known = [rows[name][metric] for name in names if rows.get(name, {}).get(metric) is not None]
    return float(np.mean(known)) if known else None


def _scored(runs: Sequence[EvaluatedRun]) -> list[str]:
    """Return actions, labels, and the objectives that all models predict."""
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
    resampled: Mapping[str, Resampled],
    reference_runs: Sequence[EvaluatedRun],
) -> ModelResult:
    """Return the result of a model's ``runs``, with differences to ``reference_runs`` if there are any."""
    tests, bootstrap = [run.test for run in runs], resampled[runs[0].model]
    reference = reference_runs[0].model if reference_runs else ""
    speeds = [run.targets_per_s for run in runs if run.targets_per_s is not None]
    seconds = [run.seconds for run in runs if run.seconds is not None]
    row = _metrics_row(runs[0].model, tests, scored, averaged)
    differences: list[Difference | None] = [None, None]
    if reference_runs:
        reference_row = _metrics_row(reference, [run.test for run in reference_runs], scored, averaged)
        other = resampled[reference]
        differences = [
            difference_of(
                row.auc, reference_row.auc, bootstrap.auc, other.auc, min(bootstrap.auc_users, other.auc_users)
            ),
            difference_of(
                row.mae_log, reference_row.mae_log, bootstrap.mae, other.mae, min(bootstrap.mae_users, other.mae_users)
            ),
        ]
    return ModelResult(
        **vars(row),
        ablation_of=runs[0].ablation_of,
        reference=reference,
        overrides=runs[0].overrides,
        seeds=tuple(run.seed for run in runs),
        auc_interval=percentile_interval(with_seed_error(bootstrap.auc)),
        mae_interval=percentile_interval(with_seed_error(bootstrap.mae)),
        auc_difference=differences[0],
        mae_difference=differences[1],
        parameters=runs[0].parameters,
        targets_per_s=max(speeds, default=None),
        seconds=float(np.median(seconds)) if seconds else None,
        importance=_mean_importance(runs),
    )


def _mean_importance(runs: Sequence[EvaluatedRun]) -> dict[str, float]:
    """Return the mean share of gain of every column, descending."""
    names = dict.fromkeys(name for run in runs for name in run.importance)
    mean = {name: float(np.mean([run.importance.get(name, 0.0) for run in runs])) for name in names}
    return dict(sorted(mean.items(), key=lambda item: -item[1]))


def _metrics_row(
    name: str, tests: Sequence[Mapping[str, Any]], scored: Sequence[str], averaged: AveragedOutcomes
) -> MetricsRow:
    outcomes = [{**test["objectives"], **test["actions"]} for test in tests]
    given_prefix = [test.get("time_given_prefix", {}) for test in tests]
    return MetricsRow(
        name=name,
        outcomes=_by_metric(outcomes, scored, SCORE_METRICS),
        times=_by_metric([test["time"] for test in tests], list(tests[0]["time"]), TIME_METRICS),
        times_given_prefix=_by_metric(given_prefix, list(given_prefix[0]), TIME_METRICS),
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
    """Return the metrics of the trivial baselines, which are the same for all models."""
    references = []
    for key, name in REFERENCES.items():
        rows = test["reference"].get(key)
        if rows:
            empty: dict[str, Any] = {"actions": {}, "objectives": {}, "time": {}}
            rows = empty | {"time" if key == "median_time" else "actions": rows}
            references.append(_metrics_row(name, [rows], scored, averaged))
    return references
