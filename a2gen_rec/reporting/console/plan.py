"""A sharding plan as tables for the terminal: readable in 80 columns, however many ranks there are."""

import shlex
from collections.abc import Callable, Sequence
from statistics import median

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from a2gen_rec.reporting import formatting as figures
from a2gen_rec.reporting.console.evaluation import MISSING, new_table
from a2gen_rec.reporting.formatting import format_bytes, format_count, format_ms, format_share
from a2gen_rec.sharding.report import Cost, Option, PlanReport, RankPlan, TablePlan

RANKS_IN_FULL = 16
EXTREMES = 3
NOTABLE_IMBALANCE = 1.01  # times as full or as slow as the least; ranks that differ less are not worth naming
OPTIONS = 4
FITS, DOES_NOT_FIT = "bold green", "bold red"


def print_plan(console: Console, report: PlanReport) -> None:
    """Print whether the tables fit, then where they live and why, or what is in the way and what would help."""
    console.print(_verdict(report))
    planned = f"planned in {report.planning_s:.1f} s"
    if not report.fits:
        console.print(planned)
        console.print(Group(_misfits(report), _remedies(report)))
        return
    console.print(f"embedding tables: about {format_ms(report.cost.total)} ms per step on the slowest rank · {planned}")
    ranks = _every_rank(report) if len(report.ranks) <= RANKS_IN_FULL else _rank_extremes(report)
    console.print(Group(_placement(report), _memory(report), _cost(report), _options(report), ranks, _traffic(report)))


def print_sweep(console: Console, reports: Sequence[PlanReport]) -> None:
    """Print a line for each number of ranks: whether the tables fit, the fullest rank's memory, time and traffic."""
    kinds = figures.memory_kinds(*reports)
    table = new_table("on other numbers of ranks", "memory: of the fullest rank; time and traffic: of a training step")
    memory = [header for kind in kinds for header in (kind.upper(), "used")]
    _columns(table, ["ranks", "hosts", "", *memory, "ms", "exchanged\nper target"], left=("",))
    for report in reports:
        cells = [cell for kind in kinds for cell in _fullest(report, kind)]
        fits = Text("fits" if report.fits else "does not fit", style=FITS if report.fits else DOES_NOT_FIT)
        table.add_row(format_count(report.world), format_count(figures.hosts(report)), fits, *cells, *_speed(report))
    console.print(table)


def print_comparison(console: Console, a: PlanReport, b: PlanReport) -> None:
    """Print two plans side by side: what sums them up, then each table's place and time."""
    for letter, report in (("A", a), ("B", b)):
        console.print(Text.assemble(f"{letter}: ", _verdict(report)))
    table = new_table("side by side", "memory: of the fullest rank; time and traffic: of a training step")
    _columns(table, ["", "A", "B"], left=("",))
    for kind in figures.memory_kinds(a, b):
        table.add_row(kind.upper(), *(" · ".join(_fullest(report, kind)) for report in (a, b)))
    for name, index in (("ms", 0), ("exchanged per target", 1)):
        table.add_row(name, *(_speed(report)[index] for report in (a, b)))
    table.add_row("time, most over mean rank", *(_uneven(report) for report in (a, b)))
    tables = [table]
    if a.tables or b.tables:
        tables.append(_places(a, b))
    console.print(Group(*tables))


def _verdict(report: PlanReport) -> Text:
    return Text(figures.verdict(report), style=FITS if report.fits else DOES_NOT_FIT)


def _placement(report: PlanReport) -> Table:
    table = new_table("where each table lives")
    left = ("table", "dtype", "sharding", "kernel")
    _columns(table, ["table", "rows", "dim", "dtype", "sharding", "kernel", "ranks"], left)
    for plan in report.tables:
        where = [plan.dtype, plan.chosen.sharding, plan.chosen.kernel, format_count(plan.chosen.ranks)]
        table.add_row(Text(plan.name), format_count(plan.rows), str(plan.dim), *where)
    return table


