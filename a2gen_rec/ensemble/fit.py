"""From a trained ranker to a trained ensemble, and how it fares beside other ways to one score (METHODS §6)."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from a2gen_rec.config import EnsembleConfig
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.ensemble.fit_baselines import fit_baselines, learned_baselines
from a2gen_rec.ensemble.score_lists import SCORES_FORMAT_VERSION, behavior_names, score_session_lists
from a2gen_rec.ensemble.session_lists import SessionLists
from a2gen_rec.ensemble.trainer import (
    ProgressCallback,
    fit_ensemble,
    max_monotonicity_violations,
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
from a2gen_rec.utils.distributed import sync_errors

UMRE = "UMRE"


@dataclass(frozen=True)
class TrainedEnsemble:
    """A trained ensemble with the lists it saw, and the dataset they are of."""

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
    """Score the training and validation splits with a run's best checkpoint, train on them, save to ``out``.

    All ranks call it and score; rank 0 trains, and gets the result. Beside the ensemble, what it is compared with is
    trained on the same lists, and all are measured on validation.

    Args:
        out: folder of the ensemble; replaced if there is one.
        data: dataset folder; by default the run's own.

    Raises:
        ConfigError: a behaviour to train for that the dataset does not have.
        UserError: no such run; its dataset gives no lists; ``out`` holds something else.
    """
    with load_run(run, data, device) as opened:
        with sync_errors():
            _check_behaviors(opened, config)
            check_output_dir(out)
        train, valid = (
            cached_session_lists(opened, run, split, config, callback.on_scoring) for split in ("train", "valid")
        )
    # Out of the group: no rank waits for the first, which may train for longer than the group has patience.
    if train is None or valid is None:
        return None
    return _train(opened, run, out, config, train, valid, callback)


def cached_session_lists(
    opened: LoadedRun,
    run: str,
    split: str,
    config: EnsembleConfig,
    progress: Callable[[str, int, int], None] | None = None,
) -> SessionLists | None:
    """A split's scored session lists, made where the run does not have them yet. Rank 0 gets them.

    They are kept in a folder of the run, one for each checkpoint, dataset and way to make lists.

    Raises:
        UserError: as :func:`score_split` raises.
    """
    events, gap_s = config.max_history_events, config.session_gap_s or opened.card.session_gap_s
    with sync_errors():
        data = {"data": paths.abspath(opened.data), "card": DatasetCard.load(opened.data).to_dict()}
    how = {
        "max_error": opened.config.evaluate.max_unexplored_mass,
        "events": events,
        "gap_s": gap_s,
        "version": SCORES_FORMAT_VERSION,
    }
    made_of = json.dumps({**data, **how, "checkpoint": opened.fingerprint}, sort_keys=True)
    digest = hashlib.sha256(made_of.encode()).hexdigest()[:12]
    folder = paths.join(RunDir(run).scores, f"step-{opened.step:08d}-{digest}")
    tell = None if progress is None else partial(progress, split)
    return score_session_lists(opened, split, paths.join(folder, split), events, gap_s, tell)


def default_ensemble_dir(run: str) -> str:
    """The folder of the run's own ensemble, empty if it has none."""
    folder = RunDir(run).ensemble
    return folder if paths.exists(paths.join(folder, CARD_FILE)) else ""


def load_compatible_ensemble(opened: LoadedRun, folder: str) -> tuple[Ensemble, EnsembleCard]:
    """An ensemble of the open run's predictions, on the CPU, and its card.

    Raises:
        UserError: it is missing or damaged, or of another run or checkpoint.
    """
    model, card = load_ensemble(folder)
    check_compatible(card, opened, folder)
    return model, card


def check_compatible(card: EnsembleCard, opened: LoadedRun, folder: str) -> None:
    """Raise a UserError unless the ensemble is of the open checkpoint."""
    again = "run `a2gen ensemble train` again or remove it"
    if card.step != opened.step:
        raise UserError(
            f"{folder}: is of step {card.step} of {card.run}, the run's best is step {opened.step}; {again}"
        )
    if card.objectives != list(prediction_objectives(opened.card, opened.model.model.ranker.objective_tasks)):
        raise UserError(f"{folder}: is of {card.run}, which predicts otherwise than this run; {again}")
    if card.checkpoint != opened.fingerprint:
        raise UserError(f"{folder}: is of another training, {card.run}, than this run's best checkpoint; {again}")


def _check_behaviors(opened: LoadedRun, config: EnsembleConfig) -> None:
    """Refuse at once what would come out only when all is scored."""
    there = behavior_names(opened.card)
    if not there:
        raise UserError(f"the dataset {opened.card.name!r} has no action, label or watch time to train an ensemble for")
    for name in config.behavior_weights:
        if name not in there:
            raise ConfigError(f"ensemble.behavior_weights.{name}: the dataset has {', '.join(there)}")


def _train(
    opened: LoadedRun,
    run: str,
    out: str,
    config: EnsembleConfig,
    train: SessionLists,
    valid: SessionLists,
    callback: ProgressCallback,
) -> TrainedEnsemble:
    named = prediction_objectives(opened.card, opened.model.model.ranker.objective_tasks)
    device = opened.process.device
    callback.on_fit_start(UMRE)
    model, history = fit_ensemble(named, train, valid, config, partial(callback.on_epoch_end, UMRE), device)
    d_context, d_event = train.widths
    falls = max_monotonicity_violations(model, valid)
    card = EnsembleCard(
        objectives=list(named),
        behavior_weights=history.epochs[history.best_epoch].weights,
        d_event=d_event,
        d_context=d_context,
        config=config,
        run=run,
        step=opened.step,
        checkpoint=opened.fingerprint,
        max_monotonicity_violation=dict(zip(train.objectives, falls.tolist(), strict=True)),
    )
    models: dict[str, nn.Module] = {UMRE: model.cpu(), **fit_baselines(card, train, valid, device, callback)}
    card = replace(card, metrics={"split": "valid", **measure_methods(models, valid, card)})
    save_ensemble(out, model, card, learned_baselines(models))
    return TrainedEnsemble(model, card, train, valid, opened.dataset)


def measure_methods(models: dict[str, nn.Module], lists: SessionLists, card: EnsembleCard) -> dict[str, Any]:
    """List metrics per method, of the behaviours trained for."""
    names, k = list(card.behavior_weights), card.config.top_k
    methods = {name: measure_lists(score_lists(model, lists), lists, k, names) for name, model in models.items()}
    first = methods[UMRE]
    return {
        "k": k,
        "lists": first["lists"],
        "mean_length": first["mean_length"],
        "behaviors": names,
        "methods": {
            name: {
                "behaviors": found["behaviors"],
                "mean": {metric: found[metric] for metric in ("hr", "ndcg", "uauc")},
                "hypervolume": found["hypervolume"],
            }
            for name, found in methods.items()
        },
    }
