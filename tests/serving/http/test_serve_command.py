"""`a2gen serve` as a process: output, signals, errors and durability."""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from a2gen_rec.cli.main import main
from a2gen_rec.config import ServeConfig
from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.serving.engine.history_cache import SESSION_MARGIN
from a2gen_rec.serving.http.server import bind_socket, read_keys, serve
from tests.helpers.fake_ranker import make_model
from tests.helpers.random_card import make_card
from tests.helpers.service import TIMEOUT_S, serve_process

pytestmark = pytest.mark.processes


@pytest.fixture(autouse=True)
def restore_process_state() -> Iterator[None]:
    """Restore the loggers and the signal handler that the command changes."""
    handler = signal.getsignal(signal.SIGHUP)
    loggers = [logging.getLogger(name) for name in ("a2gen_rec.serving", "uvicorn.error")]
    before = [(logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
    signal.signal(signal.SIGHUP, handler)


def test_acknowledged_events_survive_sigkill(tmp_path: Path) -> None:
    """Eight clients post continuously while the process is killed; then it is restarted."""
    arguments = ["--model", str(make_model(tmp_path / "model")), "--event-store", str(tmp_path / "e.db"), "--port", "0"]
    acknowledged: list[tuple[str, int]] = []
    with serve_process(*arguments) as (server, address), ThreadPoolExecutor(8) as threads:
        killed = threading.Event()

        def post_events(user: str) -> None:
            with httpx.Client(base_url=address, timeout=TIMEOUT_S) as client:
                for number in range(10**6):
                    body = {"user": user, "impressions": [{"item": f"v{number}", "ts_ms": number}]}
                    try:
                        response = client.post("/v1/events", json=body)
                    except httpx.TransportError:
                        assert killed.is_set()
                        return
                    assert response.status_code == 200
                    acknowledged.append((user, number))

        clients = [threads.submit(post_events, f"u{number}") for number in range(8)]
        while len(acknowledged) < 100:
            time.sleep(0.01)
        killed.set()
        server.kill()
        for future in clients:
            future.result(TIMEOUT_S)
    assert len({user for user, _ in acknowledged}) == 8
    with serve_process(*arguments) as (_, address), httpx.Client(base_url=address, timeout=TIMEOUT_S) as client:
        for user in {user for user, _ in acknowledged}:
            impressions = client.get(f"/v1/users/{user}/history", params={"last": 1000}).json()["impressions"]
            recorded = {impression["ts_ms"] for impression in impressions}
            assert {number for name, number in acknowledged if name == user} <= recorded
            ranked = client.post("/v1/rank", json={"user": user, "candidates": ["v1"]}).json()
            assert ranked["history_length"] == min(len(recorded), make_card().max_history + SESSION_MARGIN)


def test_signals(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    keys = tmp_path / "keys"
    keys.write_text("# ours\nsixteen-letters-or-more\n")
    arguments = [
        "--model",
        str(model),
        "--event-store",
        str(tmp_path / "e.db"),
        "--port",
        "0",
        "--api-key-file",
        str(keys),
    ]
    with serve_process(*arguments, "--host", "0.0.0.0", "--pre-stop-delay-s", "0.5") as (server, address):
        client = httpx.Client(base_url=address, headers={"X-Api-Key": "sixteen-letters-or-more"}, timeout=TIMEOUT_S)

        def version() -> str:
            return str(client.get("/v1/model").json()["version"])

        assert version() == "one"
        (model / "version").write_text("two")
        keys.write_text("another-key-of-sixteen-letters\n")
        server.send_signal(signal.SIGHUP)
        while client.get("/v1/model").status_code != 401:
            time.sleep(0.02)
        client.headers["X-Api-Key"] = "another-key-of-sixteen-letters"
        while version() != "two":
            time.sleep(0.02)
        (model / "version").unlink()
        keys.write_text("secret")
        server.send_signal(signal.SIGHUP)
        slow = {"user": "u", "candidates": ["slow"], "timeout_ms": 1000 * TIMEOUT_S}
        assert client.post("/v1/rank", json=slow).json()["model_version"] == "two"
        server.send_signal(signal.SIGTERM)
        while client.get("/readyz").status_code == 200:
            time.sleep(0.02)
        assert client.post("/v1/rank", json=slow).status_code == 200, "requests are accepted during the pre-stop delay"
        client.close()
        assert server.wait(TIMEOUT_S) == 0
        assert server.stderr is not None
        log = server.stderr.read()
        assert "model two loaded, replacing one" in log
        assert re.search(r"ERROR model reload failed, keeping two: \S+/model: no exported model found", log)
        assert re.search(r"ERROR keeping previous API keys: \S+/keys: API keys must have at least 16", log)
        assert not [key for key in ("secret", "another-key", "sixteen-letters-or-more") if key in log]
        assert re.search(r"INFO POST /v1/rank 200 \d+\.\d ms [0-9a-f]{32}", log)
        assert "Traceback" not in log


def test_sighup_while_loading_is_ignored(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    os.mkfifo(model / "version")

    def send_sighup(started: subprocess.Popen[str]) -> None:
        pipe = None
        while pipe is None:
            assert started.poll() is None
            with suppress(OSError):  # the model is not being read yet
                pipe = os.open(model / "version", os.O_WRONLY | os.O_NONBLOCK)
            time.sleep(0.02)
        started.send_signal(signal.SIGHUP)
        os.write(pipe, b"one")
        os.close(pipe)

    arguments = ["--model", str(model), "--event-store", str(tmp_path / "e.db"), "--port", "0"]
    with serve_process(*arguments, on_start=send_sighup) as (_, address):
        assert httpx.get(f"{address}/v1/model").json()["version"] == "one"


def test_startup_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, store = str(make_model(tmp_path / "model")), str(tmp_path / "e.db")

    def error_of(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as exit_info:
            main(["serve", "--event-store", store, *arguments])
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        return int(exit_info.value.code or 0), error

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert error_of("--model", model, "--port", port) == (
            1,
            f"a2gen: error: cannot listen on 127.0.0.1 port {port} (Address already in use)\n",
        )
    code, error = error_of("--model", model, "--host", "0.0.0.0", "--port", "0")
    assert (code, error) == (
        2,
        "a2gen: error: binding to 0.0.0.0 requires --api-key-file\n",
    )
    missing, other = str(tmp_path / "none"), str(tmp_path)
    assert f"{missing}: directory not found" in error_of("--model", missing, "--port", "0")[1]
    assert f"{other}: no exported model found" in error_of("--model", other, "--port", "0")[1]
    assert not os.path.exists(store), "no store was created"
    assert (
        "serve.max_batch_candidates 0 must be positive" in error_of("--model", model, "--max-batch-candidates", "0")[1]
    )
    assert "serve.port 70000" in error_of("--model", model, "--port", "70000")[1]
    assert "cannot listen on nowhere.invalid" in error_of("--model", model, "--host", "nowhere.invalid")[1]


def test_read_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("\n# comment\n0123456789abcdef\n  fedcba9876543210  \n")
    assert read_keys(str(file)) == ["0123456789abcdef", "fedcba9876543210"]
    for content, message in (("\n# 0123456789abcdef", "no API key"), ("short", "at least 16"), ("ü" * 16, "ASCII")):
        file.write_text(content)
        with pytest.raises(UserError, match=message) as error:
            read_keys(str(file))
        assert content.strip() not in str(error.value) or not content.strip()
    with pytest.raises(UserError, match="cannot be read"):
        read_keys(str(tmp_path / "none"))


def test_binding_to_all_interfaces_requires_keys() -> None:
    with bind_socket("localhost", 0) as local:
        assert local.getsockname()[0] in ("127.0.0.1", "::1")
    with pytest.raises(ConfigError, match="api-key-file"):
        serve("model", ServeConfig(host="::", port=0), lambda _: None)


def test_help_imports_neither_torch_nor_the_web_framework() -> None:
    program = "import sys, a2gen_rec.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "fastapi", "uvicorn", "pydantic", "sqlite3"} & set(loaded)
