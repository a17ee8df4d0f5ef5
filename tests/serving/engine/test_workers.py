"""A model that ranks in processes of its own: the same answers, and what happens when one of them ends."""

import os
import platform
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from a2gen_rec.config import ServeConfig
from a2gen_rec.errors import UserError
from a2gen_rec.ranking.ranker import Ranker
from a2gen_rec.ranking.types import Impression, RankQuery
from a2gen_rec.runs.export import export_run
from a2gen_rec.serving.engine.inference import RANKING_NICENESS, RankJob, lower_thread_priority
from a2gen_rec.serving.engine.workers import WorkerDied, WorkerPool
from a2gen_rec.serving.stores.sqlite import SqliteStore
from a2gen_rec.utils.malloc import disable_tcache_in_children
from tests.helpers.logs import simulated_log
from tests.helpers.service import ITEMS, PATIENT_S, FakeRanker, Running, make_model, order, process, running, until


def pids(service: Running) -> list[int]:
    workers = service.service._model.backend
    assert isinstance(workers, WorkerPool)
    return [worker._process.pid for worker in workers._workers]


def kill_all(service: Running) -> None:
    """And wait until nothing of them is left: a process of many threads is a zombie before its files are closed."""
    workers = service.service._model.backend
    assert isinstance(workers, WorkerPool)
    for worker in workers._workers:
        worker._process.kill()
        worker._process.join()


def is_alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_real_model_answers_as_it_does_in_one_process(tmp_path: Path) -> None:
    log = simulated_log(tmp_path)
    export_run(log.run, str(tmp_path / "export"), "fp32")
    ranker = Ranker.load(str(tmp_path / "export"))
    items, asked = ranker.sample_items(30), sorted(log.impressions)[:3]
    store = SqliteStore(str(tmp_path / "events.db"))
    for user in asked:
        store.put(user, log.impressions[user]).result(PATIENT_S)
    with running(tmp_path, model=tmp_path / "export", load=Ranker.load, store=store, workers=2) as service:
        assert len(set(pids(service)) | {os.getpid()}) == 3
        with ThreadPoolExecutor(6) as threads:
            now = {user: log.impressions[user][-1].ts_ms + 10**6 for user in asked}
            answers = {
                user: [threads.submit(service.rank, user, candidates=items, now_ms=now[user]) for _ in range(4)]
                for user in asked
            }
        for user, same in answers.items():
            expected = ranker.rank(RankQuery(user, items, now[user], log.impressions[user]))
            for answer in same:
                found = answer.result().json()["candidates"]
                assert [each["item"] for each in found] == [each.item for each in expected.candidates]
                for each, own in zip(found, expected.candidates, strict=True):
                    assert each["probability"] == pytest.approx(own.probability, abs=1e-5)
        counts = service.service._model.backend.cache_counts()
        assert counts["history_cache_hits"] + counts["history_cache_misses"] == 12
        assert counts["history_cache_bytes"] > 0
        bad = service.rank("u1", candidates=items, context={"no such": 1})
        assert bad.status_code == 422
        assert "no such" in bad.json()["error"]["message"]
    assert not any(map(is_alive, pids(service)))


def test_an_event_counts_in_the_next_ranking_and_a_forgotten_one_in_none(tmp_path: Path) -> None:
    with running(tmp_path, workers=2) as service:
        for place in range(6):
            assert service.post("u1", {"item": f"v{place}", "ts_ms": 1000 + place}).status_code == 200
            with ThreadPoolExecutor(4) as threads:
                found = list(threads.map(lambda _: service.rank("u1").json(), range(4)))
            assert {each["history"] for each in found} == {place + 1}
        assert service.client.delete("/v1/users/u1/history").json() == {"forgotten": 6}
        assert service.rank("u1").json()["history"] == 0
        assert service.service._model.backend.cache_counts()["history_cache_bytes"] == 0


class Sleepy(FakeRanker):
    @classmethod
    def load(cls, folder: str, cache_bytes: int = 0) -> "FakeRanker":
        return cls("one", nap_s=2.0)


