"""Many requests at once: shared batches, refusals, deadlines, another model in between, and the end."""

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


class Gate:
    """Holds a ranker's batches until it is opened."""

    def __init__(self, ranker: Any) -> None:
        self.open, self.begun, self.inner = threading.Event(), threading.Event(), ranker.rank_batch
        ranker.rank_batch = self

    def __call__(self, requests: list[RankQuery]) -> Any:
        self.begun.set()
        assert self.open.wait(TIMEOUT_S)
        return self.inner(requests)


def test_requests_share_batches_and_get_their_own_answers(tmp_path: Path) -> None:
    users = [f"u{number}" for number in range(24)]
    with running(tmp_path, max_batch_candidates=40) as service, ThreadPoolExecutor(30) as threads:
        gate = Gate(service.ranker)
        first = threads.submit(service.rank, "first")
        assert gate.begun.wait(TIMEOUT_S)
        service.ranker.batches.clear()
        asked = {user: ITEMS[: 1 + number % 5] for number, user in enumerate(users)}
        answers = {user: threads.submit(service.rank, user, candidates=items) for user, items in asked.items()}
        wait_until(lambda: service.service.batcher.queued == sum(1 + number % 5 for number in range(24)))
        gate.open.set()
        for user, answer in answers.items():
            found = answer.result(TIMEOUT_S).json()
            assert found["user"] == user
            assert [each["item"] for each in found["candidates"]] == expected_order(user, asked[user])
        assert first.result(TIMEOUT_S).status_code == 200
        batches = service.ranker.batches[1:]
        assert sorted(user for batch in batches for user in batch) == sorted(users)
        assert len(batches) == 2, "69 candidates, at most 40 at a time"


def test_one_request_that_fails_spoils_no_other_of_its_batch(tmp_path: Path) -> None:
    with running(tmp_path) as service, ThreadPoolExecutor(9) as threads:
        gate = Gate(service.ranker)
        first = threads.submit(service.rank, "first")
        assert gate.begun.wait(TIMEOUT_S)
        asked = [
            threads.submit(service.rank, f"u{each}", candidates=["bad"] if each == 3 else ["v"]) for each in range(6)
        ]
        wait_until(lambda: service.service.batcher.queued == 6)
        gate.open.set()
        assert first.result(TIMEOUT_S).status_code == 200
        assert [each.result(TIMEOUT_S).status_code for each in asked] == [200, 200, 200, 500, 200, 200]


def test_a_full_queue_refuses_while_recording_and_probes_go_on(tmp_path: Path) -> None:
    with running(tmp_path, max_queued_candidates=10) as service, ThreadPoolExecutor(9) as threads:
        gate = Gate(service.ranker)
        asked = [threads.submit(service.rank, "first")]
        assert gate.begun.wait(TIMEOUT_S)
        asked += [threads.submit(service.rank, f"u{number}") for number in range(2)]
        wait_until(lambda: service.service.batcher.is_full)
        refused = service.rank("u9")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["error"]["code"] == "overloaded"
        unread = httpx.post(f"{service.client.base_url}/v1/rank", content=b"never read as JSON")
        assert unread.status_code == 503, "before its body is looked at"
        assert service.post("u1", {"item": "v", "ts_ms": 1}).status_code == 200
        assert service.client.get("/healthz").status_code == 200
        assert 'a2gen_errors_total{code="overloaded"} 2.0' in service.client.get("/metrics").text
        gate.open.set()
        assert [each.result(TIMEOUT_S).status_code for each in asked] == [200] * 3
        assert service.rank("u9").status_code == 200


def test_too_many_requests_in_progress_are_refused_but_probes_are_not(tmp_path: Path) -> None:
    with running(tmp_path, max_concurrent_requests=3) as service, ThreadPoolExecutor(9) as threads:
        gate = Gate(service.ranker)
        asked = [threads.submit(service.rank, "first")]
        assert gate.begun.wait(TIMEOUT_S)
        asked += [threads.submit(service.rank, f"u{number}") for number in range(2)]
        wait_until(lambda: service.service.batcher.queued == 10)
        assert service.rank("u9").status_code == 503
        assert service.client.get("/healthz").status_code == 200
        gate.open.set()
        assert [each.result(TIMEOUT_S).status_code for each in asked] == [200] * 3


def test_what_is_too_late_is_told_so_and_not_ranked(tmp_path: Path) -> None:
    with running(tmp_path) as service, ThreadPoolExecutor(9) as threads:
        gate = Gate(service.ranker)
        first = threads.submit(service.rank, "first")
        assert gate.begun.wait(TIMEOUT_S)
        late = service.rank("late", timeout_ms=20)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        gone = {"user": "gone", "candidates": ["v"]}
        with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=httpx.Timeout(TIMEOUT_S, read=0.5)) as impatient:
            impatient.post(f"{service.client.base_url}/v1/rank", json=gone)
        wait_until(lambda: service.service.batcher.queued == 0)
        gate.open.set()
        assert first.result(TIMEOUT_S).status_code == 200
        service.rank("last")
        users = [user for batch in service.ranker.batches for user in batch]
        assert "first" in users
        assert "last" in users
        assert not {"late", "gone"} & set(users)


