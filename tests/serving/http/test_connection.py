"""Connections of clients that never read, disconnect early, or send endless requests."""

import logging
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.helpers.service import TIMEOUT_S, RunningService, post_request, running, send_raw

pytestmark = pytest.mark.processes

HISTORY = b"GET /v1/users/long/history?last=1000 HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHUNKED = post_request(b"", b"Transfer-Encoding: chunked")
ENDLESS_BYTES = 32 * 2**20


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with running(tmp_path_factory.mktemp("connection")) as service:
        yield service


def wait_for_status(service: RunningService, status: int) -> None:
    end = time.monotonic() + TIMEOUT_S
    while (actual := service.client.get("/v1/model").status_code) != status:
        assert time.monotonic() < end, f"still {actual}"
        time.sleep(0.02)


def connect_idle(service: RunningService) -> socket.socket:
    """Connect a client with a small receive buffer."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
    connection.settimeout(10)
    connection.connect(service.address)
    return connection


def reset(connection: socket.socket) -> None:
    """Reset the connection, like a killed process."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def test_disconnects_clients_that_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("a2gen_rec.serving.http.connection.WRITE_STALL_TIMEOUT_S", 0.5)
    with running(tmp_path, max_concurrent_requests=3) as service, ExitStack() as connections:
        service.post("long", *({"item": "v" * 256, "ts_ms": ts_ms} for ts_ms in range(1000)))
        for _ in range(3):
            connections.enter_context(connect_idle(service)).sendall(HISTORY * 60)
        wait_for_status(service, 503)
        end = time.monotonic() + 10
        while len(service.server.server_state.connections) > 1:  # the remaining one is the HTTP client's
            assert time.monotonic() < end, "connections are still open"
            time.sleep(0.02)
        wait_for_status(service, 200)


def test_slow_reader_gets_all_responses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("a2gen_rec.serving.http.connection.WRITE_STALL_TIMEOUT_S", TIMEOUT_S)
    with running(tmp_path, max_concurrent_requests=1) as service:
        service.post("long", *({"item": "v" * 256, "ts_ms": ts_ms} for ts_ms in range(1000)))
        with connect_idle(service) as late:
            late.sendall(HISTORY * 59 + HISTORY.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
            wait_for_status(service, 503)
            response = b"".join(iter(lambda: late.recv(2**20), b""))
        assert response.count(b"HTTP/1.1 200 OK") == 60
        assert response.count(b'"ts_ms"') == 60_000


def test_early_disconnect_is_no_error(one: RunningService, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    slow = post_request(b'{"user": "gone", "candidates": ["slow"]}').replace(b"Connection: close\r\n", b"")
    connection = socket.create_connection(one.address, timeout=10)
    connection.sendall(slow + HISTORY * 3)
    while ["gone"] not in one.ranker.batches:
        time.sleep(0.005)
    reset(connection)
    assert one.rank(candidates=["slow"]).status_code == 200, "after the abandoned request"
    while not (lines := [message for message in caplog.messages if message.startswith("POST /v1/rank 499 ")]):
        time.sleep(0.005)
    assert len(lines) == 1
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


ENDLESS = {
    "headers": (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n", b"X-More: " + b"x" * 1000 + b"\r\n"),
    "a header": (b"GET /healthz HTTP/1.1\r\nX-More: ", b"x" * 1000),
    "a path": (b"GET /", b"x" * 1000),
    "headers after a body": (CHUNKED + b"0\r\n", b"X-More: " + b"x" * 1000 + b"\r\n"),
    "a chunk's extension": (CHUNKED + b"1;x=", b"x" * 1000),
    "requests": (HISTORY.replace(b"long", b"slow"), HISTORY.replace(b"long", b"slow") * 10),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_aborts_endless_input(one: RunningService, name: str) -> None:
    start, more = ENDLESS[name]
    with socket.create_connection(one.address, timeout=10) as connection, suppress(ConnectionError):
        connection.sendall(start)
        more *= 50
        for _ in range(ENDLESS_BYTES // len(more)):
            connection.sendall(more)
        pytest.fail("endless input was accepted")
    assert one.rank().status_code == 200


def test_accepts_large_headers(one: RunningService) -> None:
    lines = b"".join(b"X-%d: %s\r\n" % (index, b"x" * 1000) for index in range(60))
    probe = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + lines
    for split in (1, len(probe) // 2, len(probe)):
        with socket.create_connection(one.address, timeout=10) as connection:
            connection.sendall(probe[:split])
            time.sleep(0.02)
            connection.sendall(probe[split:] + b"\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_trailers_are_no_headers(one: RunningService) -> None:
    body = b'{"user": "u", "candidates": ["v1"]}'
    chunks = b"%x\r\n%s\r\n0\r\nHost: attacker.example\r\nX-Request-Id: later\r\n\r\n" % (len(body), body)
    status, response = send_raw(one.address, CHUNKED + chunks)
    assert status == 200
    assert b"later" not in response
