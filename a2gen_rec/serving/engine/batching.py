"""Jobs of many callers done together: a bounded queue, and threads that take batches from it.

The event loop only ever appends to the queue and is told of results, so it stays free to refuse when the threads cannot
keep up: torch lets go of Python's lock in its kernels.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


SPEED_DECAY = 0.3
"""Share of what is known of former batches' speed that each batch puts out of mind."""


class QueueFull(Exception):
    """As much waits as may wait, or as can be done in time."""


class DeadlineExceeded(Exception):
    """No result came in time."""


@dataclass(eq=False)
class _QueuedJob(Generic[Job, Result]):
    job: Job
    size: int
    arrived: float
    deadline: float
    done: "Future[Result]" = field(default_factory=Future)


@dataclass
class _ThroughputEstimate:
    """How long jobs take by their size, as far as recent batches tell."""

    size: float = 0.0
    took_s: float = 0.0

    def learn(self, size: int, took_s: float) -> None:
        self.size += size - SPEED_DECAY * self.size
        self.took_s += took_s - SPEED_DECAY * self.took_s

    def seconds(self, size: int) -> float:
        return size * self.took_s / self.size if self.size else 0.0


class DynamicBatcher(Generic[Job, Result]):
    """A queue and its threads.

    Args:
        work: called in a thread with jobs in order of arrival; returns for each, in that order, its result or error.
        max_wait_s: longest that a job waits for company, where no thread is idle besides the one that takes it.
        max_batch: sum of the sizes of a batch's jobs; a larger job is a batch of its own.
        max_waiting: sum of the sizes of waiting jobs; a larger job waits alone.
        max_queue_s: for which waiting jobs may take, as far as can be told.
        observe: told of every batch, in its thread: how long its jobs had waited, in seconds, and their sizes' sum.
        threads: batches that are done at a time; begin: called first in each thread.
    """

    def __init__(
        self,
        work: Callable[[list[Job]], Sequence[Result | Exception]],
        max_wait_s: float,
        max_batch: int,
        max_waiting: int,
        max_queue_s: float = float("inf"),
        observe: Callable[[list[float], int], None] = lambda waits, size: None,
        threads: int = 1,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        self.work, self.observe, self.begin = work, observe, begin
        self.max_wait_s, self.max_batch = max_wait_s, max_batch
        self.max_waiting, self.max_queue_s = max_waiting, max_queue_s
        self.waiting = 0
        self._begun = self._idle = 0
        self._speed = _ThroughputEstimate()
        self._queue: deque[_QueuedJob[Job, Result]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [threading.Thread(target=self._run, name="inference", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def is_full(self) -> bool:
        return self.waiting >= self.max_waiting or self._wait_s(self.waiting) > self.max_queue_s

    async def submit(self, job: Job, size: int, timeout_s: float) -> Result:
        """The job's result. One whose caller is cancelled, or whose time is over, is not begun.

        Raises:
            Overloaded: at once, if the queue is full or closed, or what is before this job leaves it no time: were it
                taken, all would wait for as long as they can, to be done too late.
            Expired: no result within ``timeout_s``.
        """
        now = time.monotonic()
        mine = _QueuedJob[Job, Result](job, size, now, now + timeout_s)
        with self._changed:
            before = self._begun + self.waiting
            is_hopeless = before and self._wait_s(before) + self._speed.seconds(size) > timeout_s
            is_full = self.is_full or (self.waiting and self.waiting + size > self.max_waiting)
            if self._closed or is_hopeless or is_full:
                raise QueueFull
            self._queue.append(mine)
            self.waiting += size
            self._changed.notify()
        try:
            async with asyncio.timeout(timeout_s) as limit:
                return await asyncio.wrap_future(mine.done)
        except (TimeoutError, asyncio.CancelledError):
            self._remove(mine)
            if limit.expired():
                raise DeadlineExceeded from None
            raise

    def close(self, timeout_s: float) -> None:
        """Take no more jobs, do those that wait, and end the threads, or leave them after ``timeout_s``."""
        until = time.monotonic() + timeout_s
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _wait_s(self, size: int) -> float:
        """Until as much has been begun, all threads working."""
        return self._speed.seconds(size) / len(self._threads)

    def _remove(self, mine: _QueuedJob[Job, Result]) -> None:
        """Drop a job that has not been begun."""
        with self._changed, suppress(ValueError):
            self._queue.remove(mine)
            self.waiting -= mine.size

    def _run(self) -> None:
        self.begin()
        while batch := self._next_batch():
            now, size = time.monotonic(), sum(each.size for each in batch)
            self.observe([now - each.arrived for each in batch], size)
            results: Sequence[Result | Exception]
            try:
                results = self.work([each.job for each in batch])
            except Exception as error:
                results = [error] * len(batch)
            with self._changed:
                self._speed.learn(size, time.monotonic() - now)
                self._begun -= size
            for each, result in zip(batch, results, strict=True):
                if isinstance(result, Exception):
                    each.done.set_exception(result)
                else:
                    each.done.set_result(result)

    def _next_batch(self) -> list[_QueuedJob[Job, Result]]:
        """Jobs to do now, marked as begun; none once all is done and the queue closed."""
        with self._changed:
            while True:
                while not self._queue:
                    if self._closed:
                        return []
                    self._idle += 1
                    self._changed.wait()
                    self._idle -= 1
                self._wait_for_batch()
                batch: list[_QueuedJob[Job, Result]] = []
                size, now = 0, time.monotonic()
                share = -(-len(self._queue) // len(self._threads))  # others are free now, or will be soon
                while (
                    self._queue and (not batch or size + self._queue[0].size <= self.max_batch) and len(batch) < share
                ):
                    first = self._queue.popleft()
                    self.waiting -= first.size
                    if first.deadline > now and first.done.set_running_or_notify_cancel():
                        batch.append(first)
                        size += first.size
                if batch:
                    self._begun += size
                    return batch

    def _wait_for_batch(self) -> None:
        while self._queue and self.waiting < self.max_batch and not self._closed and not self._idle:
            left_s = self._queue[0].arrived + self.max_wait_s - time.monotonic()
            if left_s <= 0:
                return
            self._changed.wait(left_s)
