"""Figures of a sharding plan that the terminal and the page both show."""

from collections.abc import Sequence

from a2gen_rec.reporting.formatting import MISSING, format_bytes, plural
from a2gen_rec.sharding.report import Option, PlanReport, RankPlan, StepTraffic, TablePlan, UnplacedTable


def verdict(report: PlanReport) -> str:
    """Return in one line whether the tables fit, and the cluster."""
    cluster = f"{plural(report.world_size, 'rank')} on {plural(num_hosts(report), 'host')}, {report.device}"
    return f"{'fits' if report.fits else 'does not fit'} on {report.cluster}: {cluster}"


def num_hosts(report: PlanReport) -> int:
    """Return the number of hosts of the cluster."""
    return -(-report.world_size // report.ranks_per_host)


def memory_kinds(*reports: PlanReport) -> list[str]:
    """Return the kinds of memory that tables use: ``hbm``, ``ddr`` or both; the device's kind if no table is placed."""
    ranks = [rank for report in reports for rank in report.ranks]
    used = [kind for kind in ("hbm", "ddr") if any(getattr(rank, kind) for rank in ranks)]
    return used or ["hbm" if any(report.device == "cuda" for report in reports) else "ddr"]


def memory_fraction(rank: RankPlan) -> float:
    """Return the used share of a rank's memory, of the kind that is fuller."""
    return max(rank.hbm / max(rank.hbm_free, 1), rank.ddr / max(rank.ddr_free, 1))


def fullest_rank(report: PlanReport, kind: str) -> RankPlan:
    """Return the rank whose tables use most of one kind of memory."""
    return max(report.ranks, key=lambda rank: getattr(rank, kind))


def rank_times(report: PlanReport) -> list[float]:
    """Return the estimated milliseconds per step of each rank."""
    return [rank.cost.total for rank in report.ranks]


def imbalance(values: Sequence[float]) -> float:
    """Return maximum over mean; 1 if all values are equal or 0."""
    total = sum(values)
    return max(values) * len(values) / total if total else 1.0


def bytes_exchanged(traffic: StepTraffic) -> float:
    """Return the bytes per target impression that cross between ranks in a step, forward and backward."""
    return traffic.id_bytes_per_target + traffic.row_bytes_per_target + traffic.gradient_bytes_per_target


def alternatives(table: TablePlan, max_options: int) -> list[Option]:
    """Return the ``max_options`` cheapest options of a table by cost; the chosen one is always included."""
    others = [option for option in table.options if option != table.chosen]
    return sorted([table.chosen, *others[: max_options - 1]], key=lambda option: option.cost.total)


def is_too_large(option: Option, report: PlanReport) -> bool:
    """Return whether the option's largest shard exceeds the memory for tables of every empty rank."""
    return bool(report.ranks) and (
        option.hbm > max(rank.hbm_free for rank in report.ranks)
        or option.ddr > max(rank.ddr_free for rank in report.ranks)
    )


def missing_bytes(table: UnplacedTable) -> str:
    """Return the formatted bytes by which a table is too large; a dash if it would fit without the others."""
    return format_bytes(table.required - table.available) if table.required > table.available else MISSING


def combined_unplaced(tables: Sequence[UnplacedTable]) -> list[UnplacedTable]:
    """Return tables that lack the same kind of memory as one sum, because each alone may fit; else nothing."""
    if len(tables) < 2 or len({table.memory for table in tables}) > 1:
        return []
    needs = sum(table.required for table in tables)
    return [UnplacedTable("together", needs, tables[0].available, tables[0].memory)]
