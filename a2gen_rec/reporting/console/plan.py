"""A sharding plan as terminal tables: readable in 80 columns for any number of ranks."""

import shlex
from collections.abc import Callable, Sequence
from statistics import median

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from a2gen_rec.reporting import plan_summary as summary
from a2gen_rec.reporting.console.tables import new_table
from a2gen_rec.reporting.formatting import MISSING, format_bytes, format_count, format_ms, format_ratio, format_share
from a2gen_rec.sharding.report import Cost, Option, PlanReport, RankPlan, TablePlan

MAX_LISTED_RANKS = 16  # above, ranks are summarized
NUM_EXTREMES = 3
NOTABLE_IMBALANCE = 1.01  # ratio of fullest to emptiest or slowest to fastest rank from which ranks are named
MAX_OPTIONS = 4
FITS, DOES_NOT_FIT = "bold green", "bold red"


def print_plan(console: Console, report: PlanReport) -> None:
    """Print whether the tables fit, then the plan and its alternatives, or unplaced tables and suggested changes."""
    console.print(_verdict(report))
    planned = f"planned in {report.planning_s:.1f} s"
    if not report.fits:
        console.print(planned)
        console.print(Group(_unplaced_table(report), _remedies_table(report)))
        if not report.search_is_complete:
            console.print("the search for changes reached its limit of time: there may be more")
        return
    console.print(f"embedding tables: about {format_ms(report.cost.total)} ms per step on the slowest rank · {planned}")
    ranks = _ranks_table(report) if len(report.ranks) <= MAX_LISTED_RANKS else _rank_extremes_table(report)
    console.print(
        Group(
            _placement_table(report),
            _memory_table(report),
            _cost_table(report),
            _options_table(report),
            ranks,
            _traffic_table(report),
        )
    )


def print_sweep(console: Console, reports: Sequence[PlanReport]) -> None:
    """Print one line for each number of ranks: whether the tables fit, memory of the fullest rank, time and traffic."""
    kinds = summary.memory_kinds(*reports)
    table = new_table("other numbers of ranks", "memory: of the fullest rank; time and traffic: of a training step")
    memory = [header for kind in kinds for header in (kind.upper(), "used")]
    _add_columns(table, ["ranks", "hosts", "", *memory, "ms", "exchanged\nper target"], left=("",))
    for report in reports:
        cells = [cell for kind in kinds for cell in _fullest_rank_cells(report, kind)]
        fits = Text("fits" if report.fits else "does not fit", style=FITS if report.fits else DOES_NOT_FIT)
        counts = format_count(report.world_size), format_count(summary.num_hosts(report))
        table.add_row(*counts, fits, *cells, *_speed_cells(report))
    console.print(table)


def print_comparison(console: Console, a: PlanReport, b: PlanReport) -> None:
    """Print two plans side by side: their totals, then the placement and time of each table."""
    for letter, report in (("A", a), ("B", b)):
        console.print(Text.assemble(f"{letter}: ", _verdict(report)))
    table = new_table("side by side", "memory: of the fullest rank; time and traffic: of a training step")
    _add_columns(table, ["", "A", "B"], left=("",))
    for kind in summary.memory_kinds(a, b):
        table.add_row(kind.upper(), *(" · ".join(_fullest_rank_cells(report, kind)) for report in (a, b)))
    for name, index in (("ms", 0), ("exchanged per target", 1)):
        table.add_row(name, *(_speed_cells(report)[index] for report in (a, b)))
    table.add_row("time, max / mean rank", *(_time_imbalance(report) for report in (a, b)))
    tables = [table]
    if a.tables or b.tables:
        tables.append(_placements_table(a, b))
    console.print(Group(*tables))


def _verdict(report: PlanReport) -> Text:
    return Text(summary.verdict(report), style=FITS if report.fits else DOES_NOT_FIT)


def _placement_table(report: PlanReport) -> Table:
    table = new_table("placement of each table")
    left = ("table", "dtype", "sharding", "kernel")
    _add_columns(table, ["table", "rows", "dim", "dtype", "sharding", "kernel", "ranks"], left)
    for plan in report.tables:
        cells = [plan.dtype, plan.chosen.sharding, plan.chosen.kernel, format_count(plan.chosen.ranks)]
        table.add_row(Text(plan.name), format_count(plan.rows), str(plan.dim), *cells)
    return table


