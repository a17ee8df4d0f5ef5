"""Load generator that sends HTTP requests at scheduled times (open loop) or as fast as the service answers.

In an open loop, requests arrive independently of previous responses, as real users do. The generator is a separate
process, so that nothing else delays sending. It records the remaining delays.
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

RESPONSE_TIMEOUT_S = 30.0
"""Maximum time to wait for a response."""
RETRY_DELAY_S = 0.05
"""Delay before a client of a closed loop retries a rejected request."""


@dataclass(frozen=True)
class Load:
    """Requests to send.

    Attributes:
        host: host of the service.
        port: port of the service.
        path: route of the requests.
        phases: consecutive (requests per second, seconds) of a Poisson process. A closed loop uses only the seconds.
        concurrency: clients of a closed loop, each of which waits for its response; 0 is an open loop.
        seed: random seed of the Poisson process.
    """

    host: str
    port: int
    path: str
    phases: Sequence[tuple[float, float]]
    concurrency: int = 0
    seed: int = 0


def poisson_times(phases: Sequence[tuple[float, float]], rng: np.random.Generator) -> np.ndarray:
    """Return sorted arrival times in seconds, [requests]: a Poisson process with a constant rate in each phase."""
    starts = itertools.accumulate((seconds for _, seconds in phases), initial=0.0)
    times = [
        start + np.sort(rng.uniform(0, seconds, rng.poisson(rate * seconds)))
        for start, (rate, seconds) in zip(starts, phases, strict=False)
    ]
    return np.concatenate(times)


def run_load(load: Load, request_bodies: Sequence[bytes], scratch: Path) -> Trace:
    """Send a load from a new process that cycles through the request bodies.

    Raises:
        RuntimeError: the process failed.
    """
    bodies_file, trace_file = scratch / "bodies", scratch / "trace.npz"
    bodies_file.write_bytes(b"\n".join(request_bodies))
    command = [sys.executable, __file__, json.dumps(asdict(load)), str(bodies_file), str(trace_file)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            _, errors = process.communicate()
        finally:
            process.kill()
    if process.returncode:
        raise RuntimeError(f"the load generator failed: {errors.strip()}")
    return Trace.read(trace_file)


class _Connection(asyncio.Protocol):
    """Connection with one request at a time; records the time and status of the response."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.response: asyncio.Future[tuple[float, int]] | None = None
        self.parser: Any = None
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def send(self, request: bytes) -> "asyncio.Future[tuple[float, int]]":
        self.response = self.loop.create_future()
        self.parser = httptools.HttpResponseParser(self)
        self.transport.write(request)
        return self.response

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.abort()

    def on_message_complete(self) -> None:
        self._finish(self.parser.get_status_code())
        if not self.parser.should_keep_alive():
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish(LOST)

    def _finish(self, status: int) -> None:
        if self.response is not None and not self.response.done():
            self.response.set_result((time.perf_counter(), status))


class _Sender:
    """Sends requests over a pool of connections, the most recently used first."""

    def __init__(self, load: Load, bodies: Sequence[bytes]) -> None:
        self.load, self.loop = load, asyncio.get_running_loop()
        head = f"POST {load.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        self.requests = [f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in bodies]
        self.start = time.perf_counter()  # the event loop's clock has a resolution of milliseconds
        self.rows: list[tuple[float, float, float, int]] = []
        self._idle: list[_Connection] = []

    @property
    def now(self) -> float:
        return time.perf_counter() - self.start

    async def send(self, number: int, due_s: float) -> int:
        """Send a request, wait for the response, and return its status."""
        sent, connection = self.now, None
        try:
            async with asyncio.timeout(RESPONSE_TIMEOUT_S):
                connection = await self._connection()
                answered, status = await connection.send(self.requests[number % len(self.requests)])
            self._idle.append(connection)
        except OSError:  # TimeoutError included
            answered, status = time.perf_counter(), LOST
            if connection is not None:
                connection.transport.abort()
        self.rows.append((due_s, sent, answered - self.start, status))
        return status

    async def open_loop(self, times: np.ndarray) -> None:
        """Send requests at scheduled times."""
        tasks: set[asyncio.Task[int]] = set()
        for number, due in enumerate(times.tolist()):
            while (delay := due - self.now) > 0:  # timers may fire early
                await asyncio.sleep(delay)
            tasks.add(task := self.loop.create_task(self.send(number, due)))
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    async def closed_loop(self, seconds: float) -> None:
        """Send requests from concurrent clients, each waiting for its response."""
        numbers = itertools.count()

        async def client() -> None:
            while self.now < seconds:
                if await self.send(next(numbers), self.now) != RANKED:
                    await asyncio.sleep(RETRY_DELAY_S)

        await asyncio.gather(*(client() for _ in range(self.load.concurrency)))

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.transport.is_closing():
                return connection
        _, connection = await self.loop.create_connection(
            lambda: _Connection(self.loop), self.load.host, self.load.port
        )
        return connection


async def _send_all(load: Load, bodies: Sequence[bytes]) -> Trace:
    times = poisson_times(load.phases, np.random.default_rng(load.seed))
    gc.freeze()
    gc.disable()
    sender = _Sender(load, bodies)
    loop: Coroutine[Any, Any, None]
    loop = sender.closed_loop(sum(s for _, s in load.phases)) if load.concurrency else sender.open_loop(times)
    before = resource.getrusage(resource.RUSAGE_SELF)
    await loop
    after = resource.getrusage(resource.RUSAGE_SELF)
    rows = np.array(sorted(sender.rows), np.float64).reshape(-1, 4)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Trace(rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3].astype(np.int64), cpu_s)


def main(load: str, bodies: str, trace: str) -> None:
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))  # one connection per pending request
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_send_all(Load(**json.loads(load)), Path(bodies).read_bytes().split(b"\n"))).write(Path(trace))


if __name__ == "__main__":
    main(*sys.argv[1:])
