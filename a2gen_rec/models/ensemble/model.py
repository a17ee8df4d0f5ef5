"""One score from many objectives: METHODS §6 after UMRE, arXiv 2508.07613.

    s = Σ_k w_k t_k                        w = softmax over k of a_k + q(h)·e_k, independent of the values
    t_k = g T_k(u_k, h) + b(user)          h = [user ‖ context] / √width
    u_k = σ((v_k − mean_k) / scale_k)

Every t_k increases with its u_k, and u_k with the value v_k. The weights are non-negative and independent of the
values, so s increases with every v_k. Values are logits of probabilities. Those of a rare action are far from 0 and,
without normalization, would leave most of [0, 1] unused, so mean and scale are those of the training lists [ours].

The UMNN T_k rises from 0 to 1, so that all transforms have one range, the learned gain g. A weight is then an
objective's share of the score's range [ours]. Training starts from equal weights and equal transforms for all [ours].

The offset b depends on the user alone [ours]; the paper's depends on the candidate and the objective too. Offsets of
candidates order them whatever their predictions; they fit the training lists and do not generalize. Drawn at random,
they outweigh the predictions at first, and weights concentrate on the objectives with the least harmful offsets.

Adam moves each parameter by about the learning rate, even without a signal. The division by √width limits how fast the
score follows h [ours].
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from a2gen_rec.errors import ConfigError
from a2gen_rec.nn.monotonic import MonotonicTransform


@dataclass(frozen=True)
class Objective:
    """A prediction that enters the ensemble, and the direction in which it is better."""

    name: str
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.higher_is_better, bool):
            raise ConfigError(
                f"objective {self.name!r}: higher_is_better must be true or false, not {self.higher_is_better!r}"
            )


@dataclass(frozen=True)
class EnsembleOutput:
    """Scores and their parts.

    Attributes:
        score: [n, C] Σ_k weight · transform; higher ranks first.
        transform: [n, C, K] of each objective, decreasing in the value if lower is better.
        weight: [n, C, K] non-negative; sums to 1 over K.
        user_embedding: [n, dim] from the history.
    """

    score: Tensor
    transform: Tensor
    weight: Tensor
    user_embedding: Tensor

    @property
    def weight_entropy(self) -> Tensor:
        """[n, C] entropy of the weights, divided by that of equal weights: 0 for one objective, 1 for all alike."""
        entropy = torch.special.entr(self.weight).sum(-1)
        return entropy / math.log(max(self.weight.shape[-1], 2))


class UserHistoryEncoder(nn.Module):
    """GRU that encodes a user's recent events as one vector, after UMRE's light ranking model.

    Args:
        d_event: Width of an event's vector, of the item and the user's actions.
        dim: Width of the user's vector.
    """

    def __init__(self, d_event: int, dim: int) -> None:
        super().__init__()
        self.gru = nn.GRU(d_event, dim, batch_first=True)
        self.start = nn.Parameter(torch.zeros(dim))

    def forward(self, events: Tensor, length: Tensor) -> Tensor:
        """Return the state after the last event, or the learned initial state without any event.

        Args:
            events: [n, L, d_event] oldest first, padded at the end.
            length: [n] int64 number of events, 0 .. L.

        Returns:
            [n, dim]
        """
        states = self.start.expand(len(events), 1, -1)
        if events.shape[1]:
            after, _ = self.gru(events, states.transpose(0, 1).contiguous())
            states = torch.cat([states, after], dim=1)
        return states[torch.arange(len(events), device=events.device), length]


class Ensemble(nn.Module):
    """Light history model, personalized monotonic transforms and their weights; float32 even under autocast.

    Args:
        objectives: K ≥ 1 objectives with distinct names.
        d_event: Width of a history event's vector.
        d_context: Width of the candidate's context.
        dim: Width of the user vector and of the objectives' embeddings.
        hidden_dims: As in :class:`MonotonicTransform`.
        degree: As in :class:`MonotonicTransform`.
        gain: Initial range > 0 of the transforms.

    Attributes:
        mean: [K] mean of the values, saved with the weights; 0 until :meth:`set_normalization`.
        scale: [K] scale of the values, saved with the weights; 1 until :meth:`set_normalization`, so that a logit
            becomes its probability.

    Raises:
        ConfigError: No objective, or a duplicate name.
    """

    lower_is_better: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        objectives: Sequence[Objective],
        d_event: int,
        d_context: int,
        dim: int = 32,
        hidden_dims: Sequence[int] = (16, 8),
        degree: int = 32,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        names = [objective.name for objective in objectives]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"an ensemble needs one or more objectives with distinct names, not {names}")
        self.history = UserHistoryEncoder(d_event, dim)
        self.query = nn.Linear(dim + d_context, dim, bias=False)
        self.objective = nn.Parameter(torch.randn(len(names), dim))
        self.prior = nn.Parameter(torch.zeros(len(names)))
        self.transform = MonotonicTransform(len(names), dim + d_context, hidden_dims, degree)
        self.log_gain = nn.Parameter(torch.tensor(math.log(gain)))
        self.offset = nn.Linear(dim, 1)
        nn.init.zeros_(self.offset.bias)
        for personal in (self.query, self.transform.context, self.offset):
            nn.init.zeros_(personal.weight)
        lower_is_better = torch.tensor([not objective.higher_is_better for objective in objectives])
        self.register_buffer("lower_is_better", lower_is_better, persistent=False)
        self.register_buffer("mean", torch.zeros(len(names)))
        self.register_buffer("scale", torch.ones(len(names)))

    def set_normalization(self, mean: Tensor, scale: Tensor) -> None:
        """Set the mean and scale [K] that normalize the objectives' values.

        Raises:
            ConfigError: A value is not finite or a scale not positive, and the score would not increase with it.
        """
        check_normalization(mean, scale)
        self.mean.copy_(mean)
        self.scale.copy_(scale)

    def forward(self, value: Tensor, events: Tensor, length: Tensor, context: Tensor) -> EnsembleOutput:
        """Return the scores of every request's candidates; padded candidates and events do not affect the others.

        Args:
            value: [n, C, K] finite predictions: logits of probabilities, and monotonic functions of other objectives,
                such as the log of a watch time.
            events: [n, L, d_event] the user's recent events, oldest first, padded at the end.
            length: [n] int64 number of events, 0 .. L.
            context: [n, C, d_context] of each candidate, or [n, 1, d_context] shared by a request's candidates.
        """
        with torch.autocast(value.device.type, enabled=False):
            value, events, context = (tensor.to(self.objective.dtype) for tensor in (value, events, context))
            user = self.history(events, length)
            h = self._context(user, context)
            logits = self.prior + self.query(h) @ self.objective.T / self.objective.shape[1] ** 0.5
            weight = torch.softmax(logits, dim=-1).expand_as(value)
            z = (value - self.mean) / self.scale
            share = self.transform(torch.sigmoid(torch.where(self.lower_is_better, -z, z)), h)
            transform = self.log_gain.exp() * share + self.offset(user)[:, None]
            return EnsembleOutput((weight * transform).sum(-1), transform, weight, user)

    @torch.no_grad()
    def max_monotonicity_violation(self, events: Tensor, length: Tensor, context: Tensor, points: int = 257) -> Tensor:
        """Return the largest decrease of each transform for the given users and candidates.

        The exact integral never decreases; its quadrature may where it does not resolve the derivative. The result is
        computed in float64, so that it contains only the quadrature's error.

        Args:
            events: As in :meth:`forward`.
            length: As in :meth:`forward`.
            context: As in :meth:`forward`.
            points: Number of points of an even grid on [0, 1].

        Returns:
            [K] float64, the largest decrease from one grid point to the next; 0 if there is none.
        """
        exact = copy.deepcopy(self).double()
        h = exact._context(exact.history(events.double(), length), context.double()).flatten(0, 1)
        grid = torch.linspace(0, 1, points, dtype=torch.float64, device=h.device)
        violation = grid.new_zeros(len(self.lower_is_better))
        for chunk in h.split(256):
            transform = exact.log_gain.exp() * exact.transform(
                grid[:, None].expand(len(chunk), -1, len(violation)), chunk[:, None]
            )
            violation = torch.maximum(violation, -transform.diff(dim=1).amin((0, 1)))
        return violation

    def _context(self, user: Tensor, context: Tensor) -> Tensor:
        """Return h, [n, C, dim + d_context], from user [n, dim] and context [n, C, d_context]."""
        h = torch.cat([user[:, None].expand(-1, context.shape[1], -1), context], dim=-1)
        return h / h.shape[-1] ** 0.5


def check_normalization(mean: Tensor, scale: Tensor) -> None:
    """Check that mean and scale are finite and the scale positive.

    Raises:
        ConfigError: They are not.
    """
    if not (mean.isfinite().all() and scale.isfinite().all() and (scale > 0).all()):
        raise ConfigError(f"means {mean.tolist()} and scales {scale.tolist()} must be finite, scales positive")
