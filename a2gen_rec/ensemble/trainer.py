"""Training of the ensemble, and of whatever it is compared with, on session lists (METHODS §6)."""

import copy
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


SCALE_STDS = 2.0
"""Standard deviations of an objective that are its scale: the best candidates must not all come near 1."""


@dataclass(frozen=True)
class EpochResult:
    """One pass over the training lists.

    Attributes:
        loss: mean over the batches.
        metrics: on validation, of the behaviours trained for.
        weights: ω of each behaviour at the epoch's end.
    """

    epoch: int
    loss: float
    metrics: ListMetrics
    weights: dict[str, float]


class ProgressCallback(Protocol):
    """Is told of the progress of scoring and of what is trained on the scores."""

    def on_scoring(self, split: str, done: int, files: int) -> None: ...

    def on_fit_start(self, name: str) -> None: ...

    def on_epoch_end(self, name: str, epoch: EpochResult) -> None: ...


@dataclass(frozen=True)
class TrainingHistory:
    """What training went through; ``best`` is the place of the epoch whose parameters were kept."""

    epochs: list[EpochResult]
    best_epoch: int


def fit(
    model: nn.Module,
    train: SessionLists,
    valid: SessionLists,
    config: EnsembleConfig,
    progress: Callable[[EpochResult], None] = lambda epoch: None,
) -> TrainingHistory:
    """Train a model in place, on its own device, and leave it at the epoch best on validation.

    The same seed, lists and initial parameters give the same model on the same machine.

    Args:
        model: ``model(value, events, length, context)`` gives scores [n, C], or an output that has them as ``score``.
        progress: called after each epoch.

    Raises:
        DataError: no list to train on; validation has none with a positive and a negative.
        ConfigError: a behaviour that the lists lack or have no positive of, or bounds that no weights can keep.
        UserError: the loss is no longer finite.
    """
    behaviors, weights = initial_behavior_weights(train, config)
    columns = [train.behaviors.index(name) for name in behaviors]
    bounds = (config.min_weight, config.max_weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    epochs: list[EpochResult] = []
    best, highest, kept = 0, -np.inf, {}
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
            if metrics["ndcg"] > highest:
                best, highest, kept = epoch, metrics["ndcg"], copy.deepcopy(model.state_dict())
            if config.patience and epoch - best >= config.patience:
                break
            if config.weighting == "pareto" and epoch:
                before, after = (_uauc(each) for each in epochs[-2:])
                weights = update_pareto_weights(weights, before, after, config.pareto_step_size, bounds)
    model.load_state_dict(kept)
    model.eval()
    return TrainingHistory(epochs, best)


def fit_ensemble(
    objectives: Sequence[Objective],
    train: SessionLists,
    valid: SessionLists,
    config: EnsembleConfig,
    progress: Callable[[EpochResult], None] = lambda epoch: None,
    device: torch.device | None = None,
) -> tuple[Ensemble, TrainingHistory]:
    """Make an ensemble for the lists' objectives, squash their values by the training lists' own, and :func:`fit` it.

    Raises:
        ConfigError: the objectives are not those of the lists, in their order; else as :func:`fit` raises.
    """
    names = [objective.name for objective in objectives]
    if names != list(train.objectives):
        raise ConfigError(f"the lists have objectives {list(train.objectives)}, not {names}")
    d_context, d_event = train.widths
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = Ensemble(objectives, d_event, d_context, config.dim, config.hidden_dims, config.quadrature_degree)
    if len(train):
        centre, scale = mean_std(train)
        model.set_normalization(centre, SCALE_STDS * scale)
    model = model.to(device)
    return model, fit(model, train, valid, config, progress)


def max_monotonicity_violations(model: Ensemble, lists: SessionLists, sample: int = 256, seed: int = 0) -> Tensor:
    """[K] :meth:`Ensemble.largest_fall` over the first candidates of at most ``sample`` lists."""
    rows = np.random.default_rng(seed).permutation(len(lists))[:sample]
    batch = lists.batch(rows).to(model.mean.device)
    return model.max_monotonicity_violation(batch.events, batch.length, batch.context[:, :1])


def initial_behavior_weights(lists: SessionLists, config: EnsembleConfig) -> tuple[list[str], np.ndarray]:
    """The behaviours to train for and their ω [M'], of sum 1: the given ones, else all, ∝ rate^-balance.

    Raises:
        DataError: there are no lists.
        ConfigError: a behaviour is not in the lists, or no candidate has any.
    """
    if not len(lists):
        raise DataError("no session list to train on")
    known = np.isfinite(lists.label).sum(0).clip(min=1)
    rates = np.nansum(lists.label, axis=0, dtype=np.float64) / known
    rate = dict(zip(lists.behaviors, rates.tolist(), strict=True))
    for name in config.behavior_weights:
        if not rate.get(name):
            reason = "no training list has a positive of it" if name in rate else f"the lists have {list(rate)}"
            raise ConfigError(f"ensemble.behavior_weights.{name}: {reason}")
    chosen = config.behavior_weights or {
        name: share**-config.inverse_rate_exponent for name, share in rate.items() if share > 0
    }
    if not chosen:
        raise DataError("no training list has a positive of any behaviour")
    weights = np.array(list(chosen.values()))
    return list(chosen), weights / weights.sum()


def measure_lists(scores: np.ndarray, lists: SessionLists, k: int, behaviors: Sequence[str] = ()) -> ListMetrics:
    """:func:`list_metrics` of scores [candidates], for some of the lists' behaviours or, by default, all."""
    chosen = list(behaviors) or list(lists.behaviors)
    labels = lists.pad(lists.label[:, [lists.behaviors.index(name) for name in chosen]])
    return list_metrics(lists.pad(scores), labels, lists.mask, lists.user, k, chosen)


@torch.no_grad()
def score_lists(model: nn.Module, lists: SessionLists, batch_lists: int = 256) -> np.ndarray:
    """[candidates] float32 scores of all lists, the model in evaluation mode."""
    was_training = model.training
    model.eval()
    scores = np.zeros(len(lists.item), np.float32)
    device = _device(model)
    for rows in batch_indices(lists, batch_lists):
        batch = lists.batch(rows).to(device)
        scores[batch.candidate_index.cpu().numpy()] = _score(model, batch)[batch.mask].cpu().numpy()
    model.train(was_training)
    return scores


def _train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    lists: SessionLists,
    columns: list[int],
    weights: np.ndarray,
    config: EnsembleConfig,
    rng: np.random.Generator,
) -> tuple[float, np.ndarray]:
    """One epoch: the mean loss of its batches, and the weights at its end.

    Weights by gradients are those of a mixture of losses, one for each behaviour, and that mixture is what is
    stepped along; else the loss is one, against the combined relevance. For the squared error they are the same, where
    all labels are known.

    Unknown labels are no relevance. A candidate of which all are unknown (in a mixture, the one of that behaviour) is
    no term of a point- or pairwise loss, which would take it for a negative; listwise, it stays among those that the
    others were chosen from.
    """
    bounds = {"min_norm": 0.0, "pareto_efficient": config.min_weight}
    least = np.full(len(weights), bounds[config.weighting]) if config.weighting in bounds else None
    parameters, device = list(model.parameters()), _device(model)
    criterion, losses = _LOSSES[config.loss], []
    for number, rows in enumerate(batch_indices(lists, config.batch_size, rng)):
        batch = lists.batch(rows).to(device)
        labels = batch.label[..., columns]
        terms = batch.mask[..., None] & (labels.isfinite() | (config.loss == "listwise"))
        labels = labels.nan_to_num(0)
        score = _score(model, batch)
        optimizer.zero_grad()
        if least is None:
            relevance = combined_relevance(labels, torch.as_tensor(weights, dtype=labels.dtype, device=device))
            loss = criterion(score, relevance, terms.any(-1)).mean
        else:
            each = zip(labels.unbind(-1), terms.unbind(-1), strict=True)
            parts = [criterion(score, relevance, known).mean for relevance, known in each]
            if number % config.reweight_interval == 0:
                weights = bounded_min_norm_weights(gradient_gram_matrix(parts, parameters), least, weights)
            loss = torch.stack([part * weight for part, weight in zip(parts, weights.tolist(), strict=True)]).sum()
        losses.append(loss.item())
        if not np.isfinite(losses[-1]):
            raise UserError(f"the ensemble's loss became {losses[-1]}; lower ensemble.lr, {config.lr} now")
        loss.backward()
        optimizer.step()
    return float(np.mean(losses)), weights


def _score(model: nn.Module, batch: ListBatch) -> Tensor:
    more = {"valid": batch.mask} if isinstance(model, SessionWeightedFusion) else {}  # it alone looks at whole lists
    output = model(batch.predictions, batch.events, batch.length, batch.context, **more)
    score: Tensor = output if isinstance(output, Tensor) else output.score
    return score


def _uauc(epoch: EpochResult) -> np.ndarray:
    """[M'] user AUC of each behaviour, NaN where no user has both classes."""
    return np.array([each["uauc"] for each in epoch.metrics["behaviors"].values()], np.float64)


def _device(model: nn.Module) -> torch.device:
    return next((each.device for each in (*model.parameters(), *model.buffers())), torch.device("cpu"))