def test_a_worker_that_ends_is_replaced_and_the_rest_go_on(tmp_path: Path) -> None:
    with running(tmp_path, workers=2, load=Sleepy.load, max_queue_ms=1e6) as service:
        killed, other = pids(service)
        with ThreadPoolExecutor(2) as threads:
            both = [threads.submit(service.rank, "u1", candidates=["slow", "v1"]) for _ in range(2)]
            until(lambda: service.service.batcher._running == 4)
            os.kill(killed, signal.SIGKILL)
            statuses = sorted(each.result(PATIENT_S).status_code for each in both)
        assert statuses == [200, 503]
        refused = next(each.result() for each in both if each.result().status_code == 503)
        assert refused.json()["error"]["code"] == "worker_lost"
        assert refused.headers["Retry-After"]
        assert service.rank().status_code == 200, "by the other one, at the least"
        until(lambda: killed not in pids(service) and len(service.service._model.backend._idle._free) == 2)
        assert other in pids(service)
        with ThreadPoolExecutor(4) as threads:
            answers = list(threads.map(lambda _: service.rank(), range(8)))
        assert [answer.status_code for answer in answers] == [200] * 8


def test_users_go_to_the_worker_that_knows_them_if_it_is_free(tmp_path: Path) -> None:
    with running(tmp_path, workers=2) as service:
        users = [f"u{number}" for number in range(12)]
        for user in users:
            service.post(user, {"item": "v1", "ts_ms": 1000})
        for _ in range(3):
            for user in users:
                assert service.rank(user).status_code == 200
        workers = service.service._model.backend
        assert isinstance(workers, WorkerPool)
        assert workers.cache_counts()["history_cache_misses"] == len(users), "each was read by one worker"
        assert workers.cache_counts()["history_cache_hits"] == 2 * len(users)
        assert all(worker.cache_counts["history_cache_misses"] for worker in workers._workers), "both have users"
        idle = workers._idle
        one, other = (idle.take(number) for number in (1, 1))
        assert (one.index, other.index) == (1, 0), "another, where that one is not free"
        idle.put(one), idle.put(other)


@pytest.mark.skipif(sys.platform != "linux", reason="cores are told to the kernel of Linux alone")
def test_workers_keep_to_cores_where_they_have_them_all_and_no_others(tmp_path: Path) -> None:
    all_cores = os.sched_getaffinity(0)
    if len(all_cores) < 2:
        pytest.skip("there is one core")
    cores = sorted(all_cores)[:2]
    try:
        os.sched_setaffinity(0, cores)
        for workers, expected in ((2, [cores[:1], cores[1:]]), (3, [cores] * 3)):
            with running(tmp_path, workers=workers) as service:
                assert [sorted(os.sched_getaffinity(pid)) for pid in pids(service)] == expected
            assert os.sched_getaffinity(0) == set(cores)
    finally:
        os.sched_setaffinity(0, all_cores)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_heaps_of_workers_have_no_caches_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    off = "glibc.malloc.tcache_count=0"
    for said, told in (("", off), ("glibc.malloc.perturb=3", f"glibc.malloc.perturb=3:{off}"), (f"{off}1", f"{off}1")):
        monkeypatch.setenv("GLIBC_TUNABLES", said)
        disable_tcache_in_children()
        disable_tcache_in_children()
        assert os.environ["GLIBC_TUNABLES"] == told
    monkeypatch.delenv("GLIBC_TUNABLES")
    with running(tmp_path, workers=2) as service:
        for pid in pids(service):
            assert f"GLIBC_TUNABLES={off}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def test_who_dies_idle_costs_nothing(tmp_path: Path) -> None:
    with running(tmp_path, workers=2) as service:
        kill_all(service)
        ask = service.client.get
        assert service.rank().status_code == 200, "by a process in its place: the request had not been begun"
        until(lambda: service.service._model.backend._idle._free)
        assert ask("/readyz").status_code == 200
        assert ask("/metrics").status_code == 200


def test_without_any_worker_it_is_not_ready_but_still_there(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    with running(tmp_path, workers=1, model=model) as one:
        assert one.service.is_ready
    with running(tmp_path, workers=2, model=model) as service:
        make_model(model, "another")  # where the one in service was: no replacement for it
        kill_all(service)
        assert service.rank(timeout_ms=500).status_code == 504, "found out by the first one"
        assert service.client.get("/readyz").status_code == 503
        refused = service.rank()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "worker_lost")
        figures = service.client.get("/metrics").text
        assert "a2gen_state_cache_hits" in figures
        assert "a2gen_workers 0.0" in figures
        assert service.client.delete("/v1/users/u1/history").status_code == 200
        make_model(model, "one")
        until(lambda: service.client.get("/readyz").status_code == 200)
        until(lambda: service.rank().status_code == 200)


