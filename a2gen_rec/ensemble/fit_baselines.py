"""Training and loading of the ensemble's baselines: METHODS §6."""

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
"""Trained baseline -> name of its file, see :func:`save_ensemble`."""


def fit_baselines(
    card: EnsembleCard, train: SessionLists, valid: SessionLists, device: torch.device, callback: ProgressCallback
) -> dict[str, nn.Module]:
    """Train all baselines on the ensemble's lists.

    Args:
        card: Card of the ensemble; the baselines share its objectives, widths and settings.
        train: Training lists.
        valid: Validation lists.
        device: Device of training.
        callback: Receiver of progress.

    Returns:
        Name -> baseline on the CPU.
    """
    mean, std = mean_std(train)
    models = build_untrained(card, mean, std)
    names, _ = initial_behavior_weights(train, card.config)
    for name in (LOGISTIC, MLP, SESSION):
        callback.on_fit_start(name)
        fit(models[name].to(device), train, valid, card.config, partial(callback.on_epoch_end, name))
        models[name].cpu()
    callback.on_fit_start(FORMULA)

    def ndcg(scores: torch.Tensor) -> float:
        value = measure_lists(scores.numpy(), valid, card.config.top_k, names)["ndcg"]
        return math.nan if value is None else value

    models[FORMULA] = tune_formula(
        torch.from_numpy(valid.predictions),
        ndcg,
        _lower_is_better(card),
        *_formula_normalization(card, mean, std),
        card.config.formula_trials,
        card.config.seed,
    ).formula
    return models


def learned_baselines(models: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the trained baselines by the names of their files, for :func:`save_ensemble`."""
    return {file: models[name] for name, file in BASELINE_FILES.items()}


def load_baselines(folder: str, card: EnsembleCard) -> dict[str, nn.Module]:
    """Load all baselines of an ensemble directory.

    Returns:
        Name -> baseline on the CPU.

    Raises:
        UserError: A baseline is missing or corrupted.
    """
    models = build_untrained(card)
    for name, file in BASELINE_FILES.items():
        load_baseline(folder, file, models[name])
    return models


def build_untrained(
    card: EnsembleCard, mean: torch.Tensor | None = None, std: torch.Tensor | None = None
) -> dict[str, nn.Module]:
    """Build all baselines before training.

    Args:
        card: Card of the ensemble.
        mean: [K] mean of the training lists' predictions; by default 0, to be loaded.
        std: [K] standard deviation of the training lists' predictions; by default 1, to be loaded.

    Returns:
        Name -> baseline.
    """
    k, lower_is_better = len(card.objectives), _lower_is_better(card)
    mean = torch.zeros(k) if mean is None else mean
    std = torch.ones(k) if std is None else std
    standardize = [Standardize(lower_is_better, mean, std) for _ in range(3)]
    singles = {
        f"{objective.name} alone": SingleScore(i, objective.higher_is_better)
        for i, objective in enumerate(card.objectives)
    }
    widths = (card.d_event, card.d_context, card.config.dim)
    torch.manual_seed(card.config.seed)
    return {
        **singles,
        FORMULA: PowerFormula(torch.ones(k), torch.ones(k), lower_is_better, *_formula_normalization(card, mean, std)),
        LOGISTIC: LogisticRegression(standardize[0]),
        MLP: MLPFusion(standardize[1], *widths),
        SESSION: SessionWeightedFusion(standardize[2], *widths),
    }


def _lower_is_better(card: EnsembleCard) -> list[bool]:
    return [not objective.higher_is_better for objective in card.objectives]


def _formula_normalization(
    card: EnsembleCard, mean: torch.Tensor, std: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and scale of the formula: 0 and 1 for logits (probabilities), mean and std for a watch time."""
    watch = torch.tensor([objective.name == WATCH_TIME for objective in card.objectives])
    return torch.where(watch, mean, 0.0), torch.where(watch, std, 1.0)
