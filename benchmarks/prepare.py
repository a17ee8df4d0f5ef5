"""How fast is `a2gen prepare`, and how do its time and memory grow with the size of the log?

The logs are simulated in several sizes. The time is that of the full command, from the start of the interpreter to the
summary. Peak memory is the resident memory of the process. Before timing, each dataset is checked: its targets and the
dropped rows of its card add up to the log, and the loader's first windows of every split are of the log.

Another log is stored as one file and as many small files. The difference in time, divided by the number of files, is
the cost of a file. Both datasets are equal.
"""

import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from harness import Goal, Report, ReportTable, interleave, main
from many_files import FORMATS, ROWS_PER_FILE, SPEC, make_rows, write_files

from a2gen_rec.config import LoaderConfig, PrepareConfig, SimulateConfig
from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.loader import WindowDataset
from a2gen_rec.data.schema import SPLITS
from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.simulation.simulator import simulate
from a2gen_rec.utils.distributed import DistributedContext

MIB = 2**20
MAX_MS_PER_FILE = 2.0
QUICK = {"impressions": [100_000, 1_000_000], "files": 1_000, "repeats": 2}
# VmHWM restarts with each exec. The ru_maxrss that a parent reads includes the memory from before the exec.
PEAK_MEMORY_PROGRAM = """
from a2gen_rec.cli.main import main
main()
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


@dataclass(frozen=True)
class Settings:
    """Sizes of the logs, and options of `a2gen prepare`.

    Attributes:
        impressions: approximate sizes of the logs.
        impressions_per_user: mean impressions of a user.
        files: number of files of the log of many small files; 0 for none.
        memory_limit_gb: memory limit of `a2gen prepare`.
        threads: threads of `a2gen prepare`; 0 uses all cores.
        repeats: timed runs of each size.
        seed: random seed.
    """

    impressions: Sequence[int] = (100_000, 1_000_000, 10_000_000)
    impressions_per_user: int = 100
    files: int = 10_000
    memory_limit_gb: float = PrepareConfig.memory_limit_gb
    threads: int = PrepareConfig.threads
    repeats: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Preparation:
    """One log, its dataset, the peak memory of each run in MiB, and the arguments of its source."""

    log: Path
    dataset: Path
    peaks: list[float]
    source: Sequence[str] = ("simulated",)

    def run(self, settings: Settings) -> None:
        """Run `a2gen prepare` in a new process and record its peak memory."""
        shutil.rmtree(self.dataset, ignore_errors=True)
        arguments = ["prepare", *self.source, "--raw", str(self.log), "--out", str(self.dataset)]
        limits = ["--memory-limit-gb", str(settings.memory_limit_gb), "--threads", str(settings.threads)]
        completed = subprocess.run(
            [sys.executable, "-c", PEAK_MEMORY_PROGRAM, *arguments, *limits], capture_output=True, text=True
        )
        if completed.returncode:
            raise UserError(f"a2gen prepare failed: {completed.stderr.strip()}")
        self.peaks.append(int(completed.stdout.split()[-1]) / 1024)


def measure(settings: Settings, process: DistributedContext) -> Report:
    if process.world_size > 1:
        raise ConfigError(f"`a2gen prepare` runs in one process: use one rank, not {process.world_size}")
    logs = sorted(set(settings.impressions))
    if not logs or logs[0] < 1:
        raise ConfigError(f"impressions {list(settings.impressions)} must be one or more positive numbers")
    with tempfile.TemporaryDirectory() as scratch:
        jobs = [Preparation(Path(scratch, f"log-{n}"), Path(scratch, f"dataset-{n}"), []) for n in logs]
        for job, impressions in zip(jobs, logs, strict=True):
            write_log(job.log, impressions, settings)
            job.run(settings)
            check_dataset(job.log, job.dataset)
            job.peaks.clear()
        runs = {job.log.name: partial(job.run, settings) for job in jobs}
        timings = list(interleave(runs, settings.repeats, warmup=0).values())
        sizes = [count_rows(job.log) for job in jobs]
        stored = [sum(file.stat().st_size for file in job.dataset.rglob("*.parquet")) / MIB for job in jobs]
    peaks = [statistics.median(job.peaks) for job in jobs]
    speeds = [size / timing.median for size, timing in zip(sizes, timings, strict=True)]
    table = ReportTable(
        title=f"a2gen prepare --memory-limit-gb {settings.memory_limit_gb:g}",
        columns=["impressions", "median s", "p10 s", "p90 s", "impressions/s", "peak MiB", "dataset MiB"],
        rows=[
            [size, timing.median, timing.p10, timing.p90, speed, peak, volume]
            for size, timing, speed, peak, volume in zip(sizes, timings, speeds, peaks, stored, strict=True)
        ],
    )
    metrics = {"impressions_per_s": speeds[-1], "peak_mib": peaks[-1]}
    if len(logs) > 1:
        metrics["time_exponent"] = growth_exponent(sizes, [timing.median for timing in timings])
        metrics["memory_exponent"] = growth_exponent(sizes, peaks)
        table.note = (
            f"Time grows as impressions^{metrics['time_exponent']:.2f}, "
            f"peak memory as impressions^{metrics['memory_exponent']:.2f} (slopes of log-log fits)."
        )
    report = Report([table], metrics=metrics)
    if settings.files:
        measure_files(settings, report)
    return report


def measure_files(settings: Settings, report: Report) -> None:
    """Add the time per file of a log of many small files to the report."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, rows = Path(scratch), make_rows(settings.files * ROWS_PER_FILE, settings.seed)
        (folder / "spec.yaml").write_text(SPEC)
        source = ("generic", "--spec", str(folder / "spec.yaml"))
        jobs = {}
        for file_format in FORMATS:
            for count in (1, settings.files):
                log, dataset = (folder / f"{kind}-{file_format}-{count}" for kind in ("log", "dataset"))
                write_files(log, rows, count, file_format)
                jobs[file_format, count] = Preparation(log, dataset, [], source)
        runs = {f"{file_format} {count}": partial(job.run, settings) for (file_format, count), job in jobs.items()}
        timings = interleave(runs, settings.repeats, warmup=0)
        contents = {name: window_bytes(job.dataset) for name, job in jobs.items()}
    if any(content != contents[FORMATS[0], 1] for content in contents.values()):
        raise RuntimeError("the datasets of equal rows differ")
    table = ReportTable(
        title=f"{len(rows):,} impressions in {settings.files:,} files",
        columns=["format", "1 file: median s", f"{settings.files:,} files: median s", "ms per file", "peak MiB"],
        rows=[],
    )
    for file_format in FORMATS:
        one, many = (timings[f"{file_format} {count}"].median for count in (1, settings.files))
        ms = 1000 * (many - one) / settings.files
        table.rows.append([file_format, one, many, ms, statistics.median(jobs[file_format, settings.files].peaks)])
        claim = f"a small {file_format} file costs little"
        report.goals.append(Goal(claim, f"under {MAX_MS_PER_FILE:g} ms", f"{ms:.2f} ms", ms < MAX_MS_PER_FILE))
        report.metrics[f"{file_format}_ms_per_file"] = ms
    report.tables.append(table)


