"""Dynamic batching: shared batches, deadlines and a bounded queue."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a2gen_rec.serving.engine.batching import DeadlineExceeded, DynamicBatcher, QueueFull
from tests.helpers.properties import examples


class BlockingWork:
    """Batch function that blocks until ``open`` is set; returns twice each job, and an error for -1."""

    def __init__(self, is_open: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.open, self.started = threading.Event(), threading.Event()
        if is_open:
            self.open.set()

    def __call__(self, jobs: list[int]) -> Sequence[int | Exception]:
        self.batches.append(jobs)
        self.started.set()
        assert self.open.wait(10)
        return [ValueError("minus one") if job == -1 else 2 * job for job in jobs]


def with_batcher(
    work: Callable[[list[int]], Sequence[int | Exception]],
    test: Callable[["DynamicBatcher[int, int]"], Awaitable[None]],
    max_delay_s: float = 0.0,
    max_batch_size: int = 100,
    max_queued: int = 1000,
    max_backlog_s: float = 100.0,
    observe: Any = lambda waits, size: None,
    num_threads: int = 1,
    on_thread_start: Callable[[], None] = lambda: None,
) -> None:
    batcher: DynamicBatcher[int, int] = DynamicBatcher(
        work, max_delay_s, max_batch_size, max_queued, max_backlog_s, observe, num_threads, on_thread_start
    )

    async def run() -> None:
        await test(batcher)

    asyncio.run(run())
    if isinstance(work, BlockingWork):
        work.open.set()
    batcher.close(10)
    assert batcher.queued == 0


def slow(jobs: list[int]) -> list[int]:
    threading.Event().wait(0.2)
    return jobs


@examples(30)
@given(st.lists(st.tuples(st.integers(-1, 99), st.integers(1, 60)), max_size=30), st.sampled_from([0.0, 0.002]))
def test_each_job_gets_its_result_in_bounded_batches(jobs: list[tuple[int, int]], wait_s: float) -> None:
    sizes, processed = [], []
    size_of = dict(enumerate(size for _, size in jobs))

    def work(numbers: list[int]) -> list[int | Exception]:
        processed.extend(numbers)
        assert len(numbers) == 1 or sum(size_of[number] for number in numbers) <= 50
        return [ValueError("no") if jobs[number][0] == -1 else 2 * jobs[number][0] for number in numbers]

    async def test(batcher: "DynamicBatcher[int, int]") -> None:
        pending = (batcher.submit(number, size, 10) for number, (_, size) in enumerate(jobs))
        answers = await asyncio.gather(*pending, return_exceptions=True)
        for (value, _), answer in zip(jobs, answers, strict=True):
            assert isinstance(answer, ValueError) if value == -1 else answer == 2 * value
        assert processed == list(range(len(jobs))), "in order of arrival"
        assert sum(sizes) == sum(size for _, size in jobs)

    with_batcher(
        work, test, wait_s, max_batch_size=50, max_queued=10_000, observe=lambda waits, size: sizes.append(size)
    )


def test_concurrent_jobs_share_a_batch() -> None:
    async def test(batcher: "DynamicBatcher[int, int]") -> None:
        assert await asyncio.gather(*(batcher.submit(number, 1, 5) for number in range(20))) == list(range(0, 40, 2))

    with_batcher(work := BlockingWork(is_open=True), test, max_delay_s=0.5, max_batch_size=20)
    assert work.batches == [list(range(20))], "a full batch is processed immediately"

    async def alone(batcher: "DynamicBatcher[int, int]") -> None:
        start = time.monotonic()
        await batcher.submit(1, 1, 5)
        assert time.monotonic() - start >= 0.05

    with_batcher(BlockingWork(is_open=True), alone, max_delay_s=0.05)


def test_full_queue_rejects_jobs_until_there_is_room() -> None:
    work = BlockingWork()

    async def test(batcher: "DynamicBatcher[int, int]") -> None:
        first = asyncio.ensure_future(batcher.submit(1, 50, 5))
        await asyncio.to_thread(work.started.wait, 5)
        second = asyncio.ensure_future(batcher.submit(2, 2000, 5))
        await asyncio.sleep(0)
        assert batcher.is_full, "a job larger than the bound is queued alone"
        with pytest.raises(QueueFull):
            await batcher.submit(3, 1, 5)
        work.open.set()
        assert await asyncio.gather(first, second, return_exceptions=True) == [2, 4]
        assert await batcher.submit(4, 1, 5) == 8

    with_batcher(work, test)


def test_expired_and_cancelled_jobs_are_not_started() -> None:
    work = BlockingWork()

    async def test(batcher: "DynamicBatcher[int, int]") -> None:
        first = asyncio.ensure_future(batcher.submit(1, 1, 5))
        await asyncio.to_thread(work.started.wait, 5)
        late = asyncio.ensure_future(batcher.submit(2, 10, 0.01))
        cancelled = asyncio.ensure_future(batcher.submit(3, 10, 5))
        kept = asyncio.ensure_future(batcher.submit(4, 10, 5))
        with pytest.raises(DeadlineExceeded):
            await late
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert batcher.queued == 10, "their space in the queue is free again"
        work.open.set()
        assert await asyncio.gather(first, kept) == [2, 8]

    with_batcher(work, test)
    assert work.batches == [[1], [4]]


def test_job_that_expires_while_running_affects_no_other() -> None:
    work = BlockingWork()

    async def test(batcher: "DynamicBatcher[int, int]") -> None:
        with pytest.raises(DeadlineExceeded):
            await batcher.submit(1, 1, 0.05)
        work.open.set()
        assert await batcher.submit(2, 1, 5) == 4

    with_batcher(work, test)


def test_failed_batch_affects_no_other() -> None:
    def work(jobs: list[int]) -> list[int | Exception]:
        if 1 in jobs:
            raise KeyError(1)
        return list(jobs)

    async def test(batcher: "DynamicBatcher[int, int]") -> None:
        with pytest.raises(KeyError):
            await batcher.submit(1, 1, 5)
        assert await batcher.submit(2, 1, 5) == 2

    with_batcher(work, test)


def test_close_completes_queued_jobs_and_rejects_new_ones() -> None:
    work = BlockingWork()

    async def test(batcher: "DynamicBatcher[int, int]") -> None:
        pending = [asyncio.ensure_future(batcher.submit(number, 1, 5)) for number in range(5)]
        await asyncio.to_thread(work.started.wait, 5)
        closing = asyncio.ensure_future(asyncio.to_thread(batcher.close, 5))
        while not batcher._closed:
            await asyncio.sleep(0.001)
        with pytest.raises(QueueFull):
            await batcher.submit(9, 1, 5)
        work.open.set()
        await closing
        assert await asyncio.gather(*pending) == [0, 2, 4, 6, 8]

    with_batcher(work, test)


def test_backlog_is_bounded_in_time() -> None:
    """Jobs of size 10 take 0.2 s each: at most two of them fit a backlog of 0.3 s."""

    async def test(batcher: "DynamicBatcher[int, int]") -> None:
        assert await batcher.submit(0, 10, 30) == 0
        pending = [asyncio.ensure_future(batcher.submit(1, 10, 30))]
        while not batcher._running:
            await asyncio.sleep(0.001)
        for number in (2, 3):
            assert not batcher.is_full
            pending.append(asyncio.ensure_future(batcher.submit(number, 10, 30)))
            await asyncio.sleep(0)
        assert batcher.is_full
        with pytest.raises(QueueFull):
            await batcher.submit(4, 1, 30)
        assert await asyncio.gather(*pending) == [1, 2, 3]
        assert not batcher.is_full

    with_batcher(slow, test, max_batch_size=10, max_backlog_s=0.3)


def test_threads_share_the_queue() -> None:
    """Two threads run two jobs concurrently, and each takes half of the jobs that arrive meanwhile."""
    work = BlockingWork()

    async def test(batcher: "DynamicBatcher[int, int]") -> None:
        while batcher._num_idle < 2:
            await asyncio.sleep(0.001)
        pending = [asyncio.ensure_future(batcher.submit(number, 1, 30)) for number in range(2)]
        while len(work.batches) < 2:
            await asyncio.sleep(0.001)
        pending += [asyncio.ensure_future(batcher.submit(number, 1, 30)) for number in range(2, 5)]
        while batcher.queued < 3:
            await asyncio.sleep(0.001)
        work.open.set()
        assert await asyncio.gather(*pending) == [0, 2, 4, 6, 8]
        assert sorted(work.batches[:2]) == [[0], [1]]
        assert sorted(work.batches[2:]) == [[2, 3], [4]]

    with_batcher(work, test, max_batch_size=3, num_threads=2)


def test_drain_time_scales_with_threads() -> None:
    """Queued jobs drain faster with more threads; one job runs in one thread."""
    for num_threads in (1, 2, 5):
        batcher: DynamicBatcher[int, int] = DynamicBatcher(lambda jobs: jobs, 0.0, 10, 100, num_threads=num_threads)
        assert batcher._drain_s(40) == 0, "no estimate yet"
        batcher._throughput.update(10, 0.2)
        assert batcher._drain_s(40) == pytest.approx(0.8 / num_threads)
        batcher.close(10)


def test_rejects_a_job_longer_than_its_deadline() -> None:
    async def test(batcher: "DynamicBatcher[int, int]") -> None:
        batcher._throughput.update(10, 0.2)
        first = asyncio.ensure_future(batcher.submit(0, 1, 30))
        await asyncio.sleep(0.01)
        with pytest.raises(QueueFull):
            await batcher.submit(1, 100, 1.0)
        assert await first == 0

    with_batcher(slow, test, num_threads=8)


def test_each_thread_calls_its_start_function() -> None:
    started: list[str] = []

    async def test(batcher: "DynamicBatcher[int, int]") -> None:
        assert await batcher.submit(1, 1, 30) == 1

    with_batcher(
        lambda jobs: jobs, test, num_threads=3, on_thread_start=lambda: started.append(threading.current_thread().name)
    )
    assert started == ["inference"] * 3


def test_rejects_jobs_that_would_miss_their_deadline() -> None:
    """Jobs of size 10 take 0.2 s each: while one runs, 0.5 s suffice for one more, not for four."""

    async def test(batcher: "DynamicBatcher[int, int]") -> None:
        assert await batcher.submit(0, 10, 30) == 0
        pending = [asyncio.ensure_future(batcher.submit(number, 10, 30)) for number in range(4)]
        await asyncio.sleep(0)
        start = time.monotonic()
        with pytest.raises(QueueFull):
            await batcher.submit(5, 10, 0.5)
        assert time.monotonic() - start < 0.2
        patient = asyncio.ensure_future(batcher.submit(6, 10, 30))
        assert await asyncio.gather(*pending) == list(range(4))
        assert await patient == 6
        assert await batcher.submit(7, 1000, 0.5) == 7, "an empty queue accepts any job"

    with_batcher(slow, test, max_batch_size=10)
