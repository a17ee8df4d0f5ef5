"""How many embedding rows per second do sharded tables look up and update, and which share of memory bandwidth is that?

Two implementations of one table. Their looked-up rows and updated weights are compared before timing:

- sharded: an ``EmbeddingCollection`` sharded row-wise over all ranks, with row-wise Adagrad fused into the backward
  pass as in training. *dedup* looks up every distinct id once and expands the rows, as with the loader's batches;
- reference: ``nn.Embedding`` with a coalesced sparse gradient and row-wise Adagrad written in PyTorch, which has no
  row-wise optimizer. Every rank has a full, unsynchronized copy.

GB/s counts the required traffic: one row read and one written per lookup. The update adds the gradient read, and every
distinct row and its optimizer state read and written. The large copy used for comparison also counts reads and writes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from harness import CellValue, Report, ReportTable, Timing, interleave, main
from simulated_data import zipf_ids
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.nn import functional as F
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.optim import RowWiseAdagrad

from a2gen_rec.errors import ConfigError
from a2gen_rec.sharding.planner import make_sharders
from a2gen_rec.utils.distributed import DistributedContext, all_gather_object

VARIANTS = ("sharded", "dedup", "reference")
GIB = 2**30
LEARNING_RATE, EPSILON = 0.05, 1e-8


@dataclass
class Settings:
    """Sizes and repetitions.

    Attributes:
        rows: table rows; every pair of rows and dims is measured.
        dims: table widths.
        lookups: ids in one batch of one rank.
        zipf: exponent of the Zipf-distributed ids.
        memory_gib: maximum memory of both implementations on one rank; larger tables are skipped.
        repeats: timed runs of each variant.
        seed: random seed.
    """

    rows: list[int] = field(default_factory=lambda: [100_000, 1_000_000, 10_000_000])
    dims: list[int] = field(default_factory=lambda: [32, 64])
    lookups: int = 65_536
    zipf: float = 1.05
    memory_gib: float = 8.0
    repeats: int = 9
    seed: int = 0

    def __post_init__(self) -> None:
        for name, minimum in (("rows", min(self.rows, default=0)), ("dims", min(self.dims, default=0))):
            if minimum < 1:
                raise ConfigError(f"{name} must be at least 1")
        for name in ("lookups", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1")
        if any(dim % 4 for dim in self.dims):
            raise ConfigError(f"dims {self.dims} must be multiples of 4")
        if self.zipf <= 0 or self.zipf == 1:
            raise ConfigError(f"zipf {self.zipf} must be above 0 and not 1")


QUICK = {"rows": [100_000, 1_000_000], "dims": [32], "repeats": 5}


@dataclass
class Result:
    """Timings of one table and one distribution of ids; ``distinct`` counts the ids of a rank's batch."""

    rows: int
    dim: int
    distribution: str
    lookups: int
    world_size: int
    distinct: int
    forward: dict[str, Timing]
    update: dict[str, Timing]

    @property
    def forward_bytes(self) -> int:
        return 2 * 4 * self.dim * self.lookups * self.world_size

    @property
    def update_bytes(self) -> int:
        return self.forward_bytes + 4 * self.world_size * (self.dim * self.lookups + 2 * (self.dim + 1) * self.distinct)


