"""Request guard: malformed bodies, slow clients and generated requests."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import schemathesis

# Imported here and not by its first use: CPython 3.11.7 can fail to parse a module while other threads run.
import schemathesis.specs.openapi.schemas
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
VALID = json.dumps({"user": "u", "candidates": ["v1"]}).encode()
BODIES = {
    "empty": (b"", 422),
    "half": (VALID[:-3], 400),
    "more": (VALID + b"x", 400),
    "deep": (b'{"user":' + b"[" * 30_000 + b"]" * 30_000 + b"}", 400),
    "deep but few": (b'{"user":' + b"[" * 50 + b"]" * 50 + b"}", 422),
    "wide": (b"[" + b"[]," * 20_000 + b"1]", 422),
    "many fields": (b"{" + b",".join(b'"%d":1' % number for number in range(6000)) + b"}", 422),
    "not UTF-8": (VALID.replace(b"u", b"\xff"), 400),
    "UTF-16": (VALID.decode().encode("utf-16"), 400),
    "half a surrogate pair": (VALID.replace(b'"u"', b'"\\ud800"'), 400),
    "half a surrogate pair in a name": (b'{"\\ud800": 1}', 400),
    "NaN": (VALID.replace(b'"u"', b"NaN"), 400),
    "infinite": (VALID.replace(b'"u"', b"1e999"), 422),
    "a long number": (VALID.replace(b'"u"', b"9" * 5000), 400),
    "null": (b"null", 422),
    "a list": (b"[1]", 422),
    "a byte order mark": (b"\xef\xbb\xbf" + VALID, 400),
}


@pytest.mark.parametrize("name", BODIES)
def test_rejects_malformed_bodies(one: RunningService, name: str) -> None:
    body, expected = BODIES[name]
    status, response = send_raw(one.address, post_request(body))
    assert status == expected
    error = json.loads(response.partition(b"\r\n\r\n")[2])["error"]
    assert set(error) == {"code", "message", "request_id"}
    assert len(error["message"]) < 500


def test_limits_chunked_bodies(one: RunningService) -> None:
    def chunked(body: bytes, size: int) -> bytes:
        parts = [body[start : start + size] for start in range(0, len(body), size)]
        content = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
        return post_request(content, b"Transfer-Encoding: chunked")

    assert send_raw(one.address, chunked(VALID, 7))[0] == 200
    padded = VALID + b" " * (64 * KIB - len(VALID))
    assert send_raw(one.address, chunked(padded, 1000))[0] == 200, "exactly the limit"
    assert send_raw(one.address, chunked(padded + b" ", 1000))[0] == 413
    assert send_raw(one.address, post_request(padded + b" "))[0] == 413
    status, response = send_raw(one.address, post_request(b"{", length=10**9))
    assert status == 413, "before the body is sent"
    assert b"connection: close" in response.lower()
    with socket.create_connection(one.address, timeout=10) as endless, suppress(ConnectionError):
        endless.sendall(post_request(b"", b"Transfer-Encoding: chunked"))
        for _ in range(10**6):
            endless.sendall(b"1000\r\n" + b" " * 4096 + b"\r\n")
        pytest.fail("endless input was accepted")


def test_rejects_malformed_http(one: RunningService) -> None:
    assert send_raw(one.address, b"\x16\x03\x01\x02\x00 hello\r\n\r\n")[0] == 400
    assert send_raw(one.address, post_request(VALID, b"Transfer-Encoding: chunked", b"Content-Length: 5"))[0] == 400
    assert send_raw(one.address, b"GET /%ff%fe/%00 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")[0] == 404
    assert (
        send_raw(one.address, b"GET /v1/users/%ff/history HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")[0]
        == 200
    )
    assert one.rank().status_code == 200


def test_slow_senders_time_out_without_delaying_others(tmp_path: Path) -> None:
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
        start, answered = time.monotonic(), 0
        while time.monotonic() - start < 0.5 or answered < 5:
            assert service.rank().status_code == 200
            answered += 1
        for connection in dripping:
            assert connection.recv(65536).startswith(b"HTTP/1.1 408 ")
            connection.close()
        end.set()
        thread.join()


def test_missing_headers_close_the_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("a2gen_rec.serving.http.connection.HEADER_TIMEOUT_S", 0.2)
    with running(tmp_path) as service:
        for sent in (
            b"",
            b"POST /v1/rank HTTP/1.1\r\nHost:",
            b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /",
        ):
            with socket.create_connection(service.address, timeout=10) as connection:
                connection.sendall(sent)
                response = b""
                with suppress(ConnectionResetError):
                    while part := connection.recv(65536):
                        response += part
                assert response.count(b"HTTP/1.1 200") == sent.count(b"\r\n\r\n")


def test_generated_requests_conform_to_openapi(one: RunningService) -> None:
    """Valid and invalid requests of every route: none causes a server error."""
    openapi = schemathesis.openapi.from_url(f"{one.client.base_url}/openapi.json")
    operations = [operation.ok() for operation in openapi.get_all_operations()]
    assert len(operations) == 10
    for mode, count in ((GenerationMode.POSITIVE, 10), (GenerationMode.NEGATIVE, 20)):
        for operation in operations:
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
            def call(case: schemathesis.Case) -> None:
                case.call_and_validate(checks=CHECKS)

            call()
