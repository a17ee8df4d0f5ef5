"""Reader of the results of ``a2gen experiment``."""

import json
from dataclasses import dataclass
from typing import Any

from a2gen_rec.errors import DataError, UserError
from a2gen_rec.experiments.runner import RESULTS_FILE
from a2gen_rec.utils import paths


@dataclass(frozen=True)
class EvaluatedRun:
    """Run with its evaluation on the test split.

    Attributes:
        dataset: Name of the dataset.
        model: Name of the model.
        ablation_of: Full model of an ablation; empty for full models.
        seed: Random seed of training.
        overrides: Settings that differ from those of the dataset.
        test: Result of :func:`a2gen_rec.evaluation.evaluate.evaluate`.
        predictions: Parquet file of predictions.
        folder: Run directory.
        parameters: Numbers of parameters, ``tables`` and ``dense``.
        targets_per_s: Training speed; None if nothing was logged.
        seconds: Duration of training; None if it was resumed.
        commit: Git commit of the training; empty if unknown.
        importance: Column -> share of gain, of a gradient boosted model; empty for others.
    """

    dataset: str
    model: str
    ablation_of: str
    seed: int
    overrides: dict[str, Any]
    test: dict[str, Any]
    predictions: str
    folder: str
    parameters: dict[str, int]
    targets_per_s: float | None
    seconds: float | None
    commit: str
    importance: dict[str, float]


@dataclass(frozen=True)
class ExperimentResults:
    """Experiment with its tested runs in the suite's order; other attributes are those of ``results.json``."""

    folder: str
    suite: dict[str, Any]
    machine: dict[str, Any]
    command: str
    best_settings: dict[str, dict[str, dict[str, Any]]]
    runs: list[EvaluatedRun]
    failed: list[dict[str, Any]]

    @property
    def datasets(self) -> list[str]:
        """Return names of datasets with a tested run, in the suite's order."""
        tested = {run.dataset for run in self.runs}
        return [dataset["name"] for dataset in self.suite["datasets"] if dataset["name"] in tested]

    @property
    def models(self) -> list[dict[str, Any]]:
        """Return models, then ablations, with ``name``, ``overrides`` and ``ablation_of``."""
        return list(self.suite["models"])

    def runs_of(self, dataset: str, model: str) -> list[EvaluatedRun]:
        """Return the runs of a model on a dataset, one per seed."""
        return [run for run in self.runs if (run.dataset, run.model) == (dataset, model)]


def read_experiment(folder: str) -> ExperimentResults:
    """Read the experiment in ``folder``.

    Raises:
        UserError: There is no experiment or no tested run, or a file cannot be read.
        DataError: A file has an unexpected format.
    """
    file = paths.join(folder, RESULTS_FILE)
    if not paths.exists(file):
        paths.require_dir(folder)
        raise UserError(f"{folder}: no {RESULTS_FILE} found; run `a2gen experiment --out {folder}` first")
    raw = _json(file)
    try:
        results = ExperimentResults(
            folder=folder,
            suite={**raw["suite"], "models": [_model(model) for model in raw["suite"]["models"]]},
            machine=dict(raw["machine"]),
            command=raw.get("command", ""),
            best_settings=dict(raw["best_settings"]),
            runs=[_run(run, folder) for run in raw["runs"]],
            failed=[{name: failure[name] for name in ("phase", "run", "error")} for failure in raw["failed"]],
        )
        known = [model["name"] for model in results.models]
        results.runs.sort(key=lambda run: (known.index(run.model), run.seed))
        datasets = results.datasets
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"not a results file of an experiment ({_reason(error)})", file=file) from error
    if not datasets:
        raise UserError(f"{file}: no run has been tested yet; rerun the same `a2gen experiment` to continue")
    return results


def _model(raw: dict[str, Any]) -> dict[str, Any]:
    return {"name": str(raw["name"]), "overrides": dict(raw["overrides"]), "ablation_of": raw["ablation_of"] or ""}


def _run(raw: dict[str, Any], folder: str) -> EvaluatedRun:
    file = paths.join(folder, raw["test"])
    test = _json(file)
    for name in ("targets", "actions", "time", "objectives", "reference"):
        if not isinstance(test, dict) or name not in test:
            raise DataError(f"not an evaluation ({name!r} is missing)", file=file)
    return EvaluatedRun(
        dataset=raw["dataset"],
        model=raw["model"],
        ablation_of=raw["ablation_of"] or "",
        seed=raw["seed"],
        overrides=dict(raw["overrides"]),
        test=test,
        predictions=paths.join(folder, raw["predictions"]),
        folder=paths.join(folder, raw["folder"]),
        parameters={name: int(raw["parameters"][name]) for name in ("tables", "dense")},
        targets_per_s=raw["targets_per_s"],
        seconds=None if raw["resumed"] else float(raw["seconds"]),
        commit=raw["machine"]["commit"] or "",
        importance={name: float(share) for name, share in raw.get("importance", {}).items()},
    )


def _json(file: str) -> Any:
    try:
        return json.loads(paths.read_text(file))
    except ValueError as error:
        raise DataError(f"invalid JSON ({error})", file=file) from error


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)
