"""A2Gen's encoder with one head per action instead of the generator.

This is the ablation of the generator [ours]: each action's occurrence and time are predicted independently of the
other actions. Encoder, labels and objectives are those of A2Gen.
"""

from torch import Tensor, nn
from torchrec import JaggedTensor

from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.models.baselines.towers import TowerOutput, tower_marginals
from a2gen_rec.models.hierarchical import HierarchicalRanker
from a2gen_rec.models.initial_outputs import initial_outputs
from a2gen_rec.nn.experts import SharedBottom, TaskTowers, scatter_timed
from a2gen_rec.nn.marginals import ActionMarginals


class IndependentHeadsRanker(HierarchicalRanker[TowerOutput]):
    """Dense part of A2Gen, after the lookups, with an independent prediction of every action."""

    def _make_generator(self, card: DatasetCard) -> nn.Module:
        config = self.config
        outputs = len(card.predicted_actions) + int(self.is_timed.sum())
        towers = TaskTowers(outputs, config.dim, int(config.dim * config.tower_mlp_ratio), config.dropout)
        towers.init_output_bias(initial_outputs(card, card.predicted_actions))
        return nn.Sequential(SharedBottom(self.d_context, config.dim, outputs), towers)

    def forward(self, rows: dict[str, JaggedTensor], batch: WindowBatch) -> TowerOutput:
        return self.encode(rows, batch)

    def encode(self, rows: dict[str, JaggedTensor], batch: WindowBatch, actions: Tensor | None = None) -> TowerOutput:
        predicted = self._predict(*self._context(rows, batch, actions))
        events, times = self.generator(predicted.context).tensor_split([len(self.is_timed) - 2], dim=1)
        return TowerOutput(
            **vars(predicted),
            event_logits=events,
            time=scatter_timed(times, self.is_timed),
            trained=self.trained_outcomes,
        )

    def marginals(self, targets: TowerOutput, max_unexplored_mass: float) -> ActionMarginals:
        """Return the heads' predictions, or their mean with the wide part's; the unexplored mass is 0."""
        marginals = tower_marginals(targets, self.is_timed)
        return marginals if targets.wide is None else targets.wide.blend_with(marginals, self.is_timed)
