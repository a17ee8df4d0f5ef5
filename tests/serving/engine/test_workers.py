"""Ranking in worker processes: same results as in one process, and recovery from worker failures."""

import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from a2gen_rec.config import ServeConfig
from a2gen_rec.errors import UserError
from a2gen_rec.ranking.types import Impression, RankQuery
from a2gen_rec.serving.engine.inference import RANKING_NICENESS, RankJob, load_ranker, lower_thread_priority
from a2gen_rec.serving.engine.workers import WorkerDied, WorkerPool
from a2gen_rec.serving.stores.sqlite import SqliteStore
from a2gen_rec.utils.malloc import disable_tcache_in_children
from tests.helpers.fake_ranker import ITEMS, CrashingRanker, FakeRanker, SlowRanker, expected_order, make_model
from tests.helpers.service import TIMEOUT_S, RunningService, running, serve_process, wait_until

pytestmark = pytest.mark.processes

TCACHE_OFF = "glibc.malloc.tcache_count=0"


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A service with two workers, for tests that kill none."""
    with running(tmp_path_factory.mktemp("workers"), num_workers=2) as service:
        yield service


def pool(service: RunningService) -> WorkerPool:
    backend = service.service._model.backend
    assert isinstance(backend, WorkerPool)
    return backend


def pids(service: RunningService) -> list[int]:
    return [worker._process.pid for worker in pool(service)._workers]  # type: ignore[misc]


def kill_all(service: RunningService) -> None:
    """Kill the workers and reap them: a multi-threaded process is a zombie before its files are closed."""
    for worker in pool(service)._workers:
        worker._process.kill()
        worker._process.join()


def is_alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_exported_model_ranks_as_in_one_process(tmp_path: Path) -> None:
    from a2gen_rec.ranking.ranker import Ranker
    from a2gen_rec.runs.export import export_run
    from tests.helpers.logs import simulated_log

    log = simulated_log(tmp_path)
    export_run(log.run, str(tmp_path / "export"), "fp32")
    ranker = Ranker.load(str(tmp_path / "export"))
    items, users = ranker.sample_items(30), sorted(log.impressions)[:3]
    store = SqliteStore(str(tmp_path / "events.db"))
    for user in users:
        store.put(user, log.impressions[user]).result(TIMEOUT_S)
    with running(tmp_path, model=tmp_path / "export", load=load_ranker, store=store, num_workers=2) as service:
        assert len(set(pids(service)) | {os.getpid()}) == 3
        with ThreadPoolExecutor(6) as threads:
            now = {user: log.impressions[user][-1].ts_ms + 10**6 for user in users}
            responses = {
                user: [threads.submit(service.rank, user, candidates=items, now_ms=now[user]) for _ in range(4)]
                for user in users
            }
        for user, repeated in responses.items():
            expected = ranker.rank(RankQuery(user, items, now[user], log.impressions[user]))
            for response in repeated:
                assert response.result().status_code == 200, response.result().text
                candidates = response.result().json()["candidates"]
                assert [candidate["item"] for candidate in candidates] == [
                    candidate.item for candidate in expected.candidates
                ]
                for candidate, reference in zip(candidates, expected.candidates, strict=True):
                    assert candidate["probability"] == pytest.approx(reference.probability, abs=1e-5)
        counts = pool(service).cache_counts()
        assert counts["history_cache_hits"] + counts["history_cache_misses"] == 12
        assert counts["history_cache_bytes"] > 0
        bad = service.rank("u1", candidates=items, context={"no such": 1})
        assert bad.status_code == 422
        assert "no such" in bad.json()["error"]["message"]
    assert not any(map(is_alive, pids(service)))


def test_events_and_deletions_take_effect_in_all_workers(two_workers: RunningService) -> None:
    service = two_workers
    before = pool(service).cache_counts()["history_cache_bytes"]
    for index in range(6):
        assert service.post("u1", {"item": f"v{index}", "ts_ms": 1000 + index}).status_code == 200
        with ThreadPoolExecutor(4) as threads:
            rankings = list(threads.map(lambda _: service.rank("u1").json(), range(4)))
        assert {ranking["history_length"] for ranking in rankings} == {index + 1}
    assert service.client.delete("/v1/users/u1/history").json() == {"num_deleted": 6, "overwritten": True}
    assert service.rank("u1").json()["history_length"] == 0
    assert pool(service).cache_counts()["history_cache_bytes"] == before


def test_users_are_routed_to_the_worker_with_their_history(two_workers: RunningService) -> None:
    service = two_workers
    users = [f"routed{number}" for number in range(12)]
    before = pool(service).cache_counts()
    misses_before = [worker.cache_counts["history_cache_misses"] for worker in pool(service)._workers]
    for user in users:
        service.post(user, {"item": "v1", "ts_ms": 1000})
    for _ in range(3):
        for user in users:
            assert service.rank(user).status_code == 200
    counts = pool(service).cache_counts()
    misses = [worker.cache_counts["history_cache_misses"] for worker in pool(service)._workers]
    assert counts["history_cache_misses"] - before["history_cache_misses"] == len(users), "one worker read each history"
    assert counts["history_cache_hits"] - before["history_cache_hits"] == 2 * len(users)
    assert all(after > earlier for after, earlier in zip(misses, misses_before, strict=True)), "both have users"
    idle = pool(service)._idle
    one, other = (idle.take(preferred) for preferred in (1, 1))
    assert one is not None
    assert other is not None
    assert (one.index, other.index) == (1, 0), "another worker, if the preferred one is busy"
    idle.put(one), idle.put(other)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="specific to glibc")
def test_workers_run_without_tcache(two_workers: RunningService) -> None:
    for pid in pids(two_workers):
        assert f"GLIBC_TUNABLES={TCACHE_OFF}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def test_impressions_stored_by_another_process_count(two_workers: RunningService) -> None:
    store = SqliteStore(two_workers.service.config.event_store)
    store.put("stored", [Impression("v3", 5), Impression("v4", 6)]).result(TIMEOUT_S)
    assert two_workers.rank("stored").json()["history_length"] == 2
    store.close()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="specific to glibc")
def test_tcache_is_disabled_once_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (
        ("", TCACHE_OFF),
        ("glibc.malloc.perturb=3", f"glibc.malloc.perturb=3:{TCACHE_OFF}"),
        (f"{TCACHE_OFF}1", f"{TCACHE_OFF}1"),
    ):
        monkeypatch.setenv("GLIBC_TUNABLES", value)
        disable_tcache_in_children()
        disable_tcache_in_children()
        assert os.environ["GLIBC_TUNABLES"] == expected


def test_killed_worker_is_restarted_while_the_other_ranks(tmp_path: Path) -> None:
    with running(tmp_path, num_workers=2, load=SlowRanker.load) as service:
        killed, other = pids(service)
        with ThreadPoolExecutor(2) as threads:
            both = [threads.submit(service.rank, "u1", candidates=["slow", "v1"]) for _ in range(2)]
            wait_until(lambda: service.service.batcher._running == 4)
            os.kill(killed, signal.SIGKILL)
            statuses = sorted(future.result(TIMEOUT_S).status_code for future in both)
        assert statuses == [200, 503]
        failed = next(future.result() for future in both if future.result().status_code == 503)
        assert failed.json()["error"]["code"] == "worker_died"
        assert failed.headers["Retry-After"]
        assert service.rank().status_code == 200, "at least the other worker ranks"
        wait_until(lambda: killed not in pids(service) and len(pool(service)._idle._free) == 2)
        assert other in pids(service)
        with ThreadPoolExecutor(4) as threads:
            responses = list(threads.map(lambda _: service.rank(), range(8)))
        assert [response.status_code for response in responses] == [200] * 8


@pytest.mark.skipif(sys.platform != "linux", reason="cores are pinned on Linux only")
def test_workers_are_pinned_if_there_is_one_per_core(tmp_path: Path) -> None:
    all_cores = os.sched_getaffinity(0)
    if len(all_cores) < 2:
        pytest.skip("needs two cores")
    cores = sorted(all_cores)[:2]
    try:
        os.sched_setaffinity(0, cores)
        for num_workers, expected in ((2, [cores[:1], cores[1:]]), (3, [cores] * 3)):
            with running(tmp_path, num_workers=num_workers) as service:
                assert [sorted(os.sched_getaffinity(pid)) for pid in pids(service)] == expected
            assert os.sched_getaffinity(0) == set(cores)
    finally:
        os.sched_setaffinity(0, all_cores)


def test_death_of_idle_workers_fails_no_request(tmp_path: Path) -> None:
    with running(tmp_path, num_workers=2) as service:
        kill_all(service)
        get = service.client.get
        assert service.rank().status_code == 200, "ranked by a restarted worker: the request had not been started"
        wait_until(lambda: bool(pool(service)._idle._free))
        assert get("/readyz").status_code == 200
        assert get("/metrics").status_code == 200


def test_service_without_workers_is_alive_but_not_ready(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    with running(tmp_path, num_workers=1, model=model) as one:
        assert one.service.is_ready
    with running(tmp_path, num_workers=2, model=model) as service:
        make_model(model, "another")  # replaces the model in service: workers cannot restart
        kill_all(service)
        assert service.rank(timeout_ms=500).status_code == 504, "the first request detects it"
        assert service.client.get("/readyz").status_code == 503
        rejected = service.rank()
        assert (rejected.status_code, rejected.json()["error"]["code"]) == (503, "worker_died")
        metrics = service.client.get("/metrics").text
        assert "a2gen_state_cache_hits" in metrics
        assert "a2gen_workers 0.0" in metrics
        assert service.client.delete("/v1/users/u1/history").status_code == 200
        make_model(model, "one")
        wait_until(lambda: service.client.get("/readyz").status_code == 200)
        wait_until(lambda: service.rank().status_code == 200)


def test_close_kills_a_hanging_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("a2gen_rec.serving.engine.workers.SHUTDOWN_TIMEOUT_S", 0.5)
    store, model = str(tmp_path / "events.db"), str(make_model(tmp_path / "model"))
    config = ServeConfig(num_workers=2, event_store=store)
    workers = WorkerPool(FakeRanker.load, model, "one", config)  # type: ignore[arg-type]
    processes = [worker._process for worker in workers._workers]
    os.kill(processes[0].pid, signal.SIGSTOP)  # type: ignore[arg-type]
    job = RankJob(RankQuery("u1", ITEMS[:3]), use_stored_history=False)
    with ThreadPoolExecutor(2) as threads:
        both = [threads.submit(workers.rank, [job]) for _ in range(2)]
        wait_until(lambda: any(future.done() for future in both) and workers._workers[0]._lock.locked())
        workers.close()
        assert not any(process.is_alive() for process in processes)
        assert sum(future.exception() is None for future in both) == 1
    with pytest.raises(WorkerDied):
        workers.rank([job])


def test_reload_drops_no_request(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    with running(tmp_path, model=model, num_workers=2) as service:
        previous, stop = pids(service), threading.Event()
        versions: list[tuple[int, str]] = []

        def rank_repeatedly() -> None:
            while not stop.is_set():
                response = service.rank(k=3)
                versions.append((response.status_code, response.json().get("model_version", response.text)))

        with ThreadPoolExecutor(4) as threads:
            clients = [threads.submit(rank_repeatedly) for _ in range(4)]
            for version in ("two", "three"):
                make_model(model, version)
                reloaded = service.client.post("/v1/model/reload").json()
                assert (reloaded["version"], reloaded["swapped"]) == (version, True)
                wait_until(lambda version=version: versions[-1] == (200, version))
            stop.set()
            for future in clients:
                future.result(TIMEOUT_S)
        assert {status for status, _ in versions} == {200}
        assert not any(map(is_alive, previous))
        current = pids(service)
        (model / "version").unlink()
        assert service.client.post("/v1/model/reload").status_code == 409
        assert pids(service) == current, "the previous model stays"
        assert service.rank().json()["model_version"] == "three"


def test_ranking_threads_have_lower_priority() -> None:
    if sys.platform != "linux":
        pytest.skip("threads have their own niceness on Linux only")
    with ThreadPoolExecutor(1) as thread:
        thread.submit(lower_thread_priority).result()
        assert thread.submit(os.nice, 0).result() == os.nice(0) + RANKING_NICENESS


@pytest.mark.parametrize(
    ("load", "message"), [(FakeRanker.load, "no exported model"), (CrashingRanker.load, "status 3")]
)
def test_reports_why_a_worker_cannot_start(load: Any, message: str, tmp_path: Path) -> None:
    config = ServeConfig(num_workers=2, event_store=str(tmp_path / "events.db"))
    with pytest.raises(UserError, match=message):
        WorkerPool(load, str(tmp_path / "nothing"), "one", config)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_workers_exit_with_their_service(number: int, tmp_path: Path) -> None:
    model, store = str(make_model(tmp_path / "model")), str(tmp_path / "events.db")
    arguments = ["--model", model, "--event-store", store, "--port", "0", "--num-workers", "2"]
    with serve_process(*arguments) as (service, address):
        children = subprocess.run(["pgrep", "-P", str(service.pid)], capture_output=True, text=True, check=True)
        workers = [int(pid) for pid in children.stdout.split()]
        assert len(workers) >= 2
        response = httpx.post(f"{address}/v1/rank", json={"user": "u1", "candidates": ITEMS[:5]}, timeout=TIMEOUT_S)
        assert [candidate["item"] for candidate in response.json()["candidates"]] == expected_order("u1", ITEMS[:5])
        for pid in workers:  # a terminal sends Ctrl-C to all processes; workers leave it to the service
            if number != signal.SIGKILL:
                os.kill(pid, number)
        time.sleep(0.2)
        assert all(map(is_alive, workers))
        service.send_signal(number)
        service.wait(TIMEOUT_S)
        wait_until(lambda: not any(map(is_alive, workers)))


def test_service_with_a_fake_ranker_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "import a2gen_rec.serving.engine.service, a2gen_rec.serving.http.server, a2gen_rec.serving.stores.redis\n"
        "import tests.helpers.fake_ranker, tests.helpers.service\n"
        "print([name for name in ('torch', 'torchrec', 'fbgemm_gpu') if name in sys.modules])\n"
    )
    process = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout == "[]\n"
