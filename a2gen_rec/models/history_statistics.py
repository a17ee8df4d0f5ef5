"""Statistics of a user's own history: counts, rates and mean times, over all visible impressions and by shared feature.

They summarize the impressions that a target may see, by the mask that attention uses: what had not ended is not
counted, and training and serving compute the same numbers from the same history. A group's rates are relative to the
user's own, the user's own to the training rates, so that they add up [ours].
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.schema import EFFECTIVE, FEEDBACK, GLANCE, NEGATIVE, OBJECTIVES, UNKNOWN
from a2gen_rec.nn.dropout import Dropout
from a2gen_rec.nn.encoder import WindowLayout
from a2gen_rec.utils.jagged import jagged_to_padded_dense, padded_dense_to_jagged

PRIOR_WEIGHT = 5.0
"""Weight of the prior in every rate and mean, in impressions."""
RECENT = 5
"""Number of latest impressions in the group of recent ones."""


class HistoryStatistics(nn.Module):
    """Statistics of the visible history of every target.

    Groups: all visible impressions, the latest ``RECENT``, and those that share each item feature with the target.

    Args:
        card: Dataset card.
        num_features: Number of item features.
        use_feedback: Whether the feedback levels of the history are inputs.
    """

    rate_prior: Tensor
    time_prior: Tensor
    is_timed: Tensor

    def __init__(self, card: DatasetCard, num_features: int, use_feedback: bool) -> None:
        super().__init__()
        self.num_actions = len(card.actions)
        self.use_feedback = use_feedback
        self.rate_names = [*card.predicted_actions, *card.labels]
        rates = [card.base_rate[name] for name in self.rate_names]
        if self.use_feedback:
            self.rate_names += OBJECTIVES
            rates += [card.base_rate.get(name, 0.0) for name in OBJECTIVES]
        self.time_names = timed = [name for name in card.actions if name in card.timed_actions]
        self.register_buffer("rate_prior", torch.tensor(rates).clamp(min=1e-4), persistent=False)
        self.register_buffer(
            "time_prior",
            torch.log1p(torch.tensor([card.median_time_s.get(name, 0.0) for name in timed])),
            persistent=False,
        )
        self.register_buffer(
            "is_timed", torch.tensor([name in card.timed_actions for name in card.actions]), persistent=False
        )
        self.num_groups = 2 + num_features
        self.num_statistics = self.num_groups * (1 + len(rates) + len(timed))

    def names(self, features: Sequence[str]) -> list[str]:
        """Return the names of the statistics, given those of the item features."""
        groups = ["history", f"latest {RECENT}", *(f"history of {feature}" for feature in features)]
        values = ["impressions", *self.rate_names, *(f"time of {name}" for name in self.time_names)]
        return [f"{group}: {value}" for group in groups for value in values]

    def forward(self, batch: WindowBatch, layout: WindowLayout) -> Tensor:
        """Return [targets, statistics]."""
        masks = self._groups(batch, layout)  # [windows, groups, max targets, max keys]
        values = jagged_to_padded_dense(self.outcomes(batch), layout.row, layout.column, layout.shape)
        with torch.autocast(values.device.type, enabled=False):  # half precision counts exactly up to 256 only
            sums = (masks.flatten(1, 2) @ values).unflatten(1, masks.shape[1:3])
        rates, times = len(self.rate_prior), len(self.time_prior)
        # Each [windows, groups, max targets, values].
        n, positives, known, total, timed = sums.split([1, rates, rates, times, times], dim=-1)
        own_rate = (positives[:, :1] + PRIOR_WEIGHT * self.rate_prior) / (known[:, :1] + PRIOR_WEIGHT)
        own_time = (total[:, :1] + PRIOR_WEIGHT * self.time_prior) / (timed[:, :1] + PRIOR_WEIGHT)
        rate = (positives[:, 1:] + PRIOR_WEIGHT * own_rate) / (known[:, 1:] + PRIOR_WEIGHT)
        time = (total[:, 1:] + PRIOR_WEIGHT * own_time) / (timed[:, 1:] + PRIOR_WEIGHT)
        rates_ratio = torch.cat([own_rate / self.rate_prior, rate / own_rate], dim=1).log()
        time_difference = torch.cat([own_time - self.time_prior, time - own_time], dim=1)
        statistics = torch.cat([torch.log1p(n), rates_ratio, time_difference], dim=-1)
        statistics = statistics.transpose(1, 2).flatten(2).expand(-1, layout.target_shape[1], -1)
        return padded_dense_to_jagged(statistics, layout.target_row, layout.target_column)

    def _groups(self, batch: WindowBatch, layout: WindowLayout) -> Tensor:
        """Return [windows, groups, max targets, max keys] float masks of the impressions of each group."""
        visible = layout.attention_mask[:, None]
        groups = [visible, visible & (visible_from_each(visible) <= RECENT)]
        if layout.matches is not None:
            shape = (-1, -1, layout.matches.shape[2], -1)
            groups = [group.expand(shape) for group in groups] + [layout.matches & visible]
        return torch.cat(groups, dim=1).float()

    def outcomes(self, batch: WindowBatch) -> Tensor:
        """Return [keys, values]: one, rates' outcomes, whether known, log1p seconds, whether known.

        Rates' outcomes have the names ``rate_names``, times those of ``time_names``; unknown values are 0.
        """
        is_start = batch.action == 0
        impression = is_start.cumsum(0) - 1
        n = len(batch.ts_ms)
        occurred = batch.offset_s.new_zeros(n, self.num_actions)
        occurred[impression, batch.action] = 1
        seconds = batch.offset_s.new_full((n, self.num_actions), torch.nan)
        seconds[impression, batch.action] = batch.offset_s
        occurred, seconds = occurred[batch.history_index], seconds[batch.history_index][:, self.is_timed]
        labels = batch.history_labels
        outcomes = [occurred[:, 1:-1], labels.nan_to_num()]
        known = [torch.ones_like(occurred[:, 1:-1]), torch.isfinite(labels)]
        if self.use_feedback:
            level = batch.outcome[FEEDBACK][:, None]
            outcomes.append(torch.cat([level == GLANCE, level >= EFFECTIVE, level == NEGATIVE], dim=1))
            known.append((level != UNKNOWN).expand(-1, 3))
        is_known = torch.isfinite(seconds)
        times = torch.log1p(seconds.nan_to_num())
        return torch.cat([torch.ones_like(occurred[:, :1]), *outcomes, *known, times, is_known], dim=1).float()


def visible_from_each(visible: Tensor) -> Tensor:
    """Return [*, max keys] int64 number of visible keys from each on; 1 at the latest visible one.

    Args:
        visible: [*, max keys] bool.
    """
    return visible.flip(-1).cumsum(-1).flip(-1)


class NumericInputs(nn.Module):
    """Projection of numbers to ``width``: linear, and a hidden layer for what is not.

    Args:
        num_inputs: Number of numbers.
        width: Width of the output.
        dropout: Dropout rate after the hidden layer.
    """

    def __init__(self, num_inputs: int, width: int, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(num_inputs, 2 * width)
        self.dropout = Dropout(dropout)
        self.output = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[n, num_inputs] -> [n, width]"""
        hidden = F.gelu(self.hidden(x.to(self.hidden.weight.dtype)))
        projected: Tensor = self.output(self.dropout(hidden))
        return projected
