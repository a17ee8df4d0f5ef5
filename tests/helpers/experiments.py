"""Synthetic experiments for tests of the report: `results.json` with evaluations and predictions."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from a2gen_rec.data.card import DatasetCard
from a2gen_rec.evaluation.metrics import binary_metrics, time_metrics
from a2gen_rec.evaluation.predict import Predictions, outcome_columns
from a2gen_rec.evaluation.prediction_file import write_predictions
from tests.helpers.cards import make_card

CARD = make_card()
MACHINE = {"date": "today", "commit": "", "device": "cpu", "cpu": "fast", "cores": 2, "threads": 1}
MACHINE |= dict.fromkeys(("python", "torch", "torchrec", "fbgemm_gpu"), "1.0")


def make_predictions(
    card: DatasetCard, skill: float, seed: int, rows: int = 300, users: int = 40, new_items: float = 0.0
) -> Predictions:
    """Return predictions whose accuracy grows with ``skill``; users, items and outcomes are the same for all seeds."""
    outcome_rng, rng = np.random.default_rng(7), np.random.default_rng(seed)
    outcomes, actions = len(outcome_columns(card)), len(card.actions) - 1
    chance = outcome_rng.uniform(0.05, 0.6, (rows, outcomes))
    occurred = (outcome_rng.random((rows, outcomes)) < chance).astype(np.float32)
    occurred[:, actions - 1] = 1  # all exit
    observed_time = np.where(occurred[:, :actions] > 0, outcome_rng.gamma(4, 0.5, (rows, actions)), np.nan)
    for column, name in enumerate(card.actions[1:]):
        observed_time[:, column] = np.where(name in card.timed_actions, observed_time[:, column], np.nan)
    logit = skill * np.log(chance / (1 - chance)) + rng.normal(size=chance.shape)
    return Predictions(
        user=outcome_rng.integers(0, users, rows) * 10**6,
        ts_ms=np.arange(rows),
        user_row=np.full(rows, -1),
        item=np.where(outcome_rng.random(rows) < new_items, 0, outcome_rng.integers(1, 40, rows)),
        duration_bucket=np.zeros(rows, np.int64),
        probability=(1 / (1 + np.exp(-logit))).astype(np.float32),
        occurred=occurred,
        time=(2 + (1 / (1 + skill)) * rng.normal(size=observed_time.shape)).astype(np.float32),
        observed_time=observed_time.astype(np.float32),
        time_given_prefix=observed_time.astype(np.float32) + 0.25,
        watch_time=np.full(rows, np.nan, np.float32),
        oracle=chance[:, : len(card.oracle_columns)].astype(np.float32),
        unexplored_mass=np.zeros(rows, np.float32),
    )


def measure(predictions: Predictions, card: DatasetCard) -> dict[str, Any]:
    """Return the metrics of `a2gen evaluate` that a report reads."""
    names = outcome_columns(card)

    def score(name: str) -> dict[str, Any]:
        column = names[name]
        return binary_metrics(predictions.probability[:, column], predictions.occurred[:, column], predictions.user)

    rates = {
        name: {"auc": 0.55, "gauc": 0.5, "ne": 0.99, "calibration": 1.0, "positives": 1}
        for name in card.predicted_actions
    }
    return {
        "targets": len(predictions.user),
        "actions": {name: score(name) for name in [*card.predicted_actions, *card.labels]},
        "objectives": {name: score(name) for name in card.objectives},
        "time": {
            name: time_metrics(predictions.time[:, column], predictions.observed_time[:, column])
            for name, column in names.items()
            if name in card.timed_actions
        },
        "time_given_prefix": {name: {"mae_log": 0.25, "mae_s": 1.0} for name in card.timed_actions},
        "reference": {
            "item_rate": rates,
            "median_time": {name: {"mae_log": 0.9, "mae_s": 9.0} for name in card.timed_actions},
            **(
                {"oracle": {name: rates[name] | {"auc": 0.9} for name in card.oracle_columns}}
                if card.oracle_columns
                else {}
            ),
        },
    }


def write_experiment(
    folder: Path,
    models: Mapping[str, float],
    ablations: Mapping[str, float] | None = None,
    seeds: Sequence[int] = (0,),
    datasets: Sequence[str] = ("one",),
    card: DatasetCard = CARD,
    users: int = 40,
    new_items: float = 0.0,
    **more: Any,
) -> Path:
    """Write an experiment and return its directory.

    Args:
        folder: Directory of the experiment.
        models: Model -> skill of its predictions.
        ablations: Ablation of the first model -> skill of its predictions.
        seeds: Seeds of every model.
        datasets: Names of the datasets.
        card: Card of every dataset.
        users: Number of users.
        new_items: Share of impressions of new items.
        more: Keys of ``results.json`` to add or replace.
    """
    first = next(iter(models))
    suite_models = [{"name": name, "overrides": {}, "ablation_of": ""} for name in models]
    suite_models += [
        {"name": name, "overrides": {"model.gate": False}, "ablation_of": first} for name in ablations or {}
    ]
    runs = []
    for dataset in datasets:
        for model in suite_models:
            for seed in seeds:
                run_dir = f"runs/{dataset}/{len(runs)}"
                (folder / run_dir).mkdir(parents=True)
                skill = {**models, **(ablations or {})}[model["name"]]
                predictions = make_predictions(card, skill, seed=len(runs), users=users, new_items=new_items)
                write_predictions(str(folder / run_dir / "test.parquet"), predictions, card)
                (folder / run_dir / "test.json").write_text(json.dumps(measure(predictions, card)))
                runs.append(
                    {
                        "dataset": dataset,
                        "model": model["name"],
                        "ablation_of": model["ablation_of"] or None,
                        "seed": seed,
                        "overrides": model["overrides"],
                        "parameters": {"tables": 1000, "dense": 200},
                        "targets_per_s": 100.0 * (1 + len(runs)),
                        "seconds": 3.0 + len(runs),
                        "resumed": False,
                        "machine": MACHINE,
                        "folder": run_dir,
                        "test": f"{run_dir}/test.json",
                        "predictions": f"{run_dir}/test.parquet",
                    }
                )
    results = {
        "suite": {
            "datasets": [{"name": name, "settings": {"train": {"epochs": 2}}} for name in datasets],
            "models": suite_models,
            "seeds": list(seeds),
            "tuning": None,
        },
        "machine": MACHINE,
        "command": "a2gen experiment --out here",
        "best_settings": {},
        "trials": [],
        "runs": runs,
        "failed": [],
    }
    (folder / "results.json").write_text(json.dumps(results | more))
    return folder


def plain_card() -> DatasetCard:
    """Return the card of a log without times, labels and objectives."""
    return replace(CARD, timed_actions=[], labels=[], objectives=[])
