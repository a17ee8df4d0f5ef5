"""Tables that do not fit, and changes with which all tables fit, each verified by re-planning."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torchrec.distributed.planner.types import ShardingOption, Storage

from a2gen_rec.sharding.planner import InfeasiblePlanError, Plan, PlanningProblem, make_plan, precision_warning
from a2gen_rec.sharding.report import Remedy, UnplacedTable
from a2gen_rec.sharding.topology import Cluster
from a2gen_rec.sharding.workload import TableWorkload

MAX_RANKS = 4096
CACHED_KERNEL = "fused_uvm_caching"


def unplaced_tables(problem: PlanningProblem, failure: InfeasiblePlanError) -> list[UnplacedTable]:
    """Return the smallest set of largest tables without which the others fit, with the memory each lacks."""
    tables = sorted(problem.workload.tables, key=lambda table: table.rows, reverse=True)
    for count in range(1, len(tables) + 1):
        free = _max_free(problem, failure, tables[count:])
        if free is not None:
            return [_unplaced_table(table, failure.options[table.name], free) for table in tables[:count]]
    return []


def _max_free(problem: PlanningProblem, failure: InfeasiblePlanError, tables: list[TableWorkload]) -> Storage | None:
    """Return the free memory of the emptiest rank after placing these tables; None if they do not fit."""
    free = [device.storage for device in failure.topology.devices]
    if tables:
        result = _try_plan(replace(problem, workload=replace(problem.workload, tables=tuple(tables))))
        if result is None:
            return None
        for option in result.chosen.values():
            for shard in option.shards:
                free[shard.rank] -= shard.storage
    return max(free)


def _unplaced_table(table: TableWorkload, options: list[ShardingOption], free: Storage) -> UnplacedTable:
    """Return the need of the largest shard, of the option that exceeds the free memory least."""

    def shortage(option: ShardingOption) -> tuple[int, str, int]:
        hbm, ddr = (max(getattr(shard.storage, memory) for shard in option.shards) for memory in ("hbm", "ddr"))
        return max((hbm - free.hbm, "hbm", hbm), (ddr - free.ddr, "ddr", ddr))

    _, memory, required = min(map(shortage, options))
    return UnplacedTable(table.name, required, getattr(free, memory), memory)


def find_remedies(
    problem: PlanningProblem, failure: InfeasiblePlanError, unplaced: list[UnplacedTable]
) -> list[Remedy]:
    """Return changes with which all tables fit: this hardware by estimated time, then more ranks, then fewer rows."""
    same_hardware = sorted(_on_this_hardware(problem), key=lambda remedy: remedy.cost_ms)
    return [*same_hardware, *_more_ranks(problem, failure), *_fewer_rows(problem, [table.table for table in unplaced])]


def _on_this_hardware(problem: PlanningProblem) -> Iterator[Remedy]:
    """Try host memory, half precision, and both together if neither is enough."""
    sharding = problem.config.sharding
    kernels = [*sharding.compute_kernels, CACHED_KERNEL]
    changes: list[tuple[str, list[str], dict[str, Any]]] = []
    if problem.cluster.device == "cuda" and CACHED_KERNEL not in sharding.compute_kernels:
        options = ["--sharding.compute-kernels", f"[{','.join(kernels)}]"]
        changes.append(("large tables in host memory, cached on the GPU", options, {"compute_kernels": kernels}))
    if sharding.dtype == "fp32" and not precision_warning(problem.cluster.device, "fp16"):
        changes.append(("fp16 weights", ["--sharding.dtype", "fp16"], {"dtype": "fp16"}))
    remedies = [remedy for change in changes if (remedy := _with_settings(problem, *change)) is not None]
    yield from remedies
    if not remedies and len(changes) == 2:
        (kernel_change, options, settings), (dtype_change, dtype_options, dtype_settings) = changes
        change = f"{dtype_change}, {kernel_change}"
        both = _with_settings(problem, change, [*options, *dtype_options], settings | dtype_settings)
        if both is not None:
            yield both


def _with_settings(
    problem: PlanningProblem, change: str, options: list[str], settings: dict[str, Any]
) -> Remedy | None:
    sharding = replace(problem.config.sharding, **settings)
    return _remedy(change, options, replace(problem, config=replace(problem.config, sharding=sharding)))


def _more_ranks(problem: PlanningProblem, failure: InfeasiblePlanError) -> Iterator[Remedy]:
    """Try to double the ranks until all tables fit."""
    per_rank = failure.topology.devices[0].storage
    min_bytes = [
        min(sum((shard.storage for shard in option.shards), Storage(0, 0)).hbm for option in options)
        for options in failure.options.values()
    ]
    for cluster in _doublings(problem.cluster):
        if sum(min_bytes) > per_rank.hbm * cluster.ranks:
            continue  # no plan can fit, and planning for thousands of ranks is slow
        remedy = _remedy(_describe_ranks(cluster), ["--ranks", str(cluster.ranks)], replace(problem, cluster=cluster))
        if remedy is not None:
            yield remedy
            return


def _doublings(cluster: Cluster) -> Iterator[Cluster]:
    ranks, full = cluster.ranks, cluster.ranks_per_host
    while 2 * ranks <= MAX_RANKS:
        ranks = min(2 * ranks, full) if ranks < full else 2 * ranks
        yield cluster.with_ranks(ranks)


def _describe_ranks(cluster: Cluster) -> str:
    hosts = cluster.ranks // cluster.local_ranks
    return f"{cluster.ranks:,} ranks on {hosts:,} host{'s' if hosts > 1 else ''}"


def _fewer_rows(problem: PlanningProblem, names: list[str]) -> Iterator[Remedy]:
    """Find the largest share of the unplaced tables' rows that fits, to 0.1%, by bisection."""
    fits, too_many, best = 0, 1000, None
    while too_many - fits > 1:
        share = (fits + too_many) // 2
        tables = problem.workload.tables
        rows = {table.name: max(1, table.rows * share // 1000) for table in tables if table.name in names}
        options = [option for name, count in rows.items() for option in (f"--num-rows.{name}", str(count))]
        smaller = replace(problem, workload=problem.workload.with_rows(rows))
        remedy = _remedy(f"{share / 1000:.1%} of the rows of {', '.join(names)}", options, smaller)
        if remedy is None:
            too_many = share
        else:
            fits, best = share, remedy
    if best is not None:
        yield best


def _remedy(change: str, options: list[str], problem: PlanningProblem) -> Remedy | None:
    result = _try_plan(problem)
    return None if result is None else Remedy(change, options, max(cost.total for cost in result.rank_costs))


def _try_plan(problem: PlanningProblem) -> Plan | None:
    try:
        return make_plan(problem)
    except InfeasiblePlanError:
        return None
