"""Targets as a ranker sees them, and which of its predictions make one score: what scoring lists and serving share."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchrec import JaggedTensor

from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.schema import EXIT, ITEM_ID, WATCH_TIME, DatasetCard
from a2gen_rec.models.base import BaseRanker, TargetEncoding
from a2gen_rec.models.ensemble.model import Objective
from a2gen_rec.nn.marginals import ActionMarginals

PROBABILITY_EPS = 1e-7
"""Probabilities are told apart from this to one less this: sums of float32 may leave [0, 1] by as much."""


def prediction_objectives(card: DatasetCard, tasks: tuple[str, ...]) -> tuple[Objective, ...]:
    """What a ranker predicts of a candidate, each once, and whether more of it is better.

    Glances and explicit negatives are better the fewer they are.

    Args:
        tasks: that the model predicts beside actions and labels.
    """
    less = {"glance", "negative", *card.negative_actions}
    watch = [WATCH_TIME] if EXIT in card.timed_actions else []
    names = [*card.predicted_actions, *card.labels, *(task for task in tasks if task != WATCH_TIME), *watch]
    return tuple(Objective(name, name not in less) for name in names)


@dataclass(frozen=True)
class TargetPredictions:
    """Targets as a ranker sees them before anything happens in them.

    The watch time is the generator's, also where a head of its own predicts one: the generator's had the lower error
    on KuaiRand and the same on simulated data, and every ranker has it [ours].

    METHODS' events are ``[item ‖ category ‖ action]``. Here the item's embedding and the encoding of what the user did
    in it stand for them, which sees the category as it sees all the impression's context [ours].

    Attributes:
        encoded: see :class:`Encoded`.
        probability: [targets, events + labels + predicted objectives].
        time: [targets, events + exit] expected log1p seconds of each action given that it happens; NaN where nothing
            tells. They mean nothing where the log does not record them.
        context: [targets, d_item] embeddings of what is shown.
        event: [keys, d_event] past impressions, each as its item's embedding and what the user did in it.
        what: as actions and their times are told, see :class:`Occurrence`.
    """

    encoding: TargetEncoding
    probability: Tensor
    time: Tensor
    context: Tensor
    event_embedding: Tensor
    marginals: ActionMarginals

    @property
    def watch_time(self) -> Tensor:
        """[targets] expected log1p seconds."""
        return self.time[:, -1]

    def ensemble_inputs(self, with_watch_time: bool) -> Tensor:
        """[targets, objectives] float32 as the ensemble takes them: logits, and log1p seconds of a watch time."""
        logits = torch.logit(self.probability.double(), eps=PROBABILITY_EPS).float()
        return torch.cat([logits, self.watch_time[:, None]], 1) if with_watch_time else logits


def predict_targets(
    rows: dict[str, JaggedTensor],
    ranker: BaseRanker[Any],
    batch: WindowBatch,
    max_error: float,
    actions: Tensor | None = None,
) -> TargetPredictions:
    """Predictions for a batch's targets, and what an ensemble needs besides.

    Args:
        rows: looked-up rows of every table.
        max_error: bound on the probability of action sequences that are not followed to their end.
        actions: of :meth:`Ranker.encode_actions`, if they are known already.
    """
    if actions is None:
        actions = ranker.encode_actions(rows, batch)
    encoded = ranker.encode(rows, batch, actions)
    what = ranker.marginals(encoded, max_error)
    outcomes = [what.probability[:, 1:-1], encoded.label_logits.sigmoid(), encoded.objective_logits.sigmoid()]
    item = rows[ITEM_ID].values()[batch.lookup_rows(ITEM_ID, batch.history_index)]
    return TargetPredictions(
        encoding=encoded,
        probability=torch.cat(outcomes, 1),
        time=what.time[:, 1:],
        context=ranker.target_item_embeddings(rows, batch),
        event_embedding=torch.cat([item, actions], 1),
        marginals=what,
    )


def recent_events(batch: WindowBatch, first: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Of the ``most`` keys right before each list, those that a ranker may see: that had begun before and ended.

    Oldest first.

    Args:
        first: [lists] first target of each.

    Returns:
        [events] keys of all lists, one list after another, and [lists] how many each has.
    """
    window, end = batch.target_window[first], batch.history_end[first]
    keys = torch.bincount(batch.history_window, minlength=batch.history_shape[0])
    column = end[:, None] + torch.arange(-most, 0, device=end.device)
    key = (torch.cumsum(keys, 0) - keys)[window][:, None] + column
    row, place = torch.nonzero(column >= 0, as_tuple=True)
    key, now = key[row, place], batch.ts_ms[batch.query_index[first]][row]
    past = (batch.ts_ms[batch.history_index[key]] < now) & (batch.end_ms[batch.history_index[key]] <= now)
    return key[past], torch.bincount(row[past], minlength=len(first))
