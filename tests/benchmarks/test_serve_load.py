"""The load generator against services that are slow or refuse in a known way, and what is made of its traces.

Nothing here depends on how fast the machine is: a service that takes so long cannot answer sooner.
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
from load_generator import Load, poisson_times, run
from load_traces import EXPIRED, LOST, RANKED, REFUSED, Trace, percentile, recovery_s
from serve_load import Loaded, Measured, Served, Settings, loaded, measure, report, serving
from serving_fixture import World, _compare, a2gen

from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.ranking.types import RankedList, RankQuery, ScoredCandidate
from a2gen_rec.utils.distributed import DistributedContext

ALONE = DistributedContext(0, 1, 1, torch.device("cpu"))


class FakeService:
    """Answers with the status that a body names, after ``takes_s``, one request at a time; 0 hangs up instead.

    More than ``most`` at a time are refused.
    """

    def __init__(self, takes_s: float = 0.0, most: int = 10**6) -> None:
        self.takes_s, self.most = takes_s, most
        self.waiting = self.most_waiting = 0
        self.port = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
                status = int(await reader.readexactly(int(length.split(b":")[1])))
                if not status:
                    break
                if self.waiting >= self.most:
                    status = REFUSED
                else:
                    self.waiting += 1
                    self.most_waiting = max(self.most_waiting, self.waiting)
                    async with self.turn:
                        await asyncio.sleep(self.takes_s)
                    self.waiting -= 1
                writer.write(b"HTTP/1.1 %d X\r\nContent-Length: 2\r\n\r\n{}" % status)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def serve(self, ready: threading.Event, end: threading.Event) -> None:
        self.turn = asyncio.Lock()
        server = await asyncio.start_server(self.answer, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        while not end.is_set():
            await asyncio.sleep(0.01)
        server.close()


@contextmanager
def fake(takes_s: float = 0.0, most: int = 10**6) -> Iterator[FakeService]:
    service, ready, end = FakeService(takes_s, most), threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(service.serve(ready, end)))
    thread.start()
    ready.wait()
    try:
        yield service
    finally:
        end.set()
        thread.join()


def trace(due: list[float], took_ms: list[float], status: list[int] | None = None, lag_ms: float = 0.0) -> Trace:
    begins = np.array(due)
    sent, answered = begins + lag_ms / 1000, begins + np.array(took_ms) / 1000
    return Trace(begins, sent, answered, np.array(status or [RANKED] * len(due)), 0.1)


# The schedule.


def test_arrivals_are_a_poisson_process_in_every_phase() -> None:
    drawn = [poisson_times([(50.0, 4.0), (5.0, 10.0)], np.random.default_rng(seed)) for seed in range(400)]
    for begin, rate, seconds in ((0.0, 50.0, 4.0), (4.0, 5.0, 10.0)):
        inside = [each[(each >= begin) & (each < begin + seconds)] for each in drawn]
        counts, mean = np.array([len(each) for each in inside]), rate * seconds
        # Mean and variance of a count are equal; their standard errors over 400 draws bound what chance does.
        assert counts.mean() == pytest.approx(mean, abs=5 * np.sqrt(mean / 400))
        assert counts.var(ddof=1) == pytest.approx(mean, rel=5 * np.sqrt(2 / 400))
        gaps = np.concatenate([np.diff(each) for each in inside])
        assert gaps.mean() == pytest.approx(1 / rate, rel=0.05)
        assert gaps.std() == pytest.approx(1 / rate, rel=0.08), "as spread as their mean: exponential"
        assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.03, "of no memory"
    for each in drawn:
        assert (np.diff(each) >= 0).all()
        assert len(each) == ((each >= 0) & (each < 14)).sum()


# What is made of traces.


def test_latency_counts_from_when_a_request_was_due() -> None:
    made = trace([0.0, 1.0, 2.0, 3.0], [10, 20, 600, 5], [RANKED, RANKED, RANKED, REFUSED], lag_ms=4)
    assert made.latency_ms().tolist() == pytest.approx([10, 20, 600])
    assert made.latency_ms(REFUSED).tolist() == pytest.approx([5])
    assert made.lag_ms.tolist() == pytest.approx([4] * 4)
    assert percentile(made.latency_ms(), 50) == pytest.approx(20)
    assert percentile(made.latency_ms(EXPIRED), 99) is None
    assert made.ranked_per_s(2.0) == pytest.approx(3 / 3.005)
    assert made.ranked_per_s(6.0) == pytest.approx(0.5)
    assert [made.share(status) for status in (RANKED, REFUSED, EXPIRED)] == [0.75, 0.25, 0.0]
    assert made.within_ms(75) == pytest.approx(made.latency_ms().max())
    assert made.within_ms(76) == np.inf
    assert trace([], []).within_ms(99) is None
    assert replace(made, status=np.array([RANKED, 500, LOST, EXPIRED])).errors == 2


def test_traces_are_kept(tmp_path: Path) -> None:
    made = trace([0.0, 1.0], [10, 20], [RANKED, LOST])
    made.write(tmp_path / "trace.npz")
    read = Trace.read(tmp_path / "trace.npz")
    for name in ("due", "sent", "answered", "status"):
        np.testing.assert_array_equal(getattr(read, name), getattr(made, name))
    assert read.cpu_s == made.cpu_s


def times(*latencies: float) -> list[float]:
    """Due every 100 ms."""
    return [0.1 * place for place in range(len(latencies))]


@pytest.mark.parametrize(
    ("slow", "recovered"),
    [
        ([], 0.0),
        (range(10), 0.0),  # before the load fell
        ([10], 0.0),
        (range(13), 0.2),
        (range(10, 19), 0.8),
        ([*range(10, 13), 16], 0.6),  # four tenths of a second in between are not enough
        ([*range(10, 13), 18, 25], 0.2),  # slow again later is another matter
        ([*range(10, 36)], None),
    ],
)
def test_recovery_is_the_first_half_second_that_is_well(slow: Any, recovered: float | None) -> None:
    took = [900.0 if place in slow else 10.0 for place in range(40)]
    made = trace(times(*took), took)
    assert recovery_s(made, 1.0, 20.0) == pytest.approx(recovered)
    refused = replace(
        made,
        answered=made.due + 0.001,
        status=np.array([REFUSED if place in slow else RANKED for place in range(40)]),
    )
    assert recovery_s(refused, 1.0, 20.0) == pytest.approx(recovered), "to be refused at once is no answer"


# The generator.


def test_every_body_in_turn_and_its_answer(tmp_path: Path) -> None:
    statuses = [200, 503, 0, 504, 200, 500]
    with fake() as service:
        load = Load("127.0.0.1", service.port, "/", [(200.0, 0.5)], seed=3)
        made = run(load, [str(status).encode() for status in statuses], tmp_path)
    due = poisson_times([(200.0, 0.5)], np.random.default_rng(3))
    assert len(due) > 50
    np.testing.assert_allclose(made.due, due)
    assert made.status.tolist() == [statuses[number % 6] for number in range(len(due))]
    assert made.errors == sum(status in (0, 500) for status in made.status.tolist())
    assert (made.sent >= made.due).all()
    assert (made.answered >= made.sent).all()
    assert made.cpu_s > 0


def test_requests_come_whether_or_not_others_are_answered(tmp_path: Path) -> None:
    """A queue of one server, of known service time: no request can be done before those that came first."""
    takes_s = 0.03
    with fake(takes_s) as service:
        made = run(Load("127.0.0.1", service.port, "/", [(100.0, 0.6)], seed=1), [b"200"], tmp_path)
    done, earliest = -np.inf, []
    for due in made.due:
        done = max(done, due) + takes_s
        earliest.append(done)
    # Timers may end early by the clock's grain.
    assert (np.sort(made.answered) >= np.array(earliest) - 0.002 * np.arange(1, len(earliest) + 1)).all()
    assert made.latency_ms().max() > 1000 * (0.9 * takes_s * len(made.due) - 0.6), "what waited counts"
    assert service.most_waiting > 10, "the sender does not wait for answers"


def test_callers_of_a_closed_loop_wait_for_their_answers(tmp_path: Path) -> None:
    with fake(0.01) as service:
        made = run(Load("127.0.0.1", service.port, "/", [(0.0, 0.4)], callers=3), [b"200"], tmp_path)
    assert service.most_waiting <= 3
    assert set(made.status) == {RANKED}
    assert 0 < made.ranked_per_s(0.4) <= 110, "one at a time, 10 ms each"
    assert made.due.max() < 0.4 <= made.answered.max() + 0.4


def test_no_service_at_all(tmp_path: Path) -> None:
    with fake() as service:
        gone = service.port
    made = run(Load("127.0.0.1", gone, "/", [(100.0, 0.2)]), [b"200"], tmp_path)
    assert len(made.status) == made.errors > 5
    with pytest.raises(RuntimeError, match="the load generator failed"):
        run(Load("127.0.0.1", gone, "/", [(-1.0, 0.2)]), [b"200"], tmp_path)


# The benchmark.


def served(port: int) -> Served:
    process: Any = SimpleNamespace(pid=os.getpid(), poll=lambda: None)
    return Served(process, "127.0.0.1", port)


def test_loads_of_a_service_that_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings(loads=[3.0, 0.5], seconds=0.8, recovery_s=0.8, callers=3)
    with fake(0.01, most=5) as service:
        found = loaded(served(service.port), [b"200"], settings, "warm", tmp_path)
    assert service.most_waiting <= 5
    assert found.saturation <= 110
    assert [each.load for each in found.loads] == [0.5, 3.0]
    for each in found.loads:
        assert each.rate == each.load * found.saturation
        assert set(each.trace.status) <= {RANKED, REFUSED}
        assert each.before_mib > 1
        assert each.after_mib > 1
    assert found.at(3.0).trace.ranked_per_s(0.8) <= 110
    assert found.limit_ms >= 2 * 9
    assert capsys.readouterr().err.count("× saturation:") == 2
    tables = report([found, found], settings).tables
    assert [len(table.rows) for table in tables] == [2, 2, 4, 2]


def test_a_service_that_never_ranks(tmp_path: Path) -> None:
    with fake() as service, pytest.raises(UserError, match="no request is answered"):
        loaded(served(service.port), [b"503"], Settings(seconds=0.2, callers=1), "warm", tmp_path)


def measured(
    p99_ms: float, refused_ms: float, grown: float, recovery: float | None, status: int = RANKED, unranked: int = 0
) -> Measured:
    """Known figures: 101 answers at half of saturation, 100 refusals and one other answer beyond it.

    Memory grows by the same part in each of the two loads.
    """
    due = np.linspace(0, 1, 101).tolist()
    normal = trace(due, [p99_ms] * 101, [REFUSED] * unranked + [RANKED] * (101 - unranked))
    overload = trace(due, [refused_ms] * 101, [REFUSED] * 100 + [status])
    half, end = 100 * (1 + grown / 2), 100 * (1 + grown)
    loads = [Loaded(0.5, 50.0, normal, 100, half), Loaded(3.0, 300.0, overload, half, end)]
    return Measured("warm", 100.0, loads, 2 * p99_ms, recovery, status != LOST, 100, end)


@pytest.mark.parametrize(
    ("found", "met"),
    [
        (measured(49, 9, 0.04, 1.9), [True] * 5),
        (measured(51, 9, 0.04, 1.9), [False, True, True, True, True]),
        (measured(49, 9, 0.04, 1.9, unranked=1), [True] * 5),
        (measured(49, 9, 0.04, 1.9, unranked=2), [False, True, True, True, True]),
        (measured(49, 9, 0.04, 1.9, 500), [True, False, True, True, True]),
        (measured(49, 9, 0.04, 1.9, LOST), [True, False, True, True, True]),
        (measured(49, 9, 0.06, 1.9), [True, True, False, True, True]),
        (measured(49, 9, float("nan"), 1.9), [True, True, False, True, True]),
        (measured(49, 11, 0.04, 1.9), [True, True, True, False, True]),
        (measured(49, 9, 0.04, 2.1), [True, True, True, True, False]),
        (measured(49, 9, 0.04, None), [True, True, True, True, False]),
    ],
)
def test_targets(found: Measured, met: list[bool]) -> None:
    made = report([found], Settings())
    assert [target.met for target in made.targets] == met
    assert made.figures["saturation_per_s"] == 100.0
    assert ("p99_normal_ms" in made.figures) == (found.at(0.5).trace.share(RANKED) >= 0.99)
    assert ("recovery_s" in made.figures) == (found.recovery is not None)


def test_a_sender_that_is_late_says_so() -> None:
    found = measured(20, 5, 0, 0)
    (late,) = [Loaded(0.5, 50.0, replace(found.loads[0].trace, sent=found.loads[0].trace.due + 0.01), 1, 1)]
    notes = [
        report([each], Settings()).tables[1].note for each in (found, replace(found, loads=[late, found.loads[1]]))
    ]
    assert ["too slow" in note for note in notes] == [False, True]


@pytest.mark.parametrize(
    ("settings", "process", "reason"),
    [
        (Settings(), DistributedContext(0, 2, 2, torch.device("cpu")), "without torchrun"),
        (Settings(loads=[0.5, 1.0]), ALONE, "0.5 and 3.0 among them"),
        (Settings(loads=[-1, 0.5, 3.0]), ALONE, "must be positive"),
        (Settings(seconds=0), ALONE, "seconds 0 must be positive"),
        (Settings(caches=[]), ALONE, "warm, cold or both"),
    ],
)
def test_impossible_settings(settings: Settings, process: DistributedContext, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        measure(settings, process)


def test_a_service_that_does_not_start_says_why_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[str]] = []

    class Recorded(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, command: list[str], **options: Any) -> None:
            super().__init__([sys.executable, "-c", "import sys; sys.exit('a2gen: error: no model')"], **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    with (
        pytest.raises(UserError, match="a2gen serve does not start: a2gen: error: no model"),
        serving("m", tmp_path, []),
    ):
        raise AssertionError("it does not serve")
    with pytest.raises(UserError, match="a2gen train failed with exit code 1: a2gen: error: no model"):
        a2gen(tmp_path, "train")
    assert [process.poll() for process in started] == [1, 1]


def test_a_service_is_ended_after_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = subprocess.Popen, []
    program = "import time; print('model at http://127.0.0.1:1', flush=True); time.sleep(600)"
    monkeypatch.setattr(subprocess, "Popen", lambda _, **options: real([sys.executable, "-c", program], **options))

    def interrupted() -> None:
        with serving("m", tmp_path, []) as service:
            seen.append(service)
            assert (service.host, service.port) == ("127.0.0.1", 1)
            assert service.is_alive
            assert service.rss_mib > 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not seen[0].is_alive
    assert np.isnan(seen[0].rss_mib)


# Answers are right before they are timed.


def ranked(items: list[str], chance: float = 0.5, history: int = 4) -> Any:
    found = [ScoredCandidate(item, True, {"like": chance}, None, [], float("nan")) for item in items]
    fixed: dict[str, Any] = {
        "user": "u",
        "user_known": True,
        "sort_by": "like",
        "num_candidates": 3,
        "unknown_items": 0,
    }
    known = RankedList(history_length=history, candidates=found, **fixed)
    return SimpleNamespace(rank=lambda request: known)


def answer(items: list[str]) -> dict[str, Any]:
    return {"history_length": 4, "candidates": [{"item": item, "probability": {"like": 0.5}} for item in items]}


@pytest.mark.parametrize(
    "wrong", [ranked(["b", "a"]), ranked(["a"]), ranked(["a", "b"], 0.51), ranked(["a", "b"], history=3)]
)
def test_answers_other_than_the_model_s_are_not_timed(wrong: Any) -> None:
    request, items = RankQuery("u", ["a", "b", "c"]), ["a", "b"]
    _compare(items, answer(items), request, ranked(items, 0.50005), [])
    with pytest.raises(RuntimeError, match="the model"):
        _compare(items, answer(items), request, wrong, [])


@pytest.mark.parametrize(
    "told",
    [
        (503, {}),
        (200, answer(["a"])),
        (200, answer(["a", "a"])),
        (200, answer(["a", "d"])),
        (200, answer(["a", "b", "c"])),
    ],
)
def test_answers_that_are_no_ranking_are_not_timed(told: tuple[int, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving_fixture.Ranker", SimpleNamespace(load=lambda folder: ranked(["a", "b"])))
    world = World("model", {"u": []}, [RankQuery("u", ["a", "b", "c"], k=2)] * 2)
    world.check(lambda path, body: (200, answer(["a", "b"])))
    with pytest.raises(RuntimeError, match="answered with"):
        world.check(lambda path, body: told)
    with pytest.raises(RuntimeError, match="events of a user are answered with 507"):
        world.record(lambda path, body: (507, {}))
