"""Wide part: one small network per outcome on flat inputs, next to the deep part (Wide & Deep, DLRS 2016) [ours].

The outcomes share no hidden layer, only a linear projection, so a frequent one cannot displace a rare one. Large
identifiers are no inputs, so they cannot be memorized. Both parts are trained by losses of their own, and predictions
are means of both.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from a2gen_rec.data.card import DatasetCard
from a2gen_rec.models.flat_inputs import FlatInputs
from a2gen_rec.models.initial_outputs import initial_outputs
from a2gen_rec.nn.dropout import Dropout
from a2gen_rec.nn.experts import TaskLinear, scatter_timed
from a2gen_rec.nn.marginals import ActionMarginals, mean_log_odds

D_SMALL = 8
"""Width of the projected embedding of a small feature."""
MAX_INPUT = 10.0
"""Bound on inputs after scaling."""


class WidePredictions(NamedTuple):
    """Predictions of the wide part.

    Attributes:
        event_logits: [targets, events] of each action's occurrence, without ``start`` and ``exit``.
        label_logits: [targets, labels].
        objective_logits: [targets, objectives]; no columns if objectives are not predicted.
        time: [targets, actions] log1p seconds given that the action occurs; 0 if the log does not record it.
    """

    event_logits: Tensor
    label_logits: Tensor
    objective_logits: Tensor
    time: Tensor

    def blend_with(self, marginals: ActionMarginals, is_timed: Tensor) -> ActionMarginals:
        """Return the mean of these predictions and ``marginals``: of log-odds, and of times in log1p seconds.

        Args:
            marginals: Predictions of the deep part.
            is_timed: [actions] bool, whether the log records the action's time; other times are not changed.
        """
        other = marginals.time
        time = torch.where(torch.isnan(other), self.time, (other + self.time) / 2)
        return replace(mean_log_odds(marginals, self.event_logits), time=torch.where(is_timed, time, other))


class WideTowers(nn.Module):
    """One network with two hidden layers per outcome, on flat rows and embeddings of small features.

    Args:
        card: Dataset card.
        inputs: Columns of the flat rows, without table rows.
        num_small: Number of small features.
        dim: Width of an embedding.
        objectives: Predicted objectives, without the watch time.
        hidden_dim: Width of the hidden layers of each outcome.
        dropout: Dropout rate after each hidden layer, except for times.
    """

    is_timed: Tensor
    scale: Tensor

    def __init__(
        self,
        card: DatasetCard,
        inputs: FlatInputs,
        num_small: int,
        dim: int,
        objectives: Sequence[str],
        hidden_dim: int,
        dropout: float,
    ) -> None:
        super().__init__()
        timed = torch.tensor([name in card.timed_actions for name in card.actions])
        occurrences = [*card.predicted_actions, *card.labels, *objectives]
        self.counts = [len(card.predicted_actions), len(card.labels), len(objectives), int(timed.sum())]
        self.num_optional = inputs.num_optional
        self.register_buffer("scale", torch.tensor(inputs.scales), persistent=False)
        self.register_buffer("is_timed", timed, persistent=False)
        self.small = nn.Linear(dim, D_SMALL, bias=False)
        width = num_small * D_SMALL + len(inputs.scales) + self.num_optional
        # Cheaper than a first layer on all columns, and equally good on KuaiRand.
        self.project = nn.Linear(width, 4 * hidden_dim, bias=False)
        self.first = nn.Linear(4 * hidden_dim, sum(self.counts) * hidden_dim)
        self.second = TaskLinear(sum(self.counts), hidden_dim, hidden_dim)
        self.last = nn.Parameter(torch.zeros(sum(self.counts), hidden_dim))
        self.dropout = Dropout(dropout)
        self.bias = nn.Parameter(initial_outputs(card, occurrences))

    def forward(self, values: Tensor, embeddings: Tensor) -> WidePredictions:
        """Return predictions of targets.

        Args:
            values: [targets, columns] flat rows; NaN where a value is missing.
            embeddings: [targets, small features, dim].
        """
        small = self.small(embeddings).flatten(1)
        missing = torch.isnan(values[:, : self.num_optional])
        scaled = (values.nan_to_num() * self.scale).clamp(-MAX_INPUT, MAX_INPUT)
        dtype = self.first.weight.dtype
        projected = self.project(torch.cat([small, scaled.to(dtype), missing.to(dtype)], dim=1))
        hidden = self._drop(F.gelu(self.first(projected)).unflatten(1, (sum(self.counts), -1)))
        hidden = self._drop(F.gelu(self.second(hidden)))
        # On CPU, faster than a batched product with one column.
        predicted = (hidden * self.last).sum(-1) + self.bias
        events, labels, objectives, times = predicted.split(self.counts, dim=1)
        return WidePredictions(events, labels, objectives, scatter_timed(times, self.is_timed))

    def _drop(self, hidden: Tensor) -> Tensor:
        """Return hidden values [targets, outcomes, dim] after dropout, except those of times.

        On KuaiRand, dropout raised the error of this part's watch time by 2% without helping the other outcomes.
        """
        if not self.training:
            return hidden
        occurrences, times = hidden.split([sum(self.counts[:-1]), self.counts[-1]], dim=1)
        return torch.cat([self.dropout(occurrences), times], dim=1)
