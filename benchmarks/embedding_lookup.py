"""How many embedding rows per second do the sharded tables look up and update, and how near is that to memory speed?

One table in two forms, whose rows and updates are compared before either is timed:

- sharded: an ``EmbeddingCollection`` row-wise over all ranks, its row-wise Adagrad fused into the backward pass, as
  training has it; *dedup* looks every distinct id up once and spreads the rows, as the loader arranges it;
- plain: ``nn.Embedding`` with a sparse gradient, coalesced and then applied by the same optimizer written in PyTorch,
  which has none of its own that is row-wise. Every rank has a whole copy, which nothing keeps equal to the others'.

GB/s counts what must move: a row read and written per lookup; the update adds the gradient read, and every distinct
row with its moment read and written. The copy it is compared with counts its reads and writes too.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from harness import Cell, Report, ReportTable, Timing, interleave, main
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

FORMS = ("sharded", "dedup", "plain")
GIB = 2**30
LEARNING_RATE, EPSILON = 0.05, 1e-8


@dataclass
class Settings:
    """Sizes and repetitions.

    Attributes:
        rows, dims: of the table; all pairs are measured.
        lookups: ids of one batch of one rank.
        zipf: exponent of the skewed ids.
        memory_gib: tables that need more on a rank, both forms together, are left out.
    """

    rows: list[int] = field(default_factory=lambda: [100_000, 1_000_000, 10_000_000])
    dims: list[int] = field(default_factory=lambda: [32, 64])
    lookups: int = 65_536
    zipf: float = 1.05
    memory_gib: float = 8.0
    repeats: int = 9
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("rows", min(self.rows, default=0)), ("dims", min(self.dims, default=0))):
            if least < 1:
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
    """One table and one kind of ids; ``distinct`` of them in a rank's batch."""

    rows: int
    dim: int
    ids: str
    lookups: int
    world: int
    distinct: int
    forward: dict[str, Timing]
    update: dict[str, Timing]

    @property
    def forward_bytes(self) -> int:
        return 2 * 4 * self.dim * self.lookups * self.world

    @property
    def update_bytes(self) -> int:
        return self.forward_bytes + 4 * self.world * (self.dim * self.lookups + 2 * (self.dim + 1) * self.distinct)


class Lookups(nn.Module):
    """The collection of one table, as a model holds it."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        table = EmbeddingConfig(name="item", num_embeddings=rows, embedding_dim=dim, feature_names=["item"])
        self.embeddings = EmbeddingCollection(device=torch.device("meta"), tables=[table])

    def forward(self, ids: KeyedJaggedTensor) -> Tensor:
        return self.embeddings(ids)["item"].values()


class Tables:
    """The same table twice, with the same weights: sharded and plain."""

    def __init__(self, rows: int, dim: int, process: DistributedContext) -> None:
        self.process = process
        self.weight = torch.empty(rows, dim, device=process.device).uniform_(-0.1, 0.1).requires_grad_()
        self.moment = torch.zeros(rows, device=process.device)
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
        for begin, shard in self.shards():
            shard.copy_(self.weight.detach()[begin : begin + len(shard)])

    def shards(self) -> list[tuple[int, Tensor]]:
        """This rank's rows of the sharded table, and the first one's number."""
        (sharded,) = (value for name, value in self.dmp.state_dict().items() if name.endswith("item.weight"))
        return [(shard.metadata.shard_offsets[0], shard.tensor.detach()) for shard in sharded.local_shards()]

    def forward(self, form: str, ids: Tensor) -> Tensor:
        """[lookups, dim]"""
        if form == "plain":
            return F.embedding(ids, self.weight, sparse=True)
        if form == "sharded":
            return self.dmp(_sparse(ids))
        distinct, place = torch.unique(ids, return_inverse=True)
        return self.dmp(_sparse(distinct))[place]

    def update(self, form: str, ids: Tensor, gradient: Tensor) -> None:
        """Look up, and update by the gradient [lookups, dim] of what was found."""
        self.forward(form, ids).backward(gradient)
        if form == "plain":
            self.apply_sparse_gradient()

    @torch.no_grad()
    def apply_sparse_gradient(self) -> None:
        """Row-wise Adagrad: one moment per row, the mean square of its gradient."""
        assert self.weight.grad is not None
        gradient = self.weight.grad.coalesce()
        rows, values = gradient.indices()[0], gradient.values()
        self.weight.grad = None
        moment = self.moment[rows] + values.square().mean(1)
        self.moment[rows] = moment
        self.weight.index_add_(0, rows, values / (moment.sqrt() + EPSILON)[:, None], alpha=-LEARNING_RATE)


def _sparse(ids: Tensor) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(keys=["item"], values=ids, lengths=torch.tensor([len(ids)], device=ids.device))


def measure(settings: Settings, process: DistributedContext) -> Report:
    copy = copy_bytes_per_s(process.device)
    results, left_out = [], []
    for dim in settings.dims:
        for rows in settings.rows:
            if 4 * rows * (dim + 1) * (1 + 1 / process.world_size) > settings.memory_gib * GIB:
                left_out.append(f"{rows:,} × {dim}")
                continue
            results += [measure_table(rows, dim, kind, settings, process) for kind in ("uniform", "Zipf")]
    note = f"{settings.lookups:,} lookups per rank and batch, {process.world_size} rank(s); Zipf exponent {settings.zipf:g}."
    if left_out:
        note += f" Left out, for they need more than {settings.memory_gib:g} GiB: {', '.join(left_out)}."
    tables = [
        rates("Forward, million rows/s", results, lambda result: result.forward, note),
        rates("Forward, backward and update, million rows/s", results, lambda result: result.update),
        traffic(results, copy),
    ]
    return Report(tables, figures=figures(results, copy))


def measure_table(rows: int, dim: int, kind: str, settings: Settings, process: DistributedContext) -> Result:
    torch.manual_seed(settings.seed)
    tables = Tables(rows, dim, process)
    rng = np.random.default_rng([settings.seed, process.rank])
    count = settings.lookups
    drawn = rng.integers(0, rows, count) if kind == "uniform" else zipf_ids(rows, count, settings.zipf, rng)
    ids = torch.from_numpy(drawn).to(process.device)
    gradient = torch.from_numpy(rng.standard_normal((count, dim), np.float32)).to(process.device)
    for form in ("sharded", "dedup"):
        check(tables, form, ids, gradient, rng)
    with torch.no_grad():
        forms = {form: partial(tables.forward, form, ids) for form in FORMS}
        forward = interleave(forms, settings.repeats, device=process.device)
    updates = {form: partial(tables.update, form, ids, gradient) for form in FORMS}
    update = interleave(updates, settings.repeats, device=process.device)
    return Result(rows, dim, kind, count, process.world_size, len(ids.unique()), forward, update)


def check(tables: Tables, form: str, ids: Tensor, gradient: Tensor, rng: np.random.Generator) -> None:
    """Rows looked up are the plain table's, and so are all weights after an update by every rank's gradients."""
    process, weight = tables.process, tables.weight
    with torch.no_grad():
        check_close(tables.forward(form, ids), tables.forward("plain", ids), f"{form}: rows looked up")
    tables.update(form, ids, gradient)
    everyone = torch.cat(all_gather_object(ids.cpu())).to(process.device)
    # The sharded backward pass averages over the ranks.
    tables.update(
        "plain", everyone, torch.cat(all_gather_object(gradient.cpu())).to(process.device) / process.world_size
    )
    others = torch.from_numpy(rng.integers(0, len(weight), len(ids))).to(process.device)
    rows = torch.cat([everyone, others]).unique()
    for begin, shard in tables.shards():
        own = rows[(rows >= begin) & (rows < begin + len(shard))]
        check_close(shard[own - begin], weight.detach()[own], f"{form}: weights after an update")


def check_close(found: Tensor, wanted: Tensor, what: str) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, msg=lambda why: f"{what} differ: {why}")


def copy_bytes_per_s(device: torch.device, size: int = 2**28) -> float:
    """Bytes read and written per second by one large copy."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / interleave({"copy": partial(target.copy_, source)}, 9, device=device)["copy"].median


