"""What the ensemble is compared with: other ways to one score from many objectives, METHODS §6.

Each is called as the ensemble is, ``(value, events, length, context)``, and gives scores [n, C]:

- value: [n, C, K] logits of probabilities, or whatever rises with an objective, such as the log of a watch time.
- events: [n, L, d_event] the user's recent past, oldest first, padded at the end; length: [n] int64, 0 .. L.
- context: [n, C, d_context] of each candidate, or [n, 1, d_context] shared by a request's candidates.

Padded candidates and events change nothing for the others, and all is float32 even under autocast. Only
:class:`SessionWeights` looks at a list as a whole, and so must be told which candidates are padded.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from a2gen_rec.errors import ConfigError
from a2gen_rec.models.ensemble.model import UserHistoryEncoder


class SingleScore(nn.Module):
    """One objective alone, as it is: the ranker that has no ensemble.

    Args:
        k: index of the objective.
        higher_is_better: whether a higher value ranks first.
    """

    def __init__(self, index: int, higher_is_better: bool = True) -> None:
        super().__init__()
        self.index, self.higher_is_better = index, higher_is_better

    def forward(self, value: Tensor, events: Tensor, length: Tensor, context: Tensor) -> Tensor:
        score = value[..., self.index].float()
        return score if self.higher_is_better else -score


class PowerFormula(nn.Module):
    """Π_k (1 + α_k p_k)^{±β_k}, as tuned by hand, by its logarithm; objectives of which less is better divide.

    p = σ((value − centre) / scale); that objectives divide is ours. With α p ≪ 1 an objective
    counts by its size, with α p ≫ 1 by its ratios.

    Args:
        alpha, beta: [K] ≥ 0: the score then never falls where an objective gets better.
        less: [K], whether less is better.
        centre, scale: [K], scale > 0: 0 and 1 for logits, which are then their probabilities; the values' own for what
            is no probability.

    Raises:
        ConfigError: a number out of its range, or lengths that differ.
    """

    alpha: Tensor
    exponent: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(
        self, alpha: Tensor, beta: Tensor, lower_is_better: Sequence[bool], mean: Tensor, scale: Tensor
    ) -> None:
        super().__init__()
        _check(lower_is_better, mean, scale)
        if not all(
            len(each) == len(lower_is_better) and each.isfinite().all() and (each >= 0).all() for each in (alpha, beta)
        ):
            raise ConfigError(
                f"a formula needs α and β ≥ 0 of {len(lower_is_better)} objectives, not {alpha} and {beta}"
            )
        self.register_buffer("alpha", alpha.float().clone())  # buffers are written by load_state_dict: never share
        self.register_buffer("exponent", beta.float() * _direction(lower_is_better))
        self.register_buffer("mean", mean.float().clone())
        self.register_buffer("scale", scale.float().clone())

    def forward(self, value: Tensor, events: Tensor, length: Tensor, context: Tensor) -> Tensor:
        return self.score(value)

    def score(self, value: Tensor) -> Tensor:
        """Logarithm of the product: values [..., K] -> [...]."""
        p = torch.sigmoid((value.to(self.mean.dtype) - self.mean) / self.scale)
        return (self.exponent * torch.log1p(self.alpha * p)).sum(-1)


class Standardize(nn.Module):
    """Values in units of their own spread, turned so that more is better: ±(value − centre) / scale.

    Args:
        less: [K], whether less is better; centre, scale: [K], scale > 0.

    Raises:
        ConfigError: a number out of its range, or lengths that differ.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, lower_is_better: Sequence[bool], mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        _check(lower_is_better, mean, scale)
        self.objectives = len(lower_is_better)
        self.register_buffer("mean", mean.float().clone())
        self.register_buffer("scale", scale.float() * _direction(lower_is_better).to(scale.device))

    def forward(self, value: Tensor) -> Tensor:
        return (value.to(self.mean.dtype) - self.mean) / self.scale


class LogisticRegression(nn.Module):
    """Linear in the standardised values; the score is the logit. It begins with equal weights."""

    def __init__(self, standardize: Standardize) -> None:
        super().__init__()
        self.standardize = standardize
        self.weight = nn.Parameter(torch.full((standardize.objectives,), 1 / standardize.objectives))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, value: Tensor, events: Tensor, length: Tensor, context: Tensor) -> Tensor:
        return (self.standardize(value) * self.weight).sum(-1) + self.bias


