"""Rankers with a tower per task: METHODS §7.

Whether an action happens, and when, are tasks of their own, and nothing tells one of another. The time of ``exit`` is
the watch time.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torchrec import JaggedTensor

from a2gen_rec.config import ModelConfig
from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.models.base import BaseRanker, FeatureEmbeddings, TargetEncoding
from a2gen_rec.nn.experts import TaskTowers
from a2gen_rec.nn.marginals import ActionMarginals


@dataclass(frozen=True)
class TowerOutput(TargetEncoding):
    """Predictions for the targets of a batch, whatever happened in them.

    Attributes:
        event_logits: [targets, events] that each action happens, ``start`` and ``exit`` left out.
        time: [targets, actions] log1p seconds should it happen; 0 where the log does not record it.
    """

    event_logits: Tensor
    time: Tensor


class TowerRanker(BaseRanker[TowerOutput]):
    """The base of the baselines: all but the history and the mixture that feeds the towers.

    Subclasses set ``mixture``, [targets, d_context] -> [targets, ``outputs``, dim], and :meth:`_history`.

    Attributes:
        d_token: width of all that is known of a past impression.
        outputs: number of towers: of events, labels, objectives, then times.
    """

    mixture: nn.Module

    def __init__(self, card: DatasetCard, config: ModelConfig) -> None:
        super().__init__(card, config)
        self.objective_tasks = tuple(card.objectives) if config.predict_objectives else ()
        self.d_token = self.d_item + 2 * config.dim + config.dim + self.d_session + self.d_outcome
        times = int(self.is_timed.sum())
        self.ends = list(accumulate([len(card.predicted_actions), len(card.labels), len(self.objective_tasks)]))
        self.outputs = self.ends[-1] + times
        self.towers = TaskTowers(self.outputs, config.dim, int(config.dim * config.tower_mlp_ratio), config.dropout)
        self.dropout = nn.Dropout(config.dropout)
        rate = torch.tensor(
            [card.base_rate[name] for name in [*card.predicted_actions, *card.labels, *self.objective_tasks]]
        )
        seconds = torch.tensor([card.median_time_s.get(name, 0.0) for name in card.actions]).nan_to_num()
        self.towers.init_output_bias(torch.cat([torch.logit(rate, eps=1e-4), torch.log1p(seconds[self.is_timed])]))

    @property
    def timed_action(self) -> Tensor:
        """[times] action of each tower of times."""
        return self.is_timed.nonzero().squeeze(1)

    def forward(self, rows: dict[str, JaggedTensor], batch: WindowBatch) -> TowerOutput:
        """Predictions for the targets of a batch, given the looked-up rows of every table."""
        return self.encode(rows, batch)

    def encode(self, rows: dict[str, JaggedTensor], batch: WindowBatch, actions: Tensor | None = None) -> TowerOutput:
        inputs = self._inputs(rows, batch)
        history = self._history(inputs, self.encode_actions(rows, batch) if actions is None else actions, batch)
        context = self.dropout(inputs.context(history))
        events, labels, objectives, times = self.towers(self.mixture(context)).tensor_split(self.ends, dim=1)
        return TowerOutput(context, labels, objectives, None, events, scatter_timed(times, self.is_timed))

    def encode_actions(self, rows: dict[str, JaggedTensor], batch: WindowBatch) -> Tensor:
        """[keys, 2·dim] mean of the time and action embeddings of what users did inside each impression."""

        def mean(tokens: Tensor, _: Tensor, real: Tensor | None) -> Tensor:
            if real is None:
                return tokens.mean(1)
            weight = real.to(tokens.dtype) / real.sum(1, keepdim=True)
            return (weight[..., None] * tokens).sum(1)

        return batch.history_buckets.apply(
            mean, self._action_tokens(rows, batch), batch.history_index[:, None], per_token=False
        )

    def marginals(self, targets: TowerOutput, max_error: float) -> ActionMarginals:
        """What the towers say; nothing remains."""
        return tower_marginals(targets, self.is_timed)

    def _history(self, inputs: FeatureEmbeddings, actions: Tensor, batch: WindowBatch) -> Tensor:
        """[targets, dim] of what each target sees, given what was done [keys, 2·dim]."""
        raise NotImplementedError


def scatter_timed(times: Tensor, timed: Tensor) -> Tensor:
    """[n, actions] of the times [n, timed actions]; 0 for the actions that are not ``timed`` [actions]."""
    return times.new_zeros(len(times), len(timed)).masked_scatter(timed, times)


def tower_marginals(targets: TowerOutput, timed: Tensor) -> ActionMarginals:
    """What towers say; nothing remains, and times that the log does not record are NaN."""
    chance, time = targets.event_logits.sigmoid(), targets.time.masked_fill(~timed, torch.nan)
    always = torch.ones_like(time[:, :1])
    time = torch.cat([0 * always, time[:, 1:]], dim=1)
    return ActionMarginals(torch.cat([always, chance, always], dim=1), time, 0 * always.squeeze(1))
