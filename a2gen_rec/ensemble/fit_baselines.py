"""What an ensemble is compared with, trained on its lists and kept beside it: METHODS §6."""

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from a2gen_rec.data.schema import WATCH_TIME
from a2gen_rec.ensemble.formula_search import tune_formula
from a2gen_rec.ensemble.session_lists import SessionLists, mean_std
from a2gen_rec.ensemble.trainer import ProgressCallback, fit, initial_behavior_weights, measure_lists
from a2gen_rec.models.ensemble.baselines import (
    LogisticRegression,
    MLPFusion,
    PowerFormula,
    SessionWeightedFusion,
    SingleScore,
    Standardize,
)
from a2gen_rec.models.ensemble.io import EnsembleCard, load_baseline

FORMULA, LOGISTIC, MLP, SESSION = "formula", "logistic regression", "MLP", "session weights"
BASELINE_FILES = {FORMULA: "formula", LOGISTIC: "logistic-regression", MLP: "mlp", SESSION: "session-weights"}
"""Those that learn, and what their files are called (see :func:`save_ensemble`)."""


def fit_baselines(
    card: EnsembleCard, train: SessionLists, valid: SessionLists, device: torch.device, callback: ProgressCallback
) -> dict[str, nn.Module]:
    """All baselines by name, on the CPU, trained on the lists the ensemble saw.

    Args:
        card: of the ensemble, whose objectives, widths and settings they share.
    """
    centre, scale = mean_std(train)
    models = build_untrained(card, centre, scale)
    names, _ = initial_behavior_weights(train, card.config)
    for name in (LOGISTIC, MLP, SESSION):
        callback.on_fit_start(name)
        fit(models[name].to(device), train, valid, card.config, partial(callback.on_epoch_end, name))
        models[name].cpu()
    callback.on_fit_start(FORMULA)

    def ndcg(scores: torch.Tensor) -> float:
        found = measure_lists(scores.numpy(), valid, card.config.top_k, names)["ndcg"]
        return math.nan if found is None else found

    value, trials = torch.from_numpy(valid.predictions), card.config.formula_trials
    models[FORMULA] = tune_formula(
        value, ndcg, _lower_is_better(card), *_formula_normalization(card, centre, scale), trials, card.config.seed
    ).formula
    return models


def learned_baselines(models: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Of all baselines those that :func:`save_ensemble` keeps, by the names of their files."""
    return {file: models[name] for name, file in BASELINE_FILES.items()}


def load_baselines(folder: str, card: EnsembleCard) -> dict[str, nn.Module]:
    """All baselines of an ensemble's folder by name, on the CPU.

    Raises:
        UserError: one is missing or damaged.
    """
    models = build_untrained(card)
    for name, file in BASELINE_FILES.items():
        load_baseline(folder, file, models[name])
    return models


def build_untrained(
    card: EnsembleCard, mean: torch.Tensor | None = None, std: torch.Tensor | None = None
) -> dict[str, nn.Module]:
    """All baselines by name, as they are before training.

    Args:
        centre, scale: [K] of the training lists' values; by default 0 and 1, to be loaded into.
    """
    k, less = len(card.objectives), _lower_is_better(card)
    mean = torch.zeros(k) if mean is None else mean
    std = torch.ones(k) if std is None else std
    standardise = [Standardize(less, mean, std) for _ in range(3)]
    singles = {
        f"{objective.name} alone": SingleScore(i, objective.higher_is_better)
        for i, objective in enumerate(card.objectives)
    }
    widths = (card.d_event, card.d_context, card.config.dim)
    torch.manual_seed(card.config.seed)
    return {
        **singles,
        FORMULA: PowerFormula(torch.ones(k), torch.ones(k), less, *_formula_normalization(card, mean, std)),
        LOGISTIC: LogisticRegression(standardise[0]),
        MLP: MLPFusion(standardise[1], *widths),
        SESSION: SessionWeightedFusion(standardise[2], *widths),
    }


def _lower_is_better(card: EnsembleCard) -> list[bool]:
    return [not objective.higher_is_better for objective in card.objectives]


def _formula_normalization(
    card: EnsembleCard, centre: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre and scale for the formula: logits are taken as their probabilities, a watch time by its spread."""
    watch = torch.tensor([objective.name == WATCH_TIME for objective in card.objectives])
    return torch.where(watch, centre, 0.0), torch.where(watch, scale, 1.0)