def test_another_model_takes_over_between_two_batches(tmp_path: Path) -> None:
    versions = [make_model(tmp_path / "models" / name, name) for name in ("one", "two")]
    link = tmp_path / "models" / "now"
    link.symlink_to(versions[0])
    answers: list[httpx.Response] = []
    with running(tmp_path, model=link) as service, ThreadPoolExecutor(8) as threads:
        service.post("u", {"item": "v7", "ts_ms": 1})
        end = threading.Event()

        def ask(number: int) -> None:
            while not end.is_set():
                answers.append(service.rank("u"))

        asking = [threads.submit(ask, number) for number in range(6)]
        wait_until(lambda: len(answers) > 20)
        link.unlink()
        assert service.client.post("/v1/model/reload").status_code == 409, "a broken model"
        link.symlink_to(versions[1])
        told = service.client.post("/v1/model/reload").json()
        assert told == {"version": "two", "previous_version": "one", "swapped": True}
        after = service.rank("u")
        swapped = len(answers)
        wait_until(lambda: len(answers) > swapped + 20)
        end.set()
        for each in asking:
            each.result(TIMEOUT_S)
        assert service.client.post("/v1/model/reload").json()["swapped"] is False
        assert 'a2gen_model{version="two"} 1.0' in service.client.get("/metrics").text
    assert after.json()["model_version"] == "two"
    assert {answer.status_code for answer in answers} == {200}
    seen = []
    for answer in answers:
        body = answer.json()
        made_by = {name for each in body["candidates"] for name in each["probability"]} - {"like"}
        assert made_by == {body["model_version"]}, "one answer, one model"
        assert body["history_length"] == 1, "what is recorded stays"
        seen.append(body["model_version"])
    assert set(seen) == {"one", "two"}


def test_a_broken_model_leaves_the_former_one_in_service_and_says_why(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    with running(tmp_path, model=model) as service:
        (model / "version").unlink()
        answer = service.client.post("/v1/model/reload")
        assert answer.status_code == 409
        error = answer.json()["error"]
        assert error["code"] == "model_rejected"
        assert error["message"] == f"{model}: no exported model found; keeping one"
        assert service.rank().json()["model_version"] == "one"
        assert 'a2gen_reloads_total{outcome="rejected"} 1.0' in service.client.get("/metrics").text


def test_where_a_path_to_a_model_leads(tmp_path: Path) -> None:
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


def test_a_full_store_refuses_events_and_ranking_goes_on(tmp_path: Path) -> None:
    store = fast_store(tmp_path)
    with running(tmp_path, store=store) as service:
        assert service.post("u", {"item": "v", "ts_ms": 1}).status_code == 200
        store._writer.execute("PRAGMA max_page_count = 1")  # as many as there are
        answers = [service.post("u", {"item": "v" * 250, "ts_ms": 2 + number}) for number in range(40)]
        assert answers[-1].status_code == 507
        assert answers[-1].json()["error"] == {
            "code": "store_full",
            "message": "event store is full",
            "request_id": answers[-1].headers["x-request-id"],
        }
        recorded = sum(answer.status_code == 200 for answer in answers)
        assert {answer.status_code for answer in answers} == {200, 507}
        ranked = service.rank("u").json()
        assert (ranked["history_length"], ranked["fallbacks"]) == (1 + recorded, [])


def test_a_store_that_is_down_leaves_rankings_without_history(tmp_path: Path) -> None:
    store = fast_store(tmp_path)
    with running(tmp_path, store=store) as service:
        service.post("u", {"item": "v", "ts_ms": 1})
        store._writer.execute("DROP TABLE users")
        ranked = service.rank("u")
        assert ranked.status_code == 200
        assert ranked.json()["fallbacks"] == ["empty_history", "history_unavailable"]
        told = service.post("u", {"item": "v", "ts_ms": 2})
        assert (told.status_code, told.json()["error"]["code"]) == (503, "store_unavailable")
        assert service.client.get("/v1/users/u/history").status_code == 503


def test_what_is_in_progress_is_answered_before_the_end(tmp_path: Path) -> None:
    with running(tmp_path) as service, ThreadPoolExecutor(9) as threads:
        gate = Gate(service.ranker)
        asked = [threads.submit(service.rank, "first")]
        assert gate.begun.wait(TIMEOUT_S)
        asked += [threads.submit(service.rank, f"u{number}") for number in range(4)]
        wait_until(lambda: service.service.batcher.queued == 20)
        service.service.draining = True
        assert service.client.get("/readyz").status_code == 503
        assert service.client.get("/healthz").status_code == 200
        service.server.should_exit = True
        wait_until(lambda: not service.server.servers[0].is_serving())
        with pytest.raises(httpx.ConnectError), httpx.Client() as late:
            late.get(f"{service.client.base_url}/healthz")
        gate.open.set()
        assert [each.result(TIMEOUT_S).status_code for each in asked] == [200] * 5


def test_half_a_request_does_not_outlast_the_end(tmp_path: Path) -> None:
    import socket

    with running(tmp_path, graceful_timeout_s=1.0) as service:
        connection = socket.create_connection(service.address)
        connection.sendall(post_request(b"{", length=100))
        wait_until(lambda: len(service.server.server_state.tasks) == 1)
        service.server.should_exit = True
        wait_until(lambda: service.service.batcher._closed)
    connection.close()


def test_what_another_process_records_counts(tmp_path: Path) -> None:
    with running(tmp_path) as service:
        service.post("u", {"item": "v1", "ts_ms": 1})
        assert service.rank("u").json()["history_length"] == 1
        other = SqliteStore(str(tmp_path / "events.db"))
        other.put("u", [Impression("v2", 2)]).result(TIMEOUT_S)
        assert service.rank("u").json()["history_length"] == 2
        other.close()
