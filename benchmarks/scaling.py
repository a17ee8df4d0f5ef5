"""How does a training step scale with ranks, with the rows of a table and with the length of the history?

The training step is the real one: the model as training builds and shards it, its fused and dense optimizers, and
TorchRec's pipeline. Batches are made beforehand, so no reading is timed.

- ranks: the same windows of a simulated log are dealt out to all ranks, which begin with the same weights; their
  losses must be equal before anything is timed. Bytes are counted at every collective call: what of an all-to-all
  leaves its rank, and 2 (ranks - 1) / ranks of an all-reduce, a ring's share.
- rows: the same windows, their items redrawn with Zipf frequencies from ever larger tables.
- history: the same targets with ever more of the impressions before them; the model must make of a cut window what
  it makes of the full one with the same bound on its history.

Under torchrun, the ranks are those of the job. Alone, ranks are processes of this machine.
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
from harness import Cell, Report, ReportTable, Timing, interleave, main
from simulated_data import World, simulated
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from a2gen_rec.config import Config
from a2gen_rec.data.batch import WindowBatch, collate
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
        ranks: numbers of processes; passed over under torchrun, where they are given.
        history: of the ranks' and the rows' sweep.
        rows: of the item table, beside ``rows_dim``, its width in that sweep; ``zipf``: exponent of its ids.
        memory_gib: tables of the rows' sweep that would need more, together with the smaller ones, are left out.
        windows: user windows of a step over all ranks, of up to 64 targets each; ``steps``: batches of one pass.
        passes: timed, per round; rounds: times that every number of ranks is started.
        users, items, impressions_per_user: of the simulated log.
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
        for name, least in (sizes | {name: getattr(self, name) for name in names}).items():
            if least < 1:
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


def read_world(dataset: str, settings: Settings) -> World:
    """The windows of all sweeps, with the longest history any of them needs."""
    longest = max(*settings.histories, settings.history)
    return World.read(dataset, settings.windows * settings.steps, longest, settings.seed)


class Job:
    """A sharded model and its batches, on this rank."""

    def __init__(self, world: World, config: Config, settings: Settings, process: DistributedContext) -> None:
        self.config, self.process = config, process
        self.built = build_training_model(world.card, config, process)
        self.batches = batches(world, config, settings, process)
        self.targets = sum(int(batch.counts[0]) for batch in self.batches)
        self.pipeline = TrainPipelineSparseDist(self.built.model_parallel, self.built.optimizer, process.device)

    def run(self) -> list[torch.Tensor]:
        """Step through all batches; the sums of the loss terms on this rank, step by step."""
        self.built.model_parallel.train()
        coming = iter(self.batches)
        return [self.pipeline.progress(coming)[0] for _ in self.batches]

    def losses(self) -> list[float]:
        """Step through all batches; the loss over all ranks, step by step."""
        return [global_loss(sums, batch, self.config) for sums, batch in zip(self.run(), self.batches, strict=True)]


def batches(world: World, config: Config, settings: Settings, process: DistributedContext) -> list[WindowBatch]:
    """This rank's part of every step's windows, with global counts."""
    whole = EmbeddingTables.from_card(world.card, config.model).full_tables
    made = []
    for begin in range(0, len(world.columns), settings.windows):
        rows = np.arange(begin, begin + settings.windows)[process.rank :: process.world_size]
        batch = collate(world.columns, rows, whole, config.loader.deduplicate_ids)
        made.append(replace(batch, counts=all_reduce_sum(batch.counts.clone())))
    return made


def global_loss(sums: torch.Tensor, batch: WindowBatch, config: Config) -> float:
    return float(total_loss(term_means(all_reduce_sum(sums.double().cpu()), batch.counts), config.loss))


class Traffic(TorchDispatchMode):
    """Counts the bytes that collective calls send from this rank to others, by kind of call."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        rank, world = dist.get_rank(), dist.get_world_size()
        if func is torch.ops.c10d.alltoall_base_.default:
            given, splits = args[1], args[4] or [1] * world
            self.sent["all-to-all"] += given.nbytes * (1 - splits[rank] / max(sum(splits), 1))
        elif func is torch.ops.c10d.allreduce_.default:
            self.sent["all-reduce"] += sum(part.nbytes for part in args[0]) * 2 * (world - 1) / world
        return func(*args, **(kwargs or {}))


@dataclass
class RankResult:
    """What one rank of a job of ``ranks`` tells: losses, seconds of each pass, bytes sent in one, targets of one."""

    ranks: int
    threads: int
    losses: list[float]
    seconds: list[float]
    sent: Counter[str]
    targets: int


