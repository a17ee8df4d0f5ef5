"""How does a training step scale with the number of ranks, the rows of a table and the length of the history?

The training step is that of `a2gen train`: the sharded model, its fused and dense optimizers, and TorchRec's pipeline.
Batches are collated in advance, so that reading is not timed.

- ranks: the same windows of a simulated log are distributed over all ranks, which start with the same weights. Their
  losses are compared before timing. Bytes are counted at every collective call: those of an all-to-all that leave the
  rank, and 2 (ranks - 1) / ranks of an all-reduce, as in a ring.
- rows: the same windows, with items redrawn with Zipf frequencies from tables of increasing size.
- history: the same targets with histories of increasing length. For a truncated window, the model must give the same
  result as for the full one with the same maximum history.

Under torchrun, the ranks are those of the job; otherwise, they are processes of this machine.
"""

import os
import tempfile
import uuid
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from harness import CellValue, Report, ReportTable, Timing, interleave, main
from simulated_data import WindowSample, make_dataset
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from a2gen_rec.config import Config
from a2gen_rec.data.batch import WindowBatch
from a2gen_rec.data.collate import collate
from a2gen_rec.data.schema import ITEM_ID
from a2gen_rec.errors import ConfigError
from a2gen_rec.losses.loss import term_means, total_loss
from a2gen_rec.models.embedding_tables import EmbeddingTables
from a2gen_rec.training.build import TrainingModel, build_training_model
from a2gen_rec.utils.distributed import DistributedContext, all_gather_object, all_reduce_sum, process_group
from a2gen_rec.utils.warning_filters import silence_known_warnings

GIB = 2**30


@dataclass
class Settings:
    """Sizes and repetitions.

    Attributes:
        ranks: numbers of processes; ignored under torchrun.
        rows: rows of the item table in the sweep of rows.
        histories: lengths of the history in the sweep of histories.
        history: length of the history in the other sweeps.
        rows_dim: width of the tables in the sweep of rows.
        zipf: Zipf exponent of the item ids in the sweep of rows.
        memory_gib: maximum total memory of the tables in the sweep of rows; larger tables are skipped.
        windows: user windows of one step over all ranks, of up to 64 targets each.
        steps: batches of one pass.
        passes: timed passes of each round.
        rounds: number of times that every number of ranks is launched.
        users: simulated users.
        items: simulated items.
        impressions_per_user: simulated impressions of each user.
        seed: random seed.
    """

    ranks: list[int] = field(default_factory=lambda: [1, 2, 4])
    rows: list[int] = field(default_factory=lambda: [100_000, 1_000_000, 10_000_000, 100_000_000])
    histories: list[int] = field(default_factory=lambda: [10, 50, 100, 200, 500])
    history: int = 100
    rows_dim: int = 16
    zipf: float = 1.05
    memory_gib: float = 8.0
    windows: int = 16
    steps: int = 6
    passes: int = 5
    rounds: int = 2
    users: int = 100
    items: int = 20_000
    impressions_per_user: int = 900
    seed: int = 0

    def __post_init__(self) -> None:
        sizes: dict[str, int] = {name: min(getattr(self, name), default=0) for name in ("ranks", "rows", "histories")}
        names = ("history", "windows", "steps", "passes", "rounds", "users", "items", "impressions_per_user")
        for name, minimum in (sizes | {name: getattr(self, name) for name in names}).items():
            if minimum < 1:
                raise ConfigError(f"{name} must be at least 1")
        if max(self.ranks) > self.windows:
            raise ConfigError(f"windows {self.windows} must be at least the number of ranks {max(self.ranks)}")
        if self.zipf <= 0 or self.zipf == 1:
            raise ConfigError(f"zipf {self.zipf} must be above 0 and not 1")


QUICK = {
    "ranks": [1, 2],
    "rows": [100_000, 1_000_000, 10_000_000],
    "histories": [10, 100, 500],
    "steps": 2,
    "passes": 3,
    "rounds": 1,
}


def read_windows(dataset: str, settings: Settings) -> WindowSample:
    """Read the windows of all sweeps, with the longest required history."""
    max_history = max(*settings.histories, settings.history)
    return WindowSample.from_dataset(dataset, settings.windows * settings.steps, max_history, settings.seed)


