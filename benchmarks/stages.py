"""The stages of a training step, each timed by itself."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

STAGES = ("data wait", "embedding", "communication", "forward", "backward", "optimizer")


class Stopwatch:
    """Seconds per stage, summed over steps; waits for the device at both ends of a stage."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._synchronize()
        began = time.perf_counter()
        yield
        self._synchronize()
        self.seconds[stage] += time.perf_counter() - began

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def detached_leaf(tensor: Tensor) -> Tensor:
    """The same values where the graph is cut: the backward pass stops here, and goes on by :func:`go_on`."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def resume_backward(tensors: Iterable[Tensor], leaves: Iterable[Tensor]) -> None:
    """The backward pass from the ``tensors`` whose ``leaves`` it stopped at."""
    pairs = [(tensor, cut.grad) for tensor, cut in zip(tensors, leaves, strict=True) if cut.grad is not None]
    torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])
