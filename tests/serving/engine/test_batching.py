"""Jobs share batches, keep to their deadlines, and are refused when too many wait."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a2gen_rec.serving.engine.batching import DeadlineExceeded, DynamicBatcher, QueueFull


class Held:
    """Work that waits to be let go, once per batch; the result of a job is its double, of -1 an error."""

    def __init__(self, is_open: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.open, self.begun = threading.Event(), threading.Event()
        if is_open:
            self.open.set()

    def __call__(self, jobs: list[int]) -> Sequence[int | Exception]:
        self.batches.append(jobs)
        self.begun.set()
        assert self.open.wait(10)
        return [ValueError("minus one") if job == -1 else 2 * job for job in jobs]


def with_batcher(
    work: Callable[[list[int]], Sequence[int | Exception]],
    test: Callable[["DynamicBatcher[int, int]"], Awaitable[None]],
    max_wait_s: float = 0.0,
    max_batch: int = 100,
    max_waiting: int = 1000,
    max_queue_s: float = 100.0,
    observe: Any = lambda waits, size: None,
    threads: int = 1,
    begin: Callable[[], None] = lambda: None,
) -> None:
    batcher: DynamicBatcher[int, int] = DynamicBatcher(
        work, max_wait_s, max_batch, max_waiting, max_queue_s, observe, threads, begin
    )

    async def run() -> None:
        await test(batcher)

    asyncio.run(run())
    if isinstance(work, Held):
        work.open.set()
    batcher.close(10)
    assert batcher.queued == 0


def slow(jobs: list[int]) -> list[int]:
    threading.Event().wait(0.2)
    return jobs


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 99), st.integers(1, 60)), max_size=30), st.sampled_from([0.0, 0.002]))
def test_everyone_gets_their_own_answer_in_batches_of_bounded_size(jobs: list[tuple[int, int]], wait_s: float) -> None:
    sizes, seen = [], []
    size_of = dict(enumerate(size for _, size in jobs))

    def work(numbers: list[int]) -> list[int | Exception]:
        seen.extend(numbers)
        assert len(numbers) == 1 or sum(size_of[number] for number in numbers) <= 50
        return [ValueError("no") if jobs[number][0] == -1 else 2 * jobs[number][0] for number in numbers]

    async def test(batcher: "DynamicBatcher[int, int]") -> None:
        asked = (batcher.submit(number, size, 10) for number, (_, size) in enumerate(jobs))
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for (value, _), answer in zip(jobs, answers, strict=True):
            assert isinstance(answer, ValueError) if value == -1 else answer == 2 * value
        assert seen == list(range(len(jobs))), "first come, first served"
        assert sum(sizes) == sum(size for _, size in jobs)

    with_batcher(work, test, wait_s, max_batch=50, max_waiting=10_000, observe=lambda waits, size: sizes.append(size))


def test_those_who_come_together_are_done_together() -> None:
    async def test(batcher: "DynamicBatcher[int, int]") -> None:
        assert await asyncio.gather(*(batcher.submit(number, 1, 5) for number in range(20))) == list(range(0, 40, 2))

    with_batcher(work := Held(is_open=True), test, max_wait_s=0.5, max_batch=20)
    assert work.batches == [list(range(20))], "a full batch waits no longer"

    async def alone(batcher: "DynamicBatcher[int, int]") -> None:
        began = time.monotonic()
        await batcher.submit(1, 1, 5)
        assert time.monotonic() - began >= 0.05

    with_batcher(Held(is_open=True), alone, max_wait_s=0.05)


def test_a_full_queue_refuses_at_once_and_takes_again_once_there_is_room() -> None:
    work = Held()

    async def test(batcher: "DynamicBatcher[int, int]") -> None:
        first = asyncio.ensure_future(batcher.submit(1, 50, 5))
        await asyncio.to_thread(work.begun.wait, 5)
        second = asyncio.ensure_future(batcher.submit(2, 2000, 5))
        await asyncio.sleep(0)
        assert batcher.is_full, "one that is larger than the bound waits alone"
        with pytest.raises(QueueFull):
            await batcher.submit(3, 1, 5)
        work.open.set()
        assert await asyncio.gather(first, second, return_exceptions=True) == [2, 4]
        assert await batcher.submit(4, 1, 5) == 8

    with_batcher(work, test)


def test_what_is_too_late_or_no_longer_wanted_is_not_begun() -> None:
    work = Held()

    async def test(batcher: "DynamicBatcher[int, int]") -> None:
        first = asyncio.ensure_future(batcher.submit(1, 1, 5))
        await asyncio.to_thread(work.begun.wait, 5)
        late = asyncio.ensure_future(batcher.submit(2, 10, 0.01))
        gone = asyncio.ensure_future(batcher.submit(3, 10, 5))
        kept = asyncio.ensure_future(batcher.submit(4, 10, 5))
        with pytest.raises(DeadlineExceeded):
            await late
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert batcher.queued == 10, "their places are free again"
        work.open.set()
        assert await asyncio.gather(first, kept) == [2, 8]

    with_batcher(work, test)
    assert work.batches == [[1], [4]]


def test_one_that_expires_while_it_is_done_spoils_no_other() -> None:
    work = Held()

    async def test(batcher: "DynamicBatcher[int, int]") -> None:
        with pytest.raises(DeadlineExceeded):
            await batcher.submit(1, 1, 0.05)
        work.open.set()
        assert await batcher.submit(2, 1, 5) == 4

    with_batcher(work, test)


def test_work_that_fails_as_a_whole_fails_its_batch_only() -> None:
    def work(jobs: list[int]) -> list[int | Exception]:
        if 1 in jobs:
            raise KeyError(1)
        return list(jobs)

    async def test(batcher: "DynamicBatcher[int, int]") -> None:
        with pytest.raises(KeyError):
            await batcher.submit(1, 1, 5)
        assert await batcher.submit(2, 1, 5) == 2

    with_batcher(work, test)


def test_closing_does_what_waits_and_takes_no_more() -> None:
    work = Held()

    async def test(batcher: "DynamicBatcher[int, int]") -> None:
        asked = [asyncio.ensure_future(batcher.submit(number, 1, 5)) for number in range(5)]
        await asyncio.to_thread(work.begun.wait, 5)
        closing = asyncio.ensure_future(asyncio.to_thread(batcher.close, 5))
        while not batcher._closed:
            await asyncio.sleep(0.001)
        with pytest.raises(QueueFull):
            await batcher.submit(9, 1, 5)
        work.open.set()
        await closing
        assert await asyncio.gather(*asked) == [0, 2, 4, 6, 8]

    with_batcher(work, test)


def test_no_more_may_wait_than_is_done_in_a_bounded_time() -> None:
    """Jobs of size 10 that take 0.2 s each: at most two of them may wait for 0.3 s."""

    async def test(batcher: "DynamicBatcher[int, int]") -> None:
        assert await batcher.submit(0, 10, 30) == 0
        asked = [asyncio.ensure_future(batcher.submit(1, 10, 30))]
        while not batcher._running:
            await asyncio.sleep(0.001)
        for number in (2, 3):
            assert not batcher.is_full
            asked.append(asyncio.ensure_future(batcher.submit(number, 10, 30)))
            await asyncio.sleep(0)
        assert batcher.is_full
        with pytest.raises(QueueFull):
            await batcher.submit(4, 1, 30)
        assert await asyncio.gather(*asked) == [1, 2, 3]
        assert not batcher.is_full

    with_batcher(slow, test, max_batch=10, max_queue_s=0.3)


def test_threads_share_what_waits() -> None:
    """Two jobs are done at once by two threads; of what comes while both are busy, each takes half."""
    held = Held()

    async def test(batcher: "DynamicBatcher[int, int]") -> None:
        while batcher._num_idle < 2:
            await asyncio.sleep(0.001)
        asked = [asyncio.ensure_future(batcher.submit(number, 1, 30)) for number in range(2)]
        while len(held.batches) < 2:
            await asyncio.sleep(0.001)
        asked += [asyncio.ensure_future(batcher.submit(number, 1, 30)) for number in range(2, 5)]
        while batcher.queued < 3:
            await asyncio.sleep(0.001)
        held.open.set()
        assert await asyncio.gather(*asked) == [0, 2, 4, 6, 8]
        assert sorted(held.batches[:2]) == [[0], [1]]
        assert sorted(held.batches[2:]) == [[2, 3], [4]]

    with_batcher(held, test, max_batch=3, threads=2)


def test_more_is_done_in_a_time_where_more_is_done_at_once() -> None:
    """Of what waits; a job is done by one thread, however many there are."""
    for threads in (1, 2, 5):
        batcher: DynamicBatcher[int, int] = DynamicBatcher(lambda jobs: jobs, 0.0, 10, 100, num_threads=threads)
        assert batcher._drain_s(40) == 0, "nothing is known yet"
        batcher._throughput.update(10, 0.2)
        assert batcher._drain_s(40) == pytest.approx(0.8 / threads)
        batcher.close(10)


def test_a_job_that_takes_too_long_by_itself_is_refused_whoever_is_idle() -> None:
    async def test(batcher: "DynamicBatcher[int, int]") -> None:
        batcher._throughput.update(10, 0.2)
        held = asyncio.ensure_future(batcher.submit(0, 1, 30))
        await asyncio.sleep(0.01)
        with pytest.raises(QueueFull):
            await batcher.submit(1, 100, 1.0)
        assert await held == 0

    with_batcher(slow, test, threads=8)


def test_each_thread_begins_by_what_it_is_told() -> None:
    begun: list[str] = []

    async def test(batcher: "DynamicBatcher[int, int]") -> None:
        assert await batcher.submit(1, 1, 30) == 1

    with_batcher(lambda jobs: jobs, test, threads=3, begin=lambda: begun.append(threading.current_thread().name))
    assert begun == ["inference"] * 3


def test_what_cannot_be_done_in_time_is_refused_at_once() -> None:
    """Jobs of size 10 that take 0.2 s each: while one is done, there is time for one more in 0.5 s, not for four."""

    async def test(batcher: "DynamicBatcher[int, int]") -> None:
        assert await batcher.submit(0, 10, 30) == 0
        asked = [asyncio.ensure_future(batcher.submit(number, 10, 30)) for number in range(4)]
        await asyncio.sleep(0)
        began = time.monotonic()
        with pytest.raises(QueueFull):
            await batcher.submit(5, 10, 0.5)
        assert time.monotonic() - began < 0.2
        patient = asyncio.ensure_future(batcher.submit(6, 10, 30))
        assert await asyncio.gather(*asked) == list(range(4))
        assert await patient == 6
        assert await batcher.submit(7, 1000, 0.5) == 7, "where nothing is before it, it is tried"

    with_batcher(slow, test, max_batch=10)
