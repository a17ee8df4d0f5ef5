"""Timing of the individual stages of a training step."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

STAGES = ("data wait", "embedding", "communication", "forward", "backward", "optimizer")


class Stopwatch:
    """Seconds per stage, summed over steps. Synchronizes the device at both ends of a stage."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._synchronize()
        start = time.perf_counter()
        yield
        self._synchronize()
        self.seconds[stage] += time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def detached_leaf(tensor: Tensor) -> Tensor:
    """Return a leaf with the same values: the backward pass stops here; :func:`resume_backward` continues it."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def resume_backward(tensors: Iterable[Tensor], leaves: Iterable[Tensor]) -> None:
    """Continue the backward pass from ``tensors``, given the gradients of their detached ``leaves``."""
    pairs = [(tensor, leaf.grad) for tensor, leaf in zip(tensors, leaves, strict=True) if leaf.grad is not None]
    torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])