class Lookups(nn.Module):
    """Model with one embedding table."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        table = EmbeddingConfig(name="item", num_embeddings=rows, embedding_dim=dim, feature_names=["item"])
        self.embeddings = EmbeddingCollection(device=torch.device("meta"), tables=[table])

    def forward(self, ids: KeyedJaggedTensor) -> Tensor:
        return self.embeddings(ids)["item"].values()


class LookupTables:
    """Sharded table and reference table with the same weights."""

    def __init__(self, rows: int, dim: int, process: DistributedContext) -> None:
        self.process = process
        self.weight = torch.empty(rows, dim, device=process.device).uniform_(-0.1, 0.1).requires_grad_()
        self.accumulator = torch.zeros(rows, device=process.device)
        model = Lookups(rows, dim)
        optimizer = {"lr": LEARNING_RATE, "eps": EPSILON}
        apply_optimizer_in_backward(RowWiseAdagrad, model.embeddings.parameters(), optimizer)
        sharding = construct_module_sharding_plan(
            model.embeddings,
            {"item": row_wise(compute_kernel="fused")},
            local_size=process.local_world_size,
            world_size=process.world_size,
            device_type=process.device.type,
        )
        plan = ShardingPlan({"embeddings": sharding})
        self.dmp = DistributedModelParallel(model, device=process.device, plan=plan, sharders=make_sharders())
        for first_row, shard in self.shards():
            shard.copy_(self.weight.detach()[first_row : first_row + len(shard)])

    def shards(self) -> list[tuple[int, Tensor]]:
        """Return the first row and the rows of each of this rank's shards."""
        (sharded,) = (value for name, value in self.dmp.state_dict().items() if name.endswith("item.weight"))
        return [(shard.metadata.shard_offsets[0], shard.tensor.detach()) for shard in sharded.local_shards()]

    def forward(self, variant: str, ids: Tensor) -> Tensor:
        """Look up rows, [lookups, dim]."""
        if variant == "reference":
            return F.embedding(ids, self.weight, sparse=True)
        if variant == "sharded":
            return self.dmp(_sparse(ids))
        distinct, index = torch.unique(ids, return_inverse=True)
        return self.dmp(_sparse(distinct))[index]

    def update(self, variant: str, ids: Tensor, gradient: Tensor) -> None:
        """Look up rows and update the table by their gradient [lookups, dim]."""
        self.forward(variant, ids).backward(gradient)
        if variant == "reference":
            self.apply_sparse_gradient()

    @torch.no_grad()
    def apply_sparse_gradient(self) -> None:
        """Apply row-wise Adagrad: one accumulator per row, the sum of its mean squared gradients."""
        assert self.weight.grad is not None
        gradient = self.weight.grad.coalesce()
        rows, values = gradient.indices()[0], gradient.values()
        self.weight.grad = None
        accumulator = self.accumulator[rows] + values.square().mean(1)
        self.accumulator[rows] = accumulator
        self.weight.index_add_(0, rows, values / (accumulator.sqrt() + EPSILON)[:, None], alpha=-LEARNING_RATE)


def _sparse(ids: Tensor) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(keys=["item"], values=ids, lengths=torch.tensor([len(ids)], device=ids.device))


def measure(settings: Settings, process: DistributedContext) -> Report:
    copy_rate = copy_bytes_per_s(process.device)
    results, skipped = [], []
    for dim in settings.dims:
        for rows in settings.rows:
            if 4 * rows * (dim + 1) * (1 + 1 / process.world_size) > settings.memory_gib * GIB:
                skipped.append(f"{rows:,} × {dim}")
                continue
            results += [
                measure_table(rows, dim, distribution, settings, process) for distribution in ("uniform", "Zipf")
            ]
    note = f"{settings.lookups:,} lookups per rank and batch, {process.world_size} rank(s); "
    note += f"Zipf exponent {settings.zipf:g}."
    if skipped:
        note += f" Skipped, more than {settings.memory_gib:g} GiB: {', '.join(skipped)}."
    tables = [
        rate_table("Forward, million rows/s", results, lambda result: result.forward, note),
        rate_table("Forward, backward and update, million rows/s", results, lambda result: result.update),
        traffic_table(results, copy_rate),
    ]
    return Report(tables, metrics=summarize(results, copy_rate))


def measure_table(rows: int, dim: int, distribution: str, settings: Settings, process: DistributedContext) -> Result:
    torch.manual_seed(settings.seed)
    tables = LookupTables(rows, dim, process)
    rng = np.random.default_rng([settings.seed, process.rank])
    count = settings.lookups
    drawn = rng.integers(0, rows, count) if distribution == "uniform" else zipf_ids(rows, count, settings.zipf, rng)
    ids = torch.from_numpy(drawn).to(process.device)
    gradient = torch.from_numpy(rng.standard_normal((count, dim), np.float32)).to(process.device)
    for variant in ("sharded", "dedup"):
        check_variant(tables, variant, ids, gradient, rng)
    with torch.no_grad():
        lookups = {variant: partial(tables.forward, variant, ids) for variant in VARIANTS}
        forward = interleave(lookups, settings.repeats, device=process.device)
    updates = {variant: partial(tables.update, variant, ids, gradient) for variant in VARIANTS}
    update = interleave(updates, settings.repeats, device=process.device)
    return Result(rows, dim, distribution, count, process.world_size, len(ids.unique()), forward, update)


