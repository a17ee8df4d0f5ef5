"""Ranking services for tests: servers in a thread or a process, with a ranker that needs no model. Imports no torch."""

import asyncio
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvloop

from a2gen_rec.config import ServeConfig
from a2gen_rec.serving.engine.service import RankingService
from a2gen_rec.serving.http.app import create_app
from a2gen_rec.serving.http.server import Server, bind_socket
from a2gen_rec.serving.stores.base import EventStore
from a2gen_rec.serving.stores.sqlite import SqliteStore
from tests.helpers import REPOSITORY
from tests.helpers.fake_ranker import ITEMS, FakeRanker, make_model

TIMEOUT_S = 60
"""Maximum seconds that tests wait for an expected event, however busy the machine is."""


def fast_store(folder: Path) -> SqliteStore:
    """Return a SQLite store that does not wait for the disk."""
    store = SqliteStore(str(folder / "events.db"))
    store._writer.execute("PRAGMA synchronous = OFF")
    return store


@dataclass
class RunningService:
    """Server in a thread, with an HTTP client and its address for raw sockets."""

    service: RankingService
    server: Server
    client: httpx.Client
    address: tuple[str, int]

    @property
    def ranker(self) -> Any:
        return self.service.ranker

    def rank(self, user: str = "u1", **body: Any) -> httpx.Response:
        return self.client.post("/v1/rank", json={"user": user, "candidates": ITEMS[:5], **body})

    def post(self, user: str, *impressions: dict[str, Any]) -> httpx.Response:
        return self.client.post("/v1/events", json={"user": user, "impressions": list(impressions)})


@contextmanager
def running(
    folder: Path,
    keys: Sequence[str] = (),
    store: EventStore | None = None,
    model: Path | None = None,
    load: Any = FakeRanker.load,
    **settings: Any,
) -> Iterator[RunningService]:
    """Run a service on a free port, by default with the fake model ``one``, a long timeout and a long backlog.

    Args:
        folder: Directory of the model and the store.
        keys: API keys.
        store: Event store; SQLite by default.
        model: Model directory; a new one by default.
        load: Function that loads the ranker.
        settings: Fields of ServeConfig.
    """
    model = model or make_model(folder / "model")
    store = store or fast_store(folder)
    location = getattr(store, "file", "")  # worker processes open the store by its path
    patient = dict.fromkeys(("default_timeout_ms", "max_backlog_ms"), TIMEOUT_S * 1000)
    service = RankingService(
        str(model),
        lambda: store,
        ServeConfig(**{**patient, "event_store": location, **settings}),
        load,
    )
    server = Server(create_app(service, keys), service.config.graceful_timeout_s)
    listening = bind_socket("127.0.0.1", 0)
    address = listening.getsockname()

    def serve() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(server.serve(sockets=[listening]))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
    limits = httpx.Limits(max_connections=None)
    with httpx.Client(
        base_url=f"http://127.0.0.1:{address[1]}", timeout=TIMEOUT_S, headers=headers, limits=limits
    ) as client:
        yield RunningService(service, server, client, address)
    server.should_exit = True
    thread.join(TIMEOUT_S)
    assert not thread.is_alive(), "the server did not exit"


def send_raw(address: tuple[str, int], request: bytes, timeout_s: float = 10) -> tuple[int, bytes]:
    """Send raw bytes and return the status and the response; the server must close the connection."""
    with socket.create_connection(address, timeout=timeout_s) as connection:
        connection.sendall(request)
        response = b""
        while part := connection.recv(65536):
            response += part
    return int(response.split(b" ", 2)[1]), response


def post_request(body: bytes, *headers: bytes, path: bytes = b"/v1/rank", length: int | None = None) -> bytes:
    """Return the bytes of a POST request."""
    lines = [
        b"POST " + path + b" HTTP/1.1",
        b"Host: localhost",
        b"Connection: close",
        b"Content-Type: application/json",
        *headers,
    ]
    if not any(b"chunked" in header for header in headers):
        lines.append(b"Content-Length: %d" % (len(body) if length is None else length))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def wait_until(condition: Callable[[], bool], seconds: float = TIMEOUT_S) -> None:
    """Wait until the condition holds, and fail after ``seconds``."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.005)


@contextmanager
def serve_process(
    *arguments: str, on_start: Callable[[subprocess.Popen[str]], None] = lambda started: None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run `a2gen serve` with the fake ranker in a process; yield the process and its address once it serves.

    Args:
        arguments: Arguments of the command.
        on_start: Called with the process before it serves.
    """
    command = [sys.executable, "-m", "tests.helpers.fake_ranker", *arguments]
    started = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={"PYTHONPATH": str(REPOSITORY)},
    )
    try:
        on_start(started)
        assert started.stdout is not None
        line = started.stdout.readline()
        address = re.search(r"http://\S+", line)
        assert address, line or started.communicate()
        yield started, address[0]
    finally:
        started.kill()
        started.communicate()
