"""How fast does `a2gen serve` answer, how much can it take, and what does it do when more than that comes?

Requests come as a Poisson process, whether or not former ones have been answered, and latency counts from the moment a
request was due: what waits, anywhere, is not hidden. Loads are multiples of saturation, which is what a few callers who
ask again as soon as they are answered get. Sender and service are processes of one machine and share its cores. The
histories are recorded over HTTP first, and answers are checked against the model's own.

Cold is a service that keeps neither histories nor states: each request reads and encodes its user's past.
"""

import http.client
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from harness import Cell, Goal, Report, ReportTable, main
from load_generator import Load, run
from load_traces import EXPIRED, REFUSED, Trace, percentile, recovery_s
from serving_fixture import last_line, make_world

from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.experiments.command_runner import sigterm_as_keyboard_interrupt
from a2gen_rec.utils.distributed import DistributedContext

NORMAL, OVERLOAD = 0.5, 3.0
"""Times saturation: the loads of which something is wanted."""
LATE_MS = 5.0
"""Lag beyond which the sender was a bottleneck, at its 99th percentile."""
FEW = 50
"""Answers without which there is no 99th percentile."""
PATIENT_S = 120
RANK = "/v1/rank"


@dataclass
class Settings:
    """Sizes of the requests and of the load.

    Attributes:
        candidates, history: of a request.
        k, timelines: as requests have them; what is shown of the best.
        loads: times saturation.
        seconds: of each load.
        recovery_s: of the overload before recovery, and most that it may take.
        callers: who ask again at once, of the saturation.
        caches: whether the service keeps histories and states.
        workers: of the service.
        serve: further arguments of `a2gen serve`.
        users: with recorded histories; steps: of training in their world.
    """

    candidates: int = 200
    history: int = 100
    k: int = 10
    timelines: bool = True
    loads: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75, 0.9, 1.0, 1.5, 3.0])
    seconds: float = 20.0
    recovery_s: float = 5.0
    callers: int = 8
    caches: list[Literal["warm", "cold"]] = field(default_factory=lambda: ["warm", "cold"])
    workers: int = 2
    serve: list[str] = field(default_factory=list)
    users: int = 300
    steps: int = 300
    seed: int = 0


QUICK = {"loads": [0.5, 3.0], "seconds": 4.0, "recovery_s": 3.0, "caches": ["warm"], "users": 60, "steps": 30}


@dataclass(frozen=True)
class Served:
    """A running service."""

    process: subprocess.Popen[str]
    host: str
    port: int

    def ask(self, path: str, body: bytes) -> tuple[int, Any]:
        """Post once: status, and the answer's JSON."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=PATIENT_S)
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json", "Host": "localhost"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    @property
    def rss_mib(self) -> float:
        """Resident memory of its processes, NaN once it has ended; what they share counts once for each."""
        proc, main = Path("/proc"), self.process.pid
        try:
            tasks = (proc / str(main) / "task").glob("*/children")  # of each thread, which may have begun some
            children = [pid for task in tasks for pid in task.read_text().split()]
            every = [(proc / str(pid) / "status").read_text() for pid in (main, *children)]
        except OSError:
            return float("nan")
        found = [re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE) for status in every]
        return sum(int(each[1]) for each in found if each) / 1024 if found[0] else float("nan")


@dataclass(frozen=True)
class Loaded:
    """What one load gave: times saturation, requests per second, and the service's memory before and after in MiB."""

    load: float
    rate: float
    trace: Trace
    before_mib: float
    after_mib: float


@dataclass(frozen=True)
class Measured:
    """What was found of one service: ``saturation`` in requests per second, ``limit_ms`` of an answer that shows it has
    recovered, ``recovery`` in seconds, and its memory once it was warm and at the end."""

    cache: str
    saturation: float
    loads: list[Loaded]
    limit_ms: float
    recovery: float | None
    survived: bool
    warm_mib: float
    end_mib: float

    @property
    def growth(self) -> float:
        """Of memory: what little each load leaves behind adds up."""
        return self.end_mib / self.warm_mib - 1

    def at(self, load: float) -> Loaded:
        return next(each for each in self.loads if each.load == load)


