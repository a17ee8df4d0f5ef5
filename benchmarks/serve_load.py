"""What are the latency and throughput of `a2gen serve`, and how does it behave under overload?

Requests arrive as a Poisson process, independently of previous responses. Latency counts from the due time of a request
and thus includes all queueing. Loads are multiples of the saturation throughput, measured with a few clients in
a closed loop. Load generator and service are processes of one machine and share its cores. The histories are recorded
over HTTP first, and responses are compared with the model.

A cold service caches neither histories nor action states: each request reads and encodes the user's history.
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
from harness import CellValue, Goal, Report, ReportTable, main
from load_generator import Load, run_load
from load_traces import EXPIRED, REJECTED, Trace, percentile, recovery_s
from serving_fixture import last_line, make_fixture

from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.experiments.command_runner import sigterm_as_keyboard_interrupt
from a2gen_rec.utils.distributed import DistributedContext

NORMAL_LOAD, OVERLOAD_LOAD = 0.5, 3.0
"""Loads of the goals, as multiples of saturation."""
MAX_LAG_MS = 5.0
"""Maximum 99th percentile of the sending delay; above it, the load generator is a bottleneck."""
MIN_P99_COUNT = 50
"""Minimum number of responses for a 99th percentile."""
SERVICE_TIMEOUT_S = 120
RANK_ROUTE = "/v1/rank"


@dataclass
class Settings:
    """Sizes of the requests and of the load.

    Attributes:
        candidates: candidates of a request.
        history: length of the users' histories.
        k: candidates of a response.
        include_timelines: whether responses have timelines.
        loads: loads, as multiples of saturation.
        seconds: duration of each load.
        recovery_s: duration of the overload before recovery, and maximum measured recovery time.
        concurrency: clients of the closed loop that measures saturation.
        caches: warm and cold services to measure.
        num_workers: worker processes of the service.
        serve_args: further arguments of `a2gen serve`.
        users: maximum users with recorded histories.
        steps: training steps.
        seed: random seed.
    """

    candidates: int = 200
    history: int = 100
    k: int = 10
    include_timelines: bool = True
    loads: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75, 0.9, 1.0, 1.5, 3.0])
    seconds: float = 20.0
    recovery_s: float = 5.0
    concurrency: int = 8
    caches: list[Literal["warm", "cold"]] = field(default_factory=lambda: ["warm", "cold"])
    num_workers: int = 2
    serve_args: list[str] = field(default_factory=list)
    users: int = 300
    steps: int = 300
    seed: int = 0


QUICK = {"loads": [0.5, 3.0], "seconds": 4.0, "recovery_s": 3.0, "caches": ["warm"], "users": 60, "steps": 30}


@dataclass(frozen=True)
class ServiceProcess:
    """Running service."""

    process: subprocess.Popen[str]
    host: str
    port: int

    def post(self, path: str, body: bytes) -> tuple[int, Any]:
        """Post a body to a route and return the status and the JSON response."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=SERVICE_TIMEOUT_S)
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json", "Host": "localhost"})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    @property
    def rss_mib(self) -> float:
        """Resident memory of all its processes, NaN after exit; shared memory counts once per process."""
        proc, main = Path("/proc"), self.process.pid
        try:
            tasks = (proc / str(main) / "task").glob("*/children")  # any thread may have started a child
            children = [pid for task in tasks for pid in task.read_text().split()]
            statuses = [(proc / str(pid) / "status").read_text() for pid in (main, *children)]
        except OSError:
            return float("nan")
        matches = [re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE) for status in statuses]
        return sum(int(match[1]) for match in matches if match) / 1024 if matches[0] else float("nan")


@dataclass(frozen=True)
class LoadResult:
    """Result of one load.

    Attributes:
        load: multiple of saturation.
        rate: requests per second.
        trace: trace of all requests.
        before_mib: memory of the service before the load, in MiB.
        after_mib: memory of the service after the load, in MiB.
    """

    load: float
    rate: float
    trace: Trace
    before_mib: float
    after_mib: float


@dataclass(frozen=True)
class ServiceResult:
    """Results of one service.

    Attributes:
        cache: warm or cold.
        saturation: requests per second.
        loads: results of all loads.
        limit_ms: latency limit for recovery.
        recovery_s: recovery time in seconds; None if it did not recover.
        is_alive: whether the service runs at the end.
        warm_mib: memory after the saturation load, in MiB.
        end_mib: memory at the end, in MiB.
    """

    cache: str
    saturation: float
    loads: list[LoadResult]
    limit_ms: float
    recovery_s: float | None
    is_alive: bool
    warm_mib: float
    end_mib: float

    @property
    def memory_growth(self) -> float:
        """Relative memory growth from after saturation to the end, summed over all loads."""
        return self.end_mib / self.warm_mib - 1

    def at_load(self, load: float) -> LoadResult:
        """Return the result of a load."""
        return next(result for result in self.loads if result.load == load)


