"""Baselines of the ensemble: other methods that combine many objectives into one score, METHODS §6.

All have the ensemble's signature ``(value, events, length, context)`` and return scores [n, C]:

- value: [n, C, K] logits of probabilities, and monotonic functions of others, such as the log of a watch time.
- events: [n, L, d_event] the user's recent events, oldest first, padded at the end.
- length: [n] int64 number of events, 0 .. L.
- context: [n, C, d_context] of each candidate, or [n, 1, d_context] shared by a request's candidates.

Padded candidates and events do not affect the others, and everything is float32 even under autocast. Only
:class:`SessionWeightedFusion` depends on the full list and therefore takes a mask of the real candidates.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from a2gen_rec.errors import ConfigError
from a2gen_rec.models.ensemble.model import UserHistoryEncoder, check_normalization


class SingleScore(nn.Module):
    """Score by one objective alone, as a ranker without an ensemble.

    Args:
        index: Index of the objective.
        higher_is_better: Whether a higher value ranks first.
    """

    def __init__(self, index: int, higher_is_better: bool = True) -> None:
        super().__init__()
        self.index, self.higher_is_better = index, higher_is_better

    def forward(self, value: Tensor, events: Tensor, length: Tensor, context: Tensor) -> Tensor:
        score = value[..., self.index].float()
        return score if self.higher_is_better else -score


class PowerFormula(nn.Module):
    """Logarithm of Π_k (1 + α_k p_k)^{±β_k}, the usual hand-tuned formula; lower-is-better objectives divide.

    p = σ((value − mean) / scale). Division by objectives is ours. With α p ≪ 1 the score depends on an objective's
    differences, with α p ≫ 1 on its ratios.

    Args:
        alpha: [K] ≥ 0; with ``beta`` ≥ 0, the score never decreases when an objective improves.
        beta: [K] ≥ 0.
        lower_is_better: Whether lower is better, for each of the K objectives.
        mean: [K]; 0 for logits, so that p is their probability, and the mean of other values.
        scale: [K] > 0; 1 for logits and the scale of other values.

    Raises:
        ConfigError: A number out of its range, or lengths that differ.
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
        num_objectives = len(lower_is_better)
        for exponents in (alpha, beta):
            if not (len(exponents) == num_objectives and exponents.isfinite().all() and (exponents >= 0).all()):
                raise ConfigError(f"a formula needs α and β ≥ 0 of {num_objectives} objectives, not {alpha} and {beta}")
        self.register_buffer(
            "alpha", alpha.float().clone()
        )  # load_state_dict writes buffers in place: never share them
        self.register_buffer("exponent", beta.float() * _direction(lower_is_better))
        self.register_buffer("mean", mean.float().clone())
        self.register_buffer("scale", scale.float().clone())

    def forward(self, value: Tensor, events: Tensor, length: Tensor, context: Tensor) -> Tensor:
        return self.score(value)

    def score(self, value: Tensor) -> Tensor:
        """Return the logarithm of the product: values [..., K] -> [...]."""
        p = torch.sigmoid((value.to(self.mean.dtype) - self.mean) / self.scale)
        return (self.exponent * torch.log1p(self.alpha * p)).sum(-1)


