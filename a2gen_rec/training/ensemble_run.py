"""From a trained ranker to a trained ensemble, and how it fares beside other ways to one score (METHODS §6)."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from a2gen_rec import paths
from a2gen_rec.config import EnsembleConfig, EvaluateConfig
from a2gen_rec.data.schema import WATCH_TIME
from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.models.ensemble import Ensemble
from a2gen_rec.models.fusion import (
    Formula,
    LogisticRegression,
    MLPFusion,
    SessionWeights,
    SingleScore,
    Standardise,
    tune_formula,
)
from a2gen_rec.training.ensemble_store import (
    CARD,
    EnsembleCard,
    check_place,
    load_baseline,
    load_ensemble,
    save_ensemble,
)
from a2gen_rec.training.ensemble_trainer import (
    Epoch,
    behaviour_weights,
    fit,
    fit_ensemble,
    largest_falls,
    measure_lists,
    score_lists,
)
from a2gen_rec.training.evaluate import evaluate
from a2gen_rec.training.lists import Lists, centre_scale
from a2gen_rec.training.process import agreed, gather
from a2gen_rec.training.run import Device, OpenRun, open_run
from a2gen_rec.training.scores import behaviours, objectives, score_split, widths

FOLDER = "ensemble"
"""Of a run: where its ensemble is unless told otherwise."""
SCORES = "scores"
UMRE, FORMULA, LOGISTIC, MLP, SESSION = "UMRE", "formula", "logistic regression", "MLP", "session weights"


class Reporter(Protocol):
    """Is told of the progress."""

    def scoring(self, split: str, done: int, files: int) -> None: ...

    def fitting(self, name: str) -> None: ...

    def epoch(self, name: str, epoch: Epoch) -> None: ...


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

    Raises:
        UserError: the run has lists of other data.
    """
    events, gap_s = config.events, config.gap_s or opened.card.session_gap_s
    folder = paths.join(run, SCORES, f"step-{opened.step:08d}-events-{events}-gap-{gap_s:g}")
    source = paths.join(folder, "source.txt")
    data = paths.absolute(opened.data)
    with agreed():
        if opened.process.leads:
            paths.make_folder(folder)
            if paths.exists(source) and paths.read_text(source).strip() != data:
                raise UserError(
                    f"{folder}: holds scores of {paths.read_text(source).strip()}; delete it to score {data}"
                )
            paths.write_text(source, data + "\n")
    tell = None if progress is None else partial(progress, split)
    return score_split(opened, split, paths.join(folder, split), events, gap_s, tell)


def found(run: str) -> str:
    """The folder of the run's own ensemble, empty if it has none."""
    folder = paths.join(run, FOLDER)
    return folder if paths.exists(paths.join(folder, CARD)) else ""


def evaluate_ensemble(opened: OpenRun, run: str, folder: str, split: str) -> dict[str, Any]:
    """List metrics of a split for an ensemble and what it was compared with; rank 0 gets them, the others ``{}``.

    Raises:
        UserError: there is no ensemble, or one of another run or checkpoint.
    """
    with agreed():
        model, card = load_fitting(opened, folder)
    lists = session_lists(opened, run, split, card.config)
    if lists is None:
        return {}
    models = {UMRE: model, **_untrained(card)}
    for name, module in models.items():
        if name in (FORMULA, LOGISTIC, MLP, SESSION):
            load_baseline(folder, _file(name), module)
    return {"split": split, **_measure(models, lists, card)}


def evaluate_run(
    run: str,
    split: str,
    data: str,
    config: EvaluateConfig,
    device: Device = "auto",
    ensemble: str = "",
    predictions: str = "",
) -> dict[str, Any]:
    """Evaluate a run's best checkpoint; rank 0 gets the result (see ``evaluate``), the others ``{}``.

    Args:
        ensemble: its folder; by default the run's own. Where there is one, ``lists`` has its list metrics.
        predictions: Parquet file to write every target's to; none if empty.
    """
    with open_run(run, data, device) as opened:
        folder = ensemble or gather(found(run))[0]
        lists = evaluate_ensemble(opened, run, folder, split) if folder else {}  # an unfit one is told of at once
        settings = replace(opened.config, evaluate=config)
        result = evaluate(opened.built, opened.data, split, opened.card, settings, opened.process, predictions)
        return {**result, "run": run, "step": opened.step, "lists": lists} if result else result