def _memory(report: PlanReport) -> Table:
    table = new_table(
        "memory of all ranks together", "buffers: ids and looked-up rows in flight, rows cached on the device"
    )
    _columns(table, ["table", "weights", "optimizer", "buffers", "largest\nshard", "lookups by a\nrank per step"])
    for plan in report.tables:
        bytes_ = [plan.weights, plan.optimizer, plan.buffers, max(shard.hbm + shard.ddr for shard in plan.shards)]
        table.add_row(Text(plan.name), *(format_bytes(part) for part in bytes_), format_count(plan.lookups_per_batch))
    table.add_section()
    sums = [sum(getattr(plan, part) for plan in report.tables) for part in ("weights", "optimizer", "buffers")]
    table.add_row(
        "all",
        *(format_bytes(part) for part in sums),
        "",
        format_count(sum(plan.lookups_per_batch for plan in report.tables)),
    )
    return table


def _cost(report: PlanReport) -> Table:
    table = new_table("estimated ms per step", "of a table: its slowest shard; of the slowest rank: all its shards")
    prefetch = any(plan.chosen.cost.prefetch for plan in report.tables)
    headers = ["forward\ncompute", "forward\ncomms", "backward\ncompute", "backward\ncomms", "total"]
    _columns(table, ["table", *(["prefetch"] if prefetch else []), *headers])
    for plan in report.tables:
        table.add_row(Text(plan.name), *_parts(plan.chosen.cost, prefetch))
    table.add_section()
    table.add_row("slowest rank", *_parts(report.cost, prefetch))
    return table


def _parts(cost: Cost, prefetch: bool) -> list[str]:
    parts = [cost.forward_compute, cost.forward_comms, cost.backward_compute, cost.backward_comms, cost.total]
    return [format_ms(part) for part in ([cost.prefetch, *parts] if prefetch else parts)]


def _options(report: PlanReport) -> Table:
    table = new_table(
        "why: each choice beside the cheapest alternatives",
        "memory and ms: of the largest and the slowest shard; too large: for an empty rank",
    )
    kinds = figures.memory_kinds(report)
    headers = ["table", "sharding, kernel", "ranks", *(kind.upper() for kind in kinds), "ms", "ms / choice's"]
    _columns(table, headers, left=("table", "sharding, kernel"))
    for plan in report.tables:
        for place, option in enumerate(figures.alternatives(plan, OPTIONS)):
            chosen = option == plan.chosen
            table.add_row(
                Text("" if place else plan.name, style="not bold not dim"),
                f"{option.sharding}, {option.kernel}",
                format_count(option.ranks),
                *(format_bytes(getattr(option, kind)) for kind in kinds),
                format_ms(option.cost.total),
                "chosen" if chosen else _against_choice(option, plan, report),
                style="bold" if chosen else "dim",
            )
        table.add_section()
    return table


def _against_choice(option: Option, plan: TablePlan, report: PlanReport) -> str:
    if figures.is_too_large(option, report):
        return "too large"
    return figures.format_ratio(option.cost.total, plan.chosen.cost.total)


def _every_rank(report: PlanReport) -> Table:
    table = new_table("each rank's share", _imbalance(report))
    kinds = figures.memory_kinds(report)
    _columns(table, ["rank", "host", *_memory_headers(kinds), "ms"])
    for rank in report.ranks:
        table.add_row(str(rank.rank), str(rank.host), *_rank(rank, kinds))
    return table


def _rank_extremes(report: PlanReport) -> Table:
    """Least, median and most over all ranks, then the fullest and the slowest ranks where ranks differ."""
    table = new_table(f"the shares of {len(report.ranks):,} ranks", _imbalance(report))
    kinds = figures.memory_kinds(report)
    _columns(table, ["", *_memory_headers(kinds), "ms"])
    pick: Callable[..., float]
    for name, pick in (("least", min), ("median", median), ("most", max)):
        cells = []
        for kind in kinds:
            used, free = ([getattr(rank, field) for rank in report.ranks] for field in (kind, f"{kind}_free"))
            cells += [format_bytes(pick(used)), format_bytes(pick(free)), format_share(pick(used), pick(free))]
        table.add_row(name, *cells, format_ms(pick(figures.rank_times(report))))
    for name, key in (("fullest", figures.memory_fraction), ("slowest", lambda rank: rank.cost.total)):
        by_key = sorted(report.ranks, key=key, reverse=True)
        if key(by_key[0]) > NOTABLE_IMBALANCE * key(by_key[-1]):
            table.add_section()
            for rank in by_key[:EXTREMES]:
                table.add_row(f"{name}: rank {rank.rank}, host {rank.host}", *_rank(rank, kinds))
    return table