def run_on_ranks(dataset: str, settings: Settings, process: DistributedContext) -> RankResult:
    """One round on the ranks of this job."""
    config = Config()
    config.train.seed = settings.seed
    world = read_world(dataset, settings).with_history(settings.history)
    job = Job(world, config, settings, process)
    init_identical(job.built, config)
    losses = job.losses()
    with Traffic() as traffic:
        job.run()
    timing = interleave({"pass": job.run}, settings.passes, 1, process.device)["pass"]
    return RankResult(process.world_size, torch.get_num_threads(), losses, timing.seconds, traffic.sent, job.targets)


def init_identical(built: TrainingModel, config: Config) -> None:
    """Fill the tables with weights that do not depend on how they are sharded."""
    weights = {
        name: value for name, value in built.model_parallel.state_dict().items() if hasattr(value, "local_shards")
    }
    generator = torch.Generator().manual_seed(config.train.seed)
    for _, value in sorted(weights.items()):
        whole = torch.empty(value.size()).uniform_(-0.1, 0.1, generator=generator)
        for shard in value.local_shards():
            (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            shard.tensor.detach().copy_(whole[row : row + rows, column : column + columns])


def as_rank(dataset: str, settings: Settings, device: str) -> RankResult:
    """:func:`run_on_ranks` in a process that has just been started as a rank."""
    silence_known_warnings()
    with process_group(device) as process:  # type: ignore[arg-type]
        torch.set_num_threads(max(1, torch.get_num_threads() // process.local_world_size))
        return run_on_ranks(dataset, settings, process)


def start(ranks: int, dataset: str, settings: Settings, device: str) -> list[RankResult]:
    """Run one round on so many new processes of this machine."""
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
    return list(elastic_launch(launch, as_rank)(dataset, settings, device).values())


def cores() -> int:
    return len(os.sched_getaffinity(0))


def measure(settings: Settings, process: DistributedContext) -> Report:
    longest = max(*settings.histories, settings.history)
    with tempfile.TemporaryDirectory() as folder:
        dataset = simulated(
            Path(folder, "dataset"),
            settings.users,
            settings.items,
            settings.impressions_per_user,
            history=longest,
            seed=settings.seed,
        )
        world = read_world(dataset, settings)
        rounds = on_all_ranks(dataset, settings, process)
    check_losses(rounds)
    sweeps = [
        sweep_ranks(rounds, settings, process),
        sweep_rows(world, settings, process),
        sweep_histories(world, settings, process),
    ]
    figures = {name: value for _, own in sweeps for name, value in own.items()}
    return Report([table for table, _ in sweeps], figures=figures)


def on_all_ranks(dataset: str, settings: Settings, process: DistributedContext) -> dict[int, list[list[RankResult]]]:
    """Number of ranks -> rounds -> what each rank tells. The numbers take turns."""
    if dist.is_torchelastic_launched():
        return {process.world_size: [all_gather_object(run_on_ranks(dataset, settings, process))]}
    device = process.device.type
    counts = [ranks for ranks in settings.ranks if device == "cpu" or ranks <= torch.cuda.device_count()]
    found: dict[int, list[list[RankResult]]] = {ranks: [] for ranks in counts}
    for _ in range(settings.rounds):
        for ranks in counts:
            found[ranks].append(start(ranks, dataset, settings, device))
    return found


def check_losses(rounds: dict[int, list[list[RankResult]]]) -> None:
    """Every number of ranks learns the same from the same windows."""
    (fewest, first), *others = ((ranks, torch.tensor(told[0][0].losses)) for ranks, told in rounds.items())
    for ranks, losses in others:
        check_close(losses, first, f"losses on {ranks} and on {fewest} ranks")


def check_close(found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6, msg=lambda why: f"{what} differ: {why}")


Swept = tuple[ReportTable, dict[str, float]]


def sweep_ranks(rounds: dict[int, list[list[RankResult]]], settings: Settings, process: DistributedContext) -> Swept:
    rows: list[list[Cell]] = []
    figures: dict[str, float] = {}
    slowest = 0.0
    for ranks, told in rounds.items():
        timing = Timing([seconds for members in told for seconds in members[0].seconds])
        leader, targets = told[0][0], told[0][0].targets
        speeds = [targets / seconds for seconds in (timing.median, timing.p90, timing.p10)]
        slowest = slowest or speeds[0]
        sent = [sum(member.sent[kind] for member in told[0]) / targets / 1000 for kind in ("all-to-all", "all-reduce")]
        over = process.device.type == "cpu" and ranks > cores()
        name = f"{ranks}, oversubscribed" if over else str(ranks)
        rows.append([name, leader.threads, *speeds, speeds[0] / slowest, *sent, leader.losses[-1]])
        figures |= {f"targets_per_s_{ranks}_ranks": speeds[0], f"kb_per_target_{ranks}_ranks": sum(sent)}
    columns = ["ranks", "threads", "targets/s", "p10", "p90", "speed-up"]
    columns += ["all-to-all kB/target", "all-reduce kB/target", "loss"]
    note = (
        f"{settings.windows} windows with {settings.history} impressions of history per step over all ranks; "
        f"{cores()} cores, threads per rank; loss after {settings.steps} steps, equal before timing."
    )
    return ReportTable("Ranks: the same steps", columns, rows, note), figures


def sweep_rows(world: World, settings: Settings, process: DistributedContext) -> Swept:
    config = Config()
    config.train.seed, config.model.dim = settings.seed, settings.rows_dim
    jobs: dict[str, Job] = {}
    kept, left_out, needed = [], [], 0.0
    for rows in sorted(settings.rows):
        gib = 4 * rows * (settings.rows_dim + 1) / process.world_size / GIB
        if needed + gib > settings.memory_gib:
            left_out.append(f"{rows:,}")
            continue
        needed += gib
        kept.append((rows, gib))
        own = world.with_history(settings.history).with_items(rows, settings.zipf, settings.seed)
        jobs[str(rows)] = Job(own, config, settings, process)
    timings = interleave({name: job.run for name, job in jobs.items()}, settings.passes, 1, process.device)
    table: list[list[Cell]] = []
    for rows, gib in kept:
        job, timing = jobs[str(rows)], timings[str(rows)]
        distinct = sum(len(batch.sparse[ITEM_ID].values()) for batch in job.batches) / len(job.batches)
        table.append([rows, gib, distinct, *step_ms(timing, settings), timing.median / timings[str(kept[0][0])].median])
    columns = ["item rows", "GiB per rank", "distinct items", "ms/step", "p10", "p90", "× smallest"]
    note = (
        f"Dimension {settings.rows_dim}, float32, one moment per row, at most {settings.memory_gib:g} GiB in all; "
        f"Zipf exponent {settings.zipf:g}; distinct items a rank looks up per step."
    )
    if left_out:
        note += f" Left out for their size: {', '.join(left_out)}."
    figures = {f"step_ms_{rows}_rows": 1000 * timings[str(rows)].median / settings.steps for rows, _ in kept}
    return ReportTable("Rows of the item table", columns, table, note), figures


def sweep_histories(world: World, settings: Settings, process: DistributedContext) -> Swept:
    jobs: dict[str, Job] = {}
    for history in sorted(settings.histories):
        config = Config()
        config.train.seed, config.model.max_history = settings.seed, history
        job = jobs[str(history)] = Job(world.with_history(history), config, settings, process)
        check_truncated_windows(job, world, settings)
    timings = interleave({name: job.run for name, job in jobs.items()}, settings.passes, 1, process.device)
    shortest = next(iter(timings.values())).median
    table: list[list[Cell]] = []
    for name, job in jobs.items():
        timing = timings[name]
        impressions = sum(int(batch.lengths.sum()) for batch in job.batches) / len(job.batches)
        row: list[Cell] = [int(name), impressions, *step_ms(timing, settings)]
        table.append([*row, job.targets / timing.median, timing.median / shortest])
    columns = ["history", "impressions", "ms/step", "p10", "p90", "targets/s", "× shortest"]
    figures = {f"step_ms_history_{name}": 1000 * timing.median / settings.steps for name, timing in timings.items()}
    return ReportTable("History: the same targets", columns, table, "Impressions of a rank's batch."), figures


def check_truncated_windows(job: Job, world: World, settings: Settings) -> None:
    """The model makes of the cut windows what it makes of the full ones, of which it may see no more."""
    job.built.model_parallel.eval()
    cut, full = job.batches[0], batches(world, job.config, settings, job.process)[0]
    with torch.no_grad():
        outputs = [job.built.model_parallel(batch.to(job.process.device))[1][1] for batch in (cut, full)]
    check_close(outputs[0].context, outputs[1].context, "targets' contexts of cut and of full windows")


def step_ms(timing: Timing, settings: Settings) -> list[float]:
    return [1000 * seconds / settings.steps for seconds in (timing.median, timing.p10, timing.p90)]


if __name__ == "__main__":
    main(__file__, __doc__, Settings, QUICK, measure)
