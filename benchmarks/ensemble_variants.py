"""Ensemble with its quadrature in the autograd graph, as reference for the Leibniz backward pass."""

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from a2gen_rec.models.ensemble.model import Ensemble
from a2gen_rec.nn.monotonic import MonotonicTransform, clenshaw_curtis


@dataclass(frozen=True)
class Inputs:
    """Inputs of :class:`Ensemble`."""

    value: Tensor
    history: Tensor
    length: Tensor
    context: Tensor

    def score(self, model: Ensemble) -> Tensor:
        """Return the scores [batch, candidates]."""
        score: Tensor = model(self.value, self.history, self.length, self.context).score
        return score

    def double(self) -> "Inputs":
        """Convert to float64."""
        return replace(self, value=self.value.double(), history=self.history.double(), context=self.context.double())


class InGraphTransform(nn.Module):
    """Transform with shared parameters that evaluates all quadrature nodes at once in the autograd graph."""

    def __init__(self, transform: MonotonicTransform) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, p: Tensor, h: Tensor) -> Tensor:
        full = self._integral(p.new_ones(h.shape[0], h.shape[1], p.shape[2]), h)
        return self._integral(p, h) / full

    def _integral(self, p: Tensor, h: Tensor) -> Tensor:
        transform = self.transform
        nodes, weights = (p.new_tensor(part) for part in clenshaw_curtis(transform.degree))
        tau = (p.permute(2, 0, 1)[..., None] * nodes).unsqueeze(1)  # [K, 1, n, C, nodes]
        context = transform.context(h).permute(2, 0, 1).unflatten(0, transform.input.shape[:2])[..., None]
        x = transform.input[..., None, None] * tau + context
        layers = list(transform.layers)
        for matrix, bias in zip(layers[::2], layers[1::2], strict=True):
            x = torch.baddbmm(bias, matrix, F.silu(x).flatten(2)).unflatten(2, tau.shape[2:])
        rate = (F.elu(x) + (1 + 1e-4)).squeeze(1)
        return p * (rate @ weights).permute(1, 2, 0)


def in_graph(model: Ensemble) -> Ensemble:
    """Return the ensemble with the quadrature in the autograd graph; parameters are shared and in the same order."""
    other = copy.copy(model)
    other._modules = {**model._modules, "transform": InGraphTransform(model.transform)}
    return other


def check_close(actual: Tensor, expected: Tensor, name: str) -> None:
    """Check that two tensors are equal up to float32 rounding of the largest entry.

    Raises:
        RuntimeError: they are not.
    """
    error, scale = float((actual - expected).abs().max()), float(expected.abs().max())
    if not error <= 1e-4 * scale + 1e-7:
        raise RuntimeError(f"{name} differ by {error:.3g}; the largest entry is {scale:.3g}")
