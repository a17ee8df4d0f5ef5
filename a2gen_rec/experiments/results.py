"""What `a2gen experiment` left in a folder, read for a report."""

import json
from dataclasses import dataclass
from typing import Any

from a2gen_rec.errors import DataError, UserError
from a2gen_rec.experiments.runner import RESULTS_FILE
from a2gen_rec.utils import paths


@dataclass(frozen=True)
class EvaluatedRun:
    """A run with its evaluation on the test split.

    Attributes:
        of: the model whose ablation it is; empty if it is none.
        overrides: what its settings differ in from the dataset's; test: as ``training.evaluate.evaluate`` returns it.
        predictions, folder: where its predictions, and all else of it, are.
        targets_per_s: training speed; None if it was too short to tell. seconds: of training; None if it was resumed.
        commit: of the code that trained it; empty if unknown.
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


@dataclass(frozen=True)
class ExperimentResults:
    """An experiment: its tested runs in the suite's order, and the rest of ``results.json`` as it is there."""

    folder: str
    suite: dict[str, Any]
    machine: dict[str, Any]
    command: str
    best_settings: dict[str, dict[str, dict[str, Any]]]
    runs: list[EvaluatedRun]
    failed: list[dict[str, Any]]

    @property
    def datasets(self) -> list[str]:
        """Those with a tested run, in the suite's order."""
        there = {run.dataset for run in self.runs}
        return [dataset["name"] for dataset in self.suite["datasets"] if dataset["name"] in there]

    @property
    def models(self) -> list[dict[str, Any]]:
        """Models and then ablations: ``name``, ``overrides``, ``of``."""
        return list(self.suite["models"])

    def runs_of(self, dataset: str, model: str) -> list[EvaluatedRun]:
        """The runs of a model on a dataset, one per seed."""
        return [run for run in self.runs if (run.dataset, run.model) == (dataset, model)]


def read_experiment(folder: str) -> ExperimentResults:
    """The experiment in ``folder``.

    Raises:
        UserError: there is none, it has no tested run, or a file of it cannot be read.
        DataError: a file of it is not what `a2gen experiment` writes.
    """
    file = paths.join(folder, RESULTS_FILE)
    if not paths.exists(file):
        raise UserError(f"{folder}: has no {RESULTS_FILE}; `a2gen experiment --out {folder}` writes it")
    raw = _json(file)
    try:
        recorded = ExperimentResults(
            folder=folder,
            suite={**raw["suite"], "models": [_model(model) for model in raw["suite"]["models"]]},
            machine=dict(raw["machine"]),
            command=raw.get("command", ""),
            best_settings=dict(raw["best_settings"]),
            runs=[_run(run, folder) for run in raw["runs"]],
            failed=[{name: failure[name] for name in ("phase", "run", "error")} for failure in raw["failed"]],
        )
        known = [model["name"] for model in recorded.models]
        recorded.runs.sort(key=lambda run: (known.index(run.model), run.seed))
        datasets = recorded.datasets
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"is not an experiment's results ({_reason(error)})", file=file) from error
    if not datasets:
        raise UserError(f"{file}: no run has been tested yet; the same `a2gen experiment` goes on with it")
    return recorded


def _model(raw: dict[str, Any]) -> dict[str, Any]:
    return {"name": str(raw["name"]), "overrides": dict(raw["overrides"]), "ablation_of": raw["ablation_of"] or ""}


def _run(raw: dict[str, Any], folder: str) -> EvaluatedRun:
    file = paths.join(folder, raw["test"])
    test = _json(file)
    for name in ("targets", "actions", "time", "objectives", "reference"):
        if not isinstance(test, dict) or name not in test:
            raise DataError(f"is not an evaluation ({name!r} is missing)", file=file)
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
    )


def _json(file: str) -> Any:
    try:
        return json.loads(paths.read_text(file))
    except ValueError as error:
        raise DataError(f"is not JSON ({error})", file=file) from error


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)