class MLPFusion(nn.Module):
    """An MLP on ``[standardised values ‖ context ‖ user]``: it may do anything, also fall where an objective rises.

    Args:
        standardise: of the K objectives.
        d_event, d_context: widths of a history event and of the context.
        dim: width of the user vector.
        hidden: widths of the hidden layers.
    """

    def __init__(
        self,
        standardize: Standardize,
        d_event: int,
        d_context: int,
        dim: int = 32,
        hidden_dims: Sequence[int] = (64, 32),
    ) -> None:
        super().__init__()
        self.standardize = standardize
        self.history = UserHistoryEncoder(d_event, dim)
        widths = pairwise([standardize.objectives + d_context + dim, *hidden_dims, 1])
        layers = [layer for fan_in, out in widths for layer in (nn.Linear(fan_in, out), nn.SiLU())]
        self.mlp = nn.Sequential(*layers[:-1])

    def forward(self, value: Tensor, events: Tensor, length: Tensor, context: Tensor) -> Tensor:
        with torch.autocast(value.device.type, enabled=False):
            z = self.standardize(value)
            user = self.history(events.to(z.dtype), length)[:, None]
            parts = [each.to(z.dtype).expand(-1, z.shape[1], -1) for each in (context, user)]
            score: Tensor = self.mlp(torch.cat([z, *parts], dim=-1))
            return score.squeeze(-1)


class SessionWeightedFusion(nn.Module):
    """s = g Σ_k w_k z_k + b: standardised values z weighed by what the user is after in this session, after IntEL.

    One w per list, softmax of a linear map of ``[user ‖ mean z of the list ‖ mean context of the list]``. The learned
    g > 0 and b order nothing: they let a score of unit spread meet the loss's own, which w would be bent for otherwise.

    Source: IntEL, arXiv 2304.07450, whose weights differ between a list's items too; one per list is ours.

    Args:
        standardise: of the K objectives.
        d_event, d_context: widths of a history event and of the context.
        dim: width of the user vector.
    """

    def __init__(self, standardize: Standardize, d_event: int, d_context: int, dim: int = 32) -> None:
        super().__init__()
        self.standardize = standardize
        self.history = UserHistoryEncoder(d_event, dim)
        self.query = nn.Linear(dim + standardize.objectives + d_context, standardize.objectives)
        self.log_gain = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(
        self, value: Tensor, events: Tensor, length: Tensor, context: Tensor, valid: Tensor | None = None
    ) -> Tensor:
        """Scores; ``valid`` [n, C] bool tells candidates from padding, without it all are candidates."""
        z = self.standardize(value)
        weight = self.weights(z, events, length, context, valid)
        return self.log_gain.exp() * (z * weight[:, None]).sum(-1) + self.bias

    def weights(
        self, z: Tensor, events: Tensor, length: Tensor, context: Tensor, valid: Tensor | None = None
    ) -> Tensor:
        """[n, K] of each list, non-negative, of sum 1, from its standardised values [n, C, K]."""
        with torch.autocast(z.device.type, enabled=False):
            inside = z.new_ones(z.shape[:2]) if valid is None else valid.to(z.dtype)
            share = (inside / inside.sum(-1, keepdim=True).clamp(min=1))[:, :, None]
            parts = [self.history(events.to(z.dtype), length), (z * share).sum(1)]
            parts.append((context.to(z.dtype).expand(-1, z.shape[1], -1) * share).sum(1))
            return torch.softmax(self.query(torch.cat(parts, dim=-1)), dim=-1)


def _direction(lower_is_better: Sequence[bool]) -> Tensor:
    return torch.tensor([-1.0 if each else 1.0 for each in lower_is_better])


def _check(lower_is_better: Sequence[bool], mean: Tensor, scale: Tensor) -> None:
    if not len(lower_is_better) == len(mean) == len(scale):
        raise ConfigError(
            f"{len(lower_is_better)} objectives need as many centres and scales, not {len(mean)}, {len(scale)}"
        )
    if not (mean.isfinite().all() and scale.isfinite().all() and (scale > 0).all()):
        raise ConfigError(f"centres {mean.tolist()} and scales {scale.tolist()} must be finite, scales positive")
