"""Handmade sharding plans for tests of their tables and pages."""

from dataclasses import replace

from a2gen_rec.sharding.report import (
    Cost,
    Option,
    PlanReport,
    RankPlan,
    Remedy,
    Shard,
    StepTraffic,
    TablePlan,
    UnplacedTable,
)

GB = 10**9
ROWS = {"item_id": 10**10, "user_id": 2 * 10**9, "tag": 100_000, "action": 8}
TRAFFIC = StepTraffic(4096.0, 65_536.0, 5.25, 42.0, 1344.0, 1344.0)


def plan_report(world_size: int = 64, ranks_per_host: int = 8, device: str = "cuda") -> PlanReport:
    """Return a feasible plan: large tables row-wise on all ranks, each small table on its own rank."""
    tables = [_table(name, rows, world_size, index, device) for index, (name, rows) in enumerate(ROWS.items())]
    ranks = []
    for rank in range(world_size):
        shards = [shard for table in tables for shard in table.shards if shard.rank == rank]
        free = (120 * GB, 200 * GB) if device == "cuda" else (0, 400 * GB)
        used = sum(shard.hbm for shard in shards), sum(shard.ddr for shard in shards)
        ranks.append(RankPlan(rank, rank // ranks_per_host, *used, *free, _sum([shard.cost for shard in shards])))
    return PlanReport(
        cluster=f"h200_{world_size // ranks_per_host}x{ranks_per_host}",
        device=device,
        world_size=world_size,
        ranks_per_host=ranks_per_host,
        fits=True,
        cost=max((rank.cost for rank in ranks), key=lambda cost: cost.total),
        traffic=TRAFFIC,
        tables=tables,
        ranks=ranks,
        planning_s=3.21,
    )


def infeasible_report(world_size: int = 8, ranks_per_host: int = 8) -> PlanReport:
    """Return a report of tables that do not fit, with suggested changes."""
    return PlanReport(
        cluster="h200_1x8",
        device="cuda",
        world_size=world_size,
        ranks_per_host=ranks_per_host,
        fits=False,
        cost=Cost(0.0, 0.0, 0.0, 0.0),
        traffic=TRAFFIC,
        unplaced=[UnplacedTable("item_id", 322 * GB, 111 * GB), UnplacedTable("user_id", 64 * GB, 111 * GB)],
        remedies=[
            Remedy(
                "fp16 weights, item_id cached from host memory",
                ["--sharding.compute-kernels", "[fused, fused_uvm_caching]", "--sharding.dtype", "fp16"],
                45.6,
            ),
            Remedy("32 ranks", ["--topology.ranks", "32"], 7.89),
        ],
        planning_s=1.5,
    )


def renamed(report: PlanReport, names: dict[str, str]) -> PlanReport:
    """Return the same plan with other table names."""
    tables = [replace(table, name=names.get(table.name, table.name)) for table in report.tables]
    unplaced = [replace(table, table=names.get(table.table, table.table)) for table in report.unplaced]
    return replace(report, tables=tables, unplaced=unplaced)


def _table(name: str, rows: int, world_size: int, first_rank: int, device: str) -> TablePlan:
    dim, row_wise = 64, rows > 10**6
    weights, optimizer, lookups = rows * dim * 4, rows * 4, min(float(rows), 40_000.0)
    parts = world_size if row_wise else 1
    buffers = int(lookups) * dim * 8
    cost = Cost(*(lookups / parts * seconds for seconds in (2e-5, 8e-5, 4e-5, 9e-5)))
    memory = "hbm" if device == "cuda" else "ddr"
    empty = Option("row_wise" if row_wise else "table_wise", "fused", parts, cost, 0, 0)
    chosen = replace(empty, **{memory: (weights + optimizer) // parts + buffers})
    others = [
        replace(empty, sharding="column_wise", ranks=2, cost=_sum([cost] * 2), **{memory: weights // 2}),
        replace(empty, sharding="table_row_wise", kernel="fused_uvm_caching", ranks=8, cost=_sum([cost] * 4)),
        replace(empty, sharding="data_parallel", kernel="dense", cost=_sum([cost] * 5), **{memory: weights}),
        replace(empty, sharding="table_column_wise", ranks=4, cost=_sum([cost] * 9)),
    ]
    step = -(-rows // parts)
    shards = [
        Shard(
            (first_rank + part) % world_size,
            (part * step, min(rows, (part + 1) * step)),
            (0, dim),
            chosen.hbm,
            chosen.ddr,
            cost,
        )
        for part in range(parts)
    ]
    sizes = weights, optimizer, buffers * parts
    return TablePlan(name, rows, dim, "fp32", lookups, *sizes, chosen, [chosen, *others], shards)


def _sum(costs: list[Cost]) -> Cost:
    parts = ("forward_compute", "forward_comms", "backward_compute", "backward_comms")
    return Cost(*(sum(getattr(cost, part) for cost in costs) for part in parts))
