"""Unconstrained monotonic network (UMNN): METHODS §6 after UMRE, arXiv 2508.07613; Wehenkel & Louppe, arXiv 1908.05164.

The transform integrates a positive derivative, so it increases with its input for any weights::

    t(p, h) = ∫_0^p f(τ, h) dτ / ∫_0^1 f(τ, h) dτ      f = ELU(MLP([τ ‖ h])) + 1 + 1e-4 > 0

It rises from 0 at p = 0 to 1 at p = 1 [ours]. Without the division, the slope of a transform and its weight in a sum
are interchangeable. The gradient of each grows with the other, and all weight soon is on one or two transforms.

An integral is a Clenshaw–Curtis quadrature, one node after the other. Its backward pass (Leibniz) evaluates the nodes
again: the derivative by p is ``f(p, h)``, and the other gradients are a quadrature of f's gradients. Memory is that of
one node.
"""

import math
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_MIN_DERIVATIVE = 1e-4


class MonotonicTransform(nn.Module):
    """One UMNN per objective, evaluated together.

    The exact integral increases with ``p``. The quadrature does where it resolves f, which smooth hidden units (SiLU
    [ours]) ensure; rounding preserves the order up to a few units in the last place of the result.

    Args:
        num_objectives: Number K of transforms.
        d_context: Width of the context h.
        hidden_dims: Widths of the hidden layers, one or more.
        degree: The quadrature is exact for f polynomial in τ of at most this degree; it has ``degree`` + 1 nodes.
    """

    def __init__(
        self, num_objectives: int, d_context: int, hidden_dims: Sequence[int] = (16, 8), degree: int = 32
    ) -> None:
        super().__init__()
        self.degree = degree
        # The first layer is linear in [τ ‖ h]: its part for h is computed once for all nodes.
        self.context = nn.Linear(d_context, num_objectives * hidden_dims[0])
        self.input = nn.Parameter(_uniform(num_objectives, hidden_dims[0], 1, fan_in=1 + d_context))
        widths = [*hidden_dims, 1]
        self.layers = nn.ParameterList()
        for fan_in, out in pairwise(widths):
            self.layers.append(_uniform(num_objectives, out, fan_in, fan_in=fan_in))
            self.layers.append(_uniform(num_objectives, out, 1, fan_in=fan_in))

    def forward(self, p: Tensor, h: Tensor) -> Tensor:
        """Return the transforms of every candidate's objectives, in the parameters' precision even under autocast.

        Args:
            p: [n, C, K] objectives in [0, 1].
            h: [n, C, d_context] context of each candidate, or [n, 1, d_context] shared by a request's candidates.

        Returns:
            [n, C, K]
        """
        with torch.autocast(p.device.type, enabled=False):
            p, h = p.to(self.input.dtype), h.to(self.input.dtype)
            scores = p.permute(2, 0, 1).unsqueeze(1).contiguous()
            context = torch.addmm(self.context.bias[:, None], self.context.weight, h.flatten(0, 1).T)
            context = context.view(*self.input.shape[:2], *h.shape[:2])
            parameters = (context, self.input, *self.layers)
            ones = scores.new_ones(context.shape[0], 1, *h.shape[:2])
            share: Tensor = _Integral.apply(self.degree, scores, *parameters) / _Integral.apply(
                self.degree, ones, *parameters
            )
            return share.squeeze(1).permute(1, 2, 0)


@cache
def clenshaw_curtis(degree: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the nodes and weights of the Clenshaw–Curtis rule on [0, 1].

    Args:
        degree: n ≥ 1; the rule is exact for polynomials up to this degree.

    Returns:
        n + 1 nodes from 0 to 1, and their n + 1 positive weights, which sum to 1.
    """
    angles = [math.pi * j / degree for j in range(degree + 1)]
    weights = []
    for j, angle in enumerate(angles):
        terms = [2 * math.cos(2 * k * angle) / (4 * k * k - 1) for k in range(1, degree // 2 + 1)]
        if degree % 2 == 0:
            terms[-1] /= 2
        weights.append((1 - math.fsum(terms)) / degree / (2 if j in (0, degree) else 1))
    return tuple(math.sin(angle / 2) ** 2 for angle in angles), tuple(weights)


class _Integral(torch.autograd.Function):
    """∫_0^p f(τ) dτ; arguments are the quadrature's degree, then those of :func:`_derivative`."""

    @staticmethod
    def forward(ctx: Any, degree: int, p: Tensor, *inputs: Tensor) -> Tensor:
        ctx.degree = degree
        ctx.save_for_backward(p, *inputs)
        total = torch.zeros_like(p)
        for node, weight in zip(*clenshaw_curtis(degree), strict=True):
            total.add_(_derivative(p * node, *inputs), alpha=weight)
        return total.mul_(p)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        p, *inputs = ctx.saved_tensors
        with torch.autocast(p.device.type, enabled=False):
            grad_p = grad * _derivative(p, *inputs) if ctx.needs_input_grad[1] else None
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            totals = [torch.zeros_like(tensor) for tensor in inputs]
            grad = grad * p
            for node, weight in zip(*clenshaw_curtis(ctx.degree), strict=True):
                with torch.enable_grad():
                    derivative = _derivative(p * node, *leaves)
                for total, part in zip(totals, torch.autograd.grad(derivative, leaves, grad), strict=True):
                    total.add_(part, alpha=weight)
        return None, grad_p, *totals


def _derivative(tau: Tensor, context: Tensor, weight: Tensor, *layers: Tensor) -> Tensor:
    """Return f of all objectives.

    Candidates are the last axis: layers of a few units are then products of a small matrix and long rows.

    Args:
        tau: [K, 1, n, C].
        context: [K, hidden, n, C or 1] first layer's part for h.
        weight: [K, hidden, 1] first layer's weight of τ.
        layers: Weight [K, out, in] and bias [K, out, 1] of each further layer.

    Returns:
        [K, 1, n, C]
    """
    x = torch.addcmul(context, weight[..., None], tau)
    for matrix, bias in zip(layers[::2], layers[1::2], strict=True):
        x = torch.baddbmm(bias, matrix, F.silu(x, inplace=True).flatten(2))
    return (F.elu(x) + (1 + _MIN_DERIVATIVE)).view(tau.shape)


def _uniform(*shape: int, fan_in: int) -> Tensor:
    """Return uniform values in ±1/√fan_in, the initialization of ``nn.Linear``."""
    return torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5)
