"""The documented configurations of nginx and Caddy, with the real servers where they are installed."""

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import expect

from tests.helpers import REPOSITORY
from tests.helpers.browser import PageMonitor, PageRanker, chromium
from tests.helpers.fake_ranker import make_model
from tests.helpers.service import TIMEOUT_S, RunningService, running, wait_until

pytestmark = pytest.mark.processes

PAGE = REPOSITORY / "docs" / "how-to" / "reverse-proxy.md"
KEY = "a-key-of-sixteen-characters"
USERS = ["a b", "a/b", "a//b", "a/../b", "ü%2F", "%", "a?b#c", "..x", "a+b", "a;b=c", "a\\b"]


def documented(language: str) -> str:
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert "127.0.0.1:8000" in block
    return block


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        return int(free.getsockname()[1])


def nginx_command(folder: Path, port: int, upstream: int) -> list[str]:
    location = documented("nginx").replace("127.0.0.1:8000", f"127.0.0.1:{upstream}")
    temporary = [f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")]
    config = folder / "nginx.conf"
    user = "user root;" if os.getuid() == 0 else ""  # otherwise its workers cannot write to the folder
    config.write_text(
        f"{user} daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log; events {{}}\n"
        f"http {{ access_log off; {' '.join(temporary)}\n"
        f"server {{ listen 127.0.0.1:{port};\n{location}}} }}\n"
    )
    return ["nginx", "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(config)]


def caddy_command(folder: Path, port: int, upstream: int) -> list[str]:
    site = documented("caddyfile").replace("127.0.0.1:8000", f"127.0.0.1:{upstream}")
    assert site.startswith("example.com {")
    config = folder / "Caddyfile"
    config.write_text(
        f"{{\n    admin off\n    auto_https off\n    storage file_system {folder}/caddy\n}}\n"
        + site.replace("example.com {", f"http://127.0.0.1:{port} {{", 1)
    )
    return ["caddy", "run", "--config", str(config), "--adapter", "caddyfile"]


@contextmanager
def start_proxy(command: list[str], folder: Path, port: int) -> Iterator[str]:
    """Run a proxy in a folder of its own; it is stopped at the end."""
    log = folder / "output.log"
    with log.open("w") as output:
        environment = {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "PATH": "/usr/sbin:/usr/bin:/bin"}
        started = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder, env=environment)
        try:
            wait_until(lambda: started.poll() is not None or is_open(port))
            assert started.poll() is None, log.read_text()
            yield f"http://127.0.0.1:{port}"
        finally:
            started.terminate()
            started.wait(TIMEOUT_S)


def is_open(port: int) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    folder = tmp_path_factory.mktemp("behind")
    model = make_model(folder / "model", "full")
    with running(folder, [KEY], model=model, load=PageRanker.load, root_path="/ranking") as started:
        yield started


@pytest.fixture(scope="module", params=["nginx", "caddy"])
def origin(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, service: RunningService
) -> Iterator[str]:
    if shutil.which(request.param, path="/usr/sbin:/usr/bin:/bin") is None:
        pytest.skip(f"requires {request.param}")
    folder, port = tmp_path_factory.mktemp(request.param), free_port()
    command = {"nginx": nginx_command, "caddy": caddy_command}[request.param](folder, port, service.address[1])
    with start_proxy(command, folder, port) as address:
        yield address


@pytest.fixture
def client(origin: str) -> Iterator[httpx.Client]:
    with httpx.Client(
        base_url=f"{origin}/ranking/", headers={"Authorization": f"Bearer {KEY}"}, timeout=TIMEOUT_S
    ) as opened:
        yield opened


def test_proxied_requests_keep_users_apart(client: httpx.Client, service: RunningService) -> None:
    for number, user in enumerate(USERS):
        impressions = [{"item": f"v{number}", "ts_ms": 1_700_000_000_000 + number}]
        assert client.post("v1/events", json={"user": user, "impressions": impressions}).status_code == 200
    for number, user in enumerate(USERS):
        path = f"v1/users/{''.join(f'%{byte:02X}' for byte in user.encode())}/history"
        history = client.get(path).json()
        assert (history["user"], [impression["item"] for impression in history["impressions"]]) == (
            user,
            [f"v{number}"],
        )
        assert client.delete(path).json()["num_deleted"] == 1
    assert service.client.get("/v1/users").json()["users"] == []


def test_proxied_methods_and_errors(client: httpx.Client, origin: str) -> None:
    assert client.head("healthz").status_code == client.get("readyz").status_code == 200
    assert client.get("v1/rank").headers["allow"] == "POST"
    assert client.get("v1/model", headers={"Authorization": ""}).status_code == 401
    assert client.get("v1/nothing").json()["error"]["code"] == "not_found"
    ranking = {"user": "u", "candidates": ["v1"]}
    for sender, status in ((origin, 200), ("http://attacker.example", 403), (origin.replace("http", "https"), 200)):
        assert client.post("v1/rank", json=ranking, headers={"Origin": sender}).status_code == status
    redirect = httpx.get(f"{origin}/ranking")
    assert redirect.status_code == 308
    assert httpx.URL(origin).join(redirect.headers["location"]).path == "/ranking/"
    assert client.get("openapi.json").json()["servers"] == [{"url": "/ranking"}]
    large = b" " * (2**20 - 200)  # within --max-body-kb
    content = b'{"user": "u", "candidates": ["v1"]}' + large
    assert client.post("v1/rank", content=content, headers={"Content-Type": "application/json"}).status_code == 200


@pytest.mark.browser
def test_page_works_under_the_prefix(origin: str) -> None:
    monitor = PageMonitor(f"{origin}/")
    with chromium() as browser:
        page = browser.new_page()
        page.set_default_timeout(20_000)
        monitor.watch(page)
        page.goto(f"{origin}/ranking/")
        page.locator("#key").fill(KEY)
        page.keyboard.press("Enter")
        expect(page.locator("#list > li")).to_have_count(10)
    monitor.ignore_status(401)
    assert monitor.errors == []