def _memory_table(report: PlanReport) -> Table:
    table = new_table("memory, sum over ranks", "buffers: ids and looked-up rows in flight, and cached rows")
    _add_columns(table, ["table", "weights", "optimizer", "buffers", "largest\nshard", "lookups per\nrank and step"])
    for plan in report.tables:
        sizes = [plan.weights, plan.optimizer, plan.buffers, max(shard.hbm + shard.ddr for shard in plan.shards)]
        table.add_row(Text(plan.name), *(format_bytes(size) for size in sizes), format_count(plan.lookups_per_batch))
    table.add_section()
    sums = [sum(getattr(plan, part) for plan in report.tables) for part in ("weights", "optimizer", "buffers")]
    lookups = format_count(sum(plan.lookups_per_batch for plan in report.tables))
    table.add_row("all", *(format_bytes(size) for size in sums), "", lookups)
    return table


def _cost_table(report: PlanReport) -> Table:
    table = new_table("estimated ms per step", "table: its slowest shard; slowest rank: all its shards")
    prefetch = any(plan.chosen.cost.prefetch for plan in report.tables)
    headers = ["forward\ncompute", "forward\ncomms", "backward\ncompute", "backward\ncomms", "total"]
    _add_columns(table, ["table", *(["prefetch"] if prefetch else []), *headers])
    for plan in report.tables:
        table.add_row(Text(plan.name), *_cost_cells(plan.chosen.cost, prefetch))
    table.add_section()
    table.add_row("slowest rank", *_cost_cells(report.cost, prefetch))
    return table


def _cost_cells(cost: Cost, prefetch: bool) -> list[str]:
    parts = [cost.forward_compute, cost.forward_comms, cost.backward_compute, cost.backward_comms, cost.total]
    return [format_ms(part) for part in ([cost.prefetch, *parts] if prefetch else parts)]


def _options_table(report: PlanReport) -> Table:
    table = new_table(
        "chosen options and their cheapest alternatives",
        "memory: largest shard; ms: slowest shard; too large: exceeds an empty rank",
    )
    kinds = summary.memory_kinds(report)
    headers = ["table", "sharding, kernel", "ranks", *(kind.upper() for kind in kinds), "ms", "ms / chosen"]
    _add_columns(table, headers, left=("table", "sharding, kernel"))
    for plan in report.tables:
        for index, option in enumerate(summary.alternatives(plan, MAX_OPTIONS)):
            chosen = option == plan.chosen
            table.add_row(
                Text("" if index else plan.name, style="not bold not dim"),
                f"{option.sharding}, {option.kernel}",
                format_count(option.ranks),
                *(format_bytes(getattr(option, kind)) for kind in kinds),
                format_ms(option.cost.total),
                "chosen" if chosen else _relative_cost(option, plan, report),
                style="bold" if chosen else "dim",
            )
        table.add_section()
    return table


def _relative_cost(option: Option, plan: TablePlan, report: PlanReport) -> str:
    if summary.is_too_large(option, report):
        return "too large"
    return format_ratio(option.cost.total, plan.chosen.cost.total)


def _ranks_table(report: PlanReport) -> Table:
    table = new_table("load of each rank", _imbalance_caption(report))
    kinds = summary.memory_kinds(report)
    _add_columns(table, ["rank", "host", *_memory_headers(kinds), "ms"])
    for rank in report.ranks:
        table.add_row(str(rank.rank), str(rank.host), *_rank_cells(rank, kinds))
    return table


def _rank_extremes_table(report: PlanReport) -> Table:
    """Return min, median and max over all ranks, then the fullest and the slowest ranks if ranks differ."""
    table = new_table(f"load of {len(report.ranks):,} ranks", _imbalance_caption(report))
    kinds = summary.memory_kinds(report)
    _add_columns(table, ["", *_memory_headers(kinds), "ms"])
    pick: Callable[..., float]
    for name, pick in (("min", min), ("median", median), ("max", max)):
        cells = []
        for kind in kinds:
            used, free = ([getattr(rank, field) for rank in report.ranks] for field in (kind, f"{kind}_free"))
            cells += [format_bytes(pick(used)), format_bytes(pick(free)), format_share(pick(used), pick(free))]
        table.add_row(name, *cells, format_ms(pick(summary.rank_times(report))))
    for name, key in (("fullest", summary.memory_fraction), ("slowest", lambda rank: rank.cost.total)):
        by_key = sorted(report.ranks, key=key, reverse=True)
        if key(by_key[0]) > NOTABLE_IMBALANCE * key(by_key[-1]):
            table.add_section()
            for rank in by_key[:NUM_EXTREMES]:
                table.add_row(f"{name}: rank {rank.rank}, host {rank.host}", *_rank_cells(rank, kinds))
    return table


