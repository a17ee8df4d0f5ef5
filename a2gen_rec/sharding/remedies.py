"""Tables that do not fit, and changes with which all tables fit, each verified by re-planning."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torchrec.distributed.planner.types import ShardingOption, Storage

from a2gen_rec.sharding.planner import InfeasiblePlanError, Plan, PlanningProblem, make_plan, precision_warning
from a2gen_rec.sharding.report import Remedy, UnplacedTable
from a2gen_rec.sharding.topology import Cluster
from a2gen_rec.sharding.workload import TableWorkload

MAX_RANKS = 4096
MAX_SEARCH_S = 14.0
"""Maximum time of a search in seconds; one plan for thousands of ranks takes seconds."""
CACHED_KERNEL = "fused_uvm_caching"


class SearchTimeoutError(Exception):
    """The time left does not suffice for another plan."""


@dataclass
class RemedySearch:
    """Search for the tables that do not fit, and for changes with which all fit, within a limit of time.

    Attributes:
        problem: Tables, hardware and settings.
        failure: Error of planning.
        plan_s: Seconds of the slowest plan so far, an estimate of the next one's time.
        max_s: Maximum seconds of the search.
    """

    problem: PlanningProblem
    failure: InfeasiblePlanError
    plan_s: float = 0.0
    max_s: float = MAX_SEARCH_S
    _start: float = field(default_factory=time.perf_counter)

    def unplaced_tables(self) -> list[UnplacedTable]:
        """Return the smallest set of largest tables without which the others fit, with the memory each lacks.

        If time runs out, tables are assumed to fit if their total memory does.
        """
        tables = sorted(self.problem.workload.tables, key=lambda table: table.rows, reverse=True)
        for count in range(1, len(tables) + 1):
            free = self._max_free(tables[count:])
            if free is not None:
                return [_unplaced_table(table, self.failure.options[table.name], free) for table in tables[:count]]
        return []

    def remedies(self, unplaced: Sequence[UnplacedTable]) -> tuple[list[Remedy], bool]:
        """Find changes with which all tables fit.

        Returns:
            Changes on this hardware by estimated time, then more ranks, then fewer rows; and whether the search ended
            in time.
        """
        same_hardware: list[Remedy] = []
        more_ranks: list[Remedy] = []
        fewer_rows: list[Remedy] = []
        searches = (
            (same_hardware, self._on_this_hardware()),
            (more_ranks, self._more_ranks()),
            (fewer_rows, self._fewer_rows([table.table for table in unplaced])),
        )
        is_complete = True
        for remedies, search in searches:
            try:
                remedies.extend(search)
            except SearchTimeoutError:
                is_complete = False
        same_hardware.sort(key=lambda remedy: remedy.cost_ms)
        return [*same_hardware, *more_ranks, *fewer_rows], is_complete

    def _plan(self, problem: PlanningProblem) -> Plan | None:
        """Return a plan; None if the tables do not fit.

        Raises:
            SearchTimeoutError: The plan would probably exceed the limit of time.
        """
        start = time.perf_counter()
        if start + self.plan_s > self._start + self.max_s:
            raise SearchTimeoutError
        try:
            return make_plan(problem)
        except InfeasiblePlanError:
            return None
        finally:
            self.plan_s = max(self.plan_s, time.perf_counter() - start)

    def _remedy(self, change: str, options: list[str], problem: PlanningProblem) -> Remedy | None:
        result = self._plan(problem)
        return None if result is None else Remedy(change, options, max(cost.total for cost in result.rank_costs))

    def _max_free(self, tables: list[TableWorkload]) -> Storage | None:
        """Return the free memory of the emptiest rank after placing these tables; None if they do not fit."""
        free = [device.storage for device in self.failure.topology.devices]
        if not tables:
            return max(free)
        total = _sum(free)
        required = _sum(_min_storage(self.failure.options[table.name]) for table in tables)
        if required.hbm > total.hbm or required.ddr > total.ddr:
            return None  # no plan can fit
        problem = self.problem
        try:
            result = self._plan(replace(problem, workload=replace(problem.workload, tables=tuple(tables))))
        except SearchTimeoutError:
            return Storage((total.hbm - required.hbm) // len(free), (total.ddr - required.ddr) // len(free))
        if result is None:
            return None
        for option in result.chosen.values():
            for shard in option.shards:
                free[shard.rank] -= shard.storage
        return max(free)

    def _on_this_hardware(self) -> Iterator[Remedy]:
        """Try host memory, half precision, and both together if neither is enough."""
        problem, sharding = self.problem, self.problem.config.sharding
        kernels = [*sharding.compute_kernels, CACHED_KERNEL]
        changes: list[tuple[str, list[str], dict[str, Any]]] = []
        if problem.cluster.device == "cuda" and CACHED_KERNEL not in sharding.compute_kernels:
            options = ["--sharding.compute-kernels", f"[{','.join(kernels)}]"]
            changes.append(("large tables in host memory, cached on the GPU", options, {"compute_kernels": kernels}))
        if sharding.dtype == "fp32" and not precision_warning(problem.cluster.device, "fp16"):
            changes.append(("fp16 weights", ["--sharding.dtype", "fp16"], {"dtype": "fp16"}))
        one_is_enough = False
        for name, options, settings in changes:
            if (remedy := self._with_settings(name, options, settings)) is not None:
                one_is_enough = True
                yield remedy
        if not one_is_enough and len(changes) == 2:
            (kernel_change, options, settings), (dtype_change, dtype_options, dtype_settings) = changes
            both = self._with_settings(
                f"{dtype_change}, {kernel_change}", [*options, *dtype_options], settings | dtype_settings
            )
            if both is not None:
                yield both

    def _with_settings(self, change: str, options: list[str], settings: dict[str, Any]) -> Remedy | None:
        config = self.problem.config
        sharding = replace(config.sharding, **settings)
        return self._remedy(change, options, replace(self.problem, config=replace(config, sharding=sharding)))

    def _more_ranks(self) -> Iterator[Remedy]:
        """Try to double the ranks until all tables fit."""
        per_rank = self.failure.topology.devices[0].storage
        required = sum(_min_storage(options).hbm for options in self.failure.options.values())
        for cluster in _doublings(self.problem.cluster):
            if required > per_rank.hbm * cluster.ranks:
                continue  # no plan can fit
            options = ["--ranks", str(cluster.ranks)]
            remedy = self._remedy(_describe_ranks(cluster), options, replace(self.problem, cluster=cluster))
            if remedy is not None:
                yield remedy
                return

    def _fewer_rows(self, names: list[str]) -> Iterator[Remedy]:
        """Find the largest share of the unplaced tables' rows that fits, to 0.1%, by bisection.

        The search begins at the largest share whose total memory fits, as row-wise tables fit close to it. If time
        runs out, the largest share found so far is the result.
        """
        workload = self.problem.workload
        share = self._max_share(names)
        fits, too_many, best, step = 0, share + 1, None, 1
        try:
            while too_many - fits > 1:
                rows = {
                    table.name: max(1, table.rows * share // 1000) for table in workload.tables if table.name in names
                }
                options = [option for name, count in rows.items() for option in (f"--num-rows.{name}", str(count))]
                smaller = replace(self.problem, workload=workload.with_rows(rows))
                remedy = self._remedy(f"{share / 1000:.1%} of the rows of {', '.join(names)}", options, smaller)
                if remedy is None:
                    too_many, step = share, 2 * step
                else:
                    fits, best = share, remedy
                share = max((fits + too_many) // 2, too_many - step)
        finally:
            if best is not None:
                yield best

    def _max_share(self, names: list[str]) -> int:
        """Return an upper bound on the share of rows that fits, in 1/1000, from total memory.

        Buffers do not shrink with the rows, which only lowers the share that fits.
        """
        total = _sum(device.storage for device in self.failure.topology.devices)
        minimum = {name: _min_storage(options) for name, options in self.failure.options.items()}
        share = 1.0
        for memory in ("hbm", "ddr"):
            free = getattr(total, memory) - sum(getattr(minimum[name], memory) for name in minimum if name not in names)
            required = sum(getattr(minimum[name], memory) for name in names)
            share = min(share, free / required if required else 1.0)
        return max(1, min(999, int(1000 * share) + 1))


def _unplaced_table(table: TableWorkload, options: list[ShardingOption], free: Storage) -> UnplacedTable:
    """Return the need of the largest shard, of the option that exceeds the free memory least."""

    def shortage(option: ShardingOption) -> tuple[int, str, int]:
        hbm, ddr = (max(getattr(shard.storage, memory) for shard in option.shards) for memory in ("hbm", "ddr"))
        return max((hbm - free.hbm, "hbm", hbm), (ddr - free.ddr, "ddr", ddr))

    _, memory, required = min(map(shortage, options))
    return UnplacedTable(table.name, required, getattr(free, memory), memory)


def _min_storage(options: Sequence[ShardingOption]) -> Storage:
    """Return lower bounds of a table's HBM and DDR bytes, summed over ranks, for any option."""
    totals = [_sum(shard.storage for shard in option.shards) for option in options]
    return Storage(hbm=min(total.hbm for total in totals), ddr=min(total.ddr for total in totals))


def _sum(storages: Iterator[Storage] | Sequence[Storage]) -> Storage:
    return sum(storages, Storage(0, 0))


def _doublings(cluster: Cluster) -> Iterator[Cluster]:
    ranks, full = cluster.ranks, cluster.ranks_per_host
    while 2 * ranks <= MAX_RANKS:
        ranks = min(2 * ranks, full) if ranks < full else 2 * ranks
        yield cluster.with_ranks(ranks)


def _describe_ranks(cluster: Cluster) -> str:
    hosts = cluster.ranks // cluster.local_ranks
    return f"{cluster.ranks:,} ranks on {hosts:,} host{'s' if hosts > 1 else ''}"
