"""How fast does `a2gen prepare` make a dataset of a log, and how do its time and memory grow with the log?

Simulated logs of several sizes. The whole command is timed, from the start of its interpreter to its summary, and peak
memory is the resident memory of its process. Before anything is timed, each dataset is checked: its targets and what
its card says was dropped make up the log, and the loader's first windows of every split hold impressions of the log.
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
from harness import Report, ReportTable, interleave, main

from a2gen_rec.config import LoaderConfig, PrepareConfig, SimulateConfig
from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.loader import WindowDataset
from a2gen_rec.data.schema import SPLITS
from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.simulation.simulator import simulate
from a2gen_rec.utils.distributed import DistributedContext

MIB = 2**20
QUICK = {"impressions": [100_000, 1_000_000], "repeats": 2}
# A process's peak begins anew with the program it executes; what its parent is told of it does not.
PROGRAM = """
from a2gen_rec.cli.main import main
main()
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


@dataclass(frozen=True)
class Settings:
    """What is prepared, and how.

    Attributes:
        impressions: sizes of the logs, about.
        impressions_per_user: their mean.
        memory_gb, threads: as `a2gen prepare` takes them; 0 threads are all cores.
        repeats: timed runs of each size.
    """

    impressions: Sequence[int] = (100_000, 1_000_000, 10_000_000)
    impressions_per_user: int = 100
    memory_gb: float = PrepareConfig.memory_limit_gb
    threads: int = PrepareConfig.threads
    repeats: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Preparation:
    """One log, the dataset made of it, and the peak memory in MiB of every time it was made."""

    log: Path
    dataset: Path
    peaks: list[float]

    def run(self, settings: Settings) -> None:
        shutil.rmtree(self.dataset, ignore_errors=True)
        arguments = ["prepare", "simulated", "--raw", str(self.log), "--out", str(self.dataset)]
        bounds = ["--memory-limit-gb", str(settings.memory_gb), "--threads", str(settings.threads)]
        done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments, *bounds], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"a2gen prepare failed: {done.stderr.strip()}")
        self.peaks.append(int(done.stdout.split()[-1]) / 1024)


def measure(settings: Settings, process: DistributedContext) -> Report:
    if process.world_size > 1:
        raise ConfigError(f"preparation is one process: measure it on one rank, not {process.world_size}")
    logs = sorted(set(settings.impressions))
    if not logs or logs[0] < 1:
        raise ConfigError(f"impressions {list(settings.impressions)} must be one positive number or more")
    with tempfile.TemporaryDirectory() as scratch:
        jobs = [Preparation(Path(scratch, f"log-{n}"), Path(scratch, f"dataset-{n}"), []) for n in logs]
        for job, impressions in zip(jobs, logs, strict=True):
            write_log(job.log, impressions, settings)
            job.run(settings)
            check(job.log, job.dataset)
            job.peaks.clear()
        forms = {job.log.name: partial(job.run, settings) for job in jobs}
        timings = list(interleave(forms, settings.repeats, warmup=0).values())
        sizes = [rows(job.log) for job in jobs]
        stored = [sum(file.stat().st_size for file in job.dataset.rglob("*.parquet")) / MIB for job in jobs]
    peaks = [statistics.median(job.peaks) for job in jobs]
    speeds = [size / timing.median for size, timing in zip(sizes, timings, strict=True)]
    table = ReportTable(
        title=f"a2gen prepare --memory-limit-gb {settings.memory_gb:g}",
        columns=["impressions", "s median", "s p10", "s p90", "impressions/s", "peak MiB", "dataset MiB"],
        rows=[
            [size, timing.median, timing.p10, timing.p90, speed, peak, volume]
            for size, timing, speed, peak, volume in zip(sizes, timings, speeds, peaks, stored, strict=True)
        ],
    )
    figures = {"impressions_per_s": speeds[-1], "peak_mib": peaks[-1]}
    if len(logs) > 1:
        figures["time_exponent"] = exponent(sizes, [timing.median for timing in timings])
        figures["memory_exponent"] = exponent(sizes, peaks)
        table.note = (
            f"Over these sizes, time grows like impressions^{figures['time_exponent']:.2f} "
            f"and peak memory like impressions^{figures['memory_exponent']:.2f} (slopes of log-log fits)."
        )
    return Report([table], figures=figures)


def write_log(folder: Path, impressions: int, settings: Settings) -> None:
    users = max(1, impressions // settings.impressions_per_user)
    items = max(100, users // 2)
    world = SimulateConfig(
        users=users,
        items=items,
        authors=items // 5,
        impressions_per_user=settings.impressions_per_user,
        seed=settings.seed,
    )
    simulate(str(folder), world)


def rows(log: Path) -> int:
    return sum(pq.read_metadata(file).num_rows for file in log.glob("impressions/*.parquet"))


def check(log: Path, dataset: Path) -> None:
    """Raise RuntimeError unless the dataset holds the whole log and the loader reads the log's impressions from it."""
    prepared = Dataset.open(str(dataset))
    card = prepared.card
    targets = sum(split.targets for split in card.splits.values())
    dropped = sum(card.dropped_rows.values())
    if targets + dropped != rows(log):
        raise RuntimeError(f"{targets:,} targets and {dropped:,} dropped are not the log's {rows(log):,} impressions")
    for split in SPLITS:
        stream = WindowDataset(prepared, split, LoaderConfig(), full_tables={}, shuffle=False)
        read = impressions_of(next(iter(stream)), dataset / split)
        known = pc.field("user_id").isin({user for user, _ in read})
        logged = pq.read_table(log / "impressions", columns=["user_id", "ts_ms"], filters=known)
        if not read or not read <= set(zip(*logged.to_pydict().values(), strict=True)):
            raise RuntimeError(f"the loader's first windows of {split} are not of the log")


def impressions_of(batch: WindowBatch, split: Path) -> set[tuple[int, int]]:
    """User and begin in ms of every impression of a batch, users as the log names them."""
    windows = pq.read_table(split, columns=["user_key", "user"]).to_pydict()
    user = dict(zip(windows["user_key"], map(int, windows["user"]), strict=True))
    keys = batch.user_key.repeat_interleave(batch.lengths).tolist()
    return {(user[key], begin) for key, begin in zip(keys, batch.ts_ms.tolist(), strict=True)}


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of the line through log(size), log(value)."""
    slope, _ = np.polyfit(np.log(sizes), np.log(values), 1)
    return float(slope)


if __name__ == "__main__":
    main(__file__, __doc__, Settings, QUICK, measure)
