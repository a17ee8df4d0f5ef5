"""Evaluation of a run, including its ensemble if it has one."""

from dataclasses import replace
from typing import Any

from torch import nn

from a2gen_rec.config import EvaluateConfig
from a2gen_rec.ensemble.fit import (
    UMRE,
    cached_session_lists,
    default_ensemble_dir,
    load_compatible_ensemble,
    measure_methods,
)
from a2gen_rec.ensemble.fit_baselines import load_baselines
from a2gen_rec.ensemble.session_lists import SessionLists
from a2gen_rec.errors import UserError
from a2gen_rec.evaluation.evaluate import evaluate
from a2gen_rec.gbdt.evaluate import evaluate_gbdt
from a2gen_rec.models.ensemble.io import EnsembleCard
from a2gen_rec.training.loaded_run import DeviceChoice, LoadedRun, load_run
from a2gen_rec.training.run_dir import RunDir
from a2gen_rec.utils import paths
from a2gen_rec.utils.distributed import all_gather_object, sync_errors


def evaluate_run(
    run: str,
    split: str,
    data: str,
    config: EvaluateConfig,
    device: DeviceChoice = "auto",
    ensemble: str = "",
    predictions: str = "",
) -> dict[str, Any]:
    """Evaluate a run's best checkpoint. Called by all ranks.

    Args:
        run: Run directory.
        split: Name of the split.
        data: Dataset directory; empty for that of the run.
        config: Settings of the evaluation.
        device: Device of the model.
        ensemble: Ensemble directory; by default that of the run, if any.
        predictions: Parquet file for per-target predictions; empty for none.

    Returns:
        On rank 0, the result of :func:`evaluate` with ``run``, ``step``, ``data``, the digests of the data and of the
        training data, and ``lists``, the list metrics of the ensemble and its baselines (empty without an ensemble); on
        other ranks ``{}``.
    """
    if paths.exists(RunDir(run).gbdt_file):
        if ensemble:
            raise UserError(f"{run}: --ensemble: model.name gbdt supports no ensemble")
        return evaluate_gbdt(run, split, data, config, predictions)
    with load_run(run, data, device) as loaded:
        folder = ensemble or all_gather_object(default_ensemble_dir(run))[0]
        # First, so that an incompatible ensemble fails before the evaluation.
        comparison = load_list_comparison(loaded, run, folder, split) if folder else None
        model, settings = loaded.model, replace(loaded.config, evaluate=config)
        result = evaluate(
            model.model_parallel, model.model.ranker, loaded.dataset, split, settings, loaded.process, predictions
        )
    if not result:
        return {}
    # Outside the process group: list metrics on rank 0 may exceed the timeout of a collective.
    lists = {} if comparison is None else {"split": split, **measure_methods(*comparison)}
    data_keys = {
        "data": loaded.data,
        "data_digest": loaded.identity.data_digest,
        "training_data_digest": loaded.card.identity.data_digest,
    }
    return {**result, "run": run, "step": loaded.step, **data_keys, "lists": lists}


def load_list_comparison(
    loaded: LoadedRun, run: str, folder: str, split: str
) -> tuple[dict[str, nn.Module], SessionLists, EnsembleCard] | None:
    """Load a compatible ensemble with its baselines, and the split's lists. Called by all ranks.

    Returns:
        Models by name, lists, and the ensemble's card; None on ranks other than 0.

    Raises:
        UserError: The ensemble is missing, corrupted, or belongs to another checkpoint.
    """
    with sync_errors():
        model, card = load_compatible_ensemble(loaded, folder)
        models = {UMRE: model, **load_baselines(folder, card)}
    lists = cached_session_lists(loaded, run, split, card.config)
    return None if lists is None else (models, lists, card)