def rates(title: str, results: list[Result], of: Callable[[Result], dict[str, Timing]], note: str = "") -> ReportTable:
    """Median, and the rates at the slow and the fast tenth of the runs."""
    rows: list[list[Cell]] = []
    for result in results:
        row: list[Cell] = [result.rows, result.dim, result.ids]
        for form in FORMS:
            timing = of(result)[form]
            count = result.lookups * result.world / 1e6
            row += [count / timing.median, count / timing.p90, count / timing.p10]
        rows.append(row)
    columns = ["rows", "dim", "ids"] + [name for form in FORMS for name in (form, "p10", "p90")]
    return ReportTable(title, columns, rows, note)


def traffic(results: list[Result], copy: float) -> ReportTable:
    """What the faster sharded form moves, beside one large copy and beside the plain form."""
    rows: list[list[Cell]] = []
    for result in results:
        row: list[Cell] = [result.rows, result.dim, result.ids, 100 * result.distinct / result.lookups]
        for timings, moved in ((result.forward, result.forward_bytes), (result.update, result.update_bytes)):
            seconds = min(timings["sharded"].median, timings["dedup"].median)
            row += [moved / seconds / 1e9, 100 * moved / seconds / copy, timings["plain"].median / seconds]
        rows.append(row)
    columns = ["rows", "dim", "ids", "% distinct", "GB/s", "% of copy", "× plain"]
    columns += ["update GB/s", "% of copy", "× plain"]
    note = f"Of one large copy: {copy / 1e9:.1f} GB/s, reads and writes. × plain: how many times faster than that form."
    return ReportTable(
        "Traffic of the faster sharded form: forward, then forward, backward and update", columns, rows, note
    )


def figures(results: list[Result], copy: float) -> dict[str, float]:
    """Of the last table measured, skewed ids: what training meets."""
    if not results:
        return {}
    last = results[-1]
    forward, update = (min(of["sharded"].median, of["dedup"].median) for of in (last.forward, last.update))
    count = last.lookups * last.world
    return {
        "copy_gb_per_s": copy / 1e9,
        "forward_rows_per_s": count / forward,
        "update_rows_per_s": count / update,
        "forward_share_of_copy": last.forward_bytes / forward / copy,
        "update_share_of_copy": last.update_bytes / update / copy,
        "forward_ratio_vs_plain": last.forward["plain"].median / forward,
        "update_ratio_vs_plain": last.update["plain"].median / update,
    }


if __name__ == "__main__":
    main(__file__, __doc__, Settings, QUICK, measure)