class Job:
    """Sharded model and its batches on this rank."""

    def __init__(self, sample: WindowSample, config: Config, settings: Settings, process: DistributedContext) -> None:
        self.config, self.process = config, process
        self.built = build_training_model(sample.card, config, process)
        self.batches = make_batches(sample, config, settings, process)
        self.targets = sum(int(batch.counts[0]) for batch in self.batches)
        self.pipeline = TrainPipelineSparseDist(self.built.model_parallel, self.built.optimizer, process.device)

    def run(self) -> list[torch.Tensor]:
        """Train on all batches and return the sums of the loss terms of each step on this rank."""
        self.built.model_parallel.train()
        batches = iter(self.batches)
        return [self.pipeline.progress(batches)[0] for _ in self.batches]

    def losses(self) -> list[float]:
        """Train on all batches and return the loss of each step over all ranks."""
        return [global_loss(sums, batch, self.config) for sums, batch in zip(self.run(), self.batches, strict=True)]


def make_batches(
    sample: WindowSample, config: Config, settings: Settings, process: DistributedContext
) -> list[WindowBatch]:
    """Collate this rank's windows of every step, with global counts."""
    tables = EmbeddingTables.from_card(sample.card, config.model).full_tables
    batches = []
    for first in range(0, len(sample.columns), settings.windows):
        rows = np.arange(first, first + settings.windows)[process.rank :: process.world_size]
        batch = collate(sample.columns, rows, tables, config.loader.deduplicate_ids)
        batches.append(replace(batch, counts=all_reduce_sum(batch.counts.clone())))
    return batches


def global_loss(sums: torch.Tensor, batch: WindowBatch, config: Config) -> float:
    """Return the loss over all ranks from the sums of the loss terms on this rank."""
    return float(total_loss(term_means(all_reduce_sum(sums.double().cpu()), batch.counts), config.loss))


