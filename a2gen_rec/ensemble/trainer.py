"""Training of the ensemble and its baselines on session lists (METHODS §6)."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from a2gen_rec.config import EnsembleConfig
from a2gen_rec.ensemble.losses import (
    bounded_min_norm_weights,
    combined_relevance,
    gradient_gram_matrix,
    listwise,
    pairwise,
    pointwise,
    update_pareto_weights,
)
from a2gen_rec.ensemble.session_lists import ListBatch, SessionLists, batch_indices, mean_std
from a2gen_rec.errors import ConfigError, DataError, UserError
from a2gen_rec.evaluation.list_metrics import ListMetrics, list_metrics
from a2gen_rec.models.ensemble.baselines import SessionWeightedFusion
from a2gen_rec.models.ensemble.model import Ensemble, Objective

_LOSSES = {"pointwise": pointwise, "listwise": listwise, "pairwise": pairwise}

_INITIAL_GAIN = {"pointwise": 1.0, "listwise": 8.0, "pairwise": 8.0}
"""Initial range of the scores: that of the relevance, or close to that learned on the simulated log (about 10)."""

SCALE_STDS = 2.0
"""Scale of an objective in standard deviations; at a smaller scale the best candidates would all be near 1."""


@dataclass(frozen=True)
class EpochResult:
    """Result of one training epoch.

    Attributes:
        epoch: Index of the epoch, from 0.
        loss: Mean loss over the batches.
        metrics: Validation metrics of the trained behaviors.
        weights: Behavior -> weight ω at the end of the epoch.
    """

    epoch: int
    loss: float
    metrics: ListMetrics
    weights: dict[str, float]


class ProgressCallback(Protocol):
    """Receiver of the progress of scoring and training."""

    def on_scoring(self, split: str, done: int, files: int) -> None:
        """Called with the numbers of scored and of all files of a split."""

    def on_fit_start(self, name: str) -> None:
        """Called before the training of a method."""

    def on_epoch_end(self, name: str, epoch: EpochResult) -> None:
        """Called after each epoch of a method."""


@dataclass(frozen=True)
class TrainingHistory:
    """Results of all epochs.

    Attributes:
        epochs: Results by epoch.
        best_epoch: Index of the epoch whose parameters were restored.
    """

    epochs: list[EpochResult]
    best_epoch: int


def fit(
    model: nn.Module,
    train: SessionLists,
    valid: SessionLists,
    config: EnsembleConfig,
    progress: Callable[[EpochResult], None] = lambda epoch: None,
) -> TrainingHistory:
    """Train a model in place on its device and restore the epoch with the best validation NDCG.

    Training is deterministic for the same seed, lists, initial parameters and machine.

    Args:
        model: ``model(predictions, events, length, context)`` returns scores [n, C], or an output with ``score``.
        train: Training lists.
        valid: Validation lists.
        config: Settings of the ensemble.
        progress: Called after each epoch.

    Raises:
        DataError: There is no training list, or no validation list with a positive and a negative.
        ConfigError: The lists lack a configured behavior or its positives, or the weight bounds are infeasible.
        UserError: The loss is not finite.
    """
    behaviors, weights = initial_behavior_weights(train, config)
    columns = [train.behaviors.index(name) for name in behaviors]
    bounds = (config.min_weight, config.max_weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    epochs: list[EpochResult] = []
    best_epoch, best_ndcg, best_state = 0, -np.inf, {}
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        for epoch in range(config.epochs):
            model.train()
            rng = np.random.default_rng([config.seed, epoch])
            loss, weights = _train_epoch(model, optimizer, train, columns, weights, config, rng)
            metrics = measure_lists(score_lists(model, valid, config.batch_size), valid, config.top_k, behaviors)
            if metrics["ndcg"] is None:
                raise DataError(f"no validation list has a positive and a negative candidate of any of {behaviors}")
            epochs.append(EpochResult(epoch, loss, metrics, dict(zip(behaviors, weights.tolist(), strict=True))))
            progress(epochs[-1])
            if metrics["ndcg"] > best_ndcg:
                best_epoch, best_ndcg, best_state = epoch, metrics["ndcg"], copy.deepcopy(model.state_dict())
            if config.patience and epoch - best_epoch >= config.patience:
                break
            if config.weighting == "pareto" and epoch:
                previous_uauc, uauc = (_uauc(result) for result in epochs[-2:])
                weights = update_pareto_weights(weights, previous_uauc, uauc, config.pareto_step_size, bounds)
    model.load_state_dict(best_state)
    model.eval()
    return TrainingHistory(epochs, best_epoch)


def fit_ensemble(
    objectives: Sequence[Objective],
    train: SessionLists,
    valid: SessionLists,
    config: EnsembleConfig,
    progress: Callable[[EpochResult], None] = lambda epoch: None,
    device: torch.device | None = None,
) -> tuple[Ensemble, TrainingHistory]:
    """Build an ensemble, normalize its inputs with mean and deviation of the training lists, and :func:`fit` it.

    Args:
        objectives: Objectives of the lists, in their order.
        train: Training lists.
        valid: Validation lists.
        config: Settings of the ensemble.
        progress: Called after each epoch.
        device: Device of training; by default the CPU.

    Raises:
        ConfigError: The objectives differ from those of the lists, or as for :func:`fit`.
        DataError: As for :func:`fit`.
        UserError: As for :func:`fit`.
    """
    names = [objective.name for objective in objectives]
    if names != list(train.objectives):
        raise ConfigError(f"the lists have objectives {list(train.objectives)}, not {names}")
    d_context, d_event = train.widths
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        gain = _INITIAL_GAIN[config.loss]
        model = Ensemble(objectives, d_event, d_context, config.dim, config.hidden_dims, config.quadrature_degree, gain)
    if len(train):
        mean, std = mean_std(train)
        model.set_normalization(mean, SCALE_STDS * std)
    model = model.to(device)
    return model, fit(model, train, valid, config, progress)


def max_monotonicity_violations(model: Ensemble, lists: SessionLists, sample: int = 256, seed: int = 0) -> Tensor:
    """Return [K] :meth:`Ensemble.max_monotonicity_violation` for the first candidates of up to ``sample`` lists."""
    rows = np.random.default_rng(seed).permutation(len(lists))[:sample]
    batch = lists.batch(rows).to(model.mean.device)
    return model.max_monotonicity_violation(batch.events, batch.length, batch.context[:, :1])


def initial_behavior_weights(lists: SessionLists, config: EnsembleConfig) -> tuple[list[str], np.ndarray]:
    """Return the behaviors to train for and their initial weights ω [M'] of sum 1.

    They are ``config.behavior_weights``; by default all behaviors, with ω ∝ rate^-inverse_rate_exponent.

    Raises:
        DataError: There are no lists, or no candidate is positive for any behavior.
        ConfigError: The lists lack a configured behavior or its positives.
    """
    if not len(lists):
        raise DataError("no session list to train on")
    known = np.isfinite(lists.label).sum(0).clip(min=1)
    rates = np.nansum(lists.label, axis=0, dtype=np.float64) / known
    rate = dict(zip(lists.behaviors, rates.tolist(), strict=True))
    for name in config.behavior_weights:
        if not rate.get(name):
            reason = "no training list has a positive" if name in rate else f"the lists have {list(rate)}"
            raise ConfigError(f"ensemble.behavior_weights.{name}: {reason}")
    by_behavior = config.behavior_weights or {
        name: value**-config.inverse_rate_exponent for name, value in rate.items() if value > 0
    }
    if not by_behavior:
        raise DataError("no training list has a positive of any behavior")
    weights = np.array(list(by_behavior.values()))
    return list(by_behavior), weights / weights.sum()


def measure_lists(scores: np.ndarray, lists: SessionLists, k: int, behaviors: Sequence[str] = ()) -> ListMetrics:
    """Return :func:`list_metrics` of scores [candidates] for ``behaviors``, by default all of the lists."""
    names = list(behaviors) or list(lists.behaviors)
    labels = lists.pad(lists.label[:, [lists.behaviors.index(name) for name in names]])
    return list_metrics(lists.pad(scores), labels, lists.mask, lists.user, k, names)


@torch.no_grad()
def score_lists(model: nn.Module, lists: SessionLists, batch_lists: int = 256) -> np.ndarray:
    """Return [candidates] float32 scores of all lists; the model runs in evaluation mode."""
    was_training = model.training
    model.eval()
    scores = np.zeros(len(lists.item), np.float32)
    device = _device(model)
    for rows in batch_indices(lists, batch_lists):
        batch = lists.batch(rows).to(device)
        scores[batch.candidate_index.cpu().numpy()] = _score(model, batch)[batch.mask].cpu().numpy()
    model.train(was_training)
    return scores


@torch.no_grad()
def mean_weight_entropy(model: Ensemble, lists: SessionLists, batch_lists: int = 256) -> float:
    """Return the mean over candidates of :attr:`EnsembleOutput.weight_entropy`; NaN without candidates."""
    total = 0.0
    for rows in batch_indices(lists, batch_lists):
        batch = lists.batch(rows).to(model.mean.device)
        output = model(batch.predictions, batch.events, batch.length, batch.context)
        total += output.weight_entropy[batch.mask].double().sum().item()
    return total / len(lists.item) if len(lists.item) else math.nan


def _train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    lists: SessionLists,
    columns: list[int],
    weights: np.ndarray,
    config: EnsembleConfig,
    rng: np.random.Generator,
) -> tuple[float, np.ndarray]:
    """Train one epoch; return the mean loss of its batches and the final weights.

    Gradient-based weightings use one loss per behavior and optimize their weighted sum. The other weightings use one
    loss against the combined relevance. For the squared error with all labels known, both are the same.

    Unknown labels contribute no relevance. Pointwise and pairwise losses exclude candidates whose labels are all
    unknown (in a weighted sum: the label of that behavior), which would count as negatives. The listwise loss keeps
    them in the softmax.
    """
    bounds = {"min_norm": 0.0, "pareto_efficient": config.min_weight}
    min_weights = np.full(len(weights), bounds[config.weighting]) if config.weighting in bounds else None
    parameters, device = list(model.parameters()), _device(model)
    criterion, losses = _LOSSES[config.loss], []
    for number, rows in enumerate(batch_indices(lists, config.batch_size, rng)):
        batch = lists.batch(rows).to(device)
        labels = batch.label[..., columns]
        terms = batch.mask[..., None] & (labels.isfinite() | (config.loss == "listwise"))
        labels = labels.nan_to_num(0)
        score = _score(model, batch)
        optimizer.zero_grad()
        if min_weights is None:
            relevance = combined_relevance(labels, torch.as_tensor(weights, dtype=labels.dtype, device=device))
            loss = criterion(score, relevance, terms.any(-1)).mean
        else:
            columns_and_masks = zip(labels.unbind(-1), terms.unbind(-1), strict=True)
            parts = [criterion(score, relevance, mask).mean for relevance, mask in columns_and_masks]
            if number % config.reweight_interval == 0:
                weights = bounded_min_norm_weights(gradient_gram_matrix(parts, parameters), min_weights, weights)
            loss = torch.stack([part * weight for part, weight in zip(parts, weights.tolist(), strict=True)]).sum()
        losses.append(loss.item())
        if not np.isfinite(losses[-1]):
            raise UserError(f"ensemble loss is {losses[-1]}; decrease ensemble.lr (currently {config.lr})")
        loss.backward()
        optimizer.step()
    return float(np.mean(losses)), weights


def _score(model: nn.Module, batch: ListBatch) -> Tensor:
    more = (
        {"mask": batch.mask} if isinstance(model, SessionWeightedFusion) else {}
    )  # the only model that reads full lists
    output = model(batch.predictions, batch.events, batch.length, batch.context, **more)
    score: Tensor = output if isinstance(output, Tensor) else output.score
    return score


def _uauc(epoch: EpochResult) -> np.ndarray:
    """Return [M'] user AUC of each behavior; NaN if no user has both classes."""
    return np.array([metrics["uauc"] for metrics in epoch.metrics["behaviors"].values()], np.float64)


def _device(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
