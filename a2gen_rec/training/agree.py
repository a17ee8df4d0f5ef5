"""Batches that all ranks take in step, though their data may run out at different times."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from a2gen_rec.data.batch import COUNTS, WindowBatch
from a2gen_rec.data.loader import Position
from a2gen_rec.training.process import together


class Taken(NamedTuple):
    """A batch handed out: windows of it on all ranks, global counts, and this rank's position after it."""

    windows: int
    counts: torch.Tensor
    position: Position


@dataclass
class AgreedBatches(Iterator[WindowBatch]):
    """One small all-reduce per batch agrees on whether to go on, and makes the batch's counts global.

    A rank without data left goes on with batches without targets until all have run out, so that every window is
    used exactly once. Training pipelines take batches ahead of the step that uses them: ``taken`` queues what each
    was, for the step to note when it is done.

    Attributes:
        stop: asked before each batch; one rank's yes ends the batches on all.
        limit: most batches handed out; None for no bound.
        wait_s: seconds spent waiting for the loader.
    """

    batches: Iterator[WindowBatch]
    empty: Callable[[], WindowBatch]
    position: Position
    stop: Callable[[], bool] = lambda: False
    limit: int | None = None
    wait_s: float = 0.0
    stopped: bool = False

    def __post_init__(self) -> None:
        self.taken: deque[Taken] = deque()

    def __next__(self) -> WindowBatch:
        if self.limit is not None and self.limit <= 0:
            raise StopIteration
        began = time.perf_counter()
        batch = next(self.batches, None)
        self.wait_s += time.perf_counter() - began
        here = torch.zeros(3 + len(COUNTS), dtype=torch.float64)
        here[0], here[1] = batch is not None, self.stop()
        if batch is not None:
            here[2], here[3:] = len(batch.lengths), batch.counts
        everywhere = together(here)
        self.stopped = bool(everywhere[1])
        if self.stopped or not everywhere[0]:
            raise StopIteration
        if batch is not None and batch.position is not None:
            self.position = Position(**batch.position)
        counts = everywhere[3:]
        self.taken.append(Taken(int(everywhere[2]), counts, self.position))
        if self.limit is not None:
            self.limit -= 1
        return replace(batch if batch is not None else self.empty(), counts=counts)
