"""Methods, headers and paths as monitors, proxies and careless clients send them."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a2gen_rec.config import ServeConfig
from a2gen_rec.errors import ConfigError
from tests.helpers.service import RunningService, post_request, running, send_raw

KEYS = ["first-key-of-the-service", "second-key-of-the-service"]
BODY = json.dumps({"user": "u", "candidates": ["v1"]}).encode()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with running(tmp_path_factory.mktemp("methods")) as service:
        yield service


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with running(tmp_path_factory.mktemp("locked"), KEYS) as service:
        yield service


@pytest.fixture(scope="module")
def prefixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with running(tmp_path_factory.mktemp("prefixed"), KEYS, root_path="/a/rec") as service:
        yield service


def error_of(response: bytes) -> tuple[str, str]:
    error = json.loads(response.partition(b"\r\n\r\n")[2])["error"]
    return error["code"], error["message"]


def header_lines(name: str, *values: str) -> bytes:
    return "".join(f"{name}: {value}\r\n" for value in values).encode()


DUPLICATES = {
    "Host": ("localhost", "localhost"),
    "host": ("localhost", "attacker.example"),
    "Origin": ("http://localhost", "http://attacker.example"),
    "Authorization": (f"Bearer {KEYS[0]}", f"Bearer {KEYS[1]}"),
    "X-Api-Key": (KEYS[0], KEYS[0]),
    "Content-Type": ("application/json", "text/plain"),
    "CONTENT-TYPE": ("text/plain", "application/json"),
    "Content-Encoding": ("identity", "gzip"),
}


@pytest.mark.parametrize("name", DUPLICATES)
@pytest.mark.parametrize("path", ["/v1/rank", "/healthz"])
def test_rejects_duplicate_headers(locked: RunningService, name: str, path: str) -> None:
    headers = {"Host": ("localhost",), "X-Api-Key": (KEYS[0],), "Content-Type": ("application/json",)}
    headers = {key: values for key, values in headers.items() if key.lower() != name.lower()}
    lines = b"".join(header_lines(key, *values) for key, values in (headers | {name: DUPLICATES[name]}).items())
    start = f"POST {path} HTTP/1.1\r\nConnection: close\r\nContent-Length: {len(BODY)}\r\n".encode()
    status, response = send_raw(locked.address, start + lines + b"\r\n" + BODY)
    assert status == 400
    assert error_of(response) == ("invalid_header", f"duplicate header {name.title()}")


def test_rejects_duplicate_content_lengths(one: RunningService) -> None:
    assert send_raw(one.address, post_request(BODY, b"Content-Length: %d" % len(BODY)))[0] == 400


@pytest.mark.parametrize("host", ["user@localhost", "localhost/path", "localhost?x", "localhost:80:80", "localhost:x"])
def test_rejects_invalid_hosts(one: RunningService, locked: RunningService, host: str) -> None:
    request = f"GET /healthz HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
    for service in (one, locked):
        status, response = send_raw(service.address, request)
        assert status in (400, 421)
        assert error_of(response)[0] in ("invalid_header", "unknown_host")
    assert send_raw(locked.address, request)[0] == 400


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
def test_probes_answer_http_1_0_without_host(one: RunningService, path: str) -> None:
    assert send_raw(one.address, f"GET {path} HTTP/1.0\r\n\r\n".encode())[0] == 200
    assert send_raw(one.address, f"HEAD {path} HTTP/1.0\r\n\r\n".encode())[0] == 200
    status, response = send_raw(one.address, f"GET {path} HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
    assert (status, error_of(response)) == (400, ("invalid_header", "missing header Host"))
    assert send_raw(one.address, b"GET /v1/model HTTP/1.0\r\n\r\n")[0] == 400
    assert send_raw(one.address, f"GET {path} HTTP/1.0\r\nHost: attacker.example\r\n\r\n".encode())[0] == 421
    assert send_raw(one.address, f"GET {path} HTTP/1.0\r\nOrigin: http://a.example\r\n\r\n".encode())[0] == 403


@pytest.mark.parametrize(
    "path", ["/healthz", "/readyz", "/metrics", "/v1/model", "/v1/users", "/v1/users/u/history", "/openapi.json", "/"]
)
def test_head_is_get_without_body(one: RunningService, path: str) -> None:
    head, get = one.client.head(path), one.client.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    lengths = {response.headers["content-length"] for response in (head, get)}
    assert len(lengths) == 1 or path == "/metrics"
    raw = f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    assert send_raw(one.address, raw)[1].endswith(b"\r\n\r\n")


def test_head_requires_a_key(locked: RunningService) -> None:
    assert locked.client.head("/v1/model", headers={"Authorization": ""}).status_code == 401
    assert locked.client.head("/v1/model").status_code == 200
    assert locked.client.head("/healthz", headers={"Authorization": ""}).status_code == 200


ALLOWED = {
    "/v1/rank": "POST",
    "/v1/events": "POST",
    "/v1/model/reload": "POST",
    "/v1/model": "GET, HEAD",
    "/v1/users": "GET, HEAD",
    "/v1/users/a%2Fb/history": "GET, DELETE, HEAD",
    "/healthz": "GET, HEAD",
    "/metrics": "GET, HEAD",
    "/openapi.json": "GET, HEAD",
    "/": "GET, HEAD",
}


@pytest.mark.parametrize("path", ALLOWED)
def test_other_methods_get_405_with_allow(one: RunningService, path: str) -> None:
    for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
        if method in ALLOWED[path].split(", "):
            continue
        response = one.client.request(method, path)
        assert response.status_code == 405, method
        assert response.headers["allow"] == ALLOWED[path]
        if method != "HEAD":
            assert response.json()["error"]["code"] == "method_not_allowed"


def test_unknown_paths_get_404(one: RunningService) -> None:
    for path in ("/v1/nothing", "/v1", "/v1/rank/", "/nothing", "/js"):
        for method in ("GET", "HEAD"):
            assert one.client.request(method, path).status_code == 404, path


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "deflate", "br", "zstd", "gzip, gzip", "GZIP", "x" * 99])
def test_rejects_encoded_bodies_by_name(one: RunningService, encoding: str) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    for content in (gzip.compress(BODY), BODY):
        response = one.client.post("/v1/rank", content=content, headers=headers)
        assert response.status_code == 415
        assert response.json()["error"]["code"] == "encoded"
        assert f"unsupported Content-Encoding '{encoding[:32].lower()}'" in response.json()["error"]["message"]
        assert response.headers["accept-encoding"] == "identity"


def test_accepts_the_encodings_identity_and_chunked(one: RunningService) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "Identity"}
    assert one.client.post("/v1/rank", content=BODY, headers=headers).status_code == 200
    assert one.client.get("/v1/model", headers={"Content-Encoding": "gzip"}).status_code == 200, "no body"
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
    assert send_raw(one.address, post_request(chunks, b"Transfer-Encoding: chunked"))[0] == 200
    assert send_raw(one.address, post_request(chunks, b"Transfer-Encoding: gzip, chunked"))[0] == 415


names = st.sampled_from(["Host", "Origin", "Authorization", "X-Api-Key", "Content-Type", "X-Request-Id", "X-Other"])
header_values = st.sampled_from(
    ["localhost", "http://localhost", f"Bearer {KEYS[0]}", KEYS[0], "application/json", "text/plain", ""]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(names, header_values), max_size=6), st.sampled_from(["1.0", "1.1"]))
def test_accepted_requests_are_unambiguous(
    locked: RunningService, headers: list[tuple[str, str]], version: str
) -> None:
    lines = b"".join(header_lines(name, value) for name, value in headers)
    start = f"POST /v1/rank HTTP/{version}\r\nConnection: close\r\nContent-Length: {len(BODY)}\r\n".encode()
    status, _ = send_raw(locked.address, start + lines + b"\r\n" + BODY)
    assert status < 500
    if status == 200:
        sent = dict(headers)
        assert len([name for name, _ in headers if not name.startswith(("X-Request", "X-Other"))]) == len(
            {name for name in sent if not name.startswith(("X-Request", "X-Other"))}
        )
        assert "Host" in sent
        assert sent["Content-Type"] == "application/json"
        assert sent.get("Origin") in (None, f"http://{sent['Host']}", "") or sent["Host"] == ""
        assert KEYS[0] in (sent.get("X-Api-Key"), sent.get("Authorization", "")[7:])


@pytest.mark.parametrize("prefix", ["/a/rec", ""])
def test_root_path_is_removed(prefixed: RunningService, prefix: str) -> None:
    client = prefixed.client
    assert client.get(f"{prefix}/v1/model").status_code == 200
    assert client.get(f"{prefix}/v1/model", headers={"Authorization": ""}).status_code == 401
    assert client.get(f"{prefix}/metrics", headers={"Authorization": ""}).status_code == 401
    assert client.head(f"{prefix}/healthz").status_code == 200
    user = "a%2F%2Fb%2F..%2Fc"
    body = {"user": "a//b/../c", "impressions": [{"item": "v1", "ts_ms": 1}]}
    assert client.post(f"{prefix}/v1/events", json=body).status_code == 200
    ranked = client.post(f"{prefix}/v1/rank", json={"user": "a//b/../c", "candidates": ["v1"]})
    assert ranked.json()["history_length"] == 1
    assert client.delete(f"{prefix}/v1/users/{user}/history").json()["num_deleted"] == 1
    assert client.get(f"{prefix}/v1/rank").headers["allow"] == "POST"
    assert "<title>" in client.get(f"{prefix}/").text
    assert client.get(f"{prefix}/js/api.js").status_code == 200
    assert client.get(f"{prefix}/openapi.json").json()["servers"] == [{"url": "/a/rec"}]


def test_root_path_itself_is_redirected_to_the_page(prefixed: RunningService, one: RunningService) -> None:
    response = prefixed.client.get("/a/rec")
    assert (response.status_code, response.headers["location"]) == (308, "/a/rec/")
    assert prefixed.client.get("/a/rec2/v1/model").status_code == 404
    assert prefixed.client.get("/a/rec/a/rec/v1/model").status_code == 404
    assert prefixed.client.get("/a/rec%2Fv1/model", headers={"Authorization": ""}).status_code == 401
    assert "servers" not in one.client.get("/openapi.json").json()


@pytest.mark.parametrize(
    "path", ["rec", "/", "/rec/", "//rec", "/a//b", "/..", "/a/../b", "/v1", "/v1/a", "/a b", "/é"]
)
def test_rejects_invalid_root_paths(path: str) -> None:
    with pytest.raises(ConfigError, match=r"serve\.root_path .* must be empty or like /ranking"):
        ServeConfig(root_path=path)


def test_accepts_root_paths() -> None:
    for path in ("", "/rec", "/a/b.c/v1", "/v1a", "/.well-known/x"):
        assert ServeConfig(root_path=path).root_path == path


def test_message_of_cross_origin_requests_names_the_cause(locked: RunningService, tmp_path: Path) -> None:
    """The Host that nginx sends by default is that of the upstream, not that of the page."""
    response = locked.client.get("/v1/model", headers={"Origin": "https://rec.example", "Host": "127.0.0.1:8000"})
    assert response.status_code == 403
    assert "a reverse proxy must forward Host unchanged" in response.json()["error"]["message"]
    assert (
        locked.client.get("/v1/model", headers={"Origin": "https://rec.example", "Host": "rec.example"}).status_code
        == 200
    )
