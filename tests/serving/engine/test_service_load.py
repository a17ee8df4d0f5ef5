"""The service under load: shared batches, rejections, deadlines, model reloads and shutdown."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from a2gen_rec.artifact.model_dir import resolve_model_dir
from a2gen_rec.errors import UserError
from a2gen_rec.ranking.types import Impression, RankQuery
from a2gen_rec.serving.stores.sqlite import SqliteStore
from tests.helpers.fake_ranker import ITEMS, expected_order, make_model
from tests.helpers.service import TIMEOUT_S, fast_store, post_request, running, wait_until

pytestmark = pytest.mark.processes


class Gate:
    """Blocks a ranker's batches until ``open`` is set."""

    def __init__(self, ranker: Any) -> None:
        self.open, self.started, self.inner = threading.Event(), threading.Event(), ranker.rank_batch
        ranker.rank_batch = self

    def __call__(self, requests: list[RankQuery]) -> Any:
        self.started.set()
        assert self.open.wait(TIMEOUT_S)
        return self.inner(requests)


def test_requests_share_batches(tmp_path: Path) -> None:
    users = [f"u{number}" for number in range(24)]
    with running(tmp_path, max_batch_candidates=40) as service, ThreadPoolExecutor(30) as threads:
        gate = Gate(service.ranker)
        first = threads.submit(service.rank, "first")
        assert gate.started.wait(TIMEOUT_S)
        service.ranker.batches.clear()
        candidates = {user: ITEMS[: 1 + number % 5] for number, user in enumerate(users)}
        responses = {user: threads.submit(service.rank, user, candidates=items) for user, items in candidates.items()}
        wait_until(lambda: service.service.batcher.queued == sum(1 + number % 5 for number in range(24)))
        gate.open.set()
        for user, response in responses.items():
            ranking = response.result(TIMEOUT_S).json()
            assert ranking["user"] == user
            assert [candidate["item"] for candidate in ranking["candidates"]] == expected_order(user, candidates[user])
        assert first.result(TIMEOUT_S).status_code == 200
        batches = service.ranker.batches[1:]
        assert sorted(user for batch in batches for user in batch) == sorted(users)
        assert len(batches) == 2, "69 candidates, at most 40 per batch"


def test_failed_request_affects_no_other_of_its_batch(tmp_path: Path) -> None:
    with running(tmp_path) as service, ThreadPoolExecutor(9) as threads:
        gate = Gate(service.ranker)
        first = threads.submit(service.rank, "first")
        assert gate.started.wait(TIMEOUT_S)
        pending = [
            threads.submit(service.rank, f"u{index}", candidates=["bad"] if index == 3 else ["v"]) for index in range(6)
        ]
        wait_until(lambda: service.service.batcher.queued == 6)
        gate.open.set()
        assert first.result(TIMEOUT_S).status_code == 200
        assert [future.result(TIMEOUT_S).status_code for future in pending] == [200, 200, 200, 500, 200, 200]


def test_full_queue_rejects_rankings_only(tmp_path: Path) -> None:
    with running(tmp_path, max_queued_candidates=10) as service, ThreadPoolExecutor(9) as threads:
        gate = Gate(service.ranker)
        pending = [threads.submit(service.rank, "first")]
        assert gate.started.wait(TIMEOUT_S)
        pending += [threads.submit(service.rank, f"u{number}") for number in range(2)]
        wait_until(lambda: service.service.batcher.is_full)
        rejected = service.rank("u9")
        assert (rejected.status_code, rejected.headers["retry-after"]) == (503, "1")
        assert rejected.json()["error"]["code"] == "overloaded"
        unparsed = httpx.post(f"{service.client.base_url}/v1/rank", content=b"never read as JSON")
        assert unparsed.status_code == 503, "before its body is parsed"
        assert service.post("u1", {"item": "v", "ts_ms": 1}).status_code == 200
        assert service.client.get("/healthz").status_code == 200
        assert 'a2gen_errors_total{code="overloaded"} 2.0' in service.client.get("/metrics").text
        gate.open.set()
        assert [future.result(TIMEOUT_S).status_code for future in pending] == [200] * 3
        assert service.rank("u9").status_code == 200


