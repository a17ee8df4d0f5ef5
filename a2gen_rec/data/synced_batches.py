"""Batches that all ranks take in step, though their data may run out at different times."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.loader import LoaderState
from a2gen_rec.errors import UserError
from a2gen_rec.utils.distributed import all_reduce_sum, raise_on_all_ranks


class IssuedBatch(NamedTuple):
    """A batch handed out: windows of it on all ranks, global counts, and this rank's position after it."""

    num_windows: int
    counts: torch.Tensor
    loader_state: LoaderState


@dataclass
class SynchronizedBatches(Iterator[WindowBatch]):
    """One small all-reduce per batch agrees on whether to go on, and makes the batch's counts global.

    A rank without data left goes on with batches without targets until all have run out, so that every window is
    used exactly once. An error in one rank's data is raised on all. Training pipelines take batches ahead of the
    step that uses them: ``taken`` queues what each was, for the step to note when it is done.

    Attributes:
        counts: number of a batch's counts.
        stop: asked before each batch; one rank's yes ends the batches on all: ``stopped``.
        exhausted: whether the batches ended because no rank had data left.
        limit: most batches handed out; None for no bound.
        wait_s: seconds spent waiting for the loader.
    """

    batches: Generator[WindowBatch, None, None]
    make_empty_batch: Callable[[], WindowBatch]
    loader_state: LoaderState
    num_counts: int
    should_stop: Callable[[], bool] = lambda: False
    max_batches: int | None = None
    wait_s: float = 0.0
    stopped: bool = False
    exhausted: bool = False

    def __post_init__(self) -> None:
        self.issued: deque[IssuedBatch] = deque()

    def close(self) -> None:
        """Let the loader's thread go, though batches may be left."""
        self.batches.close()

    def __next__(self) -> WindowBatch:
        if self.max_batches is not None and self.max_batches <= 0:
            raise StopIteration
        began = time.perf_counter()
        batch, failure = None, None
        try:
            batch = next(self.batches, None)
        except UserError as error:
            failure = error
        self.wait_s += time.perf_counter() - began
        here = torch.zeros(4 + self.num_counts, dtype=torch.float64)
        here[0], here[1], here[2] = batch is not None, self.should_stop(), failure is not None
        if batch is not None:
            here[3], here[4:] = len(batch.lengths), batch.counts
        everywhere = all_reduce_sum(here)
        if everywhere[2]:
            raise_on_all_ranks(failure)
        self.stopped = bool(everywhere[1])
        self.exhausted = not self.stopped and not everywhere[0]
        if self.stopped or self.exhausted:
            raise StopIteration
        if batch is not None and batch.loader_state is not None:
            self.loader_state = LoaderState(**batch.loader_state)
        counts = everywhere[4:]
        self.issued.append(IssuedBatch(int(everywhere[3]), counts, self.loader_state))
        if self.max_batches is not None:
            self.max_batches -= 1
        return replace(batch if batch is not None else self.make_empty_batch(), counts=counts)