def _memory_headers(kinds: Sequence[str]) -> list[str]:
    return [header for kind in kinds for header in (kind.upper(), "free", "used")]


def _rank(rank: RankPlan, kinds: Sequence[str]) -> list[str]:
    cells = []
    for kind in kinds:
        used, free = getattr(rank, kind), getattr(rank, f"{kind}_free")
        cells += [format_bytes(used), format_bytes(free), format_share(used, free)]
    return [*cells, format_ms(rank.cost.total)]


def _imbalance(report: PlanReport) -> str:
    of = [
        f"{kind.upper()} {figures.imbalance([getattr(rank, kind) for rank in report.ranks]):.2f}"
        for kind in figures.memory_kinds(report)
    ]
    return f"imbalance, most over mean: {', '.join([*of, f'time {_uneven(report)}'])}"


def _traffic(report: PlanReport) -> Table:
    traffic = report.traffic
    table = new_table(
        "traffic of a training step, per target impression",
        f"of one rank: {format_count(traffic.targets)} targets among {format_count(traffic.impressions)} impressions in a batch",
    )
    _columns(table, ["rows looked up", "exchanged", "of it: ids", "rows, forward", "gradients, backward"], left=())
    bytes_ = [traffic.id_bytes_per_target, traffic.row_bytes_per_target, traffic.gradient_bytes_per_target]
    table.add_row(
        format_count(traffic.lookups_per_target),
        format_bytes(figures.bytes_exchanged(traffic)),
        *(format_bytes(part) for part in bytes_),
    )
    return table


def _misfits(report: PlanReport) -> Table:
    table = new_table("no place for", "on a rank: bytes needed at the least, and free beside the other tables")
    _columns(table, ["table", "memory", "needs", "free", "lacks"], left=("table", "memory"))
    for misfit in [*report.misfits, *figures.join_misfits(report.misfits)]:
        bytes_ = [format_bytes(misfit.needs), format_bytes(misfit.available), figures.missing_bytes(misfit)]
        table.add_row(Text(misfit.table), misfit.memory.upper(), *bytes_)
    return table


def _remedies(report: PlanReport) -> Table | Text:
    if not report.remedies:
        return Text("\nno change was found with which everything fits")
    table = new_table("what would make it fit", "each planned again with the options beside it; ms per step after it")
    _columns(table, ["change", "options", "ms"], left=("change", "options"))
    for remedy in report.remedies:
        options = shlex.join(remedy.settings).replace(" --", "\n--")
        table.add_row(Text(remedy.change), Text(options), format_ms(remedy.cost_ms))
    return table


def _fullest(report: PlanReport, kind: str) -> list[str]:
    if not report.ranks:
        return [MISSING, MISSING]
    rank = figures.fullest(report, kind)
    used = getattr(rank, kind)
    return [format_bytes(used), format_share(used, getattr(rank, f"{kind}_free"))]


def _speed(report: PlanReport) -> list[str]:
    if not report.fits:
        return [MISSING, MISSING]
    return [format_ms(report.cost.total), format_bytes(figures.bytes_exchanged(report.traffic))]


def _uneven(report: PlanReport) -> str:
    return f"{figures.imbalance(figures.rank_times(report)):.2f}" if report.ranks else MISSING


def _places(a: PlanReport, b: PlanReport) -> Table:
    table = new_table("each table's place and estimated ms per step")
    _columns(table, ["table", "A", "ranks", "ms", "B", "ranks", "ms"], left=("table", "A", "B"))
    placed = [{plan.name: plan for plan in report.tables} for report in (a, b)]
    for name in dict.fromkeys(name for plans in placed for name in plans):
        cells = [cell for plans in placed for cell in _place(plans.get(name))]
        table.add_row(Text(name), *cells)
    return table


def _place(plan: TablePlan | None) -> list[str]:
    if plan is None:
        return [MISSING] * 3
    return [
        f"{plan.chosen.sharding}, {plan.chosen.kernel}",
        format_count(plan.chosen.ranks),
        format_ms(plan.chosen.cost.total),
    ]


def _columns(table: Table, headers: Sequence[str], left: Sequence[str] = ("table", "rank", "")) -> None:
    """Columns of words, which may wrap, to the left; numbers, which may not, to the right."""
    for header in headers:
        words = header in left
        table.add_column(header, justify="left" if words else "right", no_wrap=not words, overflow="fold")