def measure(settings: Settings, process: DistributedContext) -> Report:
    """Measure a service with caches and one without."""
    _check_settings(settings, process)
    with sigterm_as_keyboard_interrupt(), tempfile.TemporaryDirectory(prefix="a2gen-serve-load-") as scratch:
        folder = Path(scratch)
        fixture = make_fixture(
            folder,
            users=settings.users,
            candidates=settings.candidates,
            history=settings.history,
            k=settings.k,
            include_timelines=settings.include_timelines,
            steps=settings.steps,
            seed=settings.seed,
            log=log,
        )
        results: list[ServiceResult] = []
        for cache in settings.caches:
            options = ["--history-cache-mb", "0", "--action-cache-mb", "0"] if cache == "cold" else []
            options += ["--num-workers", str(settings.num_workers)]
            with run_service(fixture.model_dir, folder, [*options, *settings.serve_args]) as service:
                if not results:
                    log(f"recording histories of {len(fixture.histories):,} users")
                    fixture.record_histories(service.post)
                log(f"{cache} service at port {service.port}: checking responses")
                fixture.check_responses(service.post)
                results.append(measure_service(service, fixture.request_bodies, settings, cache, folder))
    return make_report(results, settings)


def _check_settings(settings: Settings, process: DistributedContext) -> None:
    if process.world_size > 1:
        raise ConfigError("the load generator is one process; run this benchmark without torchrun")
    if not {NORMAL_LOAD, OVERLOAD_LOAD} <= set(settings.loads) or min(settings.loads) <= 0:
        raise ConfigError(f"loads {settings.loads} must be positive and include {NORMAL_LOAD} and {OVERLOAD_LOAD}")
    for name in ("candidates", "history", "k", "seconds", "recovery_s", "concurrency", "num_workers", "users", "steps"):
        if getattr(settings, name) <= 0:
            raise ConfigError(f"{name} {getattr(settings, name)} must be positive")
    if not settings.caches:
        raise ConfigError("caches must include warm, cold or both")


