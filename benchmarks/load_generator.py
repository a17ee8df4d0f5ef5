"""Sends requests to a service over HTTP, at moments fixed beforehand or as fast as it answers.

In an open loop, requests come as users do: whether or not the former ones have been answered. A process of its own, so
that nothing else delays them; how late they were sent is recorded.
"""

import asyncio
import gc
import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Coroutine, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httptools
import numpy as np
import uvloop
from load_traces import LOST, RANKED, Trace

PATIENCE_S = 30.0
"""For which an answer is waited for."""
PAUSE_S = 0.05
"""After which a refused caller of a closed loop comes again."""


@dataclass(frozen=True)
class Load:
    """What is to be sent.

    Attributes:
        phases: (requests per second, seconds) one after the other, as a Poisson process; of a closed loop only the
            seconds count.
        callers: of a closed loop, each of whom asks again when answered; 0 is an open loop.
    """

    host: str
    port: int
    path: str
    phases: Sequence[tuple[float, float]]
    callers: int = 0
    seed: int = 0


def poisson_times(phases: Sequence[tuple[float, float]], rng: np.random.Generator) -> np.ndarray:
    """[requests] seconds since the begin, in order: a Poisson process whose rate changes from phase to phase."""
    begins = itertools.accumulate((seconds for _, seconds in phases), initial=0.0)
    drawn = [
        begin + np.sort(rng.uniform(0, seconds, rng.poisson(rate * seconds)))
        for begin, (rate, seconds) in zip(begins, phases, strict=False)
    ]
    return np.concatenate(drawn)


def run(load: Load, bodies: Sequence[bytes], scratch: Path) -> Trace:
    """Send a load from a process of its own, which takes the bodies in turn.

    Raises:
        RuntimeError: that process failed.
    """
    bodies_file, trace_file = scratch / "bodies", scratch / "trace.npz"
    bodies_file.write_bytes(b"\n".join(bodies))
    command = [sys.executable, __file__, json.dumps(asdict(load)), str(bodies_file), str(trace_file)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            _, told = process.communicate()
        finally:
            process.kill()
    if process.returncode:
        raise RuntimeError(f"the load generator failed: {told.strip()}")
    return Trace.read(trace_file)


class _Connection(asyncio.Protocol):
    """One request at a time, and when it was answered with what."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.answer: asyncio.Future[tuple[float, int]] | None = None
        self.parser: Any = None
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def ask(self, request: bytes) -> "asyncio.Future[tuple[float, int]]":
        self.answer = self.loop.create_future()
        self.parser = httptools.HttpResponseParser(self)
        self.transport.write(request)
        return self.answer

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.abort()

    def on_message_complete(self) -> None:
        self._end(self.parser.get_status_code())
        if not self.parser.should_keep_alive():
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(LOST)

    def _end(self, status: int) -> None:
        if self.answer is not None and not self.answer.done():
            self.answer.set_result((time.perf_counter(), status))


class _Sender:
    """Sends requests over as many connections as are needed at once, the last used first."""

    def __init__(self, load: Load, bodies: Sequence[bytes]) -> None:
        self.load, self.loop = load, asyncio.get_running_loop()
        head = f"POST {load.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        self.requests = [f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in bodies]
        self.began = time.perf_counter()  # the loop's own clock counts whole milliseconds
        self.rows: list[tuple[float, float, float, int]] = []
        self._idle: list[_Connection] = []

    @property
    def now(self) -> float:
        return time.perf_counter() - self.began

    async def send(self, number: int, due: float) -> int:
        """Send a request and wait for its answer, whose status is returned."""
        sent, connection = self.now, None
        try:
            async with asyncio.timeout(PATIENCE_S):
                connection = await self._connection()
                answered, status = await connection.ask(self.requests[number % len(self.requests)])
            self._idle.append(connection)
        except OSError:  # TimeoutError included
            answered, status = time.perf_counter(), LOST
            if connection is not None:
                connection.transport.abort()
        self.rows.append((due, sent, answered - self.began, status))
        return status

    async def open_loop(self, times: np.ndarray) -> None:
        sending: set[asyncio.Task[int]] = set()
        for number, due in enumerate(times.tolist()):
            while (early := due - self.now) > 0:  # timers are rounded, down too
                await asyncio.sleep(early)
            sending.add(task := self.loop.create_task(self.send(number, due)))
            task.add_done_callback(sending.discard)
        await asyncio.gather(*sending)

    async def closed_loop(self, seconds: float) -> None:
        numbers = itertools.count()

        async def call() -> None:
            while self.now < seconds:
                if await self.send(next(numbers), self.now) != RANKED:
                    await asyncio.sleep(PAUSE_S)

        await asyncio.gather(*(call() for _ in range(self.load.callers)))

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.transport.is_closing():
                return connection
        _, made = await self.loop.create_connection(lambda: _Connection(self.loop), self.load.host, self.load.port)
        return made


async def _send_all(load: Load, bodies: Sequence[bytes]) -> Trace:
    times = poisson_times(load.phases, np.random.default_rng(load.seed))
    gc.freeze()
    gc.disable()
    sender = _Sender(load, bodies)
    loop: Coroutine[Any, Any, None]
    loop = sender.closed_loop(sum(s for _, s in load.phases)) if load.callers else sender.open_loop(times)
    before = resource.getrusage(resource.RUSAGE_SELF)
    await loop
    after = resource.getrusage(resource.RUSAGE_SELF)
    rows = np.array(sorted(sender.rows), np.float64).reshape(-1, 4)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Trace(rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3].astype(np.int64), cpu_s)


def main(load: str, bodies: str, trace: str) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each request that waits has a connection
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_send_all(Load(**json.loads(load)), Path(bodies).read_bytes().split(b"\n"))).write(Path(trace))


if __name__ == "__main__":
    main(*sys.argv[1:])
