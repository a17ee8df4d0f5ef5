"""Training of a run's ensemble and its comparison with the baselines (METHODS §6)."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from a2gen_rec.config import EnsembleConfig
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.ensemble.fit_baselines import fit_baselines, learned_baselines
from a2gen_rec.ensemble.score_lists import SCORES_FORMAT_VERSION, behavior_names, score_session_lists
from a2gen_rec.ensemble.session_lists import SessionLists
from a2gen_rec.ensemble.trainer import (
    ProgressCallback,
    fit_ensemble,
    max_monotonicity_violations,
    mean_weight_entropy,
    measure_lists,
    score_lists,
)
from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.models.ensemble.io import CARD_FILE, EnsembleCard, check_output_dir, load_ensemble, save_ensemble
from a2gen_rec.models.ensemble.model import Ensemble
from a2gen_rec.models.scoring import prediction_objectives
from a2gen_rec.training.loaded_run import DeviceChoice, LoadedRun, load_run
from a2gen_rec.training.run_dir import RunDir
from a2gen_rec.utils import paths
from a2gen_rec.utils.digest import hex_digest
from a2gen_rec.utils.distributed import sync_errors

UMRE = "UMRE"


@dataclass(frozen=True)
class TrainedEnsemble:
    """Trained ensemble with its training and validation lists, and their dataset."""

    model: Ensemble
    card: EnsembleCard
    train: SessionLists
    valid: SessionLists
    dataset: Dataset


def train_ensemble(
    run: str,
    out: str,
    config: EnsembleConfig,
    callback: ProgressCallback,
    data: str = "",
    device: DeviceChoice = "auto",
) -> TrainedEnsemble | None:
    """Score the training and validation splits with a run's best checkpoint, train an ensemble, save it to ``out``.

    Called by all ranks. All ranks score; rank 0 trains and gets the result. The baselines are trained on the same
    lists, and all models are evaluated on validation.

    Args:
        run: Run directory.
        out: Directory of the ensemble; an existing ensemble is replaced.
        config: Settings of the ensemble.
        callback: Receiver of progress.
        data: Dataset directory; by default that of the run.
        device: Device of the ranker and of training.

    Raises:
        ConfigError: ``behavior_weights`` names a behavior that the dataset does not have, or ``min_weight`` is too
            large for the number of behaviors.
        UserError: The run does not exist, its dataset has no lists, or ``out`` is not an ensemble directory.
    """
    with load_run(run, data, device) as loaded:
        with sync_errors():
            _check_behaviors(loaded, config)
            if not DatasetCard.load(loaded.data).splits["valid"].targets:
                raise UserError(
                    f"{loaded.data}: the validation split is empty, which the ensemble needs; choose --data"
                )
            check_output_dir(out)
        train, valid = (
            cached_session_lists(loaded, run, split, config, callback.on_scoring) for split in ("train", "valid")
        )
    # Outside the process group: training on rank 0 may exceed the timeout of a collective.
    if train is None or valid is None:
        return None
    return _train(loaded, run, out, config, train, valid, callback)


def cached_session_lists(
    loaded: LoadedRun,
    run: str,
    split: str,
    config: EnsembleConfig,
    progress: Callable[[str, int, int], None] | None = None,
) -> SessionLists | None:
    """Return the scored session lists of a split, from the run's cache if present. Called by all ranks.

    The cache has one directory per checkpoint, content of the dataset and list settings.

    Returns:
        The lists on rank 0, None on the others.

    Raises:
        UserError: As for :func:`score_session_lists`.
    """
    max_events, gap_s = config.max_history_events, config.session_gap_s or loaded.card.session_gap_s
    with sync_errors():
        data = {"path": paths.abspath(loaded.data), **DatasetCard.load(loaded.data).without_command()}
    settings = {
        "max_unexplored_mass": loaded.config.evaluate.max_unexplored_mass,
        "max_events": max_events,
        "gap_s": gap_s,
        "version": SCORES_FORMAT_VERSION,
    }
    key = json.dumps({"data": data, **settings, "checkpoint": loaded.fingerprint}, sort_keys=True)
    folder = paths.join(RunDir(run).scores, f"step-{loaded.step:08d}-{hex_digest(key, 12)}")
    split_progress = None if progress is None else partial(progress, split)
    return score_session_lists(loaded, split, paths.join(folder, split), max_events, gap_s, split_progress)


def default_ensemble_dir(run: str) -> str:
    """Return the directory of the run's default ensemble; empty if it has none."""
    folder = RunDir(run).ensemble
    return folder if paths.exists(paths.join(folder, CARD_FILE)) else ""


