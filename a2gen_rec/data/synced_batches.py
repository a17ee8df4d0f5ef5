"""Batches in lockstep on all ranks, even if their data end at different times."""

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
    """An issued batch: number of windows on all ranks, global counts, and this rank's loader state after it."""

    num_windows: int
    counts: torch.Tensor
    loader_state: LoaderState


@dataclass
class SynchronizedBatches(Iterator[WindowBatch]):
    """Batches with one small all-reduce each, which decides whether to continue and sums the counts of all ranks.

    A rank without data continues with batches without targets until all ranks are exhausted, so that every window is
    used exactly once. An error in one rank's data is raised on all ranks. Training pipelines prefetch batches:
    ``issued`` queues the metadata of every batch until its step is done.

    Attributes:
        batches: batches of this rank.
        make_empty_batch: function that returns a batch without targets.
        loader_state: state of this rank's loader after the last issued batch.
        num_counts: number of counts per batch.
        should_stop: called before each batch; True on one rank ends the batches on all ranks.
        max_batches: remaining number of batches; None for no limit.
        wait_s: seconds spent waiting for the loader.
        stopped: whether ``should_stop`` ended the batches.
        exhausted: whether the batches ended because no rank had data left.
        issued: metadata of the issued batches.
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
        """Stop the loader's thread, even if batches are left."""
        self.batches.close()

    def __next__(self) -> WindowBatch:
        if self.max_batches is not None and self.max_batches <= 0:
            raise StopIteration
        started = time.perf_counter()
        batch, local_error = None, None
        try:
            batch = next(self.batches, None)
        except UserError as error:
            local_error = error
        self.wait_s += time.perf_counter() - started
        local = torch.zeros(4 + self.num_counts, dtype=torch.float64)
        local[0], local[1], local[2] = batch is not None, self.should_stop(), local_error is not None
        if batch is not None:
            local[3], local[4:] = len(batch.lengths), batch.counts
        total = all_reduce_sum(local)
        if total[2]:
            raise_on_all_ranks(local_error)
        self.stopped = bool(total[1])
        self.exhausted = not self.stopped and not total[0]
        if self.stopped or self.exhausted:
            raise StopIteration
        if batch is not None and batch.loader_state is not None:
            self.loader_state = LoaderState(**batch.loader_state)
        counts = total[4:]
        self.issued.append(IssuedBatch(int(total[3]), counts, self.loader_state))
        if self.max_batches is not None:
            self.max_batches -= 1
        return replace(batch if batch is not None else self.make_empty_batch(), counts=counts)
