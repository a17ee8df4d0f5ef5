"""Tests of the load generator with services of known speed and rejections, and of trace statistics.

No test depends on the speed of the machine: a service with a minimum service time cannot answer sooner.
"""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from load_generator import Load, poisson_times, run_load
from load_traces import EXPIRED, LOST, RANKED, REJECTED, Trace, percentile, recovery_s
from serve_load import (
    LoadResult,
    ServiceProcess,
    ServiceResult,
    Settings,
    make_report,
    measure,
    measure_service,
    run_service,
)
from serving_fixture import ServingFixture, check_same_ranking, run_command

from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.ranking.types import RankedList, RankQuery, ScoredCandidate
from a2gen_rec.utils.distributed import DistributedContext

pytestmark = pytest.mark.processes

SINGLE = DistributedContext(0, 1, 1, torch.device("cpu"))


class FakeService:
    """Service that responds with the status in the body after ``service_s``, one request at a time.

    Status 0 closes the connection. Requests beyond ``max_pending`` at a time are rejected.
    """

    def __init__(self, service_s: float = 0.0, max_pending: int = 10**6) -> None:
        self.service_s, self.max_pending = service_s, max_pending
        self.pending = self.peak_pending = 0
        self.port = 0

    async def respond(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
                status = int(await reader.readexactly(int(length.split(b":")[1])))
                if not status:
                    break
                if self.pending >= self.max_pending:
                    status = REJECTED
                else:
                    self.pending += 1
                    self.peak_pending = max(self.peak_pending, self.pending)
                    async with self.lock:
                        await asyncio.sleep(self.service_s)
                    self.pending -= 1
                writer.write(b"HTTP/1.1 %d X\r\nContent-Length: 2\r\n\r\n{}" % status)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def serve(self, ready: threading.Event, end: threading.Event) -> None:
        self.lock = asyncio.Lock()
        server = await asyncio.start_server(self.respond, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        while not end.is_set():
            await asyncio.sleep(0.01)
        server.close()


@contextmanager
def fake(service_s: float = 0.0, max_pending: int = 10**6) -> Iterator[FakeService]:
    service, ready, end = FakeService(service_s, max_pending), threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(service.serve(ready, end)))
    thread.start()
    ready.wait()
    try:
        yield service
    finally:
        end.set()
        thread.join()


def make_trace(
    due: list[float], latency_ms: list[float], status: list[int] | None = None, lag_ms: float = 0.0
) -> Trace:
    due_times = np.array(due)
    sent, answered = due_times + lag_ms / 1000, due_times + np.array(latency_ms) / 1000
    return Trace(due_times, sent, answered, np.array(status or [RANKED] * len(due)), 0.1)


# The schedule.


def test_arrivals_are_poisson_in_every_phase() -> None:
    samples = [poisson_times([(50.0, 4.0), (5.0, 10.0)], np.random.default_rng(seed)) for seed in range(400)]
    for start, rate, seconds in ((0.0, 50.0, 4.0), (4.0, 5.0, 10.0)):
        phase = [times[(times >= start) & (times < start + seconds)] for times in samples]
        counts, mean = np.array([len(times) for times in phase]), rate * seconds
        # A count has equal mean and variance. The bounds are 5 standard errors over 400 draws.
        assert counts.mean() == pytest.approx(mean, abs=5 * np.sqrt(mean / 400))
        assert counts.var(ddof=1) == pytest.approx(mean, rel=5 * np.sqrt(2 / 400))
        gaps = np.concatenate([np.diff(times) for times in phase])
        assert gaps.mean() == pytest.approx(1 / rate, rel=0.05)
        assert gaps.std() == pytest.approx(1 / rate, rel=0.08), "exponential: standard deviation equals mean"
        assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.03, "memoryless"
    for times in samples:
        assert (np.diff(times) >= 0).all()
        assert len(times) == ((times >= 0) & (times < 14)).sum()


# Trace statistics.


def test_latency_counts_from_due_time() -> None:
    trace = make_trace([0.0, 1.0, 2.0, 3.0], [10, 20, 600, 5], [RANKED, RANKED, RANKED, REJECTED], lag_ms=4)
    assert trace.latency_ms().tolist() == pytest.approx([10, 20, 600])
    assert trace.latency_ms(REJECTED).tolist() == pytest.approx([5])
    assert trace.lag_ms.tolist() == pytest.approx([4] * 4)
    assert percentile(trace.latency_ms(), 50) == pytest.approx(20)
    assert percentile(trace.latency_ms(EXPIRED), 99) is None
    assert trace.ranked_per_s(2.0) == pytest.approx(3 / 3.005)
    assert trace.ranked_per_s(6.0) == pytest.approx(0.5)
    assert [trace.share(status) for status in (RANKED, REJECTED, EXPIRED)] == [0.75, 0.25, 0.0]
    assert trace.ranked_within_ms(75) == pytest.approx(trace.latency_ms().max())
    assert trace.ranked_within_ms(76) == np.inf
    assert make_trace([], []).ranked_within_ms(99) is None
    assert replace(trace, status=np.array([RANKED, 500, LOST, EXPIRED])).errors == 2


def test_writes_and_reads_traces(tmp_path: Path) -> None:
    trace = make_trace([0.0, 1.0], [10, 20], [RANKED, LOST])
    trace.write(tmp_path / "trace.npz")
    read = Trace.read(tmp_path / "trace.npz")
    for name in ("due", "sent", "answered", "status"):
        np.testing.assert_array_equal(getattr(read, name), getattr(trace, name))
    assert read.cpu_s == trace.cpu_s


def due_times(*latencies: float) -> list[float]:
    """Return due times with intervals of 100 ms."""
    return [0.1 * index for index in range(len(latencies))]


@pytest.mark.parametrize(
    ("slow", "recovered"),
    [
        ([], 0.0),
        (range(10), 0.0),  # before the load decreased
        ([10], 0.0),
        (range(13), 0.2),
        (range(10, 19), 0.8),
        ([*range(10, 13), 16], 0.6),  # 0.4 s in between are not enough
        ([*range(10, 13), 18, 25], 0.2),  # later slow requests do not count
        ([*range(10, 36)], None),
    ],
)
def test_recovery_is_the_first_half_second_within_the_limit(slow: Any, recovered: float | None) -> None:
    latencies = [900.0 if index in slow else 10.0 for index in range(40)]
    trace = make_trace(due_times(*latencies), latencies)
    assert recovery_s(trace, 1.0, 20.0) == pytest.approx(recovered)
    rejected = replace(
        trace,
        answered=trace.due + 0.001,
        status=np.array([REJECTED if index in slow else RANKED for index in range(40)]),
    )
    assert recovery_s(rejected, 1.0, 20.0) == pytest.approx(recovered), "an immediate rejection is not a ranking"


# The load generator.


def test_cycles_through_bodies_and_records_statuses(tmp_path: Path) -> None:
    statuses = [200, 503, 0, 504, 200, 500]
    with fake() as service:
        load = Load("127.0.0.1", service.port, "/", [(200.0, 0.5)], seed=3)
        trace = run_load(load, [str(status).encode() for status in statuses], tmp_path)
    due = poisson_times([(200.0, 0.5)], np.random.default_rng(3))
    assert len(due) > 50
    np.testing.assert_allclose(trace.due, due)
    assert trace.status.tolist() == [statuses[number % 6] for number in range(len(due))]
    assert trace.errors == sum(status in (0, 500) for status in trace.status.tolist())
    assert (trace.sent >= trace.due).all()
    assert (trace.answered >= trace.sent).all()
    assert trace.cpu_s > 0


def test_open_loop_does_not_wait_for_responses(tmp_path: Path) -> None:
    """With one server of known service time, no response can precede the completion of earlier requests."""
    service_s = 0.03
    with fake(service_s) as service:
        trace = run_load(Load("127.0.0.1", service.port, "/", [(100.0, 0.6)], seed=1), [b"200"], tmp_path)
    done, earliest = -np.inf, []
    for due in trace.due:
        done = max(done, due) + service_s
        earliest.append(done)
    # Timers may fire early by the resolution of the clock.
    assert (np.sort(trace.answered) >= np.array(earliest) - 0.002 * np.arange(1, len(earliest) + 1)).all()
    assert trace.latency_ms().max() > 1000 * (0.9 * service_s * len(trace.due) - 0.6), "latency includes queueing"
    assert service.peak_pending > 10, "the load generator does not wait for responses"


def test_closed_loop_clients_wait_for_responses(tmp_path: Path) -> None:
    with fake(0.01) as service:
        trace = run_load(Load("127.0.0.1", service.port, "/", [(0.0, 0.4)], concurrency=3), [b"200"], tmp_path)
    assert service.peak_pending <= 3
    assert set(trace.status) == {RANKED}
    assert 0 < trace.ranked_per_s(0.4) <= 110, "one at a time, 10 ms each"
    assert trace.due.max() < 0.4 <= trace.answered.max() + 0.4


def test_records_lost_requests_without_service(tmp_path: Path) -> None:
    with fake() as service:
        unused_port = service.port
    trace = run_load(Load("127.0.0.1", unused_port, "/", [(100.0, 0.2)]), [b"200"], tmp_path)
    assert len(trace.status) == trace.errors > 5
    with pytest.raises(RuntimeError, match="the load generator failed"):
        run_load(Load("127.0.0.1", unused_port, "/", [(-1.0, 0.2)]), [b"200"], tmp_path)


# The benchmark.


def fake_process(port: int) -> ServiceProcess:
    process: Any = SimpleNamespace(pid=os.getpid(), poll=lambda: None)
    return ServiceProcess(process, "127.0.0.1", port)


def test_measures_service_that_rejects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings(loads=[3.0, 0.5], seconds=0.8, recovery_s=0.8, concurrency=3)
    with fake(0.01, max_pending=5) as service:
        result = measure_service(fake_process(service.port), [b"200"], settings, "warm", tmp_path)
    assert service.peak_pending <= 5
    assert result.saturation <= 110
    assert [load.load for load in result.loads] == [0.5, 3.0]
    for load in result.loads:
        assert load.rate == load.load * result.saturation
        assert set(load.trace.status) <= {RANKED, REJECTED}
        assert load.before_mib > 1
        assert load.after_mib > 1
    assert result.at_load(3.0).trace.ranked_per_s(0.8) <= 110
    assert result.limit_ms >= 2 * 9
    assert capsys.readouterr().err.count("× saturation:") == 2
    tables = make_report([result, result], settings).tables
    assert [len(table.rows) for table in tables] == [2, 2, 4, 2]


def test_rejects_service_that_never_ranks(tmp_path: Path) -> None:
    with fake() as service, pytest.raises(UserError, match="no request was ranked"):
        measure_service(fake_process(service.port), [b"503"], Settings(seconds=0.2, concurrency=1), "warm", tmp_path)


def make_result(
    p99_ms: float, rejected_ms: float, growth: float, recovery: float | None, status: int = RANKED, unranked: int = 0
) -> ServiceResult:
    """Build a result: 101 responses at half of saturation, 100 rejections and one other response under overload.

    Memory grows by the same amount in each of the two loads.
    """
    due = np.linspace(0, 1, 101).tolist()
    normal = make_trace(due, [p99_ms] * 101, [REJECTED] * unranked + [RANKED] * (101 - unranked))
    overload = make_trace(due, [rejected_ms] * 101, [REJECTED] * 100 + [status])
    half, end = 100 * (1 + growth / 2), 100 * (1 + growth)
    loads = [LoadResult(0.5, 50.0, normal, 100, half), LoadResult(3.0, 300.0, overload, half, end)]
    return ServiceResult("warm", 100.0, loads, 2 * p99_ms, recovery, status != LOST, 100, end)


@pytest.mark.parametrize(
    ("result", "met"),
    [
        (make_result(49, 9, 0.04, 1.9), [True] * 5),
        (make_result(51, 9, 0.04, 1.9), [False, True, True, True, True]),
        (make_result(49, 9, 0.04, 1.9, unranked=1), [True] * 5),
        (make_result(49, 9, 0.04, 1.9, unranked=2), [False, True, True, True, True]),
        (make_result(49, 9, 0.04, 1.9, 500), [True, False, True, True, True]),
        (make_result(49, 9, 0.04, 1.9, LOST), [True, False, True, True, True]),
        (make_result(49, 9, 0.06, 1.9), [True, True, False, True, True]),
        (make_result(49, 9, float("nan"), 1.9), [True, True, False, True, True]),
        (make_result(49, 11, 0.04, 1.9), [True, True, True, False, True]),
        (make_result(49, 9, 0.04, 2.1), [True, True, True, True, False]),
        (make_result(49, 9, 0.04, None), [True, True, True, True, False]),
    ],
)
def test_goals(result: ServiceResult, met: list[bool]) -> None:
    report = make_report([result], Settings())
    assert [goal.met for goal in report.goals] == met
    assert report.metrics["saturation_per_s"] == 100.0
    assert ("p99_normal_ms" in report.metrics) == (result.at_load(0.5).trace.share(RANKED) >= 0.99)
    assert ("recovery_s" in report.metrics) == (result.recovery_s is not None)


def test_reports_late_load_generator() -> None:
    result = make_result(20, 5, 0, 0)
    (late,) = [LoadResult(0.5, 50.0, replace(result.loads[0].trace, sent=result.loads[0].trace.due + 0.01), 1, 1)]
    notes = [
        make_report([service], Settings()).tables[1].note
        for service in (result, replace(result, loads=[late, result.loads[1]]))
    ]
    assert ["too slow" in note for note in notes] == [False, True]


@pytest.mark.parametrize(
    ("settings", "process", "reason"),
    [
        (Settings(), DistributedContext(0, 2, 2, torch.device("cpu")), "without torchrun"),
        (Settings(loads=[0.5, 1.0]), SINGLE, "include 0.5 and 3.0"),
        (Settings(loads=[-1, 0.5, 3.0]), SINGLE, "must be positive"),
        (Settings(seconds=0), SINGLE, "seconds 0 must be positive"),
        (Settings(caches=[]), SINGLE, "warm, cold or both"),
    ],
)
def test_rejects_invalid_settings(settings: Settings, process: DistributedContext, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        measure(settings, process)


def test_failed_start_reports_reason_and_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []

    class RecordedProcess(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, command: list[str], **options: Any) -> None:
            super().__init__([sys.executable, "-c", "import sys; sys.exit('a2gen: error: no model')"], **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", RecordedProcess)
    with (
        pytest.raises(UserError, match="a2gen serve failed to start: a2gen: error: no model"),
        run_service("m", tmp_path, []),
    ):
        raise AssertionError("the service must not start")
    with pytest.raises(UserError, match="a2gen train failed with exit code 1: a2gen: error: no model"):
        run_command(tmp_path, "train")
    assert [process.poll() for process in started] == [1, 1]


def test_terminates_service_after_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    popen, services = subprocess.Popen, []
    program = "import time; print('model at http://127.0.0.1:1', flush=True); time.sleep(600)"
    monkeypatch.setattr(subprocess, "Popen", lambda _, **options: popen([sys.executable, "-c", program], **options))

    def interrupted() -> None:
        with run_service("m", tmp_path, []) as service:
            services.append(service)
            assert (service.host, service.port) == ("127.0.0.1", 1)
            assert service.is_alive
            assert service.rss_mib > 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not services[0].is_alive
    assert np.isnan(services[0].rss_mib)


# Responses are checked before timing.


def fake_ranker(items: list[str], probability: float = 0.5, history: int = 4) -> Any:
    candidates = [ScoredCandidate(item, True, {"like": probability}, None, []) for item in items]
    fixed: dict[str, Any] = {
        "user": "u",
        "user_known": True,
        "sort_by": "like",
        "num_candidates": 3,
        "unknown_items": 0,
    }
    ranked_list = RankedList(history_length=history, candidates=candidates, **fixed)
    return SimpleNamespace(rank=lambda request: ranked_list)


def response(items: list[str]) -> dict[str, Any]:
    return {"history_length": 4, "candidates": [{"item": item, "probability": {"like": 0.5}} for item in items]}


@pytest.mark.parametrize(
    "wrong",
    [fake_ranker(["b", "a"]), fake_ranker(["a"]), fake_ranker(["a", "b"], 0.51), fake_ranker(["a", "b"], history=3)],
)
def test_rejects_responses_that_differ_from_the_model(wrong: Any) -> None:
    request, items = RankQuery("u", ["a", "b", "c"]), ["a", "b"]
    check_same_ranking(items, response(items), request, fake_ranker(items, 0.50005), [])
    with pytest.raises(RuntimeError, match="the model"):
        check_same_ranking(items, response(items), request, wrong, [])


@pytest.mark.parametrize(
    "status_and_body",
    [
        (503, {}),
        (200, response(["a"])),
        (200, response(["a", "a"])),
        (200, response(["a", "d"])),
        (200, response(["a", "b", "c"])),
    ],
)
def test_rejects_responses_that_are_not_rankings(
    status_and_body: tuple[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving_fixture.Ranker", SimpleNamespace(load=lambda folder: fake_ranker(["a", "b"])))
    fixture = ServingFixture("model", {"u": []}, [RankQuery("u", ["a", "b", "c"], k=2)] * 2)
    fixture.check_responses(lambda path, body: (200, response(["a", "b"])))
    with pytest.raises(RuntimeError, match="unexpected response to a request"):
        fixture.check_responses(lambda path, body: status_and_body)
    with pytest.raises(RuntimeError, match="unexpected response to the events of a user: 507"):
        fixture.record_histories(lambda path, body: (507, {}))
