"""From a trained ranker to a trained ensemble, and how it fares beside other ways to one score (METHODS §6)."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from a2gen_rec.config import EnsembleConfig
from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.ensemble.fit_baselines import fit_baselines, learned
from a2gen_rec.ensemble.score_lists import SCORES_VERSION, behaviours, score_split
from a2gen_rec.ensemble.session_lists import Lists
from a2gen_rec.ensemble.trainer import Reporter, fit_ensemble, largest_falls, measure_lists, score_lists
from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.models.ensemble.io import CARD, EnsembleCard, check_place, load_ensemble, save_ensemble
from a2gen_rec.models.ensemble.model import Ensemble
from a2gen_rec.models.scoring import objectives
from a2gen_rec.training.loaded_run import Device, OpenRun, open_run
from a2gen_rec.utils import paths
from a2gen_rec.utils.distributed import agreed

FOLDER = "ensemble"
"""Of a run: where its ensemble is unless told otherwise."""
SCORES = "scores"
UMRE = "UMRE"


@dataclass(frozen=True)
class Trained:
    """A trained ensemble with the lists it saw, and the dataset they are of."""

    model: Ensemble
    card: EnsembleCard
    train: Lists
    valid: Lists
    data: str


def train_ensemble(
    run: str,
    out: str,
    config: EnsembleConfig,
    reporter: Reporter,
    data: str = "",
    device: Device = "auto",
) -> Trained | None:
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
    with open_run(run, data, device) as opened:
        with agreed():
            _check(opened, config)
            check_place(out)
        train, valid = (session_lists(opened, run, split, config, reporter.scoring) for split in ("train", "valid"))
    # Out of the group: no rank waits for the first, which may train for longer than the group has patience.
    if train is None or valid is None:
        return None
    return _train(opened, run, out, config, train, valid, reporter)


def session_lists(
    opened: OpenRun,
    run: str,
    split: str,
    config: EnsembleConfig,
    progress: Callable[[str, int, int], None] | None = None,
) -> Lists | None:
    """A split's scored session lists, made where the run does not have them yet. Rank 0 gets them.

    They are kept in a folder of the run, one for each checkpoint, dataset and way to make lists.

    Raises:
        UserError: as :func:`score_split` raises.
    """
    events, gap_s = config.events, config.gap_s or opened.card.session_gap_s
    with agreed():
        data = {"data": paths.absolute(opened.data), "card": DatasetCard.load(opened.data).to_dict()}
    how = {"max_error": opened.config.evaluate.max_error, "events": events, "gap_s": gap_s, "version": SCORES_VERSION}
    made_of = json.dumps({**data, **how, "checkpoint": opened.digest}, sort_keys=True)
    digest = hashlib.sha256(made_of.encode()).hexdigest()[:12]
    folder = paths.join(run, SCORES, f"step-{opened.step:08d}-{digest}")
    tell = None if progress is None else partial(progress, split)
    return score_split(opened, split, paths.join(folder, split), events, gap_s, tell)


def found(run: str) -> str:
    """The folder of the run's own ensemble, empty if it has none."""
    folder = paths.join(run, FOLDER)
    return folder if paths.exists(paths.join(folder, CARD)) else ""


def load_fitting(opened: OpenRun, folder: str) -> tuple[Ensemble, EnsembleCard]:
    """An ensemble of the open run's predictions, on the CPU, and its card.

    Raises:
        UserError: it is missing or damaged, or of another run or checkpoint.
    """
    model, card = load_ensemble(folder)
    check_fits(card, opened, folder)
    return model, card


def check_fits(card: EnsembleCard, opened: OpenRun, folder: str) -> None:
    """Raise a UserError unless the ensemble is of the open checkpoint."""
    again = "run `a2gen train-ensemble` again or remove it"
    if card.step != opened.step:
        raise UserError(
            f"{folder}: is of step {card.step} of {card.run}, the run's best is step {opened.step}; {again}"
        )
    if card.objectives != list(objectives(opened.card, opened.built.model.ranker.tasks)):
        raise UserError(f"{folder}: is of {card.run}, which predicts otherwise than this run; {again}")
    if card.checkpoint != opened.digest:
        raise UserError(f"{folder}: is of another training, {card.run}, than this run's best checkpoint; {again}")


def _check(opened: OpenRun, config: EnsembleConfig) -> None:
    """Refuse at once what would come out only when all is scored."""
    there = behaviours(opened.card)
    if not there:
        raise UserError(f"the dataset {opened.card.name!r} has no action, label or watch time to train an ensemble for")
    for name in config.behaviours:
        if name not in there:
            raise ConfigError(f"ensemble.behaviours.{name}: the dataset has {', '.join(there)}")


def _train(
    opened: OpenRun, run: str, out: str, config: EnsembleConfig, train: Lists, valid: Lists, reporter: Reporter
) -> Trained:
    named = objectives(opened.card, opened.built.model.ranker.tasks)
    device = opened.process.device
    reporter.fitting(UMRE)
    model, history = fit_ensemble(named, train, valid, config, partial(reporter.epoch, UMRE), device)
    d_context, d_event = train.widths
    falls = largest_falls(model, valid)
    card = EnsembleCard(
        objectives=list(named),
        behaviours=history.epochs[history.best].weights,
        d_event=d_event,
        d_context=d_context,
        config=config,
        run=run,
        step=opened.step,
        checkpoint=opened.digest,
        largest_fall=dict(zip(train.objectives, falls.tolist(), strict=True)),
    )
    models: dict[str, nn.Module] = {UMRE: model.cpu(), **fit_baselines(card, train, valid, device, reporter)}
    card = replace(card, metrics={"split": "valid", **_measure(models, valid, card)})
    save_ensemble(out, model, card, learned(models))
    return Trained(model, card, train, valid, opened.data)


def _measure(models: dict[str, nn.Module], lists: Lists, card: EnsembleCard) -> dict[str, Any]:
    """List metrics per method, of the behaviours trained for."""
    names, k = list(card.behaviours), card.config.k
    methods = {name: measure_lists(score_lists(model, lists), lists, k, names) for name, model in models.items()}
    first = methods[UMRE]
    return {
        "k": k,
        "lists": first["lists"],
        "mean_length": first["length"],
        "behaviours": names,
        "methods": {
            name: {
                "behaviours": found["behaviours"],
                "mean": {metric: found[metric] for metric in ("hr", "ndcg", "uauc")},
                "hypervolume": found["hypervolume"],
            }
            for name, found in methods.items()
        },
    }