class Standardize(nn.Module):
    """Standardized values with the sign of their direction: ±(value − mean) / scale, so that higher is better.

    Args:
        lower_is_better: Whether lower is better, for each of the K objectives.
        mean: [K].
        scale: [K] > 0.

    Raises:
        ConfigError: A number out of its range, or lengths that differ.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, lower_is_better: Sequence[bool], mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        _check(lower_is_better, mean, scale)
        self.num_objectives = len(lower_is_better)
        self.register_buffer("mean", mean.float().clone())
        self.register_buffer("scale", scale.float() * _direction(lower_is_better).to(scale.device))

    def forward(self, value: Tensor) -> Tensor:
        return (value.to(self.mean.dtype) - self.mean) / self.scale


class LogisticRegression(nn.Module):
    """Linear model of the standardized values, whose score is the logit; initial weights are equal."""

    def __init__(self, standardize: Standardize) -> None:
        super().__init__()
        self.standardize = standardize
        self.weight = nn.Parameter(torch.full((standardize.num_objectives,), 1 / standardize.num_objectives))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, value: Tensor, events: Tensor, length: Tensor, context: Tensor) -> Tensor:
        return (self.standardize(value) * self.weight).sum(-1) + self.bias


class MLPFusion(nn.Module):
    """MLP on ``[standardized values ‖ context ‖ user]``, without any monotonicity constraint.

    Args:
        standardize: Standardization of the K objectives.
        d_event: Width of a history event.
        d_context: Width of the context.
        dim: Width of the user vector.
        hidden_dims: Widths of the hidden layers.
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
        widths = pairwise([standardize.num_objectives + d_context + dim, *hidden_dims, 1])
        layers = [layer for fan_in, out in widths for layer in (nn.Linear(fan_in, out), nn.SiLU())]
        self.mlp = nn.Sequential(*layers[:-1])

    def forward(self, value: Tensor, events: Tensor, length: Tensor, context: Tensor) -> Tensor:
        with torch.autocast(value.device.type, enabled=False):
            z = self.standardize(value)
            user = self.history(events.to(z.dtype), length)[:, None]
            parts = [tensor.to(z.dtype).expand(-1, z.shape[1], -1) for tensor in (context, user)]
            score: Tensor = self.mlp(torch.cat([z, *parts], dim=-1))
            return score.squeeze(-1)


class SessionWeightedFusion(nn.Module):
    """s = g Σ_k w_k z_k + b: standardized values z, weighted by the user's intent in this session, after IntEL.

    One w per list is the softmax of a linear map of ``[user ‖ mean z of the list ‖ mean context of the list]``. The
    learned g > 0 and b do not affect the order: they match a score of unit scale to the loss, which would otherwise
    distort w.

    Source: IntEL, arXiv 2304.07450, whose weights also differ between a list's items; one per list is ours.

    Args:
        standardize: Standardization of the K objectives.
        d_event: Width of a history event.
        d_context: Width of the context.
        dim: Width of the user vector.
    """

    def __init__(self, standardize: Standardize, d_event: int, d_context: int, dim: int = 32) -> None:
        super().__init__()
        self.standardize = standardize
        self.history = UserHistoryEncoder(d_event, dim)
        self.query = nn.Linear(dim + standardize.num_objectives + d_context, standardize.num_objectives)
        self.log_gain = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(
        self, value: Tensor, events: Tensor, length: Tensor, context: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Return scores; ``mask`` [n, C] bool marks real candidates, by default all."""
        z = self.standardize(value)
        weight = self.weights(z, events, length, context, mask)
        return self.log_gain.exp() * (z * weight[:, None]).sum(-1) + self.bias

    def weights(self, z: Tensor, events: Tensor, length: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the weights [n, K] of each list, non-negative with sum 1, from its standardized values [n, C, K]."""
        with torch.autocast(z.device.type, enabled=False):
            is_real = z.new_ones(z.shape[:2]) if mask is None else mask.to(z.dtype)
            share = (is_real / is_real.sum(-1, keepdim=True).clamp(min=1))[:, :, None]
            parts = [self.history(events.to(z.dtype), length), (z * share).sum(1)]
            parts.append((context.to(z.dtype).expand(-1, z.shape[1], -1) * share).sum(1))
            return torch.softmax(self.query(torch.cat(parts, dim=-1)), dim=-1)


def _direction(lower_is_better: Sequence[bool]) -> Tensor:
    return torch.tensor([-1.0 if is_lower else 1.0 for is_lower in lower_is_better])


def _check(lower_is_better: Sequence[bool], mean: Tensor, scale: Tensor) -> None:
    if not len(lower_is_better) == len(mean) == len(scale):
        raise ConfigError(
            f"{len(lower_is_better)} objectives need as many means and scales, not {len(mean)}, {len(scale)}"
        )
    check_normalization(mean, scale)