def _memory_headers(kinds: Sequence[str]) -> list[str]:
    return [header for kind in kinds for header in (kind.upper(), "free", "used")]


def _rank_cells(rank: RankPlan, kinds: Sequence[str]) -> list[str]:
    cells = []
    for kind in kinds:
        used, free = getattr(rank, kind), getattr(rank, f"{kind}_free")
        cells += [format_bytes(used), format_bytes(free), format_share(used, free)]
    return [*cells, format_ms(rank.cost.total)]


def _imbalance_caption(report: PlanReport) -> str:
    parts = [
        f"{kind.upper()} {summary.imbalance([getattr(rank, kind) for rank in report.ranks]):.2f}"
        for kind in summary.memory_kinds(report)
    ]
    return f"max / mean: {', '.join([*parts, f'time {_time_imbalance(report)}'])}"


def _traffic_table(report: PlanReport) -> Table:
    traffic = report.traffic
    targets, impressions = format_count(traffic.targets), format_count(traffic.impressions)
    table = new_table(
        "traffic of a training step, per target impression",
        f"of one rank; its batch has {targets} targets among {impressions} impressions",
    )
    _add_columns(table, ["rows looked up", "exchanged", "ids", "rows, forward", "gradients, backward"], left=())
    sizes = [traffic.id_bytes_per_target, traffic.row_bytes_per_target, traffic.gradient_bytes_per_target]
    table.add_row(
        format_count(traffic.lookups_per_target),
        format_bytes(summary.bytes_exchanged(traffic)),
        *(format_bytes(size) for size in sizes),
    )
    return table


def _unplaced_table(report: PlanReport) -> Table:
    table = new_table("tables that do not fit", "per rank; free: next to the other tables")
    _add_columns(table, ["table", "memory", "required", "free", "missing"], left=("table", "memory"))
    for unplaced in [*report.unplaced, *summary.combined_unplaced(report.unplaced)]:
        sizes = [format_bytes(unplaced.required), format_bytes(unplaced.available), summary.missing_bytes(unplaced)]
        table.add_row(Text(unplaced.table), unplaced.memory.upper(), *sizes)
    return table


def _remedies_table(report: PlanReport) -> Table | Text:
    if not report.remedies:
        return Text("\nno change was found with which all tables fit")
    table = new_table("suggested changes", "each suggestion was verified by re-planning; ms per step after the change")
    _add_columns(table, ["change", "options", "ms"], left=("change", "options"))
    for remedy in report.remedies:
        options = shlex.join(remedy.settings).replace(" --", "\n--")
        table.add_row(Text(remedy.change), Text(options), format_ms(remedy.cost_ms))
    return table


def _fullest_rank_cells(report: PlanReport, kind: str) -> list[str]:
    if not report.ranks:
        return [MISSING, MISSING]
    rank = summary.fullest_rank(report, kind)
    used = getattr(rank, kind)
    return [format_bytes(used), format_share(used, getattr(rank, f"{kind}_free"))]


def _speed_cells(report: PlanReport) -> list[str]:
    if not report.fits:
        return [MISSING, MISSING]
    return [format_ms(report.cost.total), format_bytes(summary.bytes_exchanged(report.traffic))]


def _time_imbalance(report: PlanReport) -> str:
    return f"{summary.imbalance(summary.rank_times(report)):.2f}" if report.ranks else MISSING


def _placements_table(a: PlanReport, b: PlanReport) -> Table:
    table = new_table("placement and estimated ms per step of each table")
    _add_columns(table, ["table", "A", "ranks", "ms", "B", "ranks", "ms"], left=("table", "A", "B"))
    by_name = [{plan.name: plan for plan in report.tables} for report in (a, b)]
    for name in dict.fromkeys(name for plans in by_name for name in plans):
        cells = [cell for plans in by_name for cell in _placement_cells(plans.get(name))]
        table.add_row(Text(name), *cells)
    return table


def _placement_cells(plan: TablePlan | None) -> list[str]:
    if plan is None:
        return [MISSING] * 3
    return [
        f"{plan.chosen.sharding}, {plan.chosen.kernel}",
        format_count(plan.chosen.ranks),
        format_ms(plan.chosen.cost.total),
    ]


def _add_columns(table: Table, headers: Sequence[str], left: Sequence[str] = ("table", "rank", "")) -> None:
    """Add text columns, which may wrap, left-aligned, and number columns, which may not, right-aligned."""
    for header in headers:
        is_text = header in left
        table.add_column(header, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
