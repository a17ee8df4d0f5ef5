"""One score from many objectives: METHODS §6 after UMRE, arXiv 2508.07613.

    s = Σ_k w_k t_k(u_k, h)      w = softmax over objectives, from the user and the candidate's context alone
    u_k = σ((v_k − centre_k) / scale_k)

Every t_k rises with its u_k, u_k with the value v_k, and the weights are non-negative and do not see the values, so
s rises with every v_k. Values are logits of probabilities: those of a rare action lie far from 0, and as they are
would leave most of [0, 1] unused, so centre and scale are the values' own, of the training lists [ours].
"""

import copy
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
    """Scores, and what they are made of.

    Attributes:
        score: [n, C] Σ_k weight · transform; higher ranks first.
        transform: [n, C, K] of each objective, falling with the value where less is better.
        weight: [n, C, K] non-negative, of sum 1 over K.
        user: [n, dim] from the history.
    """

    score: Tensor
    transform: Tensor
    weight: Tensor
    user_embedding: Tensor


class UserHistoryEncoder(nn.Module):
    """A user's recent past as one vector: a GRU over the events, after UMRE's light ranking model.

    Args:
        d_event: width of an event's vector, of what was shown and what the user did.
        dim: width of the user's.
    """

    def __init__(self, d_event: int, dim: int) -> None:
        super().__init__()
        self.gru = nn.GRU(d_event, dim, batch_first=True)
        self.start = nn.Parameter(torch.zeros(dim))

    def forward(self, events: Tensor, length: Tensor) -> Tensor:
        """The state after the last event; the learned state it begins with where there is none.

        Args:
            events: [n, L, d_event] oldest first, padded at the end; length: [n] int64 number of events, 0 .. L.

        Returns:
            [n, dim]
        """
        states = self.start.expand(len(events), 1, -1)
        if events.shape[1]:
            after, _ = self.gru(events, states.transpose(0, 1).contiguous())
            states = torch.cat([states, after], dim=1)
        return states[torch.arange(len(events), device=events.device), length]


class Ensemble(nn.Module):
    """Light history model, personalised monotonic transforms and their weights; float32 even under autocast.

    Args:
        objectives: K ≥ 1, of distinct names.
        d_event: width of a history event's vector.
        d_context: width of the candidate's context.
        dim: width of the user vector and of the objectives' embeddings.
        hidden, degree: of :class:`MonotonicTransform`.

    Attributes:
        centre, scale: [K] saved with the weights; 0 and 1, which make of a logit its probability, until ``squash``.

    Raises:
        ConfigError: no objective, or a name twice.
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
    ) -> None:
        super().__init__()
        names = [objective.name for objective in objectives]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"an ensemble needs one or more objectives of distinct names, not {names}")
        self.history = UserHistoryEncoder(d_event, dim)
        self.query = nn.Linear(dim + d_context, dim)
        # Equal weights to begin with: drawn at random, they are soon all on one objective, and hard to win back.
        nn.init.zeros_(self.query.weight)
        nn.init.zeros_(self.query.bias)
        self.objective = nn.Parameter(torch.randn(len(names), dim))
        self.transform = MonotonicTransform(len(names), dim + d_context, hidden_dims, degree)
        less = torch.tensor([not objective.higher_is_better for objective in objectives])
        self.register_buffer("lower_is_better", less, persistent=False)
        self.register_buffer("mean", torch.zeros(len(names)))
        self.register_buffer("scale", torch.ones(len(names)))

    def set_normalization(self, mean: Tensor, scale: Tensor) -> None:
        """Set the centre and scale [K] of the objectives' values.

        Raises:
            ConfigError: one is not finite, or a scale not positive: the score would not rise with that objective.
        """
        if not (mean.isfinite().all() and scale.isfinite().all() and (scale > 0).all()):
            raise ConfigError(f"centres {mean.tolist()} and scales {scale.tolist()} must be finite, scales positive")
        self.mean.copy_(mean)
        self.scale.copy_(scale)

    def forward(self, value: Tensor, events: Tensor, length: Tensor, context: Tensor) -> EnsembleOutput:
        """Scores of every request's candidates. Padded candidates and events change nothing for the others.

        Args:
            value: [n, C, K] predictions, finite: logits of probabilities, and whatever rises with the others, such as
                the log of a watch time.
            events: [n, L, d_event] the user's recent past, oldest first, padded at the end.
            length: [n] int64 number of events, 0 .. L.
            context: [n, C, d_context] of each candidate, or [n, 1, d_context] shared by a request's candidates.
        """
        with torch.autocast(value.device.type, enabled=False):
            value, events, context = (each.to(self.objective.dtype) for each in (value, events, context))
            user = self.history(events, length)
            h = self._context(user, context)
            logits = self.query(h) @ self.objective.T / self.objective.shape[1] ** 0.5
            weight = torch.softmax(logits, dim=-1).expand_as(value)
            z = (value - self.mean) / self.scale
            transform = self.transform(torch.sigmoid(torch.where(self.lower_is_better, -z, z)), h)
            return EnsembleOutput((weight * transform).sum(-1), transform, weight, user)

    @torch.no_grad()
    def max_monotonicity_violation(self, events: Tensor, length: Tensor, context: Tensor, points: int = 257) -> Tensor:
        """How far from monotonic the transforms are for the given users and candidates.

        The exact integral never falls; its quadrature may where it does not resolve the rate of change. Measured in
        float64, which leaves the quadrature's error alone.

        Args:
            events, length, context: as ``forward`` takes.
            points: of an even grid on [0, 1].

        Returns:
            [K] float64: largest fall of each transform from one grid point to the next; 0 where none falls.
        """
        exact = copy.deepcopy(self).double()
        h = exact._context(exact.history(events.double(), length), context.double()).flatten(0, 1)
        grid = torch.linspace(0, 1, points, dtype=torch.float64, device=h.device)
        most = grid.new_zeros(len(self.lower_is_better))
        for part in h.split(256):
            transform = exact.transform(grid[:, None].expand(len(part), -1, len(most)), part[:, None])
            most = torch.maximum(most, -transform.diff(dim=1).amin((0, 1)))
        return most

    def _context(self, user: Tensor, context: Tensor) -> Tensor:
        """h: [n, C, dim + d_context] of user [n, dim] and context [n, C, d_context]."""
        return torch.cat([user[:, None].expand(-1, context.shape[1], -1), context], dim=-1)
