"""Evaluate a run, with its ensemble if it has one."""

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
from a2gen_rec.evaluation.evaluate import evaluate
from a2gen_rec.models.ensemble.io import EnsembleCard
from a2gen_rec.training.loaded_run import DeviceChoice, LoadedRun, load_run
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
    """Evaluate a run's best checkpoint; rank 0 gets the result (see ``evaluate``), the others ``{}``.

    Args:
        ensemble: its folder; by default the run's own. Where there is one, ``lists`` has its list metrics.
        predictions: Parquet file to write every target's to; none if empty.
    """
    with load_run(run, data, device) as opened:
        folder = ensemble or all_gather_object(default_ensemble_dir(run))[0]
        compared = (
            load_list_comparison(opened, run, folder, split) if folder else None
        )  # an unfit one is told of at once
        built, settings = opened.model, replace(opened.config, evaluate=config)
        result = evaluate(
            built.model_parallel,
            built.model.ranker,
            opened.dataset,
            split,
            settings,
            opened.process,
            predictions,
        )
    if not result:
        return {}
    # Out of the group: no rank waits for the first one's metrics.
    lists = {} if compared is None else {"split": split, **measure_methods(*compared)}
    return {**result, "run": run, "step": opened.step, "lists": lists}


def load_list_comparison(
    opened: LoadedRun, run: str, folder: str, split: str
) -> tuple[dict[str, nn.Module], SessionLists, EnsembleCard] | None:
    """A fitting ensemble and its baselines by name, the split's lists, and its card; None on ranks but the first.

    Raises:
        UserError: there is no ensemble, a file of it is missing or damaged, or it is of another checkpoint.
    """
    with sync_errors():
        model, card = load_compatible_ensemble(opened, folder)
        models = {UMRE: model, **load_baselines(folder, card)}
    lists = cached_session_lists(opened, run, split, card.config)
    return None if lists is None else (models, lists, card)