def load_compatible_ensemble(loaded: LoadedRun, folder: str) -> tuple[Ensemble, EnsembleCard]:
    """Load an ensemble trained on the loaded checkpoint.

    Returns:
        The ensemble on the CPU, and its card.

    Raises:
        UserError: The ensemble is missing or corrupted, or belongs to another run or checkpoint.
    """
    model, card = load_ensemble(folder)
    check_compatible(card, loaded, folder)
    return model, card


def check_compatible(card: EnsembleCard, loaded: LoadedRun, folder: str) -> None:
    """Raise UserError unless the ensemble was trained on the loaded checkpoint."""
    hint = "run `a2gen ensemble train` again or remove it"
    if card.step != loaded.step:
        raise UserError(
            f"{folder}: ensemble was trained on step {card.step} of {card.run}, best checkpoint is step {loaded.step}; "
            f"{hint}"
        )
    if card.objectives != list(prediction_objectives(loaded.card, loaded.model.model.ranker.objective_tasks)):
        raise UserError(f"{folder}: ensemble was trained on {card.run}, which has different outputs; {hint}")
    if card.checkpoint != loaded.fingerprint:
        raise UserError(f"{folder}: ensemble belongs to another run, {card.run}; {hint}")


def _check_behaviors(loaded: LoadedRun, config: EnsembleConfig) -> None:
    """Check the configured behaviors before scoring."""
    available = behavior_names(loaded.card)
    if not available:
        raise UserError(f"dataset {loaded.card.name!r} has no action, label or watch time to train an ensemble for")
    for name in config.behavior_weights:
        if name not in available:
            raise ConfigError(f"ensemble.behavior_weights.{name}: unknown behavior; choose from {', '.join(available)}")
    # Without configured weights, only behaviors with positives get one.
    positives = loaded.card.splits["train"].positives
    trained = list(config.behavior_weights) or [name for name in available if positives.get(name)] or list(available)
    if config.weighting == "pareto_efficient" and config.min_weight * len(trained) > 1:
        raise ConfigError(
            f"ensemble.min_weight {config.min_weight} must be at most 1 / {len(trained)}: {len(trained)} behaviors are "
            f"trained ({', '.join(trained)})"
        )


def _train(
    loaded: LoadedRun,
    run: str,
    out: str,
    config: EnsembleConfig,
    train: SessionLists,
    valid: SessionLists,
    callback: ProgressCallback,
) -> TrainedEnsemble:
    objectives = prediction_objectives(loaded.card, loaded.model.model.ranker.objective_tasks)
    device = loaded.process.device
    callback.on_fit_start(UMRE)
    model, history = fit_ensemble(objectives, train, valid, config, partial(callback.on_epoch_end, UMRE), device)
    d_context, d_event = train.widths
    violations = max_monotonicity_violations(model, valid)
    card = EnsembleCard(
        objectives=list(objectives),
        behavior_weights=history.epochs[history.best_epoch].weights,
        d_event=d_event,
        d_context=d_context,
        config=config,
        run=run,
        step=loaded.step,
        checkpoint=loaded.fingerprint,
        lineage=loaded.identity.lineage,
        max_monotonicity_violation=dict(zip(train.objectives, violations.tolist(), strict=True)),
    )
    models: dict[str, nn.Module] = {UMRE: model.cpu(), **fit_baselines(card, train, valid, device, callback)}
    card = replace(card, metrics={"split": "valid", **measure_methods(models, valid, card)})
    save_ensemble(out, model, card, learned_baselines(models))
    return TrainedEnsemble(model, card, train, valid, loaded.dataset)


def measure_methods(models: dict[str, nn.Module], lists: SessionLists, card: EnsembleCard) -> dict[str, Any]:
    """Return list metrics per method over the trained behaviors, and the mean entropy of the ensemble's weights."""
    names, k = list(card.behavior_weights), card.config.top_k
    methods = {name: measure_lists(score_lists(model, lists), lists, k, names) for name, model in models.items()}
    ensemble, umre = methods[UMRE], models[UMRE]
    assert isinstance(umre, Ensemble)
    return {
        "k": k,
        "lists": ensemble["lists"],
        "mean_length": ensemble["mean_length"],
        "behaviors": names,
        "weight_entropy": mean_weight_entropy(umre, lists),
        "methods": {
            method: {
                "behaviors": metrics["behaviors"],
                "mean": {name: metrics[name] for name in ("hr", "ndcg", "uauc")},
                "hypervolume": metrics["hypervolume"],
            }
            for method, metrics in methods.items()
        },
    }