def test_rejects_too_many_concurrent_requests_except_probes(tmp_path: Path) -> None:
    with running(tmp_path, max_concurrent_requests=3) as service, ThreadPoolExecutor(9) as threads:
        gate = Gate(service.ranker)
        pending = [threads.submit(service.rank, "first")]
        assert gate.started.wait(TIMEOUT_S)
        pending += [threads.submit(service.rank, f"u{number}") for number in range(2)]
        wait_until(lambda: service.service.batcher.queued == 10)
        assert service.rank("u9").status_code == 503
        assert service.client.get("/healthz").status_code == 200
        gate.open.set()
        assert [future.result(TIMEOUT_S).status_code for future in pending] == [200] * 3


def test_expired_requests_get_504_and_are_not_ranked(tmp_path: Path) -> None:
    with running(tmp_path) as service, ThreadPoolExecutor(9) as threads:
        gate = Gate(service.ranker)
        first = threads.submit(service.rank, "first")
        assert gate.started.wait(TIMEOUT_S)
        late = service.rank("late", timeout_ms=20)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        abandoned = {"user": "gone", "candidates": ["v"]}
        with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=httpx.Timeout(TIMEOUT_S, read=0.5)) as impatient:
            impatient.post(f"{service.client.base_url}/v1/rank", json=abandoned)
        wait_until(lambda: service.service.batcher.queued == 0)
        gate.open.set()
        assert first.result(TIMEOUT_S).status_code == 200
        service.rank("last")
        users = [user for batch in service.ranker.batches for user in batch]
        assert "first" in users
        assert "last" in users
        assert not {"late", "gone"} & set(users)


def test_reload_swaps_the_model_between_batches(tmp_path: Path) -> None:
    versions = [make_model(tmp_path / "models" / name, name) for name in ("one", "two")]
    link = tmp_path / "models" / "now"
    link.symlink_to(versions[0])
    responses: list[httpx.Response] = []
    with running(tmp_path, model=link) as service, ThreadPoolExecutor(8) as threads:
        service.post("u", {"item": "v7", "ts_ms": 1})
        end = threading.Event()

        def rank_repeatedly(number: int) -> None:
            while not end.is_set():
                responses.append(service.rank("u"))

        clients = [threads.submit(rank_repeatedly, number) for number in range(6)]
        wait_until(lambda: len(responses) > 20)
        link.unlink()
        assert service.client.post("/v1/model/reload").status_code == 409, "the model is missing"
        link.symlink_to(versions[1])
        reloaded = service.client.post("/v1/model/reload").json()
        assert reloaded == {"version": "two", "previous_version": "one", "swapped": True}
        after = service.rank("u")
        swapped = len(responses)
        wait_until(lambda: len(responses) > swapped + 20)
        end.set()
        for future in clients:
            future.result(TIMEOUT_S)
        assert service.client.post("/v1/model/reload").json()["swapped"] is False
        assert 'a2gen_model{version="two"} 1.0' in service.client.get("/metrics").text
    assert after.json()["model_version"] == "two"
    assert {response.status_code for response in responses} == {200}
    model_versions = []
    for response in responses:
        body = response.json()
        models = {name for candidate in body["candidates"] for name in candidate["probability"]} - {"like"}
        assert models == {body["model_version"]}, "one model per response"
        assert body["history_length"] == 1, "recorded impressions are kept"
        model_versions.append(body["model_version"])
    assert set(model_versions) == {"one", "two"}