def check_variant(tables: LookupTables, variant: str, ids: Tensor, gradient: Tensor, rng: np.random.Generator) -> None:
    """Check that looked-up rows and weights after an update by all ranks' gradients equal the reference's."""
    process, weight = tables.process, tables.weight
    with torch.no_grad():
        check_close(tables.forward(variant, ids), tables.forward("reference", ids), f"{variant}: looked-up rows")
    tables.update(variant, ids, gradient)
    all_ids = torch.cat(all_gather_object(ids.cpu())).to(process.device)
    # The sharded backward pass averages over ranks.
    tables.update(
        "reference", all_ids, torch.cat(all_gather_object(gradient.cpu())).to(process.device) / process.world_size
    )
    other_rows = torch.from_numpy(rng.integers(0, len(weight), len(ids))).to(process.device)
    rows = torch.cat([all_ids, other_rows]).unique()
    for first_row, shard in tables.shards():
        local_rows = rows[(rows >= first_row) & (rows < first_row + len(shard))]
        check_close(shard[local_rows - first_row], weight.detach()[local_rows], f"{variant}: weights after an update")


def check_close(actual: Tensor, expected: Tensor, name: str) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, msg=lambda reason: f"{name} differ: {reason}")


def copy_bytes_per_s(device: torch.device, size: int = 2**28) -> float:
    """Return the bytes read and written per second by one large copy."""
    source = torch.ones(size // 4, device=device)
    destination = torch.empty_like(source)
    return 2 * size / interleave({"copy": partial(destination.copy_, source)}, 9, device=device)["copy"].median


def rate_table(
    title: str, results: list[Result], timings: Callable[[Result], dict[str, Timing]], note: str = ""
) -> ReportTable:
    """Build a table of the median rate, and the 10th and 90th percentile rates."""
    rows: list[list[CellValue]] = []
    for result in results:
        row: list[CellValue] = [result.rows, result.dim, result.distribution]
        for variant in VARIANTS:
            timing = timings(result)[variant]
            count = result.lookups * result.world_size / 1e6
            row += [count / timing.median, count / timing.p90, count / timing.p10]
        rows.append(row)
    columns = ["rows", "dim", "distribution"] + [name for variant in VARIANTS for name in (variant, "p10", "p90")]
    return ReportTable(title, columns, rows, note)


def traffic_table(results: list[Result], copy_rate: float) -> ReportTable:
    """Compare the traffic of the faster sharded variant with one large copy and with the reference."""
    rows: list[list[CellValue]] = []
    for result in results:
        row: list[CellValue] = [result.rows, result.dim, result.distribution, 100 * result.distinct / result.lookups]
        for timings, num_bytes in ((result.forward, result.forward_bytes), (result.update, result.update_bytes)):
            seconds = min(timings["sharded"].median, timings["dedup"].median)
            row += [
                num_bytes / seconds / 1e9,
                100 * num_bytes / seconds / copy_rate,
                timings["reference"].median / seconds,
            ]
        rows.append(row)
    columns = ["rows", "dim", "distribution", "% distinct", "GB/s", "% of copy", "× reference"]
    columns += ["update GB/s", "% of copy", "× reference"]
    note = (
        f"One large copy: {copy_rate / 1e9:.1f} GB/s, reads and writes. × reference: speed relative to the reference."
    )
    return ReportTable(
        "Traffic of the faster sharded variant: forward, then forward with backward and update", columns, rows, note
    )


def summarize(results: list[Result], copy_rate: float) -> dict[str, float]:
    """Return metrics of the last table with Zipf-distributed ids, which resemble training."""
    if not results:
        return {}
    last = results[-1]
    forward, update = (
        min(timings["sharded"].median, timings["dedup"].median) for timings in (last.forward, last.update)
    )
    count = last.lookups * last.world_size
    return {
        "copy_gb_per_s": copy_rate / 1e9,
        "forward_rows_per_s": count / forward,
        "update_rows_per_s": count / update,
        "forward_share_of_copy": last.forward_bytes / forward / copy_rate,
        "update_share_of_copy": last.update_bytes / update / copy_rate,
        "forward_ratio_vs_reference": last.forward["reference"].median / forward,
        "update_ratio_vs_reference": last.update["reference"].median / update,
    }


if __name__ == "__main__":
    main(__file__, __doc__, Settings, QUICK, measure)