def measure(settings: Settings, process: DistributedContext) -> Report:
    """Load a service with, and one without caches."""
    _check(settings, process)
    with sigterm_as_keyboard_interrupt(), tempfile.TemporaryDirectory(prefix="a2gen-serve-load-") as scratch:
        folder = Path(scratch)
        made = (settings.users, settings.candidates, settings.history, settings.k, settings.timelines, settings.steps)
        world = make_world(folder, *made, settings.seed, tell)
        found: list[Measured] = []
        for cache in settings.caches:
            options = ["--history-cache-mb", "0", "--action-cache-mb", "0"] if cache == "cold" else []
            options += ["--num-workers", str(settings.workers)]
            with serving(world.model, folder, [*options, *settings.serve]) as service:
                if not found:
                    tell(f"recording histories of {len(world.pasts):,} users")
                    world.record(service.ask)
                tell(f"{cache} service at port {service.port}: checking answers")
                world.check(service.ask)
                found.append(loaded(service, world.bodies, settings, cache, folder))
    return report(found, settings)


def _check(settings: Settings, process: DistributedContext) -> None:
    if process.world_size > 1:
        raise ConfigError("one process sends the load; run this without torchrun")
    if not {NORMAL, OVERLOAD} <= set(settings.loads) or min(settings.loads) <= 0:
        raise ConfigError(f"loads {settings.loads} must be positive, {NORMAL} and {OVERLOAD} among them")
    for name in ("candidates", "history", "k", "seconds", "recovery_s", "callers", "workers", "users", "steps"):
        if getattr(settings, name) <= 0:
            raise ConfigError(f"{name} {getattr(settings, name)} must be positive")
    if not settings.caches:
        raise ConfigError("caches must be warm, cold or both")


@contextmanager
def serving(model: str, folder: Path, options: list[str]) -> Iterator[Served]:
    """A service of a model with the store ``folder``/events.db, which is ended afterwards.

    Raises:
        UserError: it does not start.
    """
    store, log = str(folder / "events.db"), folder / "serve.log"
    arguments = ["serve", "--model", model, "--event-store", store, "--port", "0", *options]
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "a2gen_rec.cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        told = process.stdout.readline() if process.stdout else ""
        address = re.search(r"http://([^:/]+):(\d+)", told)
        if address is None:
            raise UserError(f"a2gen serve does not start: {last_line(log)}")
        yield Served(process, address[1], int(address[2]))
    finally:
        process.terminate()
        try:
            process.wait(PATIENT_S)
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()


def loaded(service: Served, bodies: list[bytes], settings: Settings, cache: str, folder: Path) -> Measured:
    """Saturation, every load in turn, and the way back from overload."""

    def send(phases: list[tuple[float, float]], callers: int = 0) -> Trace:
        # Each load has its own moments, the same in every service.
        seed = settings.seed + round(1000 * sum(rate for rate, _ in phases))
        return run(Load(service.host, service.port, RANK, phases, callers, seed), bodies, folder)

    tell(f"saturation: {settings.callers} callers for {settings.seconds:g} s")
    saturation = send([(0.0, settings.seconds)], settings.callers).ranked_per_s(settings.seconds)
    if not saturation:
        raise UserError("no request is answered; are they too many candidates for the time that a request may take?")
    found, warm_mib = [], service.rss_mib
    for load in sorted(settings.loads):
        rate = load * saturation
        tell(f"{load:g} × saturation: {rate:.1f} requests/s for {settings.seconds:g} s")
        before = service.rss_mib
        trace = send([(rate, settings.seconds)])
        found.append(Loaded(load, rate, trace, before, service.rss_mib))
        if (lag := percentile(trace.lag_ms, 99)) is not None and lag > LATE_MS:
            tell(f"warning: requests were sent {lag:.1f} ms late (p99), which is not the service's fault")
    normal = next(each for each in found if each.load == NORMAL)
    limit_ms = 2 * (percentile(normal.trace.latency_ms(), 99) or 0.0)
    tell(f"recovery: {OVERLOAD:g} × saturation, then {NORMAL:g}")
    phases = [(OVERLOAD * saturation, settings.recovery_s), (NORMAL * saturation, settings.recovery_s)]
    recovery = recovery_s(send(phases), settings.recovery_s, limit_ms)
    return Measured(cache, saturation, found, limit_ms, recovery, service.is_alive, warm_mib, service.rss_mib)