@contextmanager
def run_service(model: str, folder: Path, options: list[str]) -> Iterator[ServiceProcess]:
    """Run a service of a model with the event store ``folder``/events.db, and terminate it at exit.

    Raises:
        UserError: the service does not start.
    """
    store, log_file = str(folder / "events.db"), folder / "serve.log"
    arguments = ["serve", "--model", model, "--event-store", store, "--port", "0", *options]
    with log_file.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "a2gen_rec.cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        line = process.stdout.readline() if process.stdout else ""
        address = re.search(r"http://([^:/]+):(\d+)", line)
        if address is None:
            raise UserError(f"a2gen serve failed to start: {last_line(log_file)}")
        yield ServiceProcess(process, address[1], int(address[2]))
    finally:
        process.terminate()
        try:
            process.wait(SERVICE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()


def measure_service(
    service: ServiceProcess, bodies: list[bytes], settings: Settings, cache: str, folder: Path
) -> ServiceResult:
    """Measure saturation, every load in turn, and recovery from overload."""

    def send(phases: list[tuple[float, float]], concurrency: int = 0) -> Trace:
        # Arrival times differ between loads and are the same for every service.
        seed = settings.seed + round(1000 * sum(rate for rate, _ in phases))
        return run_load(Load(service.host, service.port, RANK_ROUTE, phases, concurrency, seed), bodies, folder)

    log(f"saturation: {settings.concurrency} clients for {settings.seconds:g} s")
    saturation = send([(0.0, settings.seconds)], settings.concurrency).ranked_per_s(settings.seconds)
    if not saturation:
        raise UserError("no request was ranked; the candidates may be too many for the request timeout")
    results, warm_mib = [], service.rss_mib
    for load in sorted(settings.loads):
        rate = load * saturation
        log(f"{load:g} × saturation: {rate:.1f} requests/s for {settings.seconds:g} s")
        before = service.rss_mib
        trace = send([(rate, settings.seconds)])
        results.append(LoadResult(load, rate, trace, before, service.rss_mib))
        if (lag := percentile(trace.lag_ms, 99)) is not None and lag > MAX_LAG_MS:
            log(f"warning: the load generator sent requests {lag:.1f} ms late (p99)")
    normal = next(result for result in results if result.load == NORMAL_LOAD)
    limit_ms = 2 * (percentile(normal.trace.latency_ms(), 99) or 0.0)
    log(f"recovery: {OVERLOAD_LOAD:g} × saturation, then {NORMAL_LOAD:g}")
    phases = [(OVERLOAD_LOAD * saturation, settings.recovery_s), (NORMAL_LOAD * saturation, settings.recovery_s)]
    recovery = recovery_s(send(phases), settings.recovery_s, limit_ms)
    return ServiceResult(cache, saturation, results, limit_ms, recovery, service.is_alive, warm_mib, service.rss_mib)


def make_report(results: list[ServiceResult], settings: Settings) -> Report:
    """Build the tables of all services; goals and metrics are those of the first one."""
    size = f"{settings.candidates:,} candidates, history {settings.history}, {settings.num_workers} workers"
    tables = [_latency_table(result, size, settings.seconds) for result in results]
    tables += [_sender_table(results), _recovery_table(results)]
    first = results[0]
    normal, overload = first.at_load(NORMAL_LOAD), first.at_load(OVERLOAD_LOAD)
    p99 = normal.trace.ranked_within_ms(99)
    rejection_p99 = percentile(overload.trace.latency_ms(REJECTED), 99)
    errors = sum(result.trace.errors for result in first.loads)
    outcome = f"{'running' if first.is_alive else 'crashed'}, {errors} errors"
    goals = [
        _upper_bound_goal(f"{size}: p99 of all requests at {NORMAL_LOAD:g} × saturation", p99, 50.0, "ms"),
        Goal(
            f"{OVERLOAD_LOAD:g} × saturation: no crash",
            "running, 0 errors",
            outcome,
            first.is_alive and not errors,
        ),
        _upper_bound_goal("memory growth from saturation to the end", 100 * first.memory_growth, 5.0, "%"),
        _upper_bound_goal(f"{OVERLOAD_LOAD:g} × saturation: p99 of rejections", rejection_p99, 10.0, "ms"),
        _upper_bound_goal(
            f"from {OVERLOAD_LOAD:g} to {NORMAL_LOAD:g} × saturation: recovery", first.recovery_s, 2.0, "s"
        ),
    ]
    metrics = {
        "saturation_per_s": first.saturation,
        "p99_normal_ms": p99 if p99 is not None and math.isfinite(p99) else None,
        "p99_rejected_ms": rejection_p99,
        "rss_growth": first.memory_growth if first.is_alive else None,
        "recovery_s": first.recovery_s,
    }
    return Report(tables, goals, {name: value for name, value in metrics.items() if value is not None})


def _upper_bound_goal(claim: str, value: float | None, bound: float, unit: str) -> Goal:
    measured = "none" if value is None else f"{value:.1f} {unit}"
    return Goal(claim, f"under {bound:g} {unit}", measured, value is not None and value < bound)


def _latency_table(service: ServiceResult, size: str, seconds: float) -> ReportTable:
    rows: list[list[CellValue]] = []
    for result in service.loads:
        trace, ranked = result.trace, result.trace.latency_ms()
        rows.append(
            [
                result.load,
                result.rate,
                trace.ranked_per_s(seconds),
                *(percentile(ranked, q) for q in (50, 90)),
                _p99(ranked),
                100 * trace.share(REJECTED),
                _p99(trace.latency_ms(REJECTED)),
                100 * trace.share(EXPIRED),
                trace.errors,
            ]
        )
    columns = [
        "load",
        "requests/s",
        "ranked/s",
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "rejected %",
        "rejected p99 ms",
        "expired %",
    ]
    note = f"latency in ms from the due time to the ranking or rejection; –: fewer than {MIN_P99_COUNT} responses"
    title = f"{service.cache.capitalize()}, {size}: saturation {service.saturation:.1f} requests/s"
    return ReportTable(title, [*columns, "errors"], rows, note)


def _sender_table(services: list[ServiceResult]) -> ReportTable:
    rows: list[list[CellValue]] = []
    is_late = False
    for service in services:
        for result in service.loads:
            trace = result.trace
            lag = percentile(trace.lag_ms, 99)
            is_late = is_late or (lag is not None and lag > MAX_LAG_MS)
            cpu_percent = 100 * trace.cpu_s / trace.answered.max() if len(trace.due) else None
            median = percentile(trace.lag_ms, 50)
            memory = [result.before_mib, result.after_mib]
            row = [service.cache, result.load, len(trace.due), median, lag, cpu_percent, *memory]
            rows.append(row)
    columns = ["cache", "load", "requests", "lag p50 ms", "lag p99 ms", "generator CPU %", "MiB before", "MiB after"]
    note = "lag: delay of sending after the due time; MiB: resident memory of the service"
    if is_late:
        note += f". Lags above {MAX_LAG_MS:g} ms: the load generator was too slow, and latencies include its delays"
    return ReportTable("Load generator, and memory of the service", columns, rows, note)


def _recovery_table(services: list[ServiceResult]) -> ReportTable:
    rows: list[list[CellValue]] = [
        [service.cache, service.saturation, service.limit_ms, service.recovery_s] for service in services
    ]
    note = (
        "recovery: start of the first 0.5 s with all requests ranked within the limit, twice the p99 of the lower load"
    )
    return ReportTable(
        f"Recovery: {OVERLOAD_LOAD:g} × saturation, then {NORMAL_LOAD:g}",
        ["cache", "saturation, requests/s", "limit ms", "recovery s"],
        rows,
        note,
    )


def _p99(values: np.ndarray) -> float | None:
    return percentile(values, 99) if len(values) >= MIN_P99_COUNT else None


def log(line: str) -> None:
    """Print a progress line to stderr."""
    print(f"serve_load: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(__file__, __doc__, Settings, QUICK, measure)
