"""One score from many objectives: METHODS §6 after UMRE, arXiv 2508.07613.

    s = Σ_k w_k t_k(p_k, h)      w = softmax over objectives, from the user and the candidate's context alone

Every t_k rises with its p_k, and the weights are non-negative and do not see the p_k, so s rises with every p_k.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from a2gen_rec.errors import ConfigError
from a2gen_rec.nn.monotonic import MonotonicTransform

Better = Literal["more", "less"]


@dataclass(frozen=True)
class Objective:
    """A prediction that enters the ensemble, and whether more or less of it is better."""

    name: str
    better: Better = "more"

    def __post_init__(self) -> None:
        if self.better not in get_args(Better):
            raise ConfigError(f"objective {self.name!r}: better must be one of {get_args(Better)}, not {self.better!r}")


@dataclass(frozen=True)
class EnsembleOutput:
    """Scores, and what they are made of.

    Attributes:
        score: [n, C] Σ_k weight · transform; higher ranks first.
        transform: [n, C, K] of each objective, falling where less is better.
        weight: [n, C, K] non-negative, of sum 1 over K.
        user: [n, dim] from the history.
    """

    score: Tensor
    transform: Tensor
    weight: Tensor
    user: Tensor


class Ensemble(nn.Module):
    """Light history model, personalised monotonic transforms and their weights; float32 even under autocast.

    Args:
        objectives: K ≥ 1, of distinct names.
        d_event: width of a history event's ``[item ‖ category ‖ action …]`` vector.
        d_context: width of the candidate's context.
        dim: width of the user vector and of the objectives' embeddings.
        hidden, degree: of :class:`MonotonicTransform`.

    Raises:
        ConfigError: no objective, or a name twice.
    """

    less: Tensor

    def __init__(
        self,
        objectives: Sequence[Objective],
        d_event: int,
        d_context: int,
        dim: int = 32,
        hidden: Sequence[int] = (16, 8),
        degree: int = 32,
    ) -> None:
        super().__init__()
        names = [objective.name for objective in objectives]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"an ensemble needs one or more objectives of distinct names, not {names}")
        self.history = nn.GRU(d_event, dim, batch_first=True)
        self.no_history = nn.Parameter(torch.zeros(dim))
        self.query = nn.Linear(dim + d_context, dim)
        self.objective = nn.Parameter(torch.randn(len(names), dim))
        self.transform = MonotonicTransform(len(names), dim + d_context, hidden, degree)
        less = torch.tensor([objective.better == "less" for objective in objectives])
        self.register_buffer("less", less, persistent=False)

    def forward(self, p: Tensor, events: Tensor, length: Tensor, context: Tensor) -> EnsembleOutput:
        """Scores of every request's candidates. Padded candidates and events change nothing for the others.

        Args:
            p: [n, C, K] predictions in [0, 1]. A bounded one that is no probability, such as a watch time, the caller
                maps there first by an increasing function.
            events: [n, L, d_event] the user's recent past, oldest first, padded at the end.
            length: [n] int64 number of events, 0 .. L.
            context: [n, C, d_context] of each candidate, or [n, 1, d_context] shared by a request's candidates.
        """
        with torch.autocast(p.device.type, enabled=False):
            p, events, context = (each.to(self.objective.dtype) for each in (p, events, context))
            user = self._user(events, length)
            h = torch.cat([user[:, None].expand(-1, context.shape[1], -1), context], dim=-1)
            logits = self.query(h) @ self.objective.T / self.objective.shape[1] ** 0.5
            weight = torch.softmax(logits, dim=-1).expand_as(p)
            transform = self.transform(torch.where(self.less, 1 - p, p), h)
            return EnsembleOutput((weight * transform).sum(-1), transform, weight, user)

    def _user(self, events: Tensor, length: Tensor) -> Tensor:
        """[n, dim] the GRU's state after the last event; the learned state it begins with where there is none."""
        states = self.no_history.expand(len(events), 1, -1)
        if events.shape[1]:
            after, _ = self.history(events, states.transpose(0, 1).contiguous())
            states = torch.cat([states, after], dim=1)
        return states[torch.arange(len(events), device=events.device), length]