def report(found: list[Measured], settings: Settings) -> Report:
    """Tables of all services; targets and figures are the first one's."""
    what = f"{settings.candidates:,} candidates, history {settings.history}, {settings.workers} workers"
    tables = [_latencies(each, what, settings.seconds) for each in found]
    tables += [_sender(found), _recoveries(found)]
    first = found[0]
    normal, overload = first.at(NORMAL), first.at(OVERLOAD)
    p99 = normal.trace.within_ms(99)
    refused = percentile(overload.trace.latency_ms(REFUSED), 99)
    errors = sum(each.trace.errors for each in first.loads)
    survival = f"{'still' if first.survived else 'no longer'} there, {errors} errors"
    targets = [
        _below(f"{what}: p99 of all requests at {NORMAL:g} × saturation", p99, 50.0, "ms"),
        Goal(f"{OVERLOAD:g} × saturation: no crash", "still there, 0 errors", survival, first.survived and not errors),
        _below("growth of memory from saturation to the end", 100 * first.growth, 5.0, "%"),
        _below(f"{OVERLOAD:g} × saturation: p99 of refusals", refused, 10.0, "ms"),
        _below(f"from {OVERLOAD:g} to {NORMAL:g} × saturation: recovery", first.recovery, 2.0, "s"),
    ]
    figures = {
        "saturation_per_s": first.saturation,
        "p99_normal_ms": p99 if p99 is not None and math.isfinite(p99) else None,
        "p99_refused_ms": refused,
        "rss_growth": first.growth if first.survived else None,
        "recovery_s": first.recovery,
    }
    return Report(tables, targets, {name: value for name, value in figures.items() if value is not None})


def _below(claim: str, value: float | None, bound: float, unit: str) -> Goal:
    measured = "none" if value is None else f"{value:.1f} {unit}"
    return Goal(claim, f"under {bound:g} {unit}", measured, value is not None and value < bound)


def _latencies(measured: Measured, what: str, seconds: float) -> ReportTable:
    rows: list[list[Cell]] = []
    for each in measured.loads:
        trace, ranked = each.trace, each.trace.latency_ms()
        rows.append(
            [
                each.load,
                each.rate,
                trace.ranked_per_s(seconds),
                *(percentile(ranked, q) for q in (50, 90)),
                _p99(ranked),
                100 * trace.share(REFUSED),
                _p99(trace.latency_ms(REFUSED)),
                100 * trace.share(EXPIRED),
                trace.errors,
            ]
        )
    columns = ["load", "offered/s", "ranked/s", "p50 ms", "p90 ms", "p99 ms", "refused %", "its p99 ms", "expired %"]
    note = "ms from when a request was due until it was ranked, or refused; – from few of them"
    title = f"{measured.cache.capitalize()}, {what}: saturation {measured.saturation:.1f} requests/s"
    return ReportTable(title, [*columns, "errors"], rows, note)


def _sender(found: list[Measured]) -> ReportTable:
    rows: list[list[Cell]] = []
    late = False
    for measured in found:
        for each in measured.loads:
            trace = each.trace
            lag = percentile(trace.lag_ms, 99)
            late = late or (lag is not None and lag > LATE_MS)
            busy = 100 * trace.cpu_s / trace.answered.max() if len(trace.due) else None
            median = percentile(trace.lag_ms, 50)
            row = [measured.cache, each.load, len(trace.due), median, lag, busy, each.before_mib, each.after_mib]
            rows.append(row)
    columns = ["cache", "load", "requests", "lag p50 ms", "lag p99 ms", "sender's CPU %", "MiB before", "MiB after"]
    note = "lag: of sending behind when requests were due; MiB: resident memory of the service"
    if late:
        note += f". With lags above {LATE_MS:g} ms the sender was too slow for its load: latencies are its own too"
    return ReportTable("Sender, and the service's memory", columns, rows, note)


def _recoveries(found: list[Measured]) -> ReportTable:
    rows: list[list[Cell]] = [[each.cache, each.saturation, each.limit_ms, each.recovery] for each in found]
    note = "until half a second begins in which all are ranked within the limit, twice the p99 of the lower load alone"
    return ReportTable(
        f"Recovery: {OVERLOAD:g} × saturation, then {NORMAL:g}",
        ["cache", "saturation/s", "limit ms", "recovery s"],
        rows,
        note,
    )


def _p99(values: np.ndarray) -> float | None:
    return percentile(values, 99) if len(values) >= FEW else None


def tell(line: str) -> None:
    print(f"serve_load: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(__file__, __doc__, Settings, QUICK, measure)
