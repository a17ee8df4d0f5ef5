"""Which tables do not fit, and the changes with which all would: each found by planning again."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torchrec.distributed.planner.types import ShardingOption, Storage

from a2gen_rec.sharding.planner import InfeasiblePlanError, Plan, PlanningProblem, plan
from a2gen_rec.sharding.report import Remedy, UnplacedTable
from a2gen_rec.sharding.topology import Cluster
from a2gen_rec.sharding.workload import TableWorkload

MAX_RANKS = 4096
CACHED_KERNEL = "fused_uvm_caching"


def unplaced_tables(problem: PlanningProblem, failure: InfeasiblePlanError) -> list[UnplacedTable]:
    """The fewest largest tables without which the others fit, and what each is short of."""
    tables = sorted(problem.workload.tables, key=lambda table: table.rows, reverse=True)
    for count in range(1, len(tables) + 1):
        free = _free_beside(problem, failure, tables[count:])
        if free is not None:
            return [_misfit(table, failure.options[table.name], free) for table in tables[:count]]
    return []


def _free_beside(problem: PlanningProblem, failure: InfeasiblePlanError, tables: list[TableWorkload]) -> Storage | None:
    """What the emptiest rank has left when these tables are placed; None if they do not fit."""
    free = [device.storage for device in failure.topology.devices]
    if tables:
        found = _try(replace(problem, workload=replace(problem.workload, tables=tuple(tables))))
        if found is None:
            return None
        for option in found.chosen.values():
            for shard in option.shards:
                free[shard.rank] -= shard.storage
    return max(free)


def _misfit(table: TableWorkload, options: list[ShardingOption], free: Storage) -> UnplacedTable:
    """What the largest shard of the option that exceeds the free memory least needs."""

    def short(option: ShardingOption) -> tuple[int, str, int]:
        hbm, ddr = (max(getattr(shard.storage, memory) for shard in option.shards) for memory in ("hbm", "ddr"))
        return max((hbm - free.hbm, "hbm", hbm), (ddr - free.ddr, "ddr", ddr))

    _, memory, needs = min(map(short, options))
    return UnplacedTable(table.name, needs, getattr(free, memory), memory)


def find_remedies(problem: PlanningProblem, failure: InfeasiblePlanError, lacking: list[UnplacedTable]) -> list[Remedy]:
    """What would make everything fit: on this hardware by estimated time, then more ranks, then fewer rows."""
    here = sorted(_on_this_hardware(problem), key=lambda remedy: remedy.cost_ms)
    return [*here, *_more_ranks(problem, failure), *_fewer_rows(problem, [misfit.table for misfit in lacking])]


def _on_this_hardware(problem: PlanningProblem) -> Iterator[Remedy]:
    """Host memory, half precision, and both together where neither is enough."""
    sharding = problem.config.sharding
    kernels = [*sharding.compute_kernels, CACHED_KERNEL]
    changes: list[tuple[str, list[str], dict[str, Any]]] = []
    if problem.cluster.device == "cuda" and CACHED_KERNEL not in sharding.compute_kernels:
        options = ["--sharding.compute_kernels", f"[{','.join(kernels)}]"]
        changes.append(("large tables in host memory, cached on the GPU", options, {"kernels": kernels}))
    if sharding.dtype == "fp32":
        changes.append(("fp16 weights", ["--sharding.dtype", "fp16"], {"dtype": "fp16"}))
    found = [remedy for change in changes if (remedy := _with_settings(problem, *change)) is not None]
    yield from found
    if not found and len(changes) == 2:
        (one, options, settings), (other, more, others) = changes
        both = _with_settings(problem, f"{other}, {one}", [*options, *more], settings | others)
        if both is not None:
            yield both


def _with_settings(
    problem: PlanningProblem, change: str, options: list[str], settings: dict[str, Any]
) -> Remedy | None:
    sharding = replace(problem.config.sharding, **settings)
    return _remedy(change, options, replace(problem, config=replace(problem.config, sharding=sharding)))


def _more_ranks(problem: PlanningProblem, failure: InfeasiblePlanError) -> Iterator[Remedy]:
    """The first doubling of the ranks that is enough."""
    each = failure.topology.devices[0].storage
    least = [
        min(sum((shard.storage for shard in option.shards), Storage(0, 0)).hbm for option in options)
        for options in failure.options.values()
    ]
    for cluster in _doublings(problem.cluster):
        if sum(least) > each.hbm * cluster.ranks:
            continue  # no plan can fit, and trying for thousands of ranks takes a while
        remedy = _remedy(_in_hosts(cluster), ["--ranks", str(cluster.ranks)], replace(problem, cluster=cluster))
        if remedy is not None:
            yield remedy
            return


def _doublings(cluster: Cluster) -> Iterator[Cluster]:
    ranks, full = cluster.ranks, cluster.ranks_per_host
    while 2 * ranks <= MAX_RANKS:
        ranks = min(2 * ranks, full) if ranks < full else 2 * ranks
        yield cluster.with_ranks(ranks)


def _in_hosts(cluster: Cluster) -> str:
    hosts = cluster.ranks // cluster.local_ranks
    return f"{cluster.ranks:,} ranks on {hosts:,} host{'s' if hosts > 1 else ''}"


def _fewer_rows(problem: PlanningProblem, names: list[str]) -> Iterator[Remedy]:
    """The largest share of the misfit tables' rows that fits, to a thousandth, by bisection."""
    fits, too_many, best = 0, 1000, None
    while too_many - fits > 1:
        share = (fits + too_many) // 2
        tables = problem.workload.tables
        rows = {table.name: max(1, table.rows * share // 1000) for table in tables if table.name in names}
        options = [word for name, count in rows.items() for word in (f"--num-rows.{name}", str(count))]
        smaller = replace(problem, workload=problem.workload.with_rows(rows))
        remedy = _remedy(f"{share / 1000:.1%} of the rows of {', '.join(names)}", options, smaller)
        if remedy is None:
            too_many = share
        else:
            fits, best = share, remedy
    if best is not None:
        yield best


def _remedy(change: str, options: list[str], problem: PlanningProblem) -> Remedy | None:
    found = _try(problem)
    return None if found is None else Remedy(change, options, max(perf.total for perf in found.rank_perf))


def _try(problem: PlanningProblem) -> Plan | None:
    try:
        return plan(problem)
    except InfeasiblePlanError:
        return None
