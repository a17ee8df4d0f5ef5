"""Bodies that are no requests, senders that are slow, and whatever else a network brings."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode, checks

from tests.helpers.service import RunningService, post_request, running, send_raw

KIB = 1024


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with running(tmp_path_factory.mktemp("guard"), max_body_kb=64) as service:
        yield service


CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
GOOD = json.dumps({"user": "u", "candidates": ["v1"]}).encode()
BODIES = {
    "empty": (b"", 422),
    "half": (GOOD[:-3], 400),
    "more": (GOOD + b"x", 400),
    "deep": (b'{"user":' + b"[" * 30_000 + b"]" * 30_000 + b"}", 400),
    "deep but few": (b'{"user":' + b"[" * 50 + b"]" * 50 + b"}", 422),
    "wide": (b"[" + b"[]," * 20_000 + b"1]", 422),
    "many fields": (b"{" + b",".join(b'"%d":1' % number for number in range(6000)) + b"}", 422),
    "not UTF-8": (GOOD.replace(b"u", b"\xff"), 400),
    "UTF-16": (GOOD.decode().encode("utf-16"), 400),
    "half a surrogate pair": (GOOD.replace(b'"u"', b'"\\ud800"'), 400),
    "half a surrogate pair in a name": (b'{"\\ud800": 1}', 400),
    "NaN": (GOOD.replace(b'"u"', b"NaN"), 400),
    "infinite": (GOOD.replace(b'"u"', b"1e999"), 422),
    "a long number": (GOOD.replace(b'"u"', b"9" * 5000), 400),
    "null": (b"null", 422),
    "a list": (b"[1]", 422),
    "a byte order mark": (b"\xef\xbb\xbf" + GOOD, 400),
}


@pytest.mark.parametrize("name", BODIES)
def test_what_is_no_request_is_told_so(one: RunningService, name: str) -> None:
    body, expected = BODIES[name]
    status, answer = send_raw(one.address, post_request(body))
    assert status == expected
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert set(error) == {"code", "message", "request_id"}
    assert len(error["message"]) < 500


def test_bodies_in_chunks_are_bounded_too(one: RunningService) -> None:
    def chunked(body: bytes, size: int) -> bytes:
        parts = [body[begin : begin + size] for begin in range(0, len(body), size)]
        content = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
        return post_request(content, b"Transfer-Encoding: chunked")

    assert send_raw(one.address, chunked(GOOD, 7))[0] == 200
    padded = GOOD + b" " * (64 * KIB - len(GOOD))
    assert send_raw(one.address, chunked(padded, 1000))[0] == 200, "exactly as much as may be"
    assert send_raw(one.address, chunked(padded + b" ", 1000))[0] == 413
    assert send_raw(one.address, post_request(padded + b" "))[0] == 413
    status, answer = send_raw(one.address, post_request(b"{", length=10**9))
    assert status == 413, "before it is sent"
    assert b"connection: close" in answer.lower()
    with socket.create_connection(one.address, timeout=10) as endless, suppress(ConnectionError):
        endless.sendall(post_request(b"", b"Transfer-Encoding: chunked"))
        for _ in range(10**6):
            endless.sendall(b"1000\r\n" + b" " * 4096 + b"\r\n")
        pytest.fail("it was read for ever")


def test_what_is_no_http_is_refused(one: RunningService) -> None:
    assert send_raw(one.address, b"\x16\x03\x01\x02\x00 hello\r\n\r\n")[0] == 400
    assert send_raw(one.address, post_request(GOOD, b"Transfer-Encoding: chunked", b"Content-Length: 5"))[0] == 400
    assert send_raw(one.address, b"GET /%ff%fe/%00 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")[0] == 404
    assert (
        send_raw(one.address, b"GET /v1/users/%ff/history HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")[0]
        == 200
    )
    assert one.rank().status_code == 200


def test_a_slow_sender_delays_no_one_and_is_sent_away(tmp_path: Path) -> None:
    with running(tmp_path, read_timeout_s=1.0) as service:
        dripping = [socket.create_connection(service.address, timeout=10) for _ in range(20)]
        end = threading.Event()

        def drip() -> None:
            for connection in dripping:
                connection.sendall(post_request(b"", length=1000))
            while not end.wait(0.05):
                for connection in dripping:
                    try:
                        connection.sendall(b" ")
                    except OSError:
                        return

        thread = threading.Thread(target=drip)
        thread.start()
        began, answered = time.monotonic(), 0
        while time.monotonic() - began < 0.5 or answered < 5:
            assert service.rank().status_code == 200
            answered += 1
        for connection in dripping:
            assert connection.recv(65536).startswith(b"HTTP/1.1 408 ")
            connection.close()
        end.set()
        thread.join()


def test_headers_that_do_not_come_end_the_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("a2gen_rec.serving.http.connection.HEADER_TIMEOUT_S", 0.2)
    with running(tmp_path) as service:
        for begun in (
            b"",
            b"POST /v1/rank HTTP/1.1\r\nHost:",
            b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /",
        ):
            with socket.create_connection(service.address, timeout=10) as connection:
                connection.sendall(begun)
                answer = b""
                with suppress(ConnectionResetError):
                    while part := connection.recv(65536):
                        answer += part
                assert answer.count(b"HTTP/1.1 200") == begun.count(b"\r\n\r\n")


def test_requests_drawn_from_the_description_get_answers_that_it_has(one: RunningService) -> None:
    """Good ones and spoilt ones, of every route: none is an error of the server."""
    described = schemathesis.openapi.from_url(f"{one.client.base_url}/openapi.json")
    asked = [each.ok() for each in described.get_all_operations()]
    assert len(asked) == 10
    for mode, count in ((GenerationMode.POSITIVE, 10), (GenerationMode.NEGATIVE, 20)):
        for operation in asked:
            if mode is GenerationMode.NEGATIVE and operation.path not in ("/v1/rank", "/v1/events"):
                continue

            @settings(
                max_examples=count,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(operation.as_strategy(generation_mode=mode))
            def ask(case: schemathesis.Case) -> None:
                case.call_and_validate(checks=CHECKS)

            ask()