def load_fitting(opened: OpenRun, folder: str) -> tuple[Ensemble, EnsembleCard]:
    """An ensemble of the open run's predictions, on the CPU, and its card.

    Raises:
        UserError: it is missing or damaged, or of another run or checkpoint.
    """
    model, card = load_ensemble(folder)
    check_fits(card, opened, folder)
    return model, card


def check_fits(card: EnsembleCard, opened: OpenRun, folder: str) -> None:
    """Raise a UserError unless the ensemble is of the open checkpoint, as far as step, objectives and widths tell."""
    again = "run `a2gen train-ensemble` again or remove it"
    if card.step != opened.step:
        raise UserError(
            f"{folder}: is of step {card.step} of {card.run}, the run's best is step {opened.step}; {again}"
        )
    named = list(objectives(opened.card, opened.built.model.ranker.tasks))
    if card.objectives != named or (card.d_event, card.d_context) != widths(opened):
        raise UserError(f"{folder}: is of {card.run}, which predicts otherwise than this run; {again}")


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
        largest_fall=dict(zip(train.objectives, falls.tolist(), strict=True)),
    )
    models: dict[str, nn.Module] = {UMRE: model.cpu(), **_fit_baselines(card, train, valid, device, reporter)}
    card = replace(card, metrics={"split": "valid", **_measure(models, valid, card)})
    kept = {_file(name): module for name, module in models.items() if name in (FORMULA, LOGISTIC, MLP, SESSION)}
    save_ensemble(out, model, card, kept)
    return Trained(model, card, train, valid, opened.data)


def _fit_baselines(
    card: EnsembleCard, train: Lists, valid: Lists, device: torch.device, reporter: Reporter
) -> dict[str, nn.Module]:
    """What the ensemble is compared with, on the same lists."""
    centre, scale = centre_scale(train)
    models = _untrained(card, centre, scale)
    names, _ = behaviour_weights(train, card.config)
    for name in (LOGISTIC, MLP, SESSION):
        reporter.fitting(name)
        fit(models[name].to(device), train, valid, card.config, partial(reporter.epoch, name))
        models[name].cpu()
    reporter.fitting(FORMULA)

    def ndcg(scores: torch.Tensor) -> float:
        found = measure_lists(scores.numpy(), valid, card.config.k, names)["ndcg"]
        return math.nan if found is None else found

    less = [objective.better == "less" for objective in card.objectives]
    value, trials = torch.from_numpy(valid.value), card.config.formula_trials
    models[FORMULA] = tune_formula(value, ndcg, less, *_units(card, centre, scale), trials, card.config.seed).formula
    return models


def _untrained(
    card: EnsembleCard, centre: torch.Tensor | None = None, scale: torch.Tensor | None = None
) -> dict[str, nn.Module]:
    """All baselines; those with parameters before training."""
    k = len(card.objectives)
    centre = torch.zeros(k) if centre is None else centre
    scale = torch.ones(k) if scale is None else scale
    less = [objective.better == "less" for objective in card.objectives]
    standardise = [Standardise(less, centre, scale) for _ in range(3)]
    singles = {
        f"{objective.name} alone": SingleScore(i, objective.better) for i, objective in enumerate(card.objectives)
    }
    widths = (card.d_event, card.d_context, card.config.dim)
    torch.manual_seed(card.config.seed)
    return {
        **singles,
        FORMULA: Formula(torch.ones(k), torch.ones(k), less, *_units(card, centre, scale)),
        LOGISTIC: LogisticRegression(standardise[0]),
        MLP: MLPFusion(standardise[1], *widths),
        SESSION: SessionWeights(standardise[2], *widths),
    }


def _units(card: EnsembleCard, centre: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre and scale for the formula: logits are taken as their probabilities, a watch time by its spread."""
    watch = torch.tensor([objective.name == WATCH_TIME for objective in card.objectives])
    return torch.where(watch, centre, 0.0), torch.where(watch, scale, 1.0)


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


def _file(name: str) -> str:
    return name.replace(" ", "-").lower()