def test_failed_reload_keeps_the_model(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    with running(tmp_path, model=model) as service:
        (model / "version").unlink()
        response = service.client.post("/v1/model/reload")
        assert response.status_code == 409
        error = response.json()["error"]
        assert error["code"] == "model_rejected"
        assert error["message"] == f"{model}: no exported model found; keeping one"
        assert service.rank().json()["model_version"] == "one"
        assert 'a2gen_reloads_total{outcome="rejected"} 1.0' in service.client.get("/metrics").text


def test_resolve_model_dir(tmp_path: Path) -> None:
    first = make_model(tmp_path / "first")
    assert resolve_model_dir(str(first)) == str(first)
    (tmp_path / "link").symlink_to(first)
    assert resolve_model_dir(str(tmp_path / "link")) == str(first)
    (tmp_path / "CURRENT").write_text("first\n")
    assert resolve_model_dir(str(tmp_path)) == str(first)
    for wrong in ("", "..", "a/b"):
        (tmp_path / "CURRENT").write_text(wrong)
        with pytest.raises(UserError, match="CURRENT: must contain the name"):
            resolve_model_dir(str(tmp_path))


def test_full_store_rejects_events_only(tmp_path: Path) -> None:
    store = fast_store(tmp_path)
    with running(tmp_path, store=store) as service:
        assert service.post("u", {"item": "v", "ts_ms": 1}).status_code == 200
        store._writer.execute("PRAGMA max_page_count = 1")  # the current size
        responses = [service.post("u", {"item": "v" * 250, "ts_ms": 2 + number}) for number in range(40)]
        assert responses[-1].status_code == 507
        assert responses[-1].json()["error"] == {
            "code": "store_full",
            "message": "event store is full",
            "request_id": responses[-1].headers["x-request-id"],
        }
        recorded = sum(response.status_code == 200 for response in responses)
        assert {response.status_code for response in responses} == {200, 507}
        ranked = service.rank("u").json()
        assert (ranked["history_length"], ranked["fallbacks"]) == (1 + recorded, [])


def test_rankings_work_without_the_store(tmp_path: Path) -> None:
    store = fast_store(tmp_path)
    with running(tmp_path, store=store) as service:
        service.post("u", {"item": "v", "ts_ms": 1})
        store._writer.execute("DROP TABLE users")
        ranked = service.rank("u")
        assert ranked.status_code == 200
        assert ranked.json()["fallbacks"] == ["empty_history", "history_unavailable"]
        response = service.post("u", {"item": "v", "ts_ms": 2})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "store_unavailable")
        assert service.client.get("/v1/users/u/history").status_code == 503


def test_shutdown_completes_requests_in_progress(tmp_path: Path) -> None:
    with running(tmp_path) as service, ThreadPoolExecutor(9) as threads:
        gate = Gate(service.ranker)
        pending = [threads.submit(service.rank, "first")]
        assert gate.started.wait(TIMEOUT_S)
        pending += [threads.submit(service.rank, f"u{number}") for number in range(4)]
        wait_until(lambda: service.service.batcher.queued == 20)
        service.service.draining = True
        assert service.client.get("/readyz").status_code == 503
        assert service.client.get("/healthz").status_code == 200
        service.server.should_exit = True
        wait_until(lambda: not service.server.servers[0].is_serving())
        with pytest.raises(httpx.ConnectError), httpx.Client() as late:
            late.get(f"{service.client.base_url}/healthz")
        gate.open.set()
        assert [future.result(TIMEOUT_S).status_code for future in pending] == [200] * 5


def test_shutdown_drops_incomplete_requests(tmp_path: Path) -> None:
    import socket

    with running(tmp_path, graceful_timeout_s=1.0) as service:
        connection = socket.create_connection(service.address)
        connection.sendall(post_request(b"{", length=100))
        wait_until(lambda: len(service.server.server_state.tasks) == 1)
        service.server.should_exit = True
        wait_until(lambda: service.service.batcher._closed)
    connection.close()


def test_impressions_of_another_process_count(tmp_path: Path) -> None:
    with running(tmp_path) as service:
        service.post("u", {"item": "v1", "ts_ms": 1})
        assert service.rank("u").json()["history_length"] == 1
        other = SqliteStore(str(tmp_path / "events.db"))
        other.put("u", [Impression("v2", 2)]).result(TIMEOUT_S)
        assert service.rank("u").json()["history_length"] == 2
        other.close()
