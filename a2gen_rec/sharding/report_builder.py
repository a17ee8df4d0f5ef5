"""Build the report of a planning problem: the plan with alternatives, or unplaced tables and remedies."""

import time
from dataclasses import replace

from torchrec.distributed.planner.types import Perf, ShardingOption

from a2gen_rec.sharding.planner import (
    TABLE_OPTIMIZERS,
    VALUE_BYTES,
    WEIGHT_BYTES,
    InfeasiblePlanError,
    Plan,
    PlanningProblem,
    make_plan,
    non_empty_shards,
    optimizer_bytes,
)
from a2gen_rec.sharding.remedies import RemedySearch
from a2gen_rec.sharding.report import Cost, Option, PlanReport, RankPlan, Shard, StepTraffic, TablePlan
from a2gen_rec.sharding.workload import TableWorkload

ID_BYTES = 8


def plan_and_describe(problem: PlanningProblem, with_remedies: bool = True) -> tuple[PlanReport, Plan | None]:
    """Plan and return the report and the plan; the plan is None if the tables do not fit.

    Args:
        problem: Tables, hardware and settings.
        with_remedies: Search for remedies by re-planning if the tables do not fit.
    """
    start = time.perf_counter()
    try:
        result = make_plan(problem)
    except InfeasiblePlanError as failure:
        report = replace(_empty(problem), planning_s=time.perf_counter() - start)
        if with_remedies:
            search = RemedySearch(problem, failure, report.planning_s)
            unplaced = search.unplaced_tables()
            remedies, is_complete = search.remedies(unplaced)
            report = replace(report, unplaced=unplaced, remedies=remedies, search_is_complete=is_complete)
        return report, None
    return replace(describe_plan(problem, result), planning_s=time.perf_counter() - start), result


def describe_plan(problem: PlanningProblem, plan: Plan) -> PlanReport:
    """Return the report of a plan: tables, ranks and the traffic of a step."""
    ranks = _ranks(problem, plan)
    return replace(
        _empty(problem),
        fits=all(rank.hbm <= rank.hbm_free and rank.ddr <= rank.ddr_free for rank in ranks),
        cost=max((rank.cost for rank in ranks), key=lambda cost: cost.total),
        traffic=_traffic(problem, plan.chosen),
        tables=[_table(problem, table, plan) for table in problem.workload.tables],
        ranks=ranks,
    )


def _empty(problem: PlanningProblem) -> PlanReport:
    cluster = problem.cluster
    return PlanReport(
        cluster=cluster.name,
        device=cluster.device,
        world_size=cluster.ranks,
        ranks_per_host=cluster.local_ranks,
        fits=False,
        cost=Cost(0.0, 0.0, 0.0, 0.0),
        traffic=_traffic(problem, {}),
    )


def _table(problem: PlanningProblem, table: TableWorkload, plan: Plan) -> TablePlan:
    config, chosen = problem.config, plan.chosen[table.name]
    kind, width = TABLE_OPTIMIZERS[config.optim.sparse_optimizer], WEIGHT_BYTES[config.sharding.dtype]
    shards = []
    for shard in non_empty_shards(chosen):
        (rows, columns), (row, column) = shard.size, shard.offset
        shards.append(
            Shard(
                rank=shard.rank,
                rows=(row, row + rows),
                columns=(column, column + columns),
                hbm=shard.storage.hbm,
                ddr=shard.storage.ddr,
                cost=_cost(shard.perf),
                weights=rows * columns * width,
                optimizer=optimizer_bytes(kind, rows, columns),
            )
        )
    weights, optimizer = (sum(getattr(shard, part) for shard in shards) for part in ("weights", "optimizer"))
    options = [_option(option) for option in plan.options[table.name]]
    return TablePlan(
        name=table.name,
        rows=table.rows,
        dim=config.model.dim,
        dtype=config.sharding.dtype,
        lookups_per_batch=table.lookups,
        weights=weights,
        optimizer=optimizer,
        buffers=sum(shard.hbm + shard.ddr for shard in shards) - weights - optimizer,
        chosen=_option(chosen),
        options=sorted(options, key=lambda option: option.cost.total),
        shards=shards,
    )


def _option(option: ShardingOption) -> Option:
    shards = non_empty_shards(option)
    return Option(
        sharding=option.sharding_type,
        kernel=option.compute_kernel,
        ranks=len(shards),
        cost=max((_cost(shard.perf) for shard in shards), key=lambda cost: cost.total),
        hbm=max(shard.storage.hbm for shard in shards),
        ddr=max(shard.storage.ddr for shard in shards),
    )


def _ranks(problem: PlanningProblem, plan: Plan) -> list[RankPlan]:
    hbm, ddr = ([0] * problem.cluster.ranks for _ in range(2))
    for option in plan.chosen.values():
        for shard in option.shards:
            hbm[shard.rank] += shard.storage.hbm
            ddr[shard.rank] += shard.storage.ddr
    return [
        RankPlan(
            rank=rank,
            host=rank // problem.cluster.ranks_per_host,
            hbm=hbm[rank],
            ddr=ddr[rank],
            hbm_free=device.storage.hbm,
            ddr_free=device.storage.ddr,
            cost=_cost(perf),
        )
        for rank, (device, perf) in enumerate(zip(plan.topology.devices, plan.rank_costs, strict=True))
    ]


def _traffic(problem: PlanningProblem, chosen: dict[str, ShardingOption]) -> StepTraffic:
    """Return the bytes that one rank's lookups move.

    On average over W ranks, a share of (W − 1) / W of the lookups crosses between ranks for every sharding type: a
    table on one rank is local to that rank only. A column-wise table needs its ids in each of its shards.
    """
    workload, world_size = problem.workload, problem.cluster.ranks
    crossing = (world_size - 1) / world_size / workload.targets_per_batch
    lookups = sum(table.lookups for table in workload.tables)
    num_shards = {name: len(option.shards) for name, option in chosen.items() if option.sharding_type == "column_wise"}
    ids = sum(table.lookups * num_shards.get(table.name, 1) for table in workload.tables)
    return StepTraffic(
        targets=workload.targets_per_batch,
        impressions=workload.impressions_per_batch,
        lookups_per_target=lookups / workload.targets_per_batch,
        id_bytes_per_target=ids * ID_BYTES * crossing,
        row_bytes_per_target=lookups * problem.config.model.dim * VALUE_BYTES * crossing,
        gradient_bytes_per_target=lookups * problem.config.model.dim * VALUE_BYTES * crossing,
    )


def _cost(perf: Perf) -> Cost:
    return Cost(
        forward_compute=perf.fwd_compute,
        forward_comms=perf.fwd_comms,
        backward_compute=perf.bwd_compute,
        backward_comms=perf.bwd_comms,
        prefetch=perf.prefetch_compute,
    )