def test_one_that_hangs_holds_up_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("a2gen_rec.serving.engine.workers.SHUTDOWN_TIMEOUT_S", 0.5)
    store, folder = str(tmp_path / "events.db"), str(make_model(tmp_path / "model"))
    workers = WorkerPool(FakeRanker.load, folder, "one", ServeConfig(num_workers=2, event_store=store))
    hung = [worker._process for worker in workers._workers]
    os.kill(hung[0].pid, signal.SIGSTOP)
    job = RankJob(RankQuery("u1", ITEMS[:3]), use_stored_history=False)
    with ThreadPoolExecutor(2) as threads:
        both = [threads.submit(workers.rank, [job]) for _ in range(2)]
        until(lambda: any(each.done() for each in both) and workers._workers[0]._lock.locked())
        workers.close()
        assert not any(process.is_alive() for process in hung)
        assert sum(each.exception() is None for each in both) == 1
    with pytest.raises(WorkerDied):
        workers.rank([job])


def test_another_model_drops_no_request(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    with running(tmp_path, model=model, workers=2) as service:
        former, over = pids(service), threading.Event()
        versions: list[tuple[int, str]] = []

        def ask() -> None:
            while not over.is_set():
                answer = service.rank(k=3)
                versions.append((answer.status_code, answer.json().get("model_version", answer.text)))

        with ThreadPoolExecutor(4) as threads:
            asking = [threads.submit(ask) for _ in range(4)]
            for version in ("two", "three"):
                make_model(model, version)
                told = service.client.post("/v1/model/reload").json()
                assert (told["version"], told["swapped"]) == (version, True)
                until(lambda version=version: versions[-1] == (200, version))
            over.set()
            for each in asking:
                each.result(PATIENT_S)
        assert {status for status, _ in versions} == {200}
        assert not any(map(is_alive, former))
        now = pids(service)
        (model / "version").unlink()
        assert service.client.post("/v1/model/reload").status_code == 409
        assert pids(service) == now, "the former model stays"
        assert service.rank().json()["model_version"] == "three"


def test_ranking_goes_after_the_event_loop() -> None:
    if sys.platform != "linux":
        pytest.skip("only there a thread has a niceness of its own")
    with ThreadPoolExecutor(1) as thread:
        thread.submit(lower_thread_priority).result()
        assert thread.submit(os.nice, 0).result() == os.nice(0) + RANKING_NICENESS


class Deadly(FakeRanker):
    """Ends the process that loads it."""

    @classmethod
    def load(cls, folder: str, cache_bytes: int = 0) -> "FakeRanker":
        os._exit(3)


@pytest.mark.parametrize(("load", "told"), [(FakeRanker.load, "no exported model"), (Deadly.load, "exit status 3")])
def test_what_keeps_a_worker_from_loading_is_told(load: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        WorkerPool(
            load, str(tmp_path / "nothing"), "one", ServeConfig(num_workers=2, event_store=str(tmp_path / "events.db"))
        )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_service(number: int, tmp_path: Path) -> None:
    arguments = [
        "--model",
        str(make_model(tmp_path / "model")),
        "--event-store",
        str(tmp_path / "events.db"),
        "--port",
        "0",
    ]
    with process(*arguments, "--workers", "2") as (service, address):
        children = subprocess.run(["pgrep", "-P", str(service.pid)], capture_output=True, text=True, check=True)
        workers = [int(pid) for pid in children.stdout.split()]
        assert len(workers) >= 2
        answer = httpx.post(f"{address}/v1/rank", json={"user": "u1", "candidates": ITEMS[:5]}, timeout=PATIENT_S)
        assert [each["item"] for each in answer.json()["candidates"]] == order("u1", ITEMS[:5])
        for pid in workers:  # a terminal's Ctrl-C is for all; what ranks leaves it to the service
            if number != signal.SIGKILL:
                os.kill(pid, number)
        time.sleep(0.2)
        assert all(map(is_alive, workers))
        service.send_signal(number)
        service.wait(PATIENT_S)
        until(lambda: not any(map(is_alive, workers)))


def test_impressions_are_found_by_whoever_ranks(tmp_path: Path) -> None:
    """What one process has recorded, another reads: a past that is there before the service is."""
    store = SqliteStore(str(tmp_path / "events.db"))
    store.put("u1", [Impression("v3", 5), Impression("v4", 6)]).result(PATIENT_S)
    with running(tmp_path, store=store, workers=2) as service:
        assert service.rank("u1").json()["history"] == 2
