"""Per-target predictions and the subset that feeds the ensemble; shared by offline scoring and serving."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchrec import JaggedTensor

from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.schema import EXIT, ITEM_ID, WATCH_TIME
from a2gen_rec.models.base import BaseRanker, TargetEncoding
from a2gen_rec.models.ensemble.model import Objective
from a2gen_rec.nn.marginals import ActionMarginals

PROBABILITY_EPS = 1e-7
"""Clamp of probabilities before their logits; float32 sums may leave [0, 1] by this much."""


def prediction_objectives(card: DatasetCard, tasks: tuple[str, ...]) -> tuple[Objective, ...]:
    """Return the predictions of a ranker that enter an ensemble, each once, with their direction.

    Lower is better for glances and explicit negatives.

    Args:
        card: Dataset card.
        tasks: Objectives that the model predicts in addition to actions and labels.
    """
    lower_is_better = {"glance", "negative", *card.negative_actions}
    watch = [WATCH_TIME] if EXIT in card.timed_actions else []
    names = [*card.predicted_actions, *card.labels, *(task for task in tasks if task != WATCH_TIME), *watch]
    return tuple(Objective(name, name not in lower_is_better) for name in names)


@dataclass(frozen=True)
class TargetPredictions:
    """Predictions of a ranker for targets, before any of their actions.

    The watch time is the generator's even if a separate head predicts one: the generator's error was lower on
    KuaiRand and equal on simulated data, and every ranker has it [ours].

    The events of METHODS are ``[item ‖ category ‖ action]``. Here the item's embedding and the encoding of the
    impression's actions replace them; the encoding depends on the category, as on the impression's full context [ours].

    Attributes:
        encoding: Encoded targets, see :class:`TargetEncoding`.
        probability: [targets, events + labels + predicted objectives].
        time: [targets, events + exit] expected log1p seconds of each action given that it occurs; NaN if unknown.
            Meaningless for actions whose time the log does not record.
        context: [targets, d_item] embeddings of the targets' items.
        event_embedding: [keys, d_event] impressions of the history: item embedding and encoded actions.
        marginals: Actions and their times, see :class:`ActionMarginals`.
    """

    encoding: TargetEncoding
    probability: Tensor
    time: Tensor
    context: Tensor
    event_embedding: Tensor
    marginals: ActionMarginals

    @property
    def watch_time(self) -> Tensor:
        """Expected watch time, [targets] log1p seconds."""
        return self.time[:, -1]

    def ensemble_inputs(self, with_watch_time: bool) -> Tensor:
        """Return the ensemble's input, [targets, objectives] float32: logits, then optionally log1p seconds watched."""
        logits = torch.logit(self.probability.double(), eps=PROBABILITY_EPS).float()
        return torch.cat([logits, self.watch_time[:, None]], 1) if with_watch_time else logits


def predict_targets(
    rows: dict[str, JaggedTensor],
    ranker: BaseRanker[Any],
    batch: WindowBatch,
    max_unexplored_mass: float,
    actions: Tensor | None = None,
) -> TargetPredictions:
    """Return predictions for a batch's targets, and the other inputs of an ensemble.

    Args:
        rows: Looked-up rows of every table.
        ranker: Ranker that makes the predictions.
        batch: Targets and their history.
        max_unexplored_mass: Upper bound on the unexplored mass of every target.
        actions: Result of :meth:`BaseRanker.encode_actions`, if computed before.
    """
    if actions is None:
        actions = ranker.encode_actions(rows, batch)
    encoding = ranker.encode(rows, batch, actions)
    marginals = ranker.marginals(encoding, max_unexplored_mass)
    probabilities = [
        marginals.probability[:, 1:-1],
        encoding.label_probability,
        encoding.objective_probability,
    ]
    item = rows[ITEM_ID].values()[batch.lookup_rows(ITEM_ID, batch.history_index)]
    return TargetPredictions(
        encoding=encoding,
        probability=torch.cat(probabilities, 1),
        time=marginals.time[:, 1:],
        context=ranker.target_item_embeddings(rows, batch),
        event_embedding=torch.cat([item, actions], 1),
        marginals=marginals,
    )


def recent_events(batch: WindowBatch, first_target: Tensor, max_events: int) -> tuple[Tensor, Tensor]:
    """Return the visible keys among the last ``max_events`` before each list, oldest first.

    A key is visible if its impression started before the list's query time and had ended by then.

    Args:
        batch: Targets and their history.
        first_target: [lists] first target of each list.
        max_events: Maximum number of keys per list.

    Returns:
        [events] keys, concatenated over lists, and [lists] number of keys of each list.
    """
    window, end = batch.target_window[first_target], batch.history_end[first_target]
    counts = torch.bincount(batch.history_window, minlength=batch.history_shape[0])
    column = end[:, None] + torch.arange(-max_events, 0, device=end.device)
    candidates = (torch.cumsum(counts, 0) - counts)[window][:, None] + column
    row, position = torch.nonzero(column >= 0, as_tuple=True)
    key, now = candidates[row, position], batch.ts_ms[batch.query_index[first_target]][row]
    impression = batch.history_index[key]
    visible = (batch.ts_ms[impression] < now) & (batch.end_ms[impression] <= now)
    return key[visible], torch.bincount(row[visible], minlength=len(first_target))