class TrafficCounter(TorchDispatchMode):
    """Counts the bytes that this rank sends to others in collective calls, by kind of call."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        if func is torch.ops.c10d.alltoall_base_.default:
            tensor, splits = args[1], args[4] or [1] * world_size
            self.sent["all-to-all"] += tensor.nbytes * (1 - splits[rank] / max(sum(splits), 1))
        elif func is torch.ops.c10d.allreduce_.default:
            self.sent["all-reduce"] += sum(tensor.nbytes for tensor in args[0]) * 2 * (world_size - 1) / world_size
        return func(*args, **(kwargs or {}))


@dataclass
class RankResult:
    """Results of one rank.

    Attributes:
        ranks: number of ranks of the job.
        threads: threads of the rank.
        losses: loss of each step.
        seconds: seconds of each pass.
        sent: bytes sent in one pass, by kind of call.
        targets: targets of one pass over all ranks.
    """

    ranks: int
    threads: int
    losses: list[float]
    seconds: list[float]
    sent: Counter[str]
    targets: int


def run_on_ranks(dataset: str, settings: Settings, process: DistributedContext) -> RankResult:
    """Run one round on the ranks of this job."""
    config = Config()
    config.train.seed = settings.seed
    sample = read_windows(dataset, settings).with_history(settings.history)
    job = Job(sample, config, settings, process)
    init_identical(job.built, config)
    losses = job.losses()
    with TrafficCounter() as counter:
        job.run()
    timing = interleave({"pass": job.run}, settings.passes, 1, process.device)["pass"]
    return RankResult(process.world_size, torch.get_num_threads(), losses, timing.seconds, counter.sent, job.targets)


def init_identical(built: TrainingModel, config: Config) -> None:
    """Initialize the tables with weights that do not depend on the sharding."""
    weights = {
        name: value for name, value in built.model_parallel.state_dict().items() if hasattr(value, "local_shards")
    }
    generator = torch.Generator().manual_seed(config.train.seed)
    for _, value in sorted(weights.items()):
        full = torch.empty(value.size()).uniform_(-0.1, 0.1, generator=generator)
        for shard in value.local_shards():
            (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            shard.tensor.detach().copy_(full[row : row + rows, column : column + columns])


def rank_main(dataset: str, settings: Settings, device: str) -> RankResult:
    """Entry point of a new rank process: set up the process group and call :func:`run_on_ranks`."""
    silence_known_warnings()
    with process_group(device) as process:  # type: ignore[arg-type]
        torch.set_num_threads(max(1, torch.get_num_threads() // process.local_world_size))
        return run_on_ranks(dataset, settings, process)


def launch_ranks(ranks: int, dataset: str, settings: Settings, device: str) -> list[RankResult]:
    """Run one round on ``ranks`` new processes of this machine."""
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn",
    )
    return list(elastic_launch(launch, rank_main)(dataset, settings, device).values())


def num_cores() -> int:
    """Return the number of cores available to this process."""
    return len(os.sched_getaffinity(0))


def measure(settings: Settings, process: DistributedContext) -> Report:
    max_history = max(*settings.histories, settings.history)
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(
            Path(folder, "dataset"),
            settings.users,
            settings.items,
            settings.impressions_per_user,
            history=max_history,
            seed=settings.seed,
        )
        sample = read_windows(dataset, settings)
        rounds = run_all_rank_counts(dataset, settings, process)
    check_losses(rounds)
    sweeps = [
        sweep_ranks(rounds, settings, process),
        sweep_rows(sample, settings, process),
        sweep_histories(sample, settings, process),
    ]
    metrics = {name: value for _, sweep_metrics in sweeps for name, value in sweep_metrics.items()}
    return Report([table for table, _ in sweeps], metrics=metrics)


def run_all_rank_counts(
    dataset: str, settings: Settings, process: DistributedContext
) -> dict[int, list[list[RankResult]]]:
    """Return number of ranks -> rounds -> results of each rank. The numbers take turns."""
    if dist.is_torchelastic_launched():
        return {process.world_size: [all_gather_object(run_on_ranks(dataset, settings, process))]}
    device = process.device.type
    counts = [ranks for ranks in settings.ranks if device == "cpu" or ranks <= torch.cuda.device_count()]
    results: dict[int, list[list[RankResult]]] = {ranks: [] for ranks in counts}
    for _ in range(settings.rounds):
        for ranks in counts:
            results[ranks].append(launch_ranks(ranks, dataset, settings, device))
    return results


def check_losses(rounds: dict[int, list[list[RankResult]]]) -> None:
    """Check that the losses do not depend on the number of ranks."""
    (min_ranks, expected), *others = ((ranks, torch.tensor(results[0][0].losses)) for ranks, results in rounds.items())
    for ranks, losses in others:
        check_close(losses, expected, f"losses on {ranks} and on {min_ranks} ranks")


def check_close(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6, msg=lambda reason: f"{name} differ: {reason}")


SweepResult = tuple[ReportTable, dict[str, float]]


def sweep_ranks(
    rounds: dict[int, list[list[RankResult]]], settings: Settings, process: DistributedContext
) -> SweepResult:
    rows: list[list[CellValue]] = []
    metrics: dict[str, float] = {}
    baseline = 0.0
    for ranks, results in rounds.items():
        timing = Timing([seconds for rank_results in results for seconds in rank_results[0].seconds])
        main_rank, targets = results[0][0], results[0][0].targets
        speeds = [targets / seconds for seconds in (timing.median, timing.p90, timing.p10)]
        baseline = baseline or speeds[0]
        sent = [
            sum(rank_result.sent[kind] for rank_result in results[0]) / targets / 1000
            for kind in ("all-to-all", "all-reduce")
        ]
        oversubscribed = process.device.type == "cpu" and ranks > num_cores()
        name = f"{ranks}, oversubscribed" if oversubscribed else str(ranks)
        rows.append([name, main_rank.threads, *speeds, speeds[0] / baseline, *sent, main_rank.losses[-1]])
        metrics |= {f"targets_per_s_{ranks}_ranks": speeds[0], f"kb_per_target_{ranks}_ranks": sum(sent)}
    columns = ["ranks", "threads", "targets/s", "p10 targets/s", "p90 targets/s", "speed-up"]
    columns += ["all-to-all kB/target", "all-reduce kB/target", "loss"]
    note = (
        f"{settings.windows} windows with {settings.history} history impressions per step over all ranks; "
        f"{num_cores()} cores; threads per rank; loss after {settings.steps} steps, checked to be equal before timing."
    )
    return ReportTable("Ranks: the same steps", columns, rows, note), metrics


def sweep_rows(sample: WindowSample, settings: Settings, process: DistributedContext) -> SweepResult:
    config = Config()
    config.train.seed, config.model.dim = settings.seed, settings.rows_dim
    jobs: dict[str, Job] = {}
    kept, skipped, total_gib = [], [], 0.0
    for rows in sorted(settings.rows):
        gib = 4 * rows * (settings.rows_dim + 1) / process.world_size / GIB
        if total_gib + gib > settings.memory_gib:
            skipped.append(f"{rows:,}")
            continue
        total_gib += gib
        kept.append((rows, gib))
        resampled = sample.with_history(settings.history).with_items(rows, settings.zipf, settings.seed)
        jobs[str(rows)] = Job(resampled, config, settings, process)
    timings = interleave({name: job.run for name, job in jobs.items()}, settings.passes, 1, process.device)
    table: list[list[CellValue]] = []
    for rows, gib in kept:
        job, timing = jobs[str(rows)], timings[str(rows)]
        distinct = sum(len(batch.sparse[ITEM_ID].values()) for batch in job.batches) / len(job.batches)
        table.append([rows, gib, distinct, *step_ms(timing, settings), timing.median / timings[str(kept[0][0])].median])
    columns = ["item rows", "GiB per rank", "distinct items", "ms/step", "p10 ms", "p90 ms", "× fewest rows"]
    note = (
        f"Dimension {settings.rows_dim}, float32, one optimizer value per row, at most {settings.memory_gib:g} GiB in "
        f"total; Zipf exponent {settings.zipf:g}; distinct items per rank and step."
    )
    if skipped:
        note += f" Skipped: {', '.join(skipped)}."
    metrics = {f"step_ms_{rows}_rows": 1000 * timings[str(rows)].median / settings.steps for rows, _ in kept}
    return ReportTable("Rows of the item table", columns, table, note), metrics


def sweep_histories(sample: WindowSample, settings: Settings, process: DistributedContext) -> SweepResult:
    jobs: dict[str, Job] = {}
    for history in sorted(settings.histories):
        config = Config()
        config.train.seed, config.model.max_history = settings.seed, history
        job = jobs[str(history)] = Job(sample.with_history(history), config, settings, process)
        check_truncated_windows(job, sample, settings)
    timings = interleave({name: job.run for name, job in jobs.items()}, settings.passes, 1, process.device)
    shortest = next(iter(timings.values())).median
    table: list[list[CellValue]] = []
    for name, job in jobs.items():
        timing = timings[name]
        impressions = sum(int(batch.lengths.sum()) for batch in job.batches) / len(job.batches)
        row: list[CellValue] = [int(name), impressions, *step_ms(timing, settings)]
        table.append([*row, job.targets / timing.median, timing.median / shortest])
    columns = ["history", "impressions", "ms/step", "p10 ms", "p90 ms", "targets/s", "× shortest history"]
    metrics = {f"step_ms_history_{name}": 1000 * timing.median / settings.steps for name, timing in timings.items()}
    return ReportTable("History: the same targets", columns, table, "Impressions of a rank's batch."), metrics


def check_truncated_windows(job: Job, sample: WindowSample, settings: Settings) -> None:
    """Check that the model gives the same contexts for truncated and full windows with the same maximum history."""
    job.built.model_parallel.eval()
    truncated, full = job.batches[0], make_batches(sample, job.config, settings, job.process)[0]
    with torch.no_grad():
        outputs = [job.built.model_parallel(batch.to(job.process.device))[1][1] for batch in (truncated, full)]
    check_close(outputs[0].context, outputs[1].context, "contexts of targets in truncated and full windows")


def step_ms(timing: Timing, settings: Settings) -> list[float]:
    """Return the median, 10th and 90th percentile of a step in milliseconds."""
    return [1000 * seconds / settings.steps for seconds in (timing.median, timing.p10, timing.p90)]


if __name__ == "__main__":
    main(__file__, __doc__, Settings, QUICK, measure)
