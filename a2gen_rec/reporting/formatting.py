"""Figures of a sharding plan as terminal and page both print them: sizes, counts, times, and what sums a plan up."""

import math
from collections.abc import Sequence

from a2gen_rec.sharding.report import Option, PlanReport, RankPlan, StepTraffic, TablePlan, UnplacedTable

UNITS = ("kB", "MB", "GB", "TB", "PB")


def format_bytes(number: float) -> str:
    """Bytes in powers of 1000, as topologies state memory, to three digits: 1.50 GB."""
    if number < 999.5:
        return f"{number:.0f} B" if number else "0"
    power = min(max(1, math.ceil(math.log(number / 999.5, 1000))), len(UNITS))
    return f"{_three_digits(number / 1000**power)} {UNITS[power - 1]}"


def format_count(number: float) -> str:
    """A count: in full under a million, then three digits: 12,345, 1.5 million, 10 billion."""
    for power, word in ((9, "billion"), (6, "million")):
        if number >= 0.9995 * 10**power:
            return f"{number / 10**power:,.3g} {word}"
    return f"{number:,.0f}" if number >= 99.5 else f"{number:.3g}"


def format_ms(milliseconds: float) -> str:
    """Milliseconds to three digits, without their unit."""
    if milliseconds < 0.9995:
        return "0" if not milliseconds else "<0.001" if milliseconds < 0.0005 else f"{milliseconds:.3f}"
    return _three_digits(milliseconds)


def _three_digits(number: float) -> str:
    return f"{number:.2f}" if number < 9.995 else f"{number:.1f}" if number < 99.95 else f"{number:,.0f}"


def format_share(used: float, free: float) -> str:
    """Used of free, in percent; a dash where nothing is free."""
    return f"{used / free:.0%}" if free else "–"


def missing_bytes(misfit: UnplacedTable) -> str:
    """Bytes by which a table is too large; a dash where it would fit without the others."""
    return format_bytes(misfit.needs - misfit.available) if misfit.needs > misfit.available else "–"


def join_misfits(misfits: Sequence[UnplacedTable]) -> list[UnplacedTable]:
    """Several tables short of the same memory as one, for each alone may fit; empty otherwise."""
    if len(misfits) < 2 or len({misfit.memory for misfit in misfits}) > 1:
        return []
    needs = sum(misfit.needs for misfit in misfits)
    return [UnplacedTable("together", needs, misfits[0].available, misfits[0].memory)]


def format_ratio(number: float, to: float) -> str:
    """How many times ``to``; a dash where that is 0."""
    return _three_digits(number / to) if to else "–"


def plural(number: int, noun: str) -> str:
    """1 rank, 2 ranks."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def hosts(report: PlanReport) -> int:
    """Hosts of the cluster."""
    return -(-report.world // report.ranks_per_host)


def verdict(report: PlanReport) -> str:
    """Whether the tables fit, and on what, in one line."""
    cluster = f"{plural(report.world, 'rank')} on {plural(hosts(report), 'host')}, {report.device}"
    return f"{'fits' if report.fits else 'does not fit'} on {report.cluster}: {cluster}"


def memory_kinds(*reports: PlanReport) -> list[str]:
    """Fields of a rank's memory that tables take, ``hbm``, ``ddr`` or both; the devices' own if no table is placed."""
    ranks = [rank for report in reports for rank in report.ranks]
    used = [kind for kind in ("hbm", "ddr") if any(getattr(rank, kind) for rank in ranks)]
    return used or ["hbm" if any(report.device == "cuda" for report in reports) else "ddr"]


def memory_fraction(rank: RankPlan) -> float:
    """Share of a rank's memory that its tables take, of that kind which is fuller."""
    return max(rank.hbm / max(rank.hbm_free, 1), rank.ddr / max(rank.ddr_free, 1))


def fullest(report: PlanReport, kind: str) -> RankPlan:
    """The rank whose tables take most of one kind of memory."""
    return max(report.ranks, key=lambda rank: getattr(rank, kind))


def rank_times(report: PlanReport) -> list[float]:
    """Estimated milliseconds per step of each rank."""
    return [rank.cost.total for rank in report.ranks]


def imbalance(values: Sequence[float]) -> float:
    """The largest over the mean: 1 where all are equal, or nothing is there at all."""
    total = sum(values)
    return max(values) * len(values) / total if total else 1.0


def bytes_exchanged(traffic: StepTraffic) -> float:
    """Bytes per target impression that cross between ranks in a step, both passes."""
    return traffic.id_bytes_per_target + traffic.row_bytes_per_target + traffic.gradient_bytes_per_target


def alternatives(table: TablePlan, most: int) -> list[Option]:
    """The cheapest ``most`` options of a table in order of cost, the chosen one always among them."""
    others = [option for option in table.options if option != table.chosen]
    return sorted([table.chosen, *others[: most - 1]], key=lambda option: option.cost.total)


def is_too_large(option: Option, report: PlanReport) -> bool:
    """Whether the option's largest shard is larger than any rank's whole memory for tables."""
    return bool(report.ranks) and (
        option.hbm > max(rank.hbm_free for rank in report.ranks)
        or option.ddr > max(rank.ddr_free for rank in report.ranks)
    )
