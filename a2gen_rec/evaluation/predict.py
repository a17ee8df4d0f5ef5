"""Predictions for whole splits, gathered from all ranks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from a2gen_rec.data.batch import WindowBatch, count_names
from a2gen_rec.data.schema import ITEM_ID, DatasetCard
from a2gen_rec.losses.loss import term_names
from a2gen_rec.losses.targets import step_target_index, target_outcomes
from a2gen_rec.models.a2gen import A2GenOutput
from a2gen_rec.models.base import BaseRanker, TargetEncoding
from a2gen_rec.models.baselines.towers import TowerOutput
from a2gen_rec.models.embedding_tables import id_features


@dataclass
class Predictions:
    """Predicted and observed, one row per target.

    What may happen are the card's actions in code order without ``start``, then its labels, then its objectives.

    Attributes:
        user: [n] user key; item: [n] row of the item's table; length: [n] row of the feature that tells the video's
            length, 0 where there is none.
        probability: [n, outcomes], NaN for objectives that are not predicted; happened: same shape, 0, 1 or NaN.
        time, actual_time: [n, actions] log1p seconds; NaN when unknown.
        next_time: [n, actions] as ``time``, of the actions that happened, by a model that has seen the steps before
            each; the towers of baselines read no steps and say what they said.
        watch_time: [n] log1p seconds as the objectives' head has it; NaN where it is not predicted.
        oracle: [n, oracle columns] true probabilities.
        remainder: [n] probability of the sequences that were not followed to their end.
    """

    user: np.ndarray
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


def outcome_columns(card: DatasetCard) -> dict[str, int]:
    """Column of :class:`Predictions` for every action but ``start``, every label and every objective."""
    return {name: column for column, name in enumerate([*card.actions[1:], *card.labels, *card.objectives])}


@dataclass
class EvaluationSums:
    """Sums over a split and all ranks.

    Attributes:
        loss: [terms] of the loss; counts: what they are means over.
        backwards: [1] actions of one target, one right after the other, whose predicted times run backwards.
        generated: whether a generator made the predictions.
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
    callback: Callable[[TargetEncoding, WindowBatch], None] | None = None,
) -> tuple[Predictions, EvaluationSums]:
    """Run the model over agreed batches. All ranks call it; rank 0 gets all rows, the others their own.

    Args:
        task: model and loss, such as a :class:`TrainTask` or its sharded form; ranker: of that model.
        batches: on every rank the same number, with global counts.
        max_error: bound on the probability of sequences that are not followed to their end.
        also: takes every batch and what the model says of it.
    """
    was_training = task.training
    task.eval()
    device = next(ranker.parameters()).device
    parts: list[Predictions] = []
    sums = torch.zeros(len(term_names(ranker.objective_tasks)), dtype=torch.float64)
    backwards = torch.zeros(1, dtype=torch.float64)
    counts = torch.zeros(len(count_names(card)), dtype=torch.float64)
    for batch in batches:
        batch = batch.to(device)
        _, (batch_sums, output) = task(batch)
        sums += batch_sums.double().cpu()
        counts += batch.counts.cpu()
        backwards += _count_order_violations(output, batch).cpu()
        parts.append(_batch_predictions(ranker, output, batch, card, max_unexplored_mass))
        if callback is not None:
            callback(output, batch)
    task.train(was_training)
    dist.all_reduce(sums)
    dist.all_reduce(backwards)
    return _gather(_join(parts)), EvaluationSums(sums, counts, backwards, ranker.is_generative)


def _batch_predictions(
    ranker: BaseRanker[Any],
    output: A2GenOutput | TowerOutput,
    batch: WindowBatch,
    card: DatasetCard,
    max_unexplored_mass: float,
) -> Predictions:
    what = ranker.marginals(output, max_unexplored_mass)
    happened, time = target_outcomes(batch, len(card.actions))

    def host(values: Tensor) -> np.ndarray:
        return values.cpu().numpy()

    chances = [output.label_logits.sigmoid(), output.objective_logits.sigmoid()]
    if not output.objective_logits.shape[1]:
        chances[1] = torch.full_like(batch.objectives, torch.nan)
    length = card.feedback.duration_feature if card.feedback is not None else ""
    is_known = length in {feature.name for feature in id_features(card)}
    return Predictions(
        user=host(batch.user_key[batch.target_window]),
        item=host(batch.ids(ITEM_ID)[batch.target]),
        duration_bucket=host(batch.ids(length)[batch.target] if is_known else torch.zeros_like(batch.target)),
        probability=host(torch.cat([what.probability[:, 1:], *chances], 1).float()),
        occurred=host(torch.cat([happened[:, 1:], batch.labels, batch.objectives], 1)),
        time=host(what.time[:, 1:].float()),
        observed_time=host(time[:, 1:]),
        time_given_prefix=host(_time_given_prefix(output, batch, len(card.actions))[:, 1:].float()),
        watch_time=host(torch.full_like(batch.watch_s, torch.nan) if output.watch_time is None else output.watch_time),
        oracle=host(batch.oracle),
        unexplored_mass=host(what.unexplored_mass.float()),
    )


def _count_order_violations(output: A2GenOutput | TowerOutput, batch: WindowBatch) -> Tensor:
    predicted = _step_time(output, batch)
    return (batch.timed_pairs & (predicted[:-1] > predicted[1:])).sum().double()[None]


def _step_time(output: A2GenOutput | TowerOutput, batch: WindowBatch) -> Tensor:
    """[steps] predicted time of each step that was taken, given those before it."""
    of_steps = output.steps.time if isinstance(output, A2GenOutput) else output.time[step_target_index(batch)]
    return of_steps.gather(1, batch.step_label[:, None]).squeeze(1)


def _time_given_prefix(output: A2GenOutput | TowerOutput, batch: WindowBatch, actions: int) -> Tensor:
    """[targets, actions] of the steps that were taken; NaN elsewhere, and where the log does not record the time."""
    predicted = _step_time(output, batch)
    time = predicted.new_full((len(batch.target), actions), torch.nan)
    time[step_target_index(batch), batch.step_label] = predicted.masked_fill(
        ~torch.isfinite(batch.step_time), torch.nan
    )
    return time


def _gather(local: Predictions) -> Predictions:
    if dist.get_world_size() == 1:
        return local
    everyone: list[Predictions | None] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(local, everyone)
    if everyone is None:
        return local
    return _join([part for part in everyone if part is not None])


def _join(parts: list[Predictions]) -> Predictions:
    return Predictions(
        **{item.name: np.concatenate([getattr(part, item.name) for part in parts]) for item in fields(Predictions)}
    )
