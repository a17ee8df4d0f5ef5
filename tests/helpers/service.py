"""A ranking service for tests: a ranker that needs no model, and servers in a thread or a process of their own.

As a program it is `a2gen serve` with that ranker: its arguments are those of the command.
"""

import asyncio
import re
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvloop

from a2gen_rec.config import ServeConfig
from a2gen_rec.errors import UserError
from a2gen_rec.ranking.action_cache import CacheStats
from a2gen_rec.ranking.types import Impression, RankedList, RankQuery, ScoredCandidate
from a2gen_rec.serving.engine.service import RankingService
from a2gen_rec.serving.http.app import create_app
from a2gen_rec.serving.http.server import Server, bind_socket
from a2gen_rec.serving.stores.base import EventStore
from a2gen_rec.serving.stores.sqlite import SqliteStore
from tests.helpers import REPOSITORY
from tests.helpers.cards import make_card

PATIENT_S = 60
"""For which tests wait for what must come, however busy the machine is."""
ITEMS = [f"v{number}" for number in range(40)]


@dataclass(frozen=True)
class Past:
    """Stands for a history: items by their moment."""

    item_at: dict[str, str]

    def __len__(self) -> int:
        return len(self.item_at)

    @property
    def ts_ms(self) -> list[int]:
        return [int(key.split()[0]) for key in self.item_at]


@dataclass
class FakeRanker:
    """Ranks by a hash of user and item, and tells the history it has seen as the best one's timeline.

    Its model is a folder with a file ``version``. A candidate named ``slow`` takes ``nap_s``, one named ``bad``
    fails in rank_many, and a user feature that it does not have is an error.
    """

    version: str
    nap_s: float = 0.2
    keep: int = 10**6
    card: Any = field(default_factory=make_card)
    batches: list[list[str]] = field(default_factory=list)
    moments: list[int | None] = field(default_factory=list)
    encoded: int = 0

    @classmethod
    def load(cls, folder: str, cache_bytes: int = 0) -> "FakeRanker":
        version = Path(folder) / "version"
        if not version.exists():
            raise UserError(f"{folder}: no exported model here")
        return cls(version.read_text())

    def rank(self, request: RankQuery) -> RankedList:
        return self.rank_many([request])[0]

    def rank_many(self, requests: Sequence[RankQuery]) -> list[RankedList]:
        self.batches.append([request.user for request in requests])
        self.moments += [request.now_ms for request in requests]
        if any("slow" in request.candidates for request in requests):
            time.sleep(self.nap_s)
        if any("bad" in request.candidates for request in requests):
            raise KeyError(requests[0].user)
        return [self._ranked(request) for request in requests]

    def check(self, request: RankQuery) -> None:
        if request.user_features:
            raise UserError(f"request: no user feature {next(iter(request.user_features))!r}")
        if not isinstance(request.history, Past):
            self._check(request.history)

    def encode(self, impressions: Sequence[Impression], after: Past | None = None) -> Past:
        self._check(impressions)
        self.encoded += len(impressions)
        new = {f"{each.ts_ms:020d} {each.item}": each.item for each in impressions}
        return Past(dict(sorted({**(after.item_at if after else {}), **new}.items())))

    def some_users(self, count: int) -> list[str]:
        return ["u1", "u2"][:count]

    def some_items(self, count: int) -> list[str]:
        return ITEMS[:count]

    @property
    def orders(self) -> list[str]:
        return ["like"]

    def length_s(self, item: str) -> float | None:
        return float(item[1:]) if item in ITEMS else None

    @property
    def cache(self) -> CacheStats:
        return CacheStats(1, 2, 3, 4)

    def _check(self, impressions: Sequence[Impression]) -> None:
        for each in impressions:
            for name, _ in each.actions:
                if name not in self.card.events:
                    raise UserError(f"impression of {each.item!r}: no action {name!r}")

    def _ranked(self, request: RankQuery) -> RankedList:
        past = request.history if isinstance(request.history, Past) else self.encode(request.history)
        best = sorted(set(request.candidates), key=lambda item: (-chance(request.user, item), item))
        seen = [(item, None) for item in past.item_at.values()]
        return RankedList(
            user=request.user,
            user_known=True,
            history_length=len(past),
            sort_by="like",
            num_candidates=len(best),
            unknown_items=0,
            candidates=[
                ScoredCandidate(
                    item, True, {"like": chance(request.user, item), self.version: 1.0}, None, seen, float("nan")
                )
                for item in best[: request.k]
            ],
            model_version=self.version,
        )


def chance(user: str, item: str) -> float:
    return zlib.crc32(f"{user} {item}".encode()) / 2**32


def order(user: str, candidates: Sequence[str], k: int = 10) -> list[str]:
    """What the ranker answers."""
    return sorted(set(candidates), key=lambda item: (-chance(user, item), item))[:k]


def make_model(folder: Path, version: str = "one") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "version").write_text(version)
    return folder


def swift_store(folder: Path) -> SqliteStore:
    """One that does not wait for the disk."""
    store = SqliteStore(str(folder / "events.db"))
    store._writer.execute("PRAGMA synchronous = OFF")
    return store


@dataclass
class Running:
    """A server in a thread: ``client`` asks it, ``address`` is for sockets."""

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
) -> Iterator[Running]:
    """A service of the model ``one``, on a free port; settings are those of ServeConfig, patient by default."""
    model = model or make_model(folder / "model")
    store = store or swift_store(folder)
    where = getattr(store, "file", "")  # other processes open it by that
    service = RankingService(
        str(model), store, ServeConfig(**{"timeout_ms": PATIENT_S * 1000, "store": where, **settings}), load
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
        base_url=f"http://127.0.0.1:{address[1]}", timeout=PATIENT_S, headers=headers, limits=limits
    ) as client:
        yield Running(service, server, client, address)
    server.should_exit = True
    thread.join(PATIENT_S)
    assert not thread.is_alive(), "the server must end"


def raw(address: tuple[str, int], request: bytes, timeout_s: float = 10) -> tuple[int, bytes]:
    """Status and answer of a request written by hand; the connection is closed after it."""
    with socket.create_connection(address, timeout=timeout_s) as connection:
        connection.sendall(request)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return int(answer.split(b" ", 2)[1]), answer


def post(body: bytes, *headers: bytes, path: bytes = b"/v1/rank", length: int | None = None) -> bytes:
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


def until(holds: Callable[[], bool], seconds: float = PATIENT_S) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it must come"
        time.sleep(0.005)


@contextmanager
def process(
    *arguments: str, begun: Callable[[subprocess.Popen[str]], None] = lambda started: None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`a2gen serve` in a process, with the ranker above: the process and its address, once it serves.

    Args:
        begun: called with the process before it serves.
    """
    command = [sys.executable, "-m", "tests.helpers.service", *arguments]
    started = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={"PYTHONPATH": str(REPOSITORY)},
    )
    try:
        begun(started)
        assert started.stdout is not None
        line = started.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, line or started.communicate()
        yield started, found[0]
    finally:
        started.kill()
        started.communicate()


if __name__ == "__main__":
    from functools import partial

    from a2gen_rec.cli.main import main
    from a2gen_rec.serving.http import server

    server.RankingService = partial(RankingService, load=FakeRanker.load)  # type: ignore[misc,assignment]
    main(["serve", *sys.argv[1:]])
