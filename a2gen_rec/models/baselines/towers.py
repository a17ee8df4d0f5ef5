"""Rankers with a tower per task: METHODS §7.

The occurrence and the time of every action are separate tasks, predicted independently. The time of ``exit`` is the
watch time.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchrec import JaggedTensor

from a2gen_rec.config import ModelConfig
from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.models.base import BaseRanker, FeatureEmbeddings, RankerOutput
from a2gen_rec.models.initial_outputs import initial_outputs
from a2gen_rec.nn.dropout import Dropout
from a2gen_rec.nn.encoder import WindowLayout
from a2gen_rec.nn.experts import TaskTowers, scatter_timed
from a2gen_rec.nn.marginals import ActionMarginals


@dataclass(frozen=True)
class TowerOutput(RankerOutput):
    """Predictions for the targets of a batch, independent of their observed actions.

    Attributes:
        event_logits: [targets, events] logit of each action's occurrence, without ``start`` and ``exit``.
        time: [targets, actions] log1p seconds given that the action occurs; 0 if the log does not record it.
    """

    is_generative: ClassVar[bool] = False
    event_logits: Tensor
    time: Tensor

    def step_times(self, batch: WindowBatch) -> Tensor:
        return self.time[batch.step_target_index].gather(1, batch.step_label[:, None]).squeeze(1)


class TowerRanker(BaseRanker[TowerOutput]):
    """Base of the baselines: everything except the history encoder and the mixture that feeds the towers.

    Subclasses set ``mixture``, [targets, d_context] -> [targets, ``num_towers``, dim], and :meth:`_history`.

    Attributes:
        d_token: Width of all features of an impression in the history.
        num_towers: Number of towers: of events, labels, objectives, then times.
        split_indices: First tower of the labels, of the objectives and of the times.
    """

    mixture: nn.Module

    def __init__(self, card: DatasetCard, config: ModelConfig) -> None:
        super().__init__(card, config)
        self.objective_tasks = tuple(card.objectives) if config.predict_objectives else ()
        self.d_token = self.d_item + 2 * config.dim + config.dim + self.d_session + self.d_outcome
        times = int(self.is_timed.sum())
        self.split_indices = list(
            accumulate([len(card.predicted_actions), len(card.labels), len(self.objective_tasks)])
        )
        self.num_towers = self.split_indices[-1] + times
        self.towers = TaskTowers(self.num_towers, config.dim, int(config.dim * config.tower_mlp_ratio), config.dropout)
        self.dropout = Dropout(config.dropout)
        occurrences = [*card.predicted_actions, *card.labels, *self.objective_tasks]
        self.towers.init_output_bias(initial_outputs(card, occurrences))

    def forward(self, rows: dict[str, JaggedTensor], batch: WindowBatch) -> TowerOutput:
        return self.encode(rows, batch)

    def encode(self, rows: dict[str, JaggedTensor], batch: WindowBatch, actions: Tensor | None = None) -> TowerOutput:
        layout = self._layout(batch)
        inputs = self._embed(rows, batch, layout)
        actions = self.encode_actions(rows, batch) if actions is None else actions
        history = self._history(inputs, actions, batch, layout)
        context = self.dropout(inputs.context(history))
        events, labels, objectives, times = self.towers(self.mixture(context)).tensor_split(self.split_indices, dim=1)
        return TowerOutput(
            context,
            labels,
            objectives,
            None,
            events,
            scatter_timed(times, self.is_timed),
            trained=self.trained_outcomes,
        )

    def encode_actions(self, rows: dict[str, JaggedTensor], batch: WindowBatch) -> Tensor:
        """Return [keys, 2·dim] mean time and action embeddings of the actions inside each impression."""

        def mean(tokens: Tensor, _: Tensor, mask: Tensor | None) -> Tensor:
            if mask is None:
                return tokens.mean(1)
            weight = mask.to(tokens.dtype) / mask.sum(1, keepdim=True)
            return (weight[..., None] * tokens).sum(1)

        return batch.history_buckets.apply(
            mean, self._action_tokens(rows, batch), batch.history_index[:, None], per_token=False
        )

    def marginals(self, targets: TowerOutput, max_unexplored_mass: float) -> ActionMarginals:
        """Return the towers' predictions; the unexplored mass is 0."""
        return tower_marginals(targets, self.is_timed)

    def _history(self, inputs: FeatureEmbeddings, actions: Tensor, batch: WindowBatch, layout: WindowLayout) -> Tensor:
        """Return [targets, dim] history vectors, given the encoded actions [keys, 2·dim]."""
        raise NotImplementedError


def tower_marginals(targets: TowerOutput, is_timed: Tensor) -> ActionMarginals:
    """Return the towers' predictions as marginals; times that the log does not record are NaN."""
    probability, time = targets.event_logits.sigmoid(), targets.time.masked_fill(~is_timed, torch.nan)
    one = torch.ones_like(time[:, :1])
    time = torch.cat([0 * one, time[:, 1:]], dim=1)
    return ActionMarginals(torch.cat([one, probability, one], dim=1), time, 0 * one.squeeze(1))
