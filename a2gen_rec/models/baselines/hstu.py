"""HSTU (arXiv 2402.17152) over the sequence of impressions, with a tower per task: METHODS §7."""

import torch
from torch import Tensor, nn

from a2gen_rec.config import ModelConfig
from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.models.baselines.towers import TowersRanker
from a2gen_rec.models.ranker import Inputs, in_windows, key_times
from a2gen_rec.nn.encoder import log_bucket
from a2gen_rec.nn.experts import SharedBottom
from a2gen_rec.nn.hstu import HSTU, SequenceLayout
from a2gen_rec.ragged import pad


class HSTURanker(TowersRanker):
    """Impressions and targets are tokens of one sequence.

    What a target sees is what A2Gen sees, through all layers: states of past impressions depend on how far back the
    target's history goes, so that every moment has a sequence of its own. Candidates of one request share one.
    """

    def __init__(self, card: DatasetCard, config: ModelConfig) -> None:
        super().__init__(card, config)
        self.item = nn.Linear(self.d_target, config.dim)  # of past and target alike
        self.past = nn.Linear(self.d_token - self.d_target, config.dim, bias=False)  # what only the past has
        self.sequence = HSTU(
            config.dim,
            config.heads,
            config.layers,
            self.history,
            config.time_buckets if config.recency_bias else 0,
            len(self.features["item"]) if config.match_bias else 0,
            config.dropout,
        )
        self.mixture = SharedBottom(self.d_context, config.dim, self.outputs)

    def _history(self, inputs: Inputs, actions: Tensor, batch: WindowBatch) -> Tensor:
        shown = torch.cat([inputs.item, inputs.session], dim=-1)
        known = torch.cat([actions, inputs.gap, inputs.outcome], dim=-1)
        tokens = pad(self.item(shown) + self.past(known), batch.key_window, batch.key_column, batch.key_shape)
        place, layout = self._sequences(batch)
        return self.sequence(tokens[place], self.item(inputs.target), layout)

    def _sequences(self, batch: WindowBatch) -> tuple[tuple[Tensor, Tensor], SequenceLayout]:
        """One sequence for each moment at which targets are judged.

        Returns:
            Places of the sequences' impressions in the padded windows, broadcastable to [moments, longest] each, and
            their layout.
        """
        # The number of moments is asked of the accelerator; it is that of the targets but for requests.
        moment, owner, count = torch.unique_consecutive(batch.moment, return_inverse=True, return_counts=True)
        first = torch.cumsum(count, 0) - count
        longest = min(batch.key_shape[1], self.history)
        column = batch.history_end[first][:, None] + torch.arange(-longest, 0, device=first.device)
        place = (batch.target_window[first][:, None], column.clamp(min=0))
        now = batch.ts_ms[moment][:, None]
        begin, end = (values[place] for values in key_times(batch))
        matches = []
        if self.config.match_bias:
            for name in self.features["item"]:
                ids = batch.ids(name)
                target = ids[batch.target][:, None]
                matches.append((in_windows(batch, ids, 0)[place][owner] == target) & (target != 0))
        layout = SequenceLayout(
            owner=owner,
            seen=(column >= 0) & (begin < now) & (end <= now),
            between=self._bucket(begin[:, :, None] - begin[:, None]) if self.config.recency_bias else None,
            since=self._bucket(now - begin)[owner] if self.config.recency_bias else None,
            matches=matches,
        )
        return place, layout

    def _bucket(self, elapsed_ms: Tensor) -> Tensor:
        return log_bucket(elapsed_ms.float() / 1000, self.config.time_buckets, self.config.max_gap_s)
