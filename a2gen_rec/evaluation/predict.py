"""Prediction of full splits, gathered from all ranks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from a2gen_rec.data.batch import WindowBatch, count_names
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.schema import ITEM_ID, USER_ID
from a2gen_rec.losses.loss import term_names
from a2gen_rec.losses.targets import target_outcomes
from a2gen_rec.models.base import BaseRanker, RankerOutput


@dataclass
class Predictions:
    """Predictions and observations, one row per target.

    Outcomes are the card's actions in code order without ``start``, then its labels, then its objectives.

    Attributes:
        user: [n] user key.
        ts_ms: [n] start of the impression in milliseconds.
        user_row: [n] row of the user table, 0 for a user who is new to the model; -1 if users have no table.
        item: [n] row of the item table, 0 for an item that is new to the model.
        duration_bucket: [n] row of the duration feature, 0 if there is none.
        probability: [n, outcomes], NaN for objectives without a prediction.
        occurred: [n, outcomes], 0, 1 or NaN if unknown.
        time: [n, actions] predicted log1p seconds.
        observed_time: [n, actions] log1p seconds, NaN if unknown.
        time_given_prefix: [n, actions] as ``time``, for actions that occurred, given the preceding steps, without the
            wide part. Towers of baselines read no steps, so their values equal ``time``.
        watch_time: [n] log1p seconds of the watch-time head, NaN without a prediction.
        oracle: [n, oracle columns] true probabilities.
        unexplored_mass: [n] total probability of pruned sequence prefixes.
    """

    user: np.ndarray
    ts_ms: np.ndarray
    user_row: np.ndarray
    item: np.ndarray
    duration_bucket: np.ndarray
    probability: np.ndarray
    occurred: np.ndarray
    time: np.ndarray
    observed_time: np.ndarray
    time_given_prefix: np.ndarray
    watch_time: np.ndarray
    oracle: np.ndarray
    unexplored_mass: np.ndarray

    def take(self, included: np.ndarray) -> "Predictions":
        """Return the rows with ``included`` [n]."""
        return Predictions(**{field.name: getattr(self, field.name)[included] for field in fields(Predictions)})


def outcome_columns(card: DatasetCard) -> dict[str, int]:
    """Return name -> column of :class:`Predictions` for actions except ``start``, labels and objectives."""
    return {name: column for column, name in enumerate([*card.actions[1:], *card.labels, *card.objectives])}


@dataclass
class EvaluationSums:
    """Sums over a split and all ranks.

    Attributes:
        loss: [terms] sums of the loss terms.
        counts: Denominators of the loss terms.
        order_violations: [1] consecutive actions of a target with decreasing predicted times.
        is_generative: Whether a generator made the predictions.
    """

    loss: Tensor
    counts: Tensor
    order_violations: Tensor
    is_generative: bool = True


@torch.no_grad()
def predict(
    task: nn.Module,
    ranker: BaseRanker[Any],
    batches: Iterable[WindowBatch],
    card: DatasetCard,
    max_unexplored_mass: float,
    callback: Callable[[RankerOutput, WindowBatch], None] | None = None,
) -> tuple[Predictions, EvaluationSums]:
    """Run the model over synchronized batches. Called by all ranks; rank 0 gets all rows, other ranks their rows.

    Args:
        task: Model with loss, such as :class:`ModelWithLoss` or its sharded form.
        ranker: Ranker of the model.
        batches: Batches with global counts, the same number on every rank.
        card: Dataset card.
        max_unexplored_mass: Bound on the total probability of pruned sequence prefixes.
        callback: Called with every batch and the model's output.
    """
    was_training = task.training
    task.eval()
    device = ranker.is_timed.device  # boosters have no parameters
    parts: list[Predictions] = []
    sums = torch.zeros(len(term_names(ranker.objective_tasks)), dtype=torch.float64)
    order_violations = torch.zeros(1, dtype=torch.float64)
    counts = torch.zeros(len(count_names(card)), dtype=torch.float64)
    for batch in batches:
        batch = batch.to(device)
        _, (batch_sums, output) = task(batch)
        sums += batch_sums.double().cpu()
        counts += batch.counts.cpu()
        order_violations += _count_order_violations(output, batch).cpu()
        parts.append(_batch_predictions(ranker, output, batch, card, max_unexplored_mass))
        if callback is not None:
            callback(output, batch)
    task.train(was_training)
    dist.all_reduce(sums)
    dist.all_reduce(order_violations)
    return _gather(_join(parts)), EvaluationSums(sums, counts, order_violations, ranker.is_generative)


def _batch_predictions(
    ranker: BaseRanker[Any],
    output: RankerOutput,
    batch: WindowBatch,
    card: DatasetCard,
    max_unexplored_mass: float,
) -> Predictions:
    marginals = ranker.marginals(output, max_unexplored_mass)
    occurred, time = target_outcomes(batch, len(card.actions))

    def to_numpy(values: Tensor) -> np.ndarray:
        return values.cpu().numpy()

    probabilities = [output.label_probability, output.objective_probability]
    if not output.objective_logits.shape[1]:
        probabilities[1] = torch.full_like(batch.objectives, torch.nan)
    duration_feature = card.feedback.duration_feature if card.feedback is not None else ""
    names = batch.sparse.keys()
    has_duration, has_users = duration_feature in names, USER_ID in names
    return Predictions(
        user=to_numpy(batch.user_key[batch.target_window]),
        ts_ms=to_numpy(batch.ts_ms[batch.target]),
        user_row=to_numpy(batch.ids(USER_ID)[batch.target_window] if has_users else torch.full_like(batch.target, -1)),
        item=to_numpy(batch.ids(ITEM_ID)[batch.target]),
        duration_bucket=to_numpy(
            batch.ids(duration_feature)[batch.target] if has_duration else torch.zeros_like(batch.target)
        ),
        probability=to_numpy(torch.cat([marginals.probability[:, 1:], *probabilities], 1).float()),
        occurred=to_numpy(torch.cat([occurred[:, 1:], batch.labels, batch.objectives], 1)),
        time=to_numpy(marginals.time[:, 1:].float()),
        observed_time=to_numpy(time[:, 1:]),
        time_given_prefix=to_numpy(_time_given_prefix(output, batch, len(card.actions))[:, 1:].float()),
        watch_time=to_numpy(
            torch.full_like(batch.watch_s, torch.nan) if output.watch_time is None else output.watch_time
        ),
        oracle=to_numpy(batch.oracle),
        unexplored_mass=to_numpy(marginals.unexplored_mass.float()),
    )


def _count_order_violations(output: RankerOutput, batch: WindowBatch) -> Tensor:
    predicted = output.step_times(batch)
    return (batch.timed_pairs & (predicted[:-1] > predicted[1:])).sum().double()[None]


def _time_given_prefix(output: RankerOutput, batch: WindowBatch, num_actions: int) -> Tensor:
    """Return [targets, actions] predicted times of observed steps; NaN elsewhere and where the log has no time."""
    predicted = output.step_times(batch)
    time = predicted.new_full((len(batch.target), num_actions), torch.nan)
    time[batch.step_target_index, batch.step_label] = predicted.masked_fill(~torch.isfinite(batch.step_time), torch.nan)
    return time


def _gather(local: Predictions) -> Predictions:
    if dist.get_world_size() == 1:
        return local
    parts: list[Predictions | None] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(local, parts)
    if parts is None:
        return local
    return _join([part for part in parts if part is not None])


def _join(parts: list[Predictions]) -> Predictions:
    return Predictions(
        **{field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Predictions)}
    )
