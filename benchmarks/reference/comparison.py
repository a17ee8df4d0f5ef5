"""Comparison of losses and gradients with the reference."""

import torch
from torch import Tensor

from a2gen_rec.errors import UserError


def randomize_zeros(module: torch.nn.Module) -> None:
    """Randomize parameters that are zero; they would hide gradients, and errors, of earlier layers."""
    for parameter in module.parameters():
        if not parameter.count_nonzero():
            torch.nn.init.normal_(parameter, std=0.1)


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return the gradients of all parameters, zeros where the loss does not depend on a parameter."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in module.named_parameters()
    }


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the maximum difference relative to the largest entry."""
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


def check_loss(name: str, actual: float, expected: float, tolerance: float) -> float:
    """Return the relative difference of two losses.

    Raises:
        UserError: the difference exceeds ``tolerance``.
    """
    difference = abs(actual - expected) / abs(expected)
    if not difference <= tolerance:
        raise UserError(f"{name}: loss {actual:.7g} differs from {expected:.7g}; nothing was timed")
    return difference