def window_bytes(dataset: Path) -> dict[str, bytes]:
    """Return the windows' files of a dataset by name."""
    return {file.relative_to(dataset).as_posix(): file.read_bytes() for file in sorted(dataset.glob("*/*.parquet"))}


def write_log(folder: Path, impressions: int, settings: Settings) -> None:
    """Simulate a log with about ``impressions`` impressions."""
    users = max(1, impressions // settings.impressions_per_user)
    items = max(100, users // 2)
    config = SimulateConfig(
        users=users,
        items=items,
        authors=items // 5,
        impressions_per_user=settings.impressions_per_user,
        seed=settings.seed,
    )
    simulate(str(folder), config)


def count_rows(log: Path) -> int:
    """Return the number of impressions of a log."""
    return sum(pq.read_metadata(file).num_rows for file in log.glob("impressions/*.parquet"))


def check_dataset(log: Path, dataset: Path) -> None:
    """Check that the dataset accounts for the full log and that the loader reads impressions of the log.

    Raises:
        RuntimeError: it does not.
    """
    prepared = Dataset.open(str(dataset))
    card = prepared.card
    targets = sum(split.targets for split in card.splits.values())
    dropped = sum(card.dropped_rows.values())
    if targets + dropped != count_rows(log):
        raise RuntimeError(
            f"{targets:,} targets and {dropped:,} dropped rows do not add up to {count_rows(log):,} impressions"
        )
    for split in SPLITS:
        stream = WindowDataset(prepared, split, LoaderConfig(), full_tables={}, shuffle=False)
        read = batch_impressions(next(iter(stream)), dataset / split)
        users = pc.field("user_id").isin({user for user, _ in read})
        logged = pq.read_table(log / "impressions", columns=["user_id", "ts_ms"], filters=users)
        if not read or not read <= set(zip(*logged.to_pydict().values(), strict=True)):
            raise RuntimeError(f"the first windows of {split} contain impressions that are not in the log")


def batch_impressions(batch: WindowBatch, split: Path) -> set[tuple[int, int]]:
    """Return the raw user id and the start time in ms of every impression of a batch."""
    windows = pq.read_table(split, columns=["user_key", "user"]).to_pydict()
    user_ids = dict(zip(windows["user_key"], map(int, windows["user"]), strict=True))
    keys = batch.user_key.repeat_interleave(batch.lengths).tolist()
    return {(user_ids[key], ts_ms) for key, ts_ms in zip(keys, batch.ts_ms.tolist(), strict=True)}


def growth_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the slope of the least-squares line through (log size, log value)."""
    slope, _ = np.polyfit(np.log(sizes), np.log(values), 1)
    return float(slope)


if __name__ == "__main__":
    main(__file__, __doc__, Settings, QUICK, measure)
