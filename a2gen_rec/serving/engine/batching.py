"""Dynamic batching: a bounded queue of jobs from many callers, and threads that process batches from it.

The event loop only appends to the queue and receives results. It therefore stays responsive and can reject requests
when the threads cannot keep up: torch releases the GIL in its kernels.
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
"""Exponential decay of the throughput estimate, per batch."""


class QueueFull(Exception):
    """The queue is full, or the job cannot be completed before its deadline."""


class DeadlineExceeded(Exception):
    """No result before the deadline."""


@dataclass(eq=False)
class _QueuedJob(Generic[Job, Result]):
    job: Job
    size: int
    enqueued_s: float
    deadline_s: float
    future: "Future[Result]" = field(default_factory=Future)


@dataclass
class _ThroughputEstimate:
    """Estimate of the processing time of jobs by size, from recent batches."""

    size: float = 0.0
    duration_s: float = 0.0

    def update(self, size: int, duration_s: float) -> None:
        self.size += size - SPEED_DECAY * self.size
        self.duration_s += duration_s - SPEED_DECAY * self.duration_s

    def seconds(self, size: int) -> float:
        return size * self.duration_s / self.size if self.size else 0.0


class DynamicBatcher(Generic[Job, Result]):
    """Queue with its processing threads.

    Args:
        process_batch: Called in a thread with jobs in order of arrival; returns the result or error of each, in order.
        max_delay_s: Maximum time that a job waits for others to share its batch, unless another thread is idle.
        max_batch_size: Maximum total size of a batch; a larger job is a batch of its own.
        max_queued: Maximum total size of queued jobs; a larger job may be queued alone.
        max_backlog_s: Maximum estimated time to process the queue.
        observe: Called for every batch, in its thread, with the queue times of its jobs in seconds and its total size.
        num_threads: Number of batches processed at a time.
        on_thread_start: Called first in each thread.
    """

    def __init__(
        self,
        process_batch: Callable[[list[Job]], Sequence[Result | Exception]],
        max_delay_s: float,
        max_batch_size: int,
        max_queued: int,
        max_backlog_s: float = float("inf"),
        observe: Callable[[list[float], int], None] = lambda waits, size: None,
        num_threads: int = 1,
        on_thread_start: Callable[[], None] = lambda: None,
    ) -> None:
        self.process_batch, self.observe, self.on_thread_start = process_batch, observe, on_thread_start
        self.max_delay_s, self.max_batch_size = max_delay_s, max_batch_size
        self.max_queued, self.max_backlog_s = max_queued, max_backlog_s
        self.queued = 0
        self._running = self._num_idle = 0
        self._throughput = _ThroughputEstimate()
        self._queue: deque[_QueuedJob[Job, Result]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [threading.Thread(target=self._run, name="inference", daemon=True) for _ in range(num_threads)]
        for thread in self._threads:
            thread.start()

    @property
    def is_full(self) -> bool:
        return self.queued >= self.max_queued or self._drain_s(self.queued) > self.max_backlog_s

    async def submit(self, job: Job, size: int, timeout_s: float) -> Result:
        """Return the result of a job. A job whose caller is cancelled or whose deadline has passed is not started.

        Raises:
            QueueFull: Immediately, if the queue is full or closed, or if the jobs ahead leave no time for this one.
                Accepting such jobs would make every job wait as long as possible and then finish too late.
            DeadlineExceeded: No result within ``timeout_s``.
        """
        now = time.monotonic()
        queued_job = _QueuedJob[Job, Result](job, size, now, now + timeout_s)
        with self._changed:
            ahead = self._running + self.queued
            is_too_late = ahead and self._drain_s(ahead) + self._throughput.seconds(size) > timeout_s
            is_full = self.is_full or (self.queued and self.queued + size > self.max_queued)
            if self._closed or is_too_late or is_full:
                raise QueueFull
            self._queue.append(queued_job)
            self.queued += size
            self._changed.notify()
        try:
            async with asyncio.timeout(timeout_s) as timeout:
                return await asyncio.wrap_future(queued_job.future)
        except (TimeoutError, asyncio.CancelledError):
            self._remove(queued_job)
            if timeout.expired():
                raise DeadlineExceeded from None
            raise

    def close(self, timeout_s: float) -> None:
        """Reject new jobs, process queued ones, and join the threads or abandon them after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _drain_s(self, size: int) -> float:
        """Return the estimated seconds until jobs of this total size are started, with all threads working."""
        return self._throughput.seconds(size) / len(self._threads)

    def _remove(self, queued_job: _QueuedJob[Job, Result]) -> None:
        """Remove a job that has not been started."""
        with self._changed, suppress(ValueError):
            self._queue.remove(queued_job)
            self.queued -= queued_job.size

    def _run(self) -> None:
        self.on_thread_start()
        while batch := self._next_batch():
            now, size = time.monotonic(), sum(queued_job.size for queued_job in batch)
            self.observe([now - queued_job.enqueued_s for queued_job in batch], size)
            results: Sequence[Result | Exception]
            try:
                results = self.process_batch([queued_job.job for queued_job in batch])
            except Exception as error:
                results = [error] * len(batch)
            with self._changed:
                self._throughput.update(size, time.monotonic() - now)
                self._running -= size
            for queued_job, result in zip(batch, results, strict=True):
                if isinstance(result, Exception):
                    queued_job.future.set_exception(result)
                else:
                    queued_job.future.set_result(result)

    def _next_batch(self) -> list[_QueuedJob[Job, Result]]:
        """Return the next jobs, marked as running; none once the queue is closed and empty."""
        with self._changed:
            while True:
                while not self._queue:
                    if self._closed:
                        return []
                    self._num_idle += 1
                    self._changed.wait()
                    self._num_idle -= 1
                self._wait_for_batch()
                batch: list[_QueuedJob[Job, Result]] = []
                size, now = 0, time.monotonic()
                max_jobs = -(-len(self._queue) // len(self._threads))  # other threads are idle or will be soon
                while (
                    self._queue
                    and (not batch or size + self._queue[0].size <= self.max_batch_size)
                    and len(batch) < max_jobs
                ):
                    first = self._queue.popleft()
                    self.queued -= first.size
                    if first.deadline_s > now and first.future.set_running_or_notify_cancel():
                        batch.append(first)
                        size += first.size
                if batch:
                    self._running += size
                    return batch

    def _wait_for_batch(self) -> None:
        while self._queue and self.queued < self.max_batch_size and not self._closed and not self._num_idle:
            remaining_s = self._queue[0].enqueued_s + self.max_delay_s - time.monotonic()
            if remaining_s <= 0:
                return
            self._changed.wait(remaining_s)
